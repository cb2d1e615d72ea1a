//! The operations a decoder needs, on a device: not a tensor library.
//!
//! A step begins with [`Backend::begin`], which puts the batch's arrays where the device reads them;
//! every operation after it runs over the batch's tokens. Activations are f32, row-major, one row per
//! token; buffers are made at load and reused by every step.

use std::{
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
};

use secondwind_kernels::{
    KernelError,
    logits::{Adjustment, RowMasks},
    select::Precision,
    weights::Dtype,
};
use secondwind_model::plan::KvDType;

use crate::{
    batch::Batch,
    collective::{Collective, CollectiveError},
    timeline::{Mark, Span},
};

mod cpu;
mod cuda;
mod operands;

pub use cpu::CpuBackend;
pub use cuda::CudaBackend;
pub(crate) use cuda::RECORDING_SIZES;
pub(crate) use operands::largest_group;
pub use operands::{
    AttentionShape, Check, DenseSink, HeadNorms, LinearJob, LinearUse, NonFinite, QuantShape,
    QuantSink, ReducedRow, RowRequest, StepLimits,
};

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

    /// What runs a linear over `rows` rows.
    ///
    /// # Errors
    /// A forced path that cannot.
    fn linear_use(&self, linear: &Self::Linear, rows: usize) -> Result<LinearUse, KernelError>;

    /// Which paths run attention over heads of this size, and why.
    fn attention_choice(&self, head_dim: usize, kv: KvDType) -> String;

    /// Bytes of the device's memory that are in use: of a card those of all its users, of a host what
    /// this process has touched. None where that cannot be told.
    fn used_bytes(&self) -> Option<u64>;

    /// Over what sums over ranks go, and why, if that was a choice.
    fn sums_choice(&self) -> Option<&str> {
        None
    }

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

    /// Says which family of arithmetic the plan allows; comes before anything is loaded.
    fn set_precision(&mut self, precision: Precision);

    /// Makes room for the largest step; comes when all weights are loaded.
    ///
    /// # Errors
    /// The device is out of memory.
    fn prepare(&mut self, limits: &StepLimits) -> Result<(), KernelError>;

    /// Starts a step over `batch`, which is worked on in `parts`: ranges of its tokens that tile them, two at
    /// the most, and more than one only where [`Backend::sums_aside`]. All tokens are selected.
    ///
    /// # Errors
    /// The device failed.
    fn begin(&mut self, batch: &Batch, parts: &[Range<usize>]) -> Result<(), KernelError>;

    /// True if sums over `collective` may go on while the device computes something else.
    fn sums_aside(&self, collective: &dyn Collective) -> bool {
        let _ = collective;
        false
    }

    /// Operations from here on are over these tokens, a part of the step or all of it: over the rows of the
    /// same numbers in every buffer.
    fn select(&mut self, tokens: Range<usize>) {
        let _ = tokens;
    }

    /// Has the sum of the selected rows of `width` over the ranks go on beside what is given next. They are
    /// part `part` of the step.
    ///
    /// # Errors
    /// Of the collective, or that this device sums nothing aside.
    fn start_sum(
        &mut self,
        buffer: &mut Self::Buffer,
        width: usize,
        part: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        let _ = (buffer, width, part);
        Err(CollectiveError::Device {
            rank: collective.rank(),
            op: "start_sum",
            what: "this device sums nothing aside".into(),
        })
    }

    /// Has what is given next wait for the part's sum.
    ///
    /// # Errors
    /// The device failed.
    fn await_sum(&mut self, part: usize) -> Result<(), KernelError> {
        let _ = part;
        Ok(())
    }

    /// Tokens of the decoding steps that this device wants to record, rising; none if it records nothing.
    fn recording_sizes(&self) -> &'static [usize] {
        &[]
    }

    /// The least size of which there is a recording that holds decoding steps of `tokens` tokens.
    fn recorded(&self, tokens: usize) -> Option<usize> {
        let _ = tokens;
        None
    }

    /// Begins to record what is given to the device from here on, instead of running it.
    ///
    /// # Errors
    /// The device failed.
    fn start_recording(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    /// Keeps the recording as that of decoding steps of `tokens` tokens.
    ///
    /// # Errors
    /// The device failed, or something that was given cannot be recorded.
    fn finish_recording(&mut self, tokens: usize) -> Result<(), KernelError> {
        let _ = tokens;
        Ok(())
    }

    /// Runs the recording of decoding steps of `tokens` tokens, a size that [`Backend::recorded`] gave.
    ///
    /// # Errors
    /// The device failed.
    fn replay(&mut self, tokens: usize) -> Result<(), KernelError> {
        let _ = tokens;
        Ok(())
    }

    /// Drops all recordings and what else sums over the epoch's links: these are about to end.
    fn forget_recordings(&mut self) {}

    /// Times the parts of a step from here on; nothing is replayed until that ends.
    ///
    /// # Errors
    /// The device failed.
    fn start_timeline(&mut self) -> Result<(), KernelError>;

    /// Marks the end of a part of the step, if it is timed.
    ///
    /// # Errors
    /// The device failed.
    fn mark(&mut self, mark: Mark) -> Result<(), KernelError>;

    /// Ends timing: the parts in the order of their marks, after everything given to the device.
    ///
    /// # Errors
    /// The device failed.
    fn finish_timeline(&mut self) -> Result<Vec<Span>, KernelError>;

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

    /// `residual += delta` if there is one, then `out = residual / rms(residual) * weight`, rows of
    /// `width`. `readers` are the linears that read `out` next: a device may leave it in the form
    /// that they want, and nothing else reads it.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn add_norm(
        &mut self,
        residual: &mut Self::Buffer,
        delta: Option<&Self::Buffer>,
        weight: &Self::Buffer,
        width: usize,
        eps: f32,
        out: &mut Self::Buffer,
        readers: &[&Self::Linear],
        check: Check,
    ) -> Result<(), KernelError>;

    /// `out = x * weights + bias` for every job, over `rows` rows of one x.
    ///
    /// # Errors
    /// The device failed.
    fn linears(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        jobs: &mut [LinearJob<'_, Self>],
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
        check: Check,
    ) -> Result<(), KernelError>;

    /// `gate = silu(gate) * up`, rows of `width`; only `reader` reads it.
    ///
    /// # Errors
    /// The device failed.
    fn silu_mul(
        &mut self,
        gate: &mut Self::Buffer,
        up: &Self::Buffer,
        width: usize,
        reader: &Self::Linear,
        check: Check,
    ) -> Result<(), KernelError>;

    /// Sums the first `elements` over the ranks.
    ///
    /// # Errors
    /// Of the collective.
    fn all_reduce_sum(
        &mut self,
        buffer: &mut Self::Buffer,
        elements: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError>;

    /// Joins the ranks of `host` over NCCL, from the thread that will use it.
    ///
    /// # Errors
    /// The device has no NCCL, or the ranks did not come together.
    fn join_nccl(
        &mut self,
        host: Box<dyn Collective>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Box<dyn Collective>, CollectiveError>;

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

    /// Changes single logits in place; `originals`, if wanted, get what they were, in order. No two
    /// changes are of the same logit.
    ///
    /// # Errors
    /// The device failed, or a change is of no logit.
    fn adjust_logits(
        &mut self,
        logits: &mut Self::Buffer,
        changes: &[Adjustment],
        originals: Option<&mut [f32]>,
    ) -> Result<(), KernelError>;

    /// Bans what `masks` leave out of rows of (any, width) logits, in place.
    ///
    /// # Errors
    /// The device failed, or a row is of no logits.
    fn mask_logits(
        &mut self,
        logits: &mut Self::Buffer,
        width: usize,
        masks: &RowMasks,
    ) -> Result<(), KernelError>;

    /// Reduces the first rows of (any, width) logits, whose first column is token `first_id`: one
    /// row per request.
    ///
    /// # Errors
    /// The device failed.
    fn reduce_rows(
        &mut self,
        logits: &Self::Buffer,
        width: usize,
        first_id: u32,
        requests: &[RowRequest],
    ) -> Result<Vec<ReducedRow>, KernelError>;

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

    /// The first value since [`Backend::begin`] that was not finite, as far as this device knows
    /// already; with `wait` after everything given to it.
    ///
    /// # Errors
    /// The device failed.
    fn non_finite(&mut self, wait: bool) -> Result<Option<NonFinite>, KernelError>;
}
