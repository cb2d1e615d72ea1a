//! Random checkpoints of any shape, written straight to disk: for tests, and for benchmarks of models that
//! are not at hand.
//!
//! Everything is a function of the description and its seed. Weights have a spread of about 1 / sqrt(K), so
//! that activations stay finite however deep the model is. There is no tokenizer: such a model speaks token
//! ids only.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::{Architecture, CONFIG_FILE, GENERATION_CONFIG_FILE, ModelConfig};
use crate::gptq::QuantConfig;
use crate::modules::{DType, modules};
use crate::plan::ModelShape;

mod random;
mod write;

/// Quantisation of a [`SyntheticModel`].
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticQuant {
    /// 2, 3, 4 or 8.
    pub bits: u8,
    /// 32, 64, 128, or `None` for one group over all rows.
    pub group_size: Option<usize>,
    /// Symmetric.
    pub sym: bool,
    /// Rows belong to groups in a random order.
    pub desc_act: bool,
    /// `gptq` or `gptq_v2`.
    pub checkpoint_format: String,
    /// The field `dynamic`.
    pub dynamic: Option<Value>,
    /// `lm_head` is quantised too; not with tied embeddings.
    pub lm_head: bool,
}

impl Default for SyntheticQuant {
    /// What the official Qwen checkpoints have: int4, groups of 128, symmetric, in order.
    fn default() -> Self {
        Self {
            bits: 4,
            group_size: Some(128),
            sym: true,
            desc_act: false,
            checkpoint_format: "gptq".to_owned(),
            dynamic: None,
            lm_head: false,
        }
    }
}

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticModel {
    /// Decoder family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between gate/up and down.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// `attention_bias`; Qwen3 only.
    pub attention_bias: bool,
    /// Fields of `rope_scaling`, such as `{"rope_type": "yarn", "factor": 4.0}`.
    pub rope_scaling: Option<Value>,
    /// Type of embeddings, norms, biases and unquantised linears; scales are F16 whatever it is.
    pub float: DType,
    /// `None` leaves every linear unquantised.
    pub quant: Option<SyntheticQuant>,
    /// Begin a new file, with an index, before one grows past this many bytes; `None` is one file.
    pub shard_bytes: Option<u64>,
    /// Seed of every random number.
    pub seed: u64,
}

impl SyntheticModel {
    /// A model that opens in milliseconds: 2 layers, hidden 64, 4 query and 2 KV heads of 16, int4 groups of 32.
    pub fn tiny(architecture: Architecture, seed: u64) -> Self {
        Self {
            architecture,
            hidden_size: 64,
            intermediate_size: 160,
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab_size: 128,
            max_position_embeddings: 512,
            tie_word_embeddings: false,
            attention_bias: false,
            rope_scaling: None,
            float: DType::F16,
            quant: Some(SyntheticQuant {
                group_size: Some(32),
                ..SyntheticQuant::default()
            }),
            shard_bytes: None,
            seed,
        }
    }

    /// The shape of a published Qwen2.5 GPTQ-Int4 checkpoint by its size: `0.5b`, `1.5b`, `3b`, `7b`, `14b`,
    /// `32b` or `72b`.
    pub fn qwen2_5(size: &str) -> Option<Self> {
        // hidden, intermediate, layers, query heads, KV heads, head_dim, vocabulary, tied
        let (
            hidden_size,
            intermediate_size,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            vocab_size,
            tied,
        ) = match size {
            "0.5b" => (896, 4864, 24, 14, 2, 64, 151_936, true),
            "1.5b" => (1536, 8960, 28, 12, 2, 128, 151_936, true),
            "3b" => (2048, 11_008, 36, 16, 2, 128, 151_936, true),
            "7b" => (3584, 18_944, 28, 28, 4, 128, 152_064, false),
            "14b" => (5120, 13_824, 48, 40, 8, 128, 152_064, false),
            "32b" => (5120, 27_648, 64, 40, 8, 128, 152_064, false),
            "72b" => (8192, 29_696, 80, 64, 8, 128, 152_064, false),
            _ => return None,
        };
        Some(Self {
            hidden_size,
            intermediate_size,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            vocab_size,
            max_position_embeddings: 32_768,
            tie_word_embeddings: tied,
            quant: Some(SyntheticQuant::default()),
            shard_bytes: Some(4 << 30),
            ..Self::tiny(Architecture::Qwen2, 0)
        })
    }

    /// Text of its `config.json`, quantisation block included.
    pub fn config_json(&self) -> String {
        let (name, model_type) = match self.architecture {
            Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        };
        let dtype = match self.float {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        };
        let mut config = json!({
            "architectures": [name],
            "attention_bias": self.attention_bias,
            "eos_token_id": self.vocab_size.saturating_sub(1),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": model_type,
            "num_attention_heads": self.query_heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": self.rope_scaling,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        });
        if let Some(quant) = &self.quant {
            config["quantization_config"] = json!({
                "bits": quant.bits,
                "checkpoint_format": quant.checkpoint_format,
                "desc_act": quant.desc_act,
                "dynamic": quant.dynamic,
                "group_size": quant.group_size.map_or(-1, |group| group as i64),
                "lm_head": quant.lm_head,
                "pack_dtype": "int32",
                "quant_method": "gptq",
                "sym": quant.sym,
            });
        }
        config.to_string()
    }

    /// The shape that its files would have, without writing any.
    ///
    /// # Errors
    /// As [`SyntheticModel::write`] for the description.
    pub fn shape(&self) -> io::Result<ModelShape> {
        let invalid = |error: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
        };
        let text = self.config_json();
        let config = ModelConfig::parse(&text, None).map_err(|error| invalid(&error))?;
        let quant = QuantConfig::parse(&text, None).map_err(|error| invalid(&error))?;
        let tensors =
            write::tensors(self, &config, quant.as_ref()).map_err(|error| invalid(&error))?;
        let present = tensors.iter().map(write::Tensor::info).collect();
        let list = modules(&config, quant.as_ref(), &present).map_err(|error| invalid(&error))?;
        Ok(ModelShape::new(config, &list))
    }

    /// Writes `config.json`, `generation_config.json` and the weights into `folder`, which is made when it
    /// does not exist. Memory use does not grow with the model; files that lie there are overwritten.
    ///
    /// # Errors
    /// `InvalidInput` for a description that [`ModelConfig`] or [`QuantConfig`] refuses, else what the
    /// operating system says.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let invalid = |error: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
        };
        let text = self.config_json();
        let config = ModelConfig::parse(&text, None).map_err(|error| invalid(&error))?;
        let quant = QuantConfig::parse(&text, None).map_err(|error| invalid(&error))?;
        let tensors =
            write::tensors(self, &config, quant.as_ref()).map_err(|error| invalid(&error))?;
        fs::create_dir_all(folder)?;
        fs::write(folder.join(CONFIG_FILE), text)?;
        let generation = Value::Object(Map::from_iter([(
            "do_sample".to_owned(),
            Value::Bool(false),
        )]));
        fs::write(folder.join(GENERATION_CONFIG_FILE), generation.to_string())?;
        write::weights(folder, &tensors, self.shard_bytes, self.seed)
    }
}

#[cfg(test)]
#[path = "synthetic/tests.rs"]
mod tests;
