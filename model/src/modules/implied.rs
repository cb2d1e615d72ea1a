//! Which modules and tensors a configuration implies, whatever files are at hand.

use super::{Axis, LinearModule, LinearRole, PlainRole, Split, WeightFormat};
use crate::config::{AttentionKind, LayerConfig, MlpKind, ModelConfig};

pub(super) const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

/// A linear before its format is known.
pub(crate) struct ImpliedLinear {
    pub(crate) name: String,
    pub(crate) layer: Option<usize>,
    pub(crate) role: LinearRole,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) bias: bool,
    pub(crate) split: Split,
    pub(crate) axis: Axis,
    pub(crate) unit: usize,
}

impl ImpliedLinear {
    pub(super) fn with(self, format: WeightFormat) -> LinearModule {
        let Self {
            name,
            layer,
            role,
            k,
            n,
            bias,
            split,
            axis,
            unit,
        } = self;
        LinearModule {
            name,
            layer,
            role,
            k,
            n,
            bias,
            split,
            axis,
            unit,
            format,
            requantised: None,
        }
    }
}

/// A tensor outside the linears before its element type is known.
pub(crate) struct ImpliedPlain {
    pub(crate) name: String,
    pub(crate) layer: Option<usize>,
    pub(crate) role: PlainRole,
    pub(crate) shape: Vec<usize>,
}

/// By layer q, k, v, o, gate, up, down; the vocabulary projection last. A tied one bears the name of the
/// embeddings.
pub(crate) fn implied_linears(config: &ModelConfig) -> Vec<ImpliedLinear> {
    let layers = config.layers.iter().enumerate();
    let mut linears: Vec<_> = layers
        .flat_map(|(layer, kind)| layer_linears(layer, kind, config.hidden_size))
        .collect();
    linears.push(ImpliedLinear {
        name: if config.tie_word_embeddings {
            EMBEDDING
        } else {
            HEAD
        }
        .to_owned(),
        layer: None,
        role: LinearRole::LmHead,
        k: config.hidden_size,
        n: config.vocab_size,
        bias: false,
        split: Split::Column,
        axis: Axis::Vocab,
        unit: 1,
    });
    linears
}

fn layer_linears(layer: usize, config: &LayerConfig, hidden: usize) -> [ImpliedLinear; 7] {
    let AttentionKind::Full {
        query_heads,
        kv_heads,
        head_dim,
        qkv_bias,
        output_bias,
        ..
    } = config.attention;
    let MlpKind::Dense { intermediate_size } = config.mlp;
    let name = |name: &str| format!("model.layers.{layer}.{name}");
    let heads = |inner: &str, role, heads, axis| ImpliedLinear {
        name: name(inner),
        layer: Some(layer),
        role,
        k: hidden,
        n: heads * head_dim,
        bias: qkv_bias,
        split: Split::Column,
        axis,
        unit: head_dim,
    };
    let ffn = |inner: &str, role, k, n, split| ImpliedLinear {
        name: name(inner),
        layer: Some(layer),
        role,
        k,
        n,
        bias: false,
        split,
        axis: Axis::Ffn,
        unit: 1,
    };
    [
        heads(
            "self_attn.q_proj",
            LinearRole::Query,
            query_heads,
            Axis::QueryHeads,
        ),
        heads("self_attn.k_proj", LinearRole::Key, kv_heads, Axis::KvHeads),
        heads(
            "self_attn.v_proj",
            LinearRole::Value,
            kv_heads,
            Axis::KvHeads,
        ),
        ImpliedLinear {
            name: name("self_attn.o_proj"),
            layer: Some(layer),
            role: LinearRole::Output,
            k: query_heads * head_dim,
            n: hidden,
            bias: output_bias,
            split: Split::Row,
            axis: Axis::QueryHeads,
            unit: head_dim,
        },
        ffn(
            "mlp.gate_proj",
            LinearRole::Gate,
            hidden,
            intermediate_size,
            Split::Column,
        ),
        ffn(
            "mlp.up_proj",
            LinearRole::Up,
            hidden,
            intermediate_size,
            Split::Column,
        ),
        ffn(
            "mlp.down_proj",
            LinearRole::Down,
            intermediate_size,
            hidden,
            Split::Row,
        ),
    ]
}

/// Embeddings, the norms by layer, the final norm.
pub(crate) fn implied_plain(config: &ModelConfig) -> Vec<ImpliedPlain> {
    let hidden = config.hidden_size;
    let plain = |name: String, layer, role, shape| ImpliedPlain {
        name,
        layer,
        role,
        shape,
    };
    let embedding = vec![config.vocab_size, hidden];
    let mut tensors = vec![plain(
        format!("{EMBEDDING}.weight"),
        None,
        PlainRole::Embedding,
        embedding,
    )];
    for (layer, kind) in config.layers.iter().enumerate() {
        let AttentionKind::Full {
            head_dim, qk_norm, ..
        } = kind.attention;
        let mut norm = |inner: &str, role, width| {
            let name = format!("model.layers.{layer}.{inner}.weight");
            tensors.push(plain(name, Some(layer), role, vec![width]));
        };
        norm("input_layernorm", PlainRole::InputNorm, hidden);
        if qk_norm {
            norm("self_attn.q_norm", PlainRole::QueryNorm, head_dim);
            norm("self_attn.k_norm", PlainRole::KeyNorm, head_dim);
        }
        norm(
            "post_attention_layernorm",
            PlainRole::PostAttentionNorm,
            hidden,
        );
    }
    tensors.push(plain(
        "model.norm.weight".to_owned(),
        None,
        PlainRole::FinalNorm,
        vec![hidden],
    ));
    tensors
}
