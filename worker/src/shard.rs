//! One rank's part of a model, on its device.

use std::ops::Range;

use crate::backend::Backend;

/// Weights and KV cache of one rank.
pub struct Shard<B: Backend> {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Of every RMS norm.
    pub rms_norm_eps: f32,
    /// Rows of the whole vocabulary.
    pub vocab_size: usize,
    /// Rows of it that this rank holds, in the embedding and in `lm_head`.
    pub vocab: Range<usize>,
    /// By rank, how many rows of the vocabulary it holds.
    pub vocab_lengths: Vec<usize>,
    /// Embedding rows of `vocab`.
    pub embedding: B::Embedding,
    /// In the order of the model.
    pub layers: Vec<LayerShard<B>>,
    /// (hidden).
    pub final_norm: B::Buffer,
    /// Columns of `vocab`.
    pub lm_head: B::Linear,
}

/// One decoder layer.
pub struct LayerShard<B: Backend> {
    /// (hidden).
    pub input_norm: B::Buffer,
    /// The token mixer.
    pub attention: AttentionShard<B>,
    /// (hidden).
    pub post_attention_norm: B::Buffer,
    /// The channel mixer.
    pub mlp: MlpShard<B>,
}

/// Attention heads of this rank.
pub struct AttentionShard<B: Backend> {
    /// Query heads of this rank.
    pub query_heads: usize,
    /// KV heads that they read.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// (query_heads) KV head, counted on this rank.
    pub kv_head_of_query_head: Vec<u32>,
    /// hidden -> query_heads * head_dim.
    pub query: B::Linear,
    /// hidden -> kv_heads * head_dim.
    pub key: B::Linear,
    /// hidden -> kv_heads * head_dim.
    pub value: B::Linear,
    /// query_heads * head_dim -> hidden, partial sums.
    pub output: B::Linear,
    /// (head_dim) for queries and for keys, where the architecture has them.
    pub head_norms: Option<(B::Buffer, B::Buffer)>,
    /// Keys and values of this layer.
    pub kv_cache: B::KvCache,
}

/// FFN channels of this rank.
pub struct MlpShard<B: Backend> {
    /// Channels.
    pub width: usize,
    /// hidden -> width.
    pub gate: B::Linear,
    /// hidden -> width.
    pub up: B::Linear,
    /// width -> hidden, partial sums.
    pub down: B::Linear,
}
