//! One step as flat arrays over its tokens. Pure.

mod sequences;
#[cfg(test)]
mod tests;

use std::ops::Range;

use secondwind_model::step::{RowInput, SequenceId, Step};

pub use sequences::Sequences;

/// What the group agreed on at load; bounds of everything a step may carry.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// KV blocks; block 0 is reserved.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Tokens of one sequence.
    pub max_context_tokens: usize,
    /// Tokens of one step.
    pub max_step_tokens: usize,
    /// Rows of logits in one step.
    pub max_logit_rows: usize,
}

/// Flat arrays over the tokens of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// (tokens) ids.
    pub tokens: Vec<u32>,
    /// (tokens) position in the token's sequence.
    pub positions: Vec<u32>,
    /// (tokens) where its key and value go: block * block_tokens + offset.
    pub slots: Vec<u32>,
    /// Block tables of the rows, one after the other.
    pub block_tables: Vec<u32>,
    /// (rows + 1) where each row's table starts, and the end of the last.
    pub table_offsets: Vec<u32>,
    /// (tokens) the row whose block table is its own.
    pub row_of_token: Vec<u32>,
    /// (rows) the row of the step that brings it. A row with guesses is laid out as so many rows of one token
    /// that share a sequence, so that it is a decoding row like any other.
    pub step_rows: Vec<usize>,
    /// (tokens) tokens of its sequence that it attends to, itself included.
    pub context_lengths: Vec<u32>,
    /// Tokens whose logits are needed, those that sample first.
    pub logit_tokens: Vec<u32>,
    /// Of `logit_tokens`, the sampling ones: index of the step's row, and position of what is drawn.
    pub samples: Vec<(usize, usize)>,
    /// Of `logit_tokens`, the others: (index of the step's row, target).
    pub targets: Vec<(usize, u32)>,
}

impl Batch {
    /// True if every row brings one token and samples: such steps repeat with other numbers only.
    pub fn is_decoding(&self) -> bool {
        let rows = self.table_offsets.len().saturating_sub(1);
        self.tokens.len() == rows && self.samples.len() == rows && self.targets.is_empty()
    }

    /// Of each row, in order: tokens that its sequence had before, and tokens of the step.
    pub fn extents(&self) -> impl Iterator<Item = (usize, usize)> + Clone {
        let mut at = 0;
        self.row_of_token.chunk_by(|a, b| a == b).map(move |row| {
            let before = self.positions[at] as usize;
            at += row.len();
            (before, row.len())
        })
    }

    /// What of the tokens drawn, one for each of `samples`, counts: of each row of `step` that samples, the
    /// range of those that were drawn after right guesses.
    pub fn kept(&self, step: &Step, drawn: &[u32]) -> Vec<(usize, Range<usize>)> {
        let mut kept = Vec::new();
        let mut start = 0;
        for row in self.samples.chunk_by(|(a, _), (b, _)| a == b) {
            let (index, end) = (row[0].0, start + row.len());
            let guesses = match &step.rows[index].input {
                RowInput::Tokens(tokens) => &tokens[tokens.len() - (row.len() - 1)..],
                RowInput::Sampled { .. } => &[],
            };
            let right = guesses.iter().zip(&drawn[start..end]);
            let right = right.take_while(|(guess, drawn)| guess == drawn).count();
            kept.push((index, start..start + right + 1));
            start = end;
        }
        kept
    }

    /// The same decoding step with rows up to `tokens` that read and write no sequence's cache.
    pub fn padded(&self, tokens: usize) -> Self {
        let mut padded = self.clone();
        let blank = Self::blank(tokens);
        let own = self.tokens.len().min(tokens);
        let end = self.table_offsets.last().copied().unwrap_or(0);
        padded.tokens.extend(&blank.tokens[own..]);
        padded.positions.extend(&blank.positions[own..]);
        padded.slots.extend(&blank.slots[own..]);
        padded.row_of_token.extend(&blank.row_of_token[own..]);
        padded.context_lengths.extend(&blank.context_lengths[own..]);
        padded.logit_tokens.extend(&blank.logit_tokens[own..]);
        padded.table_offsets.resize(tokens + 1, end);
        padded
    }

    /// A decoding step of `tokens` tokens that reads and writes no sequence's cache.
    pub fn blank(tokens: usize) -> Self {
        let count = tokens as u32;
        Self {
            tokens: vec![0; tokens],
            positions: vec![0; tokens],
            slots: vec![NO_SLOT; tokens],
            block_tables: Vec::new(),
            table_offsets: vec![0; tokens + 1],
            row_of_token: (0..count).collect(),
            context_lengths: vec![0; tokens],
            logit_tokens: (0..count).collect(),
            step_rows: Vec::new(),
            samples: (0..tokens).map(|row| (row, 0)).collect(),
            targets: Vec::new(),
        }
    }
}

/// The slot of a token whose key and value are not kept; only for devices that record.
const NO_SLOT: u32 = u32::MAX;

/// A step that this rank cannot execute. The group must end: ranks no longer agree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Steps are numbered without gaps.
    #[error("step {got} came, step {expected} was due")]
    Gap {
        /// Number due.
        expected: u64,
        /// Number that came.
        got: u64,
    },
    /// A row that does not fit what this rank knows.
    #[error("step {step}, row {row} (sequence {sequence}): {what}")]
    Row {
        /// Step number.
        step: u64,
        /// Index of the row.
        row: usize,
        /// Its sequence.
        sequence: SequenceId,
        /// What is wrong.
        what: String,
    },
    /// More tokens or logit rows than buffers were planned for.
    #[error("step {step} carries {count} {what}, the plan allows {limit}")]
    TooLarge {
        /// Step number.
        step: u64,
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The plan's bound.
        limit: usize,
    },
}

impl BatchError {
    /// The sequence whose row is the cause, where that is known.
    pub fn sequence(&self) -> Option<SequenceId> {
        match self {
            Self::Row { sequence, .. } => Some(*sequence),
            Self::Gap { .. } | Self::TooLarge { .. } => None,
        }
    }
}
