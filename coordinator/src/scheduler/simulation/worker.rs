//! All ranks in one, remembering what they were told to write.

use std::collections::{BTreeMap, BTreeSet};

use secondwind_model::step::{
    RowInput, RowResult, SequenceId, Step, StepResult, StepRow, TokenLogprobs,
};

use crate::scheduler::SchedulerSettings;

/// The token at a position of a sequence, stop tokens ignored: what a seed and the tokens before it
/// would give, so that computing again gives the same.
pub fn token_at(sequence: SequenceId, position: usize) -> u32 {
    let mut mixed = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (position as u64 + 1);
    mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed ^ (mixed >> 32)) % 24) as u32
}

/// The workers, with the rules that steps must keep.
pub struct Worker {
    settings: SchedulerSettings,
    next_number: u64,
    pub tables: BTreeMap<SequenceId, Table>,
    kv: BTreeMap<(u32, usize), (SequenceId, usize, u32)>,
    sampled: BTreeMap<(u64, usize), u32>,
}

#[derive(Default)]
pub struct Table {
    blocks: Vec<u32>,
    positions: usize,
    has_rules: bool,
}

impl Worker {
    pub fn new(settings: SchedulerSettings) -> Self {
        let (tables, kv, sampled) = Default::default();
        Self {
            settings,
            next_number: 0,
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
        for &block in &row.new_blocks {
            assert!(block != 0 && (block as usize) < self.settings.kv_blocks);
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
        if row.position == 0 {
            assert!(
                self.tables.insert(id, Table::default()).is_none(),
                "sequence {id} begins twice"
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
        let table = self
            .tables
            .get_mut(&id)
            .expect("a row past position 0 has a table");
        assert_eq!(row.position, table.positions, "positions have no gap");
        table.blocks.extend(&row.new_blocks);
        table.positions += input.len();
        let end = table.positions;
        assert_eq!(
            table.blocks.len(),
            end.div_ceil(block_tokens),
            "blocks are taken lazily"
        );
        let slot = |position: usize| {
            (
                table.blocks[position / block_tokens],
                position % block_tokens,
            )
        };
        for (offset, &token) in input.iter().enumerate() {
            let position = row.position + offset;
            self.kv.insert(slot(position), (id, position, token));
        }
        for position in 0..end {
            assert_eq!(
                self.kv[&slot(position)],
                (id, position, token_at(id, position)),
                "sequence {id}"
            );
        }
        if let Some(sample) = &row.sample {
            // Rules come once, and with every token that came before, on the wire or in the cache.
            assert_eq!(
                sample.rules.is_some(),
                !table.has_rules,
                "rules of sequence {id}"
            );
            if let Some(rules) = &sample.rules {
                let before: Vec<u32> = (0..row.position).map(|at| token_at(id, at)).collect();
                assert_eq!(rules.history, before);
            }
            table.has_rules = true;
        }
        for (offset, &target) in row.prompt_targets.iter().enumerate() {
            assert_eq!(target, token_at(id, row.position + offset + 1));
        }
        assert!(row.prompt_targets.is_empty() || row.prompt_targets.len() + 1 >= input.len());
        let token = row.sample.as_ref().map(|_| token_at(id, end));
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
