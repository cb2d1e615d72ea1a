//! What was loaded, put together as a shard with its cache and buffers.

use secondwind_model::{
    config::{AttentionKind, ModelConfig, RopeScaling},
    modules::{LinearRole, PlainRole},
    plan::{ModelShape, ShardPlan, buffer_sizes},
};

use super::LoadError;
use crate::{
    backend::Backend,
    exec::Activations,
    shard::{AttentionShard, LayerShard, MlpShard, Shard},
};

/// What has been loaded so far.
pub(super) struct ModelParts<B: Backend> {
    pub embedding: Option<B::Embedding>,
    pub lm_head: Option<B::Linear>,
    pub final_norm: Option<B::Buffer>,
    pub layers: Vec<LayerParts<B>>,
}

pub(super) struct LayerParts<B: Backend> {
    pub linears: [Option<B::Linear>; 7],
    pub input_norm: Option<B::Buffer>,
    pub post_attention_norm: Option<B::Buffer>,
    pub query_norm: Option<B::Buffer>,
    pub key_norm: Option<B::Buffer>,
}

impl<B: Backend> ModelParts<B> {
    pub fn new(layers: usize) -> Self {
        let layer = || LayerParts {
            linears: [const { None }; 7],
            input_norm: None,
            post_attention_norm: None,
            query_norm: None,
            key_norm: None,
        };
        Self {
            embedding: None,
            lm_head: None,
            final_norm: None,
            layers: (0..layers).map(|_| layer()).collect(),
        }
    }
}

impl<B: Backend> ModelParts<B> {
    /// Where a norm belongs.
    pub fn norm(
        &mut self,
        layer: Option<usize>,
        role: PlainRole,
    ) -> Option<&mut Option<B::Buffer>> {
        let Some(layer) = layer else {
            return (role == PlainRole::FinalNorm).then_some(&mut self.final_norm);
        };
        let layer = self.layers.get_mut(layer)?;
        Some(match role {
            PlainRole::InputNorm => &mut layer.input_norm,
            PlainRole::PostAttentionNorm => &mut layer.post_attention_norm,
            PlainRole::QueryNorm => &mut layer.query_norm,
            PlainRole::KeyNorm => &mut layer.key_norm,
            PlainRole::FinalNorm | PlainRole::Embedding => return None,
        })
    }

    /// Where a linear belongs.
    pub fn linear(
        &mut self,
        layer: Option<usize>,
        role: LinearRole,
    ) -> Option<&mut Option<B::Linear>> {
        match role {
            LinearRole::LmHead => Some(&mut self.lm_head),
            role => self
                .layers
                .get_mut(layer?)?
                .linears
                .get_mut(place_of(role)?),
        }
    }
}

/// Order of a layer's linears in [`LayerParts`].
fn place_of(role: LinearRole) -> Option<usize> {
    match role {
        LinearRole::Query => Some(0),
        LinearRole::Key => Some(1),
        LinearRole::Value => Some(2),
        LinearRole::Output => Some(3),
        LinearRole::Gate => Some(4),
        LinearRole::Up => Some(5),
        LinearRole::Down => Some(6),
        LinearRole::LmHead => None,
    }
}

pub(super) fn assemble<B: Backend>(
    backend: &mut B,
    shape: &ModelShape,
    plan: &ShardPlan,
    rank: usize,
    parts: ModelParts<B>,
) -> Result<Shard<B>, LoadError> {
    let config = &shape.config;
    let missing = |what: String| LoadError::Plan { what };
    let mut layers = Vec::new();
    for (index, part) in parts.layers.into_iter().enumerate() {
        let lacks = |what: &str| missing(format!("layer {index} lacks {what}"));
        let AttentionKind::Full {
            query_heads,
            kv_heads,
            head_dim,
            ..
        } = config.layers[index].attention;
        let own_queries = plan.layers[index].query_heads[rank].clone();
        let own_kv = plan.kv_heads(config, index, rank);
        let queries_per_kv = query_heads / kv_heads;
        let [query, key, value, output, gate, up, down] = part.linears;
        let need = |linear: Option<B::Linear>, name: &str| linear.ok_or_else(|| lacks(name));
        let kv_cache = backend.kv_cache(
            plan.kv_blocks,
            plan.settings.block_tokens,
            own_kv.len(),
            head_dim,
            plan.settings.kv_dtype,
        )?;
        layers.push(LayerShard {
            input_norm: part.input_norm.ok_or_else(|| lacks("its input norm"))?,
            attention: AttentionShard {
                query_heads: own_queries.len(),
                kv_heads: own_kv.len(),
                head_dim,
                kv_head_of_query_head: own_queries
                    .map(|head| (head / queries_per_kv - own_kv.start) as u32)
                    .collect(),
                query: need(query, "q_proj")?,
                key: need(key, "k_proj")?,
                value: need(value, "v_proj")?,
                output: need(output, "o_proj")?,
                head_norms: part.query_norm.zip(part.key_norm),
                kv_cache,
            },
            post_attention_norm: part
                .post_attention_norm
                .ok_or_else(|| lacks("its post-attention norm"))?,
            mlp: MlpShard {
                width: plan.layers[index].ffn[rank].len(),
                gate: need(gate, "gate_proj")?,
                up: need(up, "up_proj")?,
                down: need(down, "down_proj")?,
            },
        });
    }
    Ok(Shard {
        hidden_size: config.hidden_size,
        rms_norm_eps: config.rms_norm_eps,
        vocab_size: config.vocab_size,
        vocab: plan.vocab[rank].clone(),
        vocab_lengths: plan.vocab.iter().map(ExactSizeIterator::len).collect(),
        embedding: parts
            .embedding
            .ok_or_else(|| missing("the embedding is missing".into()))?,
        layers,
        final_norm: parts
            .final_norm
            .ok_or_else(|| missing("the final norm is missing".into()))?,
        lm_head: parts
            .lm_head
            .ok_or_else(|| missing("lm_head is missing".into()))?,
    })
}

/// Cos and sin of every position up to the plan's context.
pub(super) fn set_rotary<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    positions: usize,
) -> Result<(), LoadError> {
    let AttentionKind::Full { head_dim, .. } = config.layers[0].attention;
    let dynamic = matches!(config.rope.scaling, RopeScaling::Dynamic { .. });
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let mut frequencies = config.rope.inv_freq(head_dim, 1);
    for position in 0..positions {
        if dynamic {
            frequencies = config.rope.inv_freq(head_dim, position + 1);
        }
        let (inv_freq, factor) = &frequencies;
        for frequency in inv_freq {
            // Rounded to f32 where the reference implementation rounds.
            let (sine, cosine) = (position as f32 * frequency).sin_cos();
            cos.push(cosine * factor);
            sin.push(sine * factor);
        }
    }
    Ok(backend.set_rotary(cos, sin)?)
}

/// Buffers by the plan's own list, so that what was planned is what is taken.
pub(super) fn activations<B: Backend>(
    backend: &mut B,
    shape: &ModelShape,
    plan: &ShardPlan,
    rank: usize,
) -> Result<Activations<B>, LoadError> {
    let widths = plan.local_widths(shape, rank);
    let sizes = buffer_sizes(&shape.config, &plan.settings, &widths);
    let mut make = |name: &str| {
        let bytes = sizes
            .iter()
            .find(|(of, _)| *of == name)
            .map(|(_, bytes)| *bytes);
        let bytes = bytes.ok_or_else(|| LoadError::Plan {
            what: format!("it has no buffer {name}"),
        })?;
        Ok::<_, LoadError>(backend.buffer(bytes as usize / size_of::<f32>())?)
    };
    Ok(Activations {
        residual: make("residual")?,
        normed: make("normed")?,
        partial_sum: make("partial_sum")?,
        query: make("query")?,
        key: make("key")?,
        value: make("value")?,
        attention: make("attention")?,
        gate: make("gate")?,
        up: make("up")?,
        logits: make("logits")?,
    })
}
