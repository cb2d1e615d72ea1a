//! Which of a step's logits rules change on this rank, and of which rows the former ones matter.

use std::collections::HashMap;

use secondwind_kernels::logits::{Adjustment, RowMasks};
use secondwind_model::step::Sampling;

use crate::{backend::Backend, rules::Adjustments, shard::Shard};

/// What rules change of this rank's rows, and of which rows the former logits matter.
pub(super) struct Changes<'a> {
    adjustments: &'a Adjustments,
    /// By sampling row: the most likely tokens to report of a row that changes.
    reported: Vec<Option<u32>>,
    /// Elements of a row.
    width: usize,
    first_id: u32,
}

impl<'a> Changes<'a> {
    pub fn of<B: Backend>(
        adjustments: &'a Adjustments,
        samplings: &[&Sampling],
        shard: &Shard<B>,
    ) -> Self {
        let reported = samplings
            .iter()
            .enumerate()
            .map(|(row, sampling)| sampling.logprobs.filter(|_| adjustments.touch(row)));
        Self {
            adjustments,
            reported: reported.collect(),
            width: shard.vocab.len(),
            first_id: shard.vocab.start as u32,
        }
    }

    /// All changes, in order.
    pub fn all(&self) -> &[Adjustment] {
        &self.adjustments.changes
    }

    /// Which tokens may be drawn of rows that are masked.
    pub fn masks(&self) -> &RowMasks {
        &self.adjustments.masks
    }

    /// The most likely tokens to report of sampling row `row`, if it changes and reports any.
    pub fn reported(&self, row: usize) -> Option<u32> {
        self.reported.get(row).copied().flatten()
    }

    /// Rows from the first on that hold all whose former logits matter.
    pub fn rows_to_keep(&self) -> usize {
        let last = self.reported.iter().rposition(Option::is_some);
        last.map_or(0, |last| last + 1)
    }

    /// What the changed logits of `row` were, by token; nothing if that does not matter.
    pub fn originals(&self, row: usize, originals: &[f32]) -> HashMap<u32, f32> {
        if self.reported(row).is_none() {
            return HashMap::new();
        }
        let range = self.adjustments.of_row(row);
        let changes = self.adjustments.changes[range.clone()].iter();
        let first = (row * self.width) as u32;
        changes
            .zip(&originals[range])
            .map(|(change, &original)| (self.first_id + (change.element - first), original))
            .collect()
    }
}
