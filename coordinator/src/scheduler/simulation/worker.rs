//! All ranks in one, remembering what they were told to write.

use std::collections::{BTreeMap, BTreeSet};

use secondwind_model::step::{
    RowInput, RowResult, SequenceId, Step, StepResult, StepRow, TokenLogprobs,
};

use crate::scheduler::SchedulerSettings;

/// All tokens that a sequence can come to have, stop tokens ignored: what a seed and the tokens before
/// would give, so that computing again gives the same.
#[derive(Clone)]
pub struct Text {
    pub tokens: Vec<u32>,
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
            let source = if position < shared {
                beginning
            } else {
                1000 + id
            };
            (mix(source, position as u64 + 1) % 24) as u32
        });
        let tokens: Vec<_> = tokens.collect();
        let mut so_far = realm.into();
        let kv = tokens.iter().map(|&token| {
            so_far = mix(so_far, token.into());
            so_far
        });
        let kv = kv.collect();
        Self { tokens, kv }
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
            .map(|row| row.prompt_targets.len() + usize::from(row.sample.is_some()));
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
        });
        assert_eq!(row.position, table.positions, "positions have no gap");
        table.blocks.extend(&row.new_blocks);
        table.positions += input.len();
        let end = table.positions;
        assert_eq!(
            table.blocks.len(),
            end.div_ceil(block_tokens),
            "blocks are taken lazily"
        );
        let table = &self.tables[&id];
        let slot = |position: usize| {
            (
                table.blocks[position / block_tokens],
                position % block_tokens,
            )
        };
        let text = &self.texts[&id];
        assert_eq!(input, text.tokens[row.position..end]);
        for position in row.position..end {
            let (block, offset) = slot(position);
            for (other, table) in &self.tables {
                assert!(
                    *other == id || !table.blocks.contains(&block),
                    "sequence {id} writes to block {block} of {other}"
                );
            }
            self.kv.insert((block, offset), text.kv[position]);
        }
        for position in 0..end {
            let read = self.kv[&slot(position)];
            assert_eq!(read, text.kv[position], "sequence {id} at {position}");
        }
        if let Some(sample) = &row.sample {
            // Rules come once, and with every token that came before, on the wire or in the cache.
            let known = self.tables.get_mut(&id).expect("it ran");
            assert_eq!(
                sample.rules.is_some(),
                !std::mem::replace(&mut known.has_rules, true),
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
        let token = row.sample.as_ref().map(|_| text.tokens[end]);
        if let Some(token) = token {
            self.sampled.insert((number, index), token);
        }
        let first = row.position + 1;
        let prompt_logprobs = (first..first + row.prompt_targets.len())
            .map(|at| (-(at as f32)).into())
            .collect::<Vec<_>>();
        (token.is_some() || !prompt_logprobs.is_empty()).then(|| RowResult {
            row: index,
            token: token.map(|token| TokenLogprobs {
                token,
                logprob: None,
                top: Vec::new(),
            }),
            prompt_logprobs,
        })
    }
}
