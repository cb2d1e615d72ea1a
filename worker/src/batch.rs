//! One step as flat arrays over its tokens, and what a rank remembers of each sequence. Pure.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use secondwind_model::step::{RowInput, SequenceId, Step, StepRow, TokenSet};

use crate::rules::{Adjustments, Rules};

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
    /// Block tables of the step's rows, one after the other.
    pub block_tables: Vec<u32>,
    /// (rows + 1) where each row's table starts, and the end of the last.
    pub table_offsets: Vec<u32>,
    /// (tokens) the row of the step that brings it.
    pub row_of_token: Vec<u32>,
    /// (tokens) tokens of its sequence that it attends to, itself included.
    pub context_lengths: Vec<u32>,
    /// Tokens whose logits are needed, those that sample first.
    pub logit_tokens: Vec<u32>,
    /// Of `logit_tokens`, the sampling ones: index of the step's row.
    pub sample_rows: Vec<usize>,
    /// Of `logit_tokens`, the others: (index of the step's row, target).
    pub targets: Vec<(usize, u32)>,
}

impl Batch {
    /// True if every row brings one token and samples: such steps repeat with other numbers only.
    pub fn is_decoding(&self) -> bool {
        let rows = self.table_offsets.len().saturating_sub(1);
        self.tokens.len() == rows && self.sample_rows.len() == rows && self.targets.is_empty()
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
            sample_rows: (0..tokens).collect(),
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

/// What a rank remembers between the steps of an epoch.
#[derive(Debug)]
pub struct Sequences {
    limits: Limits,
    next_step: u64,
    known: HashMap<SequenceId, Known>,
    /// By block number.
    blocks: Vec<Block>,
    /// Tokens sampled by the last step, by its row.
    sampled: HashMap<usize, u32>,
}

#[derive(Debug, Default)]
struct Known {
    blocks: Vec<u32>,
    tokens: usize,
    rules: Option<Rules>,
}

/// A KV block in this epoch.
#[derive(Clone, Debug, Default)]
struct Block {
    /// Known sequences whose table has it.
    users: u32,
    /// All its tokens were written since it was last given to a sequence.
    full: bool,
}

impl Sequences {
    /// Nothing known, step 0 due.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            next_step: 0,
            known: HashMap::new(),
            blocks: vec![Block::default(); limits.kv_blocks],
            sampled: HashMap::new(),
        }
    }

    /// Takes in the next step and lays it out.
    ///
    /// # Errors
    /// The step does not follow from the former ones, or breaks a limit of the plan.
    pub fn batch(&mut self, step: &Step) -> Result<Batch, BatchError> {
        if step.number != self.next_step {
            return Err(BatchError::Gap {
                expected: self.next_step,
                got: step.number,
            });
        }
        self.next_step += 1;
        for sequence in &step.ended {
            let blocks = self.known.remove(sequence).map(|known| known.blocks);
            for block in blocks.unwrap_or_default() {
                self.blocks[block as usize].users -= 1;
            }
        }
        let mut batch = Batch {
            table_offsets: vec![0],
            ..Batch::default()
        };
        let mut targets = Vec::new();
        for (index, row) in step.rows.iter().enumerate() {
            self.lay_out(step.number, index, row, &mut batch, &mut targets)
                .map_err(|what| BatchError::Row {
                    step: step.number,
                    row: index,
                    sequence: row.sequence,
                    what,
                })?;
        }
        for (token, target) in targets {
            batch.logit_tokens.push(token);
            batch.targets.push(target);
        }
        for (what, count, limit) in [
            ("tokens", batch.tokens.len(), self.limits.max_step_tokens),
            (
                "logit rows",
                batch.logit_tokens.len(),
                self.limits.max_logit_rows,
            ),
        ] {
            if count > limit {
                return Err(BatchError::TooLarge {
                    step: step.number,
                    what,
                    count,
                    limit,
                });
            }
        }
        Ok(batch)
    }

    /// Remembers what a step sampled: (row, token).
    pub fn sampled(&mut self, tokens: impl IntoIterator<Item = (usize, u32)>) {
        self.sampled = tokens.into_iter().collect();
    }

    /// Which logits of `step`'s sampling rows change before they are sampled, over a rank's range of the
    /// vocabulary; `batch` is what [`Sequences::batch`] made of the step.
    ///
    /// # Errors
    /// More logits than an index holds.
    pub fn adjustments(
        &self,
        step: &Step,
        batch: &Batch,
        vocab: &Range<usize>,
    ) -> Result<Adjustments, BatchError> {
        let mut adjustments = Adjustments::default();
        for (index, &row) in batch.sample_rows.iter().enumerate() {
            let row = &step.rows[row];
            let known = self.known.get(&row.sequence);
            if let Some(rules) = known.and_then(|known| known.rules.as_ref()) {
                let first = index * vocab.len();
                let limit = u32::MAX as usize;
                let fits = first + vocab.len() <= limit;
                let first = u32::try_from(first).ok().filter(|_| fits);
                let first = first.ok_or(BatchError::TooLarge {
                    step: step.number,
                    what: "logits",
                    count: (index + 1) * vocab.len(),
                    limit,
                })?;
                let position = row.position + row.input.len();
                rules.adjust(position, vocab, first, &mut adjustments.changes);
            }
            adjustments.ends.push(adjustments.changes.len());
            if let Some(mask) = &row.mask {
                adjustments.masks.rows.push(index as u32);
                mask.append_range(vocab, &mut adjustments.masks.words);
            }
        }
        Ok(adjustments)
    }

    fn lay_out(
        &mut self,
        step: u64,
        index: usize,
        row: &StepRow,
        batch: &mut Batch,
        targets: &mut Vec<(u32, (usize, u32))>,
    ) -> Result<(), String> {
        let Limits {
            vocab_size,
            kv_blocks,
            block_tokens,
            max_context_tokens,
            ..
        } = self.limits;
        let in_vocabulary = |token: u32| {
            if (token as usize) < vocab_size {
                return Ok(token);
            }
            Err(format!(
                "token {token} is outside the vocabulary of {vocab_size}"
            ))
        };
        let sampled;
        let tokens: &[u32] = match &row.input {
            RowInput::Tokens(tokens) => tokens,
            RowInput::Sampled { step: of, row } => {
                if of.checked_add(1) != Some(step) {
                    return Err(format!(
                        "its token is of step {of}, only the last step's are kept"
                    ));
                }
                let token = self.sampled.get(row);
                sampled =
                    [*token.ok_or_else(|| format!("step {of} sampled nothing in row {row}"))?];
                &sampled
            }
        };
        if tokens.is_empty() {
            return Err("it carries no token".into());
        }
        let start = match self.known.get(&row.sequence) {
            Some(known) => known.tokens,
            // A new one may start after full blocks of others, which it shares.
            None if row.position.is_multiple_of(block_tokens) => row.position,
            None => 0,
        };
        if row.position != start {
            return Err(format!("it starts at {}, {start} is due", row.position));
        }
        let end = row.position.saturating_add(tokens.len());
        if end > max_context_tokens {
            return Err(format!(
                "it reaches {end} tokens of at most {max_context_tokens}"
            ));
        }
        if let Some(block) = row
            .new_blocks
            .iter()
            .find(|&&block| block == 0 || block as usize >= kv_blocks)
        {
            return Err(format!("block {block} is outside 1..{kv_blocks}"));
        }
        let shared = match self.known.get(&row.sequence) {
            Some(_) => 0,
            None => row.position / block_tokens,
        };
        self.take_blocks(row, shared)?;
        let known = self.known.entry(row.sequence).or_default();
        known.blocks.extend(&row.new_blocks);
        if known.blocks.len() * block_tokens < end {
            return Err(format!(
                "{} blocks do not hold {end} tokens",
                known.blocks.len()
            ));
        }
        if row.prompt_targets.len() > tokens.len() {
            return Err("it has more prompt targets than tokens".into());
        }
        known.tokens = end;
        for &block in &known.blocks[row.position / block_tokens..end / block_tokens] {
            self.blocks[block as usize].full = true;
        }

        let first = batch.tokens.len() as u32;
        batch
            .block_tables
            .extend(&known.blocks[..end.div_ceil(block_tokens)]);
        batch.table_offsets.push(batch.block_tables.len() as u32);
        for (position, &token) in (row.position..).zip(tokens) {
            batch.tokens.push(in_vocabulary(token)?);
            batch.positions.push(position as u32);
            let block = known.blocks[position / block_tokens] as usize;
            batch
                .slots
                .push((block * block_tokens + position % block_tokens) as u32);
            batch.row_of_token.push(index as u32);
            batch.context_lengths.push(position as u32 + 1);
        }
        if let Some(rules) = row.sample.as_ref().and_then(|sample| sample.rules.as_ref()) {
            if known.rules.is_some() {
                return Err("its rules came before".into());
            }
            known.rules = Some(Rules::new(rules, row.position, vocab_size)?);
        }
        if let Some(rules) = &mut known.rules {
            rules.count(row.position, tokens);
        }
        for (token, &target) in (first..).zip(&row.prompt_targets) {
            targets.push((token, (index, in_vocabulary(target)?)));
        }
        if let Some(mask) = &row.mask {
            check_mask(mask, row.sample.is_some(), vocab_size)?;
        }
        if row.sample.is_some() {
            batch.logit_tokens.push(batch.tokens.len() as u32 - 1);
            batch.sample_rows.push(index);
        }
        Ok(())
    }

    /// Gives a row its new blocks: the first `shared` of them must be full, and are only read; the others
    /// must be in no table.
    fn take_blocks(&mut self, row: &StepRow, shared: usize) -> Result<(), String> {
        let (Some(read), Some(written)) =
            (row.new_blocks.get(..shared), row.new_blocks.get(shared..))
        else {
            return Err(format!(
                "it starts at {}, after more than the {} blocks that it brings",
                row.position,
                row.new_blocks.len()
            ));
        };
        let mut seen = HashSet::new();
        for &block in read {
            let state = &mut self.blocks[block as usize];
            if !state.full || !seen.insert(block) {
                return Err(format!(
                    "it starts after block {block}, which is not full or came twice"
                ));
            }
            state.users += 1;
        }
        for &block in written {
            let state = &mut self.blocks[block as usize];
            if state.users > 0 {
                return Err(format!("its block {block} is in use"));
            }
            *state = Block {
                users: 1,
                full: false,
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

/// There is something to draw under `mask`.
fn check_mask(mask: &TokenSet, samples: bool, vocab_size: usize) -> Result<(), String> {
    if !samples {
        return Err("it has a mask, and samples nothing".into());
    }
    if mask.vocab_size() != vocab_size {
        return Err(format!(
            "its mask is over {} tokens, the vocabulary has {vocab_size}",
            mask.vocab_size()
        ));
    }
    if mask.is_empty() {
        return Err("its mask leaves no token".into());
    }
    Ok(())
}
