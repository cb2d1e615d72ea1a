//! The operations a decoder needs, on a device: not a tensor library.
//!
//! A step begins with [`Backend::begin`], which puts the batch's arrays where the device reads them;
//! every operation after it runs over the batch's tokens. Activations are f32, row-major, one row per
//! token; buffers are made at load and reused by every step.

use half::f16;
use secondwind_kernels::{KernelError, weights::Dtype};
use secondwind_model::{plan::KvDType, step::Sampling};

use crate::{
    batch::Batch,
    collective::{Collective, CollectiveError},
    sampler::Row,
};

mod cpu;

pub use cpu::CpuBackend;

/// What a quantised linear is made of, before its words are written.
pub struct QuantShape<'a> {
    /// 2, 3, 4 or 8.
    pub bits: u8,
    /// Input rows of this rank.
    pub k: usize,
    /// Output columns of this rank.
    pub n: usize,
    /// (k) which row of `scales` each input row uses.
    pub group_of_row: &'a [u32],
    /// (groups, n) row-major.
    pub scales: &'a [f16],
    /// (groups, n) true zero points.
    pub zeros: &'a [u16],
    /// (n).
    pub bias: Option<&'a [f32]>,
}

/// Takes a quantised linear's packed words as they come from disk.
pub trait QuantSink {
    /// `words`: (any, n) row-major, GPTQ packing along K from a row that is a multiple of 32 in the
    /// checkpoint; rows `skip..skip + rows` of that window become rows `first..` of the shard.
    ///
    /// # Errors
    /// The window does not hold these rows.
    fn write(
        &mut self,
        first: usize,
        skip: usize,
        rows: usize,
        words: &[u32],
    ) -> Result<(), KernelError>;
}

/// Takes rows of a dense tensor as they come from disk.
pub trait DenseSink {
    /// `data`: little-endian elements, whole rows; the first becomes row `first` of the shard.
    ///
    /// # Errors
    /// Rows outside the shard.
    fn write(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError>;
}

/// Per-head normalisation of queries and keys.
pub struct HeadNorms<'a, B: Backend + ?Sized> {
    /// (head_dim) weights for queries.
    pub query: &'a B::Buffer,
    /// (head_dim) weights for keys.
    pub key: &'a B::Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// One layer's attention on this rank.
pub struct AttentionShape<'a> {
    /// Query heads of this rank.
    pub query_heads: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// (query_heads) the KV head, counted on this rank, that each query head reads.
    pub kv_head_of_query_head: &'a [u32],
}

/// A device that can run a decoder's shard. Generic code above it knows no device.
pub trait Backend {
    /// f32 memory of the device.
    type Buffer;
    /// A linear's weights in the device's own layout.
    type Linear;
    /// Embedding rows of this rank.
    type Embedding;
    /// One layer's keys and values.
    type KvCache;

    /// Which paths run a linear, by number of rows, and why.
    fn linear_choices(&self, linear: &Self::Linear) -> Vec<String>;

    /// Which path runs attention, and why.
    fn attention_choice(&self) -> String;

    /// `elements` zeros.
    ///
    /// # Errors
    /// The device is out of memory.
    fn buffer(&mut self, elements: usize) -> Result<Self::Buffer, KernelError>;

    /// A buffer with these values.
    ///
    /// # Errors
    /// The device is out of memory.
    fn upload(&mut self, values: &[f32]) -> Result<Self::Buffer, KernelError>;

    /// Weights that `fill` writes piece by piece, so that no second copy is ever held.
    ///
    /// # Errors
    /// Of the shape, of `fill`, or that not every row was written.
    fn quantised<E: From<KernelError>>(
        &mut self,
        shape: QuantShape<'_>,
        fill: impl FnOnce(&mut dyn QuantSink) -> Result<(), E>,
    ) -> Result<Self::Linear, E>;

    /// Weights of shape (n, k) as Hugging Face stores them, written by rows of n.
    ///
    /// # Errors
    /// As [`Backend::quantised`].
    fn dense<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        k: usize,
        n: usize,
        bias: Option<&[f32]>,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Self::Linear, E>;

    /// An embedding of shape (rows, width), written by rows.
    ///
    /// # Errors
    /// As [`Backend::quantised`].
    fn embedding<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        rows: usize,
        width: usize,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Self::Embedding, E>;

    /// The embedding that shares a dense `lm_head`'s memory.
    ///
    /// # Errors
    /// The linear is not dense.
    fn tied_embedding(&mut self, lm_head: &Self::Linear) -> Result<Self::Embedding, KernelError>;

    /// An empty paged cache.
    ///
    /// # Errors
    /// The device is out of memory.
    fn kv_cache(
        &mut self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDType,
    ) -> Result<Self::KvCache, KernelError>;

    /// Puts the rotary table in place: cos and sin, each (positions, head_dim / 2).
    ///
    /// # Errors
    /// The device is out of memory.
    fn set_rotary(&mut self, cos: Vec<f32>, sin: Vec<f32>) -> Result<(), KernelError>;

    /// Starts a step over `batch`.
    ///
    /// # Errors
    /// The device failed.
    fn begin(&mut self, batch: &Batch) -> Result<(), KernelError>;

    /// Embeds the batch's tokens; those outside `first_id..` of the table become zeros.
    ///
    /// # Errors
    /// The device failed.
    fn embed(
        &mut self,
        table: &Self::Embedding,
        first_id: u32,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    /// `out = x / rms(x) * weight`, rows of `width`.
    ///
    /// # Errors
    /// The device failed.
    fn rms_norm(
        &mut self,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        width: usize,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    /// `residual += delta`, rows of `width`.
    ///
    /// # Errors
    /// The device failed.
    fn add(
        &mut self,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        width: usize,
    ) -> Result<(), KernelError>;

    /// `out = x * weights + bias` over `rows` rows.
    ///
    /// # Errors
    /// The device failed.
    fn linear(
        &mut self,
        weights: &Self::Linear,
        x: &Self::Buffer,
        rows: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    /// Normalises heads if `norms`, rotates queries and keys, and writes keys and values to the cache.
    ///
    /// # Errors
    /// The device failed.
    fn rotate_and_cache(
        &mut self,
        query: &mut Self::Buffer,
        key: &mut Self::Buffer,
        value: &Self::Buffer,
        norms: Option<HeadNorms<'_, Self>>,
        shape: &AttentionShape<'_>,
        cache: &mut Self::KvCache,
    ) -> Result<(), KernelError>;

    /// Softmax attention of every token over its own sequence up to itself.
    ///
    /// # Errors
    /// The device failed.
    fn attention(
        &mut self,
        query: &Self::Buffer,
        cache: &Self::KvCache,
        shape: &AttentionShape<'_>,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    /// `gate = silu(gate) * up`, rows of `width`.
    ///
    /// # Errors
    /// The device failed.
    fn silu_mul(
        &mut self,
        gate: &mut Self::Buffer,
        up: &Self::Buffer,
        width: usize,
    ) -> Result<(), KernelError>;

    /// Sums `rows` rows of `width` over the ranks.
    ///
    /// # Errors
    /// Of the collective.
    fn all_reduce_sum(
        &mut self,
        buffer: &mut Self::Buffer,
        elements: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError>;

    /// Copies the batch's logit tokens out of rows of `width`.
    ///
    /// # Errors
    /// The device failed.
    fn take_logit_tokens(
        &mut self,
        x: &Self::Buffer,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    /// Reduces row `row` of (any, width) logits, whose first column is token `first_id`.
    ///
    /// # Errors
    /// The device failed.
    fn summarise(
        &mut self,
        logits: &Self::Buffer,
        row: usize,
        width: usize,
        first_id: u32,
        sampling: &Sampling,
    ) -> Result<Row, KernelError>;

    /// Max, sum of exp(logit - max), and column `target`'s logit if this row has it.
    ///
    /// # Errors
    /// The device failed.
    fn target_logit(
        &mut self,
        logits: &Self::Buffer,
        row: usize,
        width: usize,
        target: Option<usize>,
    ) -> Result<(f32, f64, Option<f32>), KernelError>;

    /// Row `row` of (any, width) logits, on the host.
    ///
    /// # Errors
    /// The device failed.
    fn row(
        &mut self,
        logits: &Self::Buffer,
        row: usize,
        width: usize,
    ) -> Result<Vec<f32>, KernelError>;

    /// Index of the first NaN or Inf among the first `elements`.
    ///
    /// # Errors
    /// The device failed.
    fn first_non_finite(
        &mut self,
        buffer: &Self::Buffer,
        elements: usize,
    ) -> Result<Option<usize>, KernelError>;
}
