//! All ranks in one, remembering what they were told to write.

use std::collections::{BTreeMap, BTreeSet};

use secondwind_model::step::{
    RowInput, RowResult, SequenceId, Step, StepResult, StepRow, TokenLogprobs, TokenSet,
};

use crate::scheduler::SchedulerSettings;

/// All tokens that a sequence can come to have, stop tokens ignored: what a seed and the tokens before
/// would give, so that computing again gives the same.
#[derive(Clone)]
pub struct Text {
    pub tokens: Vec<u32>,
    /// It is only sampled under masks.
    pub masked: bool,
    /// Its sequence has rules.
    pub ruled: bool,
    /// Of each position, what its KV depends on: the realm and all tokens so far.
    kv: Vec<u64>,
}

impl Text {
    /// A text that shares its first tokens with all that begin as it does, and no others.
    pub fn new(
        id: SequenceId,
        realm: u32,
        (beginning, shared): (u64, usize),
        length: usize,
    ) -> Self {
        let tokens = (0..length).map(|position| {
            let (source, at) = match position < shared {
                true => (beginning, position),
                // Every other one repeats itself, so that guesses are right, until it does not.
                false if id.is_multiple_of(2) => (1000 + id, position % 3 + position / 16),
                false => (1000 + id, position),
            };
            (mix(source, at as u64 + 1) % 24) as u32
        });
        let tokens: Vec<_> = tokens.collect();
        let mut so_far = realm.into();
        let kv = tokens.iter().map(|&token| {
            so_far = mix(so_far, token.into());
            so_far
        });
        let kv = kv.collect();
        Self {
            tokens,
            masked: false,
            ruled: false,
            kv,
        }
    }

    /// What may be sampled at `position`; no two positions have the same.
    pub fn mask(&self, position: usize) -> Option<TokenSet> {
        let tokens = [self.tokens[position], 24 + position as u32];
        self.masked
            .then(|| TokenSet::from_tokens(tokens, 24 + self.tokens.len()))
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut mixed = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b;
    mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 32)
}

/// The workers, with the rules that steps must keep.
pub struct Worker {
    settings: SchedulerSettings,
    next_number: u64,
    pub texts: BTreeMap<SequenceId, Text>,
    pub tables: BTreeMap<SequenceId, Table>,
    kv: BTreeMap<(u32, usize), u64>,
    sampled: BTreeMap<(u64, usize), u32>,
}

pub struct Table {
    blocks: Vec<u32>,
    positions: usize,
    has_rules: bool,
    guessed: bool,
}

impl Worker {
    pub fn new(settings: SchedulerSettings) -> Self {
        let (texts, tables, kv, sampled) = Default::default();
        Self {
            settings,
            next_number: 0,
            texts,
            tables,
            kv,
            sampled,
        }
    }

    pub fn run(&mut self, step: &Step) -> StepResult {
        assert_eq!(
            step.number, self.next_number,
            "steps are numbered without gaps"
        );
        self.next_number += 1;
        for id in &step.ended {
            assert!(
                self.tables.remove(id).is_some(),
                "sequence {id} ended that the worker does not have"
            );
        }
        self.check_budget(step);
        let rows = step.rows.iter().enumerate();
        let rows = rows
            .filter_map(|(index, row)| self.run_row(step.number, index, row))
            .collect();
        StepResult {
            number: step.number,
            rows,
            gathered_rows: 0,
        }
    }

    fn check_budget(&self, step: &Step) {
        let rows = &step.rows;
        let ids: BTreeSet<_> = rows.iter().map(|row| row.sequence).collect();
        assert_eq!(ids.len(), rows.len(), "each sequence once");
        assert!(rows.len() <= self.settings.max_sequences);
        assert!(
            rows.iter().map(|row| row.input.len()).sum::<usize>() <= self.settings.max_step_tokens
        );
        let logit_rows = rows
            .iter()
            .map(|row| row.prompt_targets.len() + usize::from(row.sample.is_some()) + row.drafts);
        let places: usize = rows.iter().map(|row| 1 + row.drafts).sum();
        assert!(places <= self.settings.max_sequences);
        assert!(logit_rows.sum::<usize>() <= self.settings.max_logit_rows);
        let known = ids
            .iter()
            .filter(|id| !self.tables.contains_key(id))
            .count();
        assert!(
            self.tables.len() + known <= self.settings.max_sequences,
            "places on the worker"
        );
    }

    fn run_row(&mut self, number: u64, index: usize, row: &StepRow) -> Option<RowResult> {
        let id = row.sequence;
        let block_tokens = self.settings.block_tokens;
        // What a new sequence finds computed; all other blocks are its own.
        let cached = if self.tables.contains_key(&id) {
            0
        } else {
            assert_eq!(row.position % block_tokens, 0);
            assert!(self.settings.prefix_cache || row.position == 0);
            row.position / block_tokens
        };
        for (index, &block) in row.new_blocks.iter().enumerate() {
            assert!(block != 0 && (block as usize) < self.settings.kv_blocks);
            assert!(!row.new_blocks[..index].contains(&block));
            if index < cached {
                continue;
            }
            let owner = self
                .tables
                .iter()
                .find(|(_, table)| table.blocks.contains(&block));
            assert!(
                owner.is_none(),
                "block {block} for {id} is owned by {:?}",
                owner.map(|owner| owner.0)
            );
        }
        let input = match &row.input {
            RowInput::Tokens(tokens) => tokens.clone(),
            RowInput::Sampled { step, row } => {
                assert_eq!(step + 1, number, "a row feeds on the step before");
                vec![self.sampled[&(*step, *row)]]
            }
        };
        assert!(!input.is_empty());
        let positions = cached * block_tokens;
        let table = self.tables.entry(id).or_insert(Table {
            blocks: Vec::new(),
            positions,
            has_rules: false,
            guessed: false,
        });
        assert_eq!(row.position, table.positions, "positions have no gap");
        table.blocks.extend(&row.new_blocks);
        table.positions += input.len();
        let end = table.positions;
        // Wrong guesses leave a block behind that comes to use later.
        let spare = table.blocks.len() - end.div_ceil(block_tokens);
        assert!(
            spare == 0 || table.guessed && spare < 24,
            "blocks are taken lazily"
        );
        table.guessed |= row.drafts > 0;
        let table = &self.tables[&id];
        let slot = |position: usize| {
            (
                table.blocks[position / block_tokens],
                position % block_tokens,
            )
        };
        let text = &self.texts[&id];
        let certain = end - row.drafts;
        assert_eq!(
            input[..certain - row.position],
            text.tokens[row.position..certain]
        );
        assert!(row.drafts == 0 || input.len() == row.drafts + 1 && !text.masked && !text.ruled);
        let guesses = &input[certain - row.position..];
        let follows = text.tokens.iter().skip(certain);
        let right = guesses.iter().zip(follows);
        let right = right
            .take_while(|(guess, follows)| guess == follows)
            .count();
        for position in row.position..end {
            let (block, offset) = slot(position);
            for (other, table) in &self.tables {
                assert!(
                    *other == id || !table.blocks.contains(&block),
                    "sequence {id} writes to block {block} of {other}"
                );
            }
            let value = match position < certain + right {
                true => text.kv[position],
                false => u64::MAX,
            };
            self.kv.insert((block, offset), value);
        }
        let end = certain + right;
        for position in 0..end {
            let read = self.kv[&slot(position)];
            assert_eq!(read, text.kv[position], "sequence {id} at {position}");
        }
        let mask = row.sample.as_ref().and_then(|_| text.mask(certain));
        assert_eq!(row.mask, mask, "mask of sequence {id} at {end}");
        if let Some(sample) = &row.sample {
            // Rules come once, and with every token that came before, on the wire or in the cache.
            let known = self.tables.get_mut(&id).expect("it ran");
            known.positions = end;
            assert_eq!(
                sample.rules.is_some(),
                text.ruled && !std::mem::replace(&mut known.has_rules, true),
                "rules of sequence {id}"
            );
            if let Some(rules) = &sample.rules {
                assert_eq!(rules.history, text.tokens[..row.position]);
            }
        }
        for (offset, &target) in row.prompt_targets.iter().enumerate() {
            assert_eq!(target, text.tokens[row.position + offset + 1]);
        }
        assert!(row.prompt_targets.is_empty() || row.prompt_targets.len() + 1 >= input.len());
        let tokens: Vec<u32> = match &row.sample {
            Some(_) => text.tokens[certain..=end].to_vec(),
            None => Vec::new(),
        };
        if let Some(&token) = tokens.last() {
            self.sampled.insert((number, index), token);
        }
        let first = row.position + 1;
        let prompt_logprobs = (first..first + row.prompt_targets.len())
            .map(|at| (-(at as f32)).into())
            .collect::<Vec<_>>();
        (!tokens.is_empty() || !prompt_logprobs.is_empty()).then(|| RowResult {
            row: index,
            tokens: tokens
                .into_iter()
                .map(|token| TokenLogprobs {
                    token,
                    logprob: None,
                    top: Vec::new(),
                })
                .collect(),
            prompt_logprobs,
        })
    }
}
