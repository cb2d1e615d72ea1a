//! What a step on a card needs beside weights and cache.

use std::ops::Range;

use secondwind_kernels::{
    KernelError,
    cuda::{Activations, AttentionBatch, AttentionScratch, Device, Memory, Pinned, SampleScratch},
    select::Phase,
};

use super::unprepared;
use crate::{backend::StepLimits, batch::Batch};

/// What a step needs beside the activations, made once.
pub(super) struct StepMemory {
    pub(super) limits: StepLimits,
    pub(super) arrays: StepArrays,
    pub(super) activations: Activations,
    pub(super) attention: AttentionScratch,
    pub(super) sample: SampleScratch,
    /// For collectives that work in host memory.
    pub(super) host: Pinned<f32>,
    /// Those of the step that operations are over.
    pub(super) tokens: Range<usize>,
    pub(super) logit_rows: usize,
    pub(super) phase: Phase,
}

/// The batch's arrays, at the same places in every step, written by one copy.
pub(super) struct StepArrays {
    pub(super) staging: Pinned<u32>,
    pub(super) all: Memory<u32>,
    pub(super) tokens: Memory<u32>,
    pub(super) positions: Memory<u32>,
    pub(super) slots: Memory<u32>,
    pub(super) row_of_token: Memory<u32>,
    pub(super) context_lengths: Memory<u32>,
    pub(super) logit_tokens: Memory<u32>,
    pub(super) table_offsets: Memory<u32>,
    pub(super) block_tables: Memory<u32>,
}

impl StepMemory {
    /// The selected tokens' rows of a buffer.
    pub(super) fn rows(&self, of: &Memory<f32>, width: usize) -> Memory<f32> {
        of.part(self.tokens.start * width, self.tokens.len() * width)
    }

    pub(super) fn batch(&self) -> AttentionBatch<'_> {
        let arrays = &self.arrays;
        AttentionBatch {
            block_tables: &arrays.block_tables,
            table_offsets: &arrays.table_offsets,
            row_of_token: &arrays.row_of_token,
            context_lengths: &arrays.context_lengths,
            positions: &arrays.positions,
            slots: &arrays.slots,
            tokens: self.tokens.clone(),
            max_context: self.limits.context,
        }
    }
}

impl StepArrays {
    pub(super) fn new(device: &Device, limits: &StepLimits) -> Result<Self, KernelError> {
        let blocks = limits.context.div_ceil(limits.block_tokens);
        let lengths = [
            limits.tokens,
            limits.tokens,
            limits.tokens,
            limits.tokens,
            limits.tokens,
            limits.logit_rows.max(1),
            limits.rows + 1,
            limits.rows * blocks,
        ];
        let total = lengths.iter().sum();
        let all: Memory<u32> = device.zeros(total, "the step's arrays")?;
        let mut first = 0;
        let mut parts = lengths
            .map(|len| {
                first += len;
                all.part(first - len, len)
            })
            .into_iter();
        let mut part = || parts.next().ok_or_else(unprepared);
        Ok(Self {
            staging: device.pinned(total)?,
            tokens: part()?,
            positions: part()?,
            slots: part()?,
            row_of_token: part()?,
            context_lengths: part()?,
            logit_tokens: part()?,
            table_offsets: part()?,
            block_tables: part()?,
            all,
        })
    }

    pub(super) fn write(&mut self, device: &Device, batch: &Batch) -> Result<(), KernelError> {
        let arrays: [(&Memory<u32>, &[u32]); 8] = [
            (&self.tokens, &batch.tokens),
            (&self.positions, &batch.positions),
            (&self.slots, &batch.slots),
            (&self.row_of_token, &batch.row_of_token),
            (&self.context_lengths, &batch.context_lengths),
            (&self.logit_tokens, &batch.logit_tokens),
            (&self.table_offsets, &batch.table_offsets),
            (&self.block_tables, &batch.block_tables),
        ];
        let staging = self.staging.as_mut_slice();
        let (mut first, mut end) = (0, 0);
        for (memory, values) in arrays {
            end = first + values.len();
            if values.len() > memory.len() {
                return Err(KernelError::Length {
                    op: "begin",
                    tensor: "batch",
                    expected: memory.len(),
                    actual: values.len(),
                });
            }
            staging[first..end].copy_from_slice(values);
            first += memory.len();
        }
        Ok(device.write(&self.all, 0, &staging[..end])?)
    }
}
