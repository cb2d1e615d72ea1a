//! One step as flat arrays over its tokens, and what a rank remembers of each sequence. Pure.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use secondwind_model::step::{RowInput, SequenceId, Step, StepRow};

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
mod tests {
    use secondwind_model::step::{LogitRules, Sampling};

    use super::*;

    const LIMITS: Limits = Limits {
        vocab_size: 100,
        kv_blocks: 8,
        block_tokens: 4,
        max_context_tokens: 20,
        max_step_tokens: 8,
        max_logit_rows: 4,
    };

    fn row(sequence: u64, position: usize, tokens: &[u32], new_blocks: &[u32]) -> StepRow {
        StepRow {
            sequence,
            position,
            input: RowInput::Tokens(tokens.to_vec()),
            new_blocks: new_blocks.to_vec(),
            sample: None,
            prompt_targets: Vec::new(),
        }
    }

    fn step(number: u64, rows: Vec<StepRow>) -> Step {
        Step {
            number,
            rows,
            ended: Vec::new(),
        }
    }

    fn greedy() -> Option<Sampling> {
        Some(Sampling::default())
    }

    #[test]
    fn lays_out_chunks_and_sampled_tokens_of_several_sequences() {
        let mut sequences = Sequences::new(LIMITS);
        let mut prompt = row(7, 0, &[1, 2, 3, 4, 5], &[3, 6]);
        prompt.prompt_targets = vec![2, 3];
        prompt.sample = greedy();
        let batch = sequences
            .batch(&step(0, vec![prompt, row(9, 0, &[8], &[1])]))
            .unwrap();
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 8]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 0]);
        assert_eq!(batch.slots, [12, 13, 14, 15, 24, 4]);
        assert_eq!(batch.block_tables, [3, 6, 1]);
        assert_eq!(batch.table_offsets, [0, 2, 3]);
        assert_eq!(batch.row_of_token, [0, 0, 0, 0, 0, 1]);
        assert_eq!(batch.context_lengths, [1, 2, 3, 4, 5, 1]);
        assert_eq!(batch.logit_tokens, [4, 0, 1]);
        assert_eq!(batch.sample_rows, [0]);
        assert_eq!(batch.targets, [(0, 2), (0, 3)]);

        sequences.sampled([(0, 42)]);
        let mut next = row(7, 5, &[], &[]);
        next.input = RowInput::Sampled { step: 0, row: 0 };
        let batch = sequences.batch(&step(1, vec![next])).unwrap();
        assert_eq!((batch.tokens, batch.slots), (vec![42], vec![25]));
    }

    #[test]
    fn rules_hold_until_a_sequence_leaves() {
        let mut sequences = Sequences::new(LIMITS);
        let ruled = |repetition_penalty, history: &[u32]| {
            Some(Sampling {
                rules: Some(Box::new(LogitRules {
                    repetition_penalty,
                    prompt_tokens: 3,
                    history: history.to_vec(),
                    ..LogitRules::default()
                })),
                ..Sampling::default()
            })
        };
        let touched = |sequences: &Sequences, step: &Step, batch: &Batch| {
            // This rank has tokens 10 to 49.
            let adjustments = sequences.adjustments(step, batch, &(10..50)).unwrap();
            let elements = |row| {
                let changes = &adjustments.changes[adjustments.of_row(row)];
                changes.iter().map(|change| change.element).collect()
            };
            (0..batch.sample_rows.len())
                .map(elements)
                .collect::<Vec<Vec<u32>>>()
        };
        // The rules come with the last chunk of the prompt, beside a sequence without any.
        sequences
            .batch(&step(0, vec![row(7, 0, &[12, 9], &[3])]))
            .unwrap();
        let mut last = row(7, 2, &[49], &[]);
        last.sample = ruled(1.1, &[12, 9]);
        let mut other = row(8, 0, &[20], &[4]);
        other.sample = greedy();
        let second = step(1, vec![other, last]);
        let batch = sequences.batch(&second).unwrap();
        assert_eq!(
            touched(&sequences, &second, &batch),
            [vec![], vec![40 + 2, 40 + 39]]
        );
        sequences.sampled([(0, 21), (1, 30)]);
        let mut sampled = row(7, 3, &[], &[]);
        sampled.input = RowInput::Sampled { step: 1, row: 1 };
        sampled.sample = greedy();
        let third = step(2, vec![sampled]);
        let batch = sequences.batch(&third).unwrap();
        assert_eq!(touched(&sequences, &third, &batch), [vec![2, 20, 39]]);
        // Rules come once for each time that a sequence comes.
        let mut again = row(7, 4, &[1], &[5]);
        again.sample = ruled(1.1, &[12, 9, 49, 30]);
        let error = sequences
            .batch(&step(3, vec![again.clone()]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("its rules came before"), "{error}");
        let mut anew = step(4, vec![row(7, 0, &[1], &[2])]);
        anew.ended = vec![7];
        anew.rows[0].sample = greedy();
        let batch = sequences.batch(&anew).unwrap();
        assert_eq!(touched(&sequences, &anew, &batch), [Vec::<u32>::new()]);
        let mut wrong = row(9, 0, &[1], &[6]);
        wrong.sample = ruled(-1.0, &[]);
        let error = sequences.batch(&step(5, vec![wrong])).unwrap_err();
        assert!(error.to_string().contains("no legal numbers"), "{error}");
    }

    #[test]
    fn a_padded_step_keeps_its_rows_and_adds_rows_without_a_cache() {
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(0, vec![row(7, 0, &[5, 6], &[3])]))
            .unwrap();
        let mut decoding = row(7, 2, &[9], &[]);
        decoding.sample = greedy();
        let batch = sequences.batch(&step(1, vec![decoding])).unwrap();
        assert!(batch.is_decoding());
        let padded = batch.padded(3);
        assert_eq!(padded.tokens, [9, 0, 0]);
        assert_eq!(padded.slots[1..], [NO_SLOT; 2]);
        assert_eq!(padded.context_lengths, [3, 0, 0]);
        assert_eq!(padded.row_of_token, [0, 1, 2]);
        assert_eq!(padded.logit_tokens, [0, 1, 2]);
        assert_eq!(padded.table_offsets, [0, 1, 1, 1]);
        assert_eq!(batch.padded(1), batch);
    }

    #[test]
    fn an_ended_sequence_starts_anew_in_the_same_step() {
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(0, vec![row(7, 0, &[1, 2], &[3])]))
            .unwrap();
        let mut again = step(1, vec![row(7, 0, &[1], &[2])]);
        again.ended = vec![7];
        assert_eq!(sequences.batch(&again).unwrap().slots, [8]);
    }

    #[test]
    fn a_new_sequence_may_start_after_full_blocks_of_another() {
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(0, vec![row(7, 0, &[1, 2, 3, 4, 5, 6], &[3, 6])]))
            .unwrap();
        let batch = sequences
            .batch(&step(1, vec![row(8, 4, &[9, 9], &[3, 2])]))
            .unwrap();
        assert_eq!(batch.positions, [4, 5]);
        assert_eq!(batch.slots, [8, 9]);
        assert_eq!(batch.block_tables, [3, 2]);
        assert_eq!(batch.context_lengths, [5, 6]);
        // The blocks outlive the sequence that wrote them, until they are given to another.
        let mut third = step(2, vec![row(9, 4, &[1], &[3, 6])]);
        third.ended = vec![7, 8];
        assert_eq!(sequences.batch(&third).unwrap().block_tables, [3, 6]);
        let mut again = step(3, vec![row(7, 0, &[1], &[3])]);
        again.ended = vec![9];
        sequences.batch(&again).unwrap();
        let refused = sequences.batch(&step(4, vec![row(1, 4, &[1], &[3, 2])]));
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("block 3, which is not full"),
        );
    }

    #[test]
    fn refuses_to_share_anything_else() {
        let far = usize::MAX & !3;
        let cases: [(StepRow, &str); 9] = [
            (row(1, far, &[1; 5], &[3, 2]), "tokens of at most 20"),
            // Block 6 holds two tokens only, block 5 was never written.
            (row(1, 8, &[1], &[3, 6, 2]), "block 6, which is not full"),
            (row(1, 4, &[1], &[5, 2]), "block 5, which is not full"),
            (row(1, 6, &[1], &[3, 2]), "it starts at 6, 0 is due"),
            (row(1, 8, &[1], &[3]), "after more than the 1 blocks"),
            (row(1, 4, &[1], &[3]), "1 blocks do not hold 5 tokens"),
            (
                row(1, 8, &[1], &[3, 3, 2]),
                "block 3, which is not full or came twice",
            ),
            (row(1, 0, &[1], &[3]), "its block 3 is in use"),
            (row(1, 4, &[1], &[3, 6]), "its block 6 is in use"),
        ];
        for (asked, words) in cases {
            let mut sequences = Sequences::new(LIMITS);
            sequences
                .batch(&step(0, vec![row(7, 0, &[1, 2, 3, 4, 5, 6], &[3, 6])]))
                .unwrap();
            let error = sequences.batch(&step(1, vec![asked])).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        // A known sequence goes on where it is, whatever it brings.
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(
                0,
                vec![row(7, 0, &[1, 2, 3, 4], &[3]), row(8, 0, &[1], &[2])],
            ))
            .unwrap();
        let error = sequences
            .batch(&step(1, vec![row(8, 4, &[1], &[3, 5])]))
            .unwrap_err();
        assert!(
            error.to_string().contains("starts at 4, 1 is due"),
            "{error}"
        );
    }

    #[test]
    fn refuses_what_does_not_follow() {
        let cases: [(StepRow, &str); 8] = [
            (row(1, 2, &[1], &[2]), "it starts at 2, 0 is due"),
            (
                row(1, 0, &[100], &[2]),
                "token 100 is outside the vocabulary of 100",
            ),
            (row(1, 0, &[1], &[0]), "block 0 is outside 1..8"),
            (row(1, 0, &[1], &[8]), "block 8 is outside 1..8"),
            (row(1, 0, &[1; 5], &[2]), "1 blocks do not hold 5 tokens"),
            (row(1, 0, &[], &[2]), "it carries no token"),
            (
                row(1, 0, &[1; 21], &[1, 2, 3, 4, 5, 6]),
                "it reaches 21 tokens of at most 20",
            ),
            (
                StepRow {
                    input: RowInput::Sampled { step: 0, row: 3 },
                    ..row(1, 0, &[], &[2])
                },
                "its token is of step 0, only the last step's are kept",
            ),
        ];
        for (row, words) in cases {
            let error = Sequences::new(LIMITS)
                .batch(&step(0, vec![row]))
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{error}");
        }
        let error = Sequences::new(LIMITS)
            .batch(&step(3, Vec::new()))
            .unwrap_err();
        assert_eq!(
            error,
            BatchError::Gap {
                expected: 0,
                got: 3
            }
        );
        let error = Sequences::new(LIMITS)
            .batch(&step(0, vec![row(1, 0, &[1; 9], &[1, 2, 3])]))
            .unwrap_err();
        assert!(
            error.to_string().contains("9 tokens, the plan allows 8"),
            "{error}"
        );
    }
}
