//! What a rank remembers of each sequence, and how it lays out the next step. Pure.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use secondwind_model::step::{RowInput, Sampling, SequenceId, Step, StepRow, TokenSet};

use super::{Batch, BatchError, Limits};
use crate::rules::{Adjustments, Rules};

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

    /// Remembers what `step` sampled: of each row that samples, the guesses that were right and one token
    /// more. What was computed of wrong guesses is forgotten.
    pub fn sampled(&mut self, step: &Step, sampled: &[(usize, Vec<u32>)]) {
        self.sampled.clear();
        for (index, tokens) in sampled {
            if let Some(&last) = tokens.last() {
                self.sampled.insert(*index, last);
            }
            let row = &step.rows[*index];
            if row.drafts > 0
                && let Some(known) = self.known.get_mut(&row.sequence)
            {
                known.tokens = row.position + tokens.len();
                let full = row.position / self.limits.block_tokens
                    ..known.tokens / self.limits.block_tokens;
                for &block in &known.blocks[full] {
                    self.blocks[block as usize].full = true;
                }
            }
        }
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
        for (index, &(row, position)) in batch.samples.iter().enumerate() {
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
        if row.drafts > 0 {
            let known = self.known.get(&row.sequence);
            let has_rules = known.is_some_and(|known| known.rules.is_some());
            check_drafts(row, tokens.len(), has_rules)?;
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
        // Of guesses it is not known yet which count.
        let certain = end - row.drafts;
        for &block in &known.blocks[row.position / block_tokens..certain / block_tokens] {
            self.blocks[block as usize].full = true;
        }

        let first = batch.tokens.len() as u32;
        for (position, &token) in (row.position..).zip(tokens) {
            if position == row.position || row.drafts > 0 {
                let table = &known.blocks[..end.div_ceil(block_tokens)];
                batch.block_tables.extend(table);
                batch.table_offsets.push(batch.block_tables.len() as u32);
                batch.step_rows.push(index);
            }
            batch.tokens.push(in_vocabulary(token)?);
            batch.positions.push(position as u32);
            let block = known.blocks[position / block_tokens] as usize;
            batch
                .slots
                .push((block * block_tokens + position % block_tokens) as u32);
            batch.row_of_token.push(batch.step_rows.len() as u32 - 1);
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
            let tokens = batch.tokens.len() as u32;
            for (token, position) in (tokens - 1 - row.drafts as u32..tokens).zip(certain..) {
                batch.logit_tokens.push(token);
                batch.samples.push((index, position));
            }
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

/// The row is one token and guesses, and nothing but them says what is drawn.
fn check_drafts(row: &StepRow, tokens: usize, has_rules: bool) -> Result<(), String> {
    let drafts = row.drafts;
    if drafts != tokens - 1 {
        return Err(format!("{drafts} of its {tokens} tokens are guesses"));
    }
    let free = |sample: &Sampling| sample.rules.is_none() && !has_rules && row.mask.is_none();
    if !row.sample.as_ref().is_some_and(free) || !row.prompt_targets.is_empty() {
        return Err("it has guesses, and samples nothing, or not by them alone".into());
    }
    Ok(())
}
