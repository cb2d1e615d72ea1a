//! `config.json` and `generation_config.json` to [`ModelConfig`].

use std::collections::BTreeSet;

use serde_json::Value;

use super::fields::{Fields, object};
use super::{
    Architecture, AttentionKind, GenerationDefaults, LayerConfig, MOST_POSITIONS, MlpKind,
    ModelConfig, rope,
};
use crate::error::ConfigError;

/// Name of the model's own configuration file.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the file with sampling defaults.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

// Limits far above any published model, low enough that no product of two or three of them overflows.
const MOST_HIDDEN: usize = 1 << 18;
const MOST_FFN: usize = 1 << 22;
const MOST_VOCAB: usize = 1 << 24;
const MOST_LAYERS: usize = 4096;
const MOST_HEADS: usize = 4096;
const MOST_HEAD_DIM: usize = 4096;

/// Head width that `Qwen3Config` of transformers falls back to; it is not `hidden_size / heads`.
const QWEN3_HEAD_DIM: usize = 128;

impl ModelConfig {
    /// Reads the text of `config.json` and, when there is one, of `generation_config.json`.
    ///
    /// Both the older spelling (`rope_theta`, `rope_scaling`) and that of 2026 (`rope_parameters`,
    /// `layer_types`) are read. Defaults are those of `Qwen2Config` and `Qwen3Config` in transformers,
    /// except that sizes must be present.
    ///
    /// # Errors
    /// [`ConfigError`], with the field's name: absent sizes, absurd numbers, heads that do not divide, and
    /// by name whatever exists in the family but is not served.
    pub fn parse(config: &str, generation: Option<&str>) -> Result<Self, ConfigError> {
        let map = object(CONFIG_FILE, config)?;
        let fields = Fields::new(CONFIG_FILE, &map);
        let generation_map = generation
            .map(|text| object(GENERATION_CONFIG_FILE, text))
            .transpose()?;
        let generation = generation_map
            .as_ref()
            .map(|map| Fields::new(GENERATION_CONFIG_FILE, map));

        let architecture = architecture(&fields)?;
        refuse_unserved(&fields)?;
        let layer_count = fields.required_size("num_hidden_layers", MOST_LAYERS)?;
        check_layer_types(&fields, layer_count)?;
        let hidden_size = fields.required_size("hidden_size", MOST_HIDDEN)?;
        let max_position_embeddings =
            fields.required_size("max_position_embeddings", MOST_POSITIONS)?;
        let attention = attention(&fields, architecture, hidden_size)?;
        let AttentionKind::Full { head_dim, .. } = attention;
        let mlp = MlpKind::Dense {
            intermediate_size: fields.required_size("intermediate_size", MOST_FFN)?,
        };
        let mut eos_token_ids = eos(&fields)?;
        if let Some(generation) = &generation {
            eos_token_ids.extend(eos(generation)?);
        }
        Ok(Self {
            architecture,
            hidden_size,
            vocab_size: fields.required_size("vocab_size", MOST_VOCAB)?,
            max_position_embeddings,
            rms_norm_eps: fields.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            rope: rope::parse(&fields, head_dim, max_position_embeddings)?,
            layers: vec![LayerConfig { attention, mlp }; layer_count],
            eos_token_ids: eos_token_ids.into_iter().collect(),
            generation: generation
                .as_ref()
                .map(defaults)
                .transpose()?
                .unwrap_or_default(),
        })
    }
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ConfigError> {
    const SERVED: &str = "Qwen2ForCausalLM (Qwen1.5, Qwen2, Qwen2.5, QwQ, Coder) and Qwen3ForCausalLM (dense Qwen3) are served";
    let names = fields
        .list("architectures")?
        .ok_or_else(|| fields.missing("architectures"))?;
    let [name] = names else {
        let found = Value::Array(names.to_vec());
        return Err(fields.unsupported("architectures", &found, SERVED));
    };
    match name.as_str() {
        Some("Qwen2ForCausalLM") => Ok(Architecture::Qwen2),
        Some("Qwen3ForCausalLM") => Ok(Architecture::Qwen3),
        _ => Err(fields.unsupported("architectures", name, SERVED)),
    }
}

fn refuse_unserved(fields: &Fields<'_>) -> Result<(), ConfigError> {
    if fields.boolean("use_sliding_window")? == Some(true) {
        let remedy = "only attention over the whole context is; \
                      set it to false if the model was not trained with a window";
        return Err(fields.unsupported("use_sliding_window", &Value::Bool(true), remedy));
    }
    if let Some(act) = fields.text("hidden_act")?
        && act != "silu"
    {
        return Err(fields.unsupported("hidden_act", &Value::from(act), "silu is"));
    }
    Ok(())
}

fn check_layer_types(fields: &Fields<'_>, layers: usize) -> Result<(), ConfigError> {
    let Some(types) = fields.list("layer_types")? else {
        return Ok(());
    };
    if types.len() != layers {
        let found = Value::from(format!("a list of {}", types.len()));
        let expected = format!("one entry for each of the {layers} of num_hidden_layers");
        return Err(fields.invalid("layer_types", &found, expected));
    }
    match types
        .iter()
        .position(|kind| kind.as_str() != Some("full_attention"))
    {
        None => Ok(()),
        Some(layer) => {
            let field = format!("layer_types[{layer}]");
            Err(fields.unsupported(&field, &types[layer], "full_attention is"))
        }
    }
}

fn attention(
    fields: &Fields<'_>,
    architecture: Architecture,
    hidden_size: usize,
) -> Result<AttentionKind, ConfigError> {
    let not_divisible = |left: &str, left_value: usize, right: &str, right_value: usize| {
        ConfigError::NotDivisible {
            file: fields.file().to_owned(),
            left: left.to_owned(),
            left_value: left_value as u64,
            right: right.to_owned(),
            right_value: right_value as u64,
        }
    };
    let query_heads = fields.required_size("num_attention_heads", MOST_HEADS)?;
    let kv_heads = fields
        .size("num_key_value_heads", MOST_HEADS)?
        .unwrap_or(query_heads);
    if !query_heads.is_multiple_of(kv_heads) {
        return Err(not_divisible(
            "num_attention_heads",
            query_heads,
            "num_key_value_heads",
            kv_heads,
        ));
    }
    let head_dim = match fields.size("head_dim", MOST_HEAD_DIM)? {
        Some(explicit) => explicit,
        None if architecture == Architecture::Qwen3 && !fields.map().contains_key("head_dim") => {
            QWEN3_HEAD_DIM
        }
        None if hidden_size.is_multiple_of(query_heads) => hidden_size / query_heads,
        None => {
            return Err(not_divisible(
                "hidden_size",
                hidden_size,
                "num_attention_heads",
                query_heads,
            ));
        }
    };
    if head_dim == 0 || head_dim % 2 == 1 {
        let expected = "an even number: rotary embeddings turn channels in pairs";
        return Err(fields.invalid("head_dim", &Value::from(head_dim), expected));
    }
    // Qwen2 has its biases in code, whatever `attention_bias` says; Qwen3 follows the field.
    let bias = fields.boolean("attention_bias")?.unwrap_or(false);
    let (qkv_bias, output_bias, qk_norm) = match architecture {
        Architecture::Qwen2 => (true, false, false),
        Architecture::Qwen3 => (bias, bias, true),
    };
    Ok(AttentionKind::Full {
        query_heads,
        kv_heads,
        head_dim,
        qkv_bias,
        output_bias,
        qk_norm,
    })
}

/// `eos_token_id`: a number, a list of numbers, or nothing.
fn eos(fields: &Fields<'_>) -> Result<BTreeSet<u32>, ConfigError> {
    const FIELD: &str = "eos_token_id";
    let Some(value) = fields.get(FIELD) else {
        return Ok(BTreeSet::new());
    };
    let ids: &[Value] = match value {
        Value::Array(items) => items,
        single => std::slice::from_ref(single),
    };
    ids.iter()
        .map(|id| {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| fields.invalid(FIELD, value, "a token id or a list of token ids"))
        })
        .collect()
}

fn defaults(fields: &Fields<'_>) -> Result<GenerationDefaults, ConfigError> {
    let number = |field: &str, most: f64| -> Result<Option<f32>, ConfigError> {
        Ok(fields.number(field, 0.0..=most)?.map(|value| value as f32))
    };
    Ok(GenerationDefaults {
        do_sample: fields.boolean("do_sample")?,
        temperature: number("temperature", 1e4)?,
        top_k: fields
            .integer("top_k", 0..=i64::from(u32::MAX))?
            .and_then(|k| u32::try_from(k).ok()),
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 1.0)?,
        typical_p: number("typical_p", 1.0)?,
        repetition_penalty: number("repetition_penalty", 1e4)?,
    })
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
