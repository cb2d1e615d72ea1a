//! What a [`Backend`](super::Backend)'s operations take and give.

use half::f16;
use secondwind_kernels::{KernelError, logits::RowSummary, select::LinearPath};

use super::Backend;

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

/// One product of several that read the same x.
pub struct LinearJob<'a, B: Backend + ?Sized> {
    /// W and bias.
    pub weights: &'a B::Linear,
    /// (rows, columns of W).
    pub out: &'a mut B::Buffer,
    /// Its number in the step.
    pub check: Check,
}

/// What sampling wants of a row of logits.
#[derive(Clone, Copy, Debug)]
pub enum RowRequest {
    /// Everything to draw a token at this temperature.
    Sample {
        /// 0 for greedy.
        temperature: f32,
    },
    /// The probability of one token, and at least `MAX_TOP_LOGPROBS` candidates.
    Target {
        /// Its id, in this rank's range or not.
        token: u32,
    },
}

/// A reduced row, and the logit of a requested target if this rank has it.
pub type ReducedRow = (RowSummary, Option<f32>);

/// What running a linear over some rows means.
#[derive(Clone, Copy, Debug)]
pub struct LinearUse {
    /// The path that the selector takes.
    pub path: LinearPath,
    /// Of the activations.
    pub rows: usize,
    /// Bytes of weights, scales and zero points: what one pass over them reads.
    pub read_bytes: u64,
    /// Of all rows.
    pub multiply_adds: u64,
}

/// Number of an operation within a step, for what is found not finite.
pub type Check = u32;

/// The first value of a step that is not a finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// The operation that made it.
    pub check: Check,
    /// Where in its output.
    pub element: usize,
}

/// The largest step, known before anything is loaded.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Tokens of a step.
    pub tokens: usize,
    /// Rows of a step.
    pub rows: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Tokens of a KV block.
    pub block_tokens: usize,
    /// Columns of the residual.
    pub hidden: usize,
    /// Rows of logits.
    pub logit_rows: usize,
    /// Columns of a row of logits on this rank.
    pub vocab: usize,
    /// Most query heads of a layer on this rank.
    pub query_heads: usize,
    /// Most KV heads of a layer on this rank.
    pub kv_heads: usize,
    /// Most query heads that read one KV head.
    pub largest_group: usize,
    /// Most channels of a head.
    pub head_dim: usize,
}

/// Most query heads of one KV head.
pub(crate) fn largest_group(kv_head_of_query_head: &[u32]) -> usize {
    let groups = kv_head_of_query_head
        .chunk_by(|a, b| a == b)
        .map(<[u32]>::len);
    groups.max().unwrap_or(1)
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
