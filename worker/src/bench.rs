//! Ranks of random weights, driven step by step without a coordinator: what `secondwind bench model`
//! times.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use secondwind_model::{
    plan::{ModelShape, ShardPlan},
    step::{RowInput, Sampling, SequenceId, Step, StepRow},
};

use crate::{
    backend::{Backend, CudaBackend},
    batch::{Limits, Sequences},
    collective::Collective,
    exec::{self, Activations, ExecError},
    loader::{self, LoadError},
    shard::Shard,
};

/// One rank on one card.
pub struct BenchRank {
    backend: CudaBackend,
    shard: Shard<CudaBackend>,
    activations: Activations<CudaBackend>,
    collective: Box<dyn Collective>,
    limits: Limits,
    sequences: Sequences,
    next_step: u64,
    /// Which path runs what, and why.
    pub choices: Vec<String>,
    /// Device memory taken since before anything was loaded, after every decoding step was recorded.
    pub taken_bytes: u64,
    /// Of these, what recordings took.
    pub recording_bytes: u64,
}

/// Why a measurement ended.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The rank could not be made.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A step that does not follow.
    #[error("{0}")]
    Step(String),
}

impl BenchRank {
    /// Makes rank `rank` of `plan` on the card of `backend`; `host` joins it with the others, whose sums
    /// go over NCCL if `nccl`.
    ///
    /// # Errors
    /// The card's, or that the ranks did not come together.
    pub fn new(
        mut backend: CudaBackend,
        shape: &ModelShape,
        plan: &ShardPlan,
        rank: usize,
        host: Box<dyn Collective>,
        nccl: bool,
    ) -> Result<Self, BenchError> {
        let free = |backend: &CudaBackend| backend.device().memory().map_or(0, |(free, _)| free);
        let before = free(&backend);
        let parts = loader::random(&mut backend, shape, plan, rank)?;
        let mut collective = match nccl {
            true => backend
                .join_nccl(host, Arc::new(AtomicBool::new(false)))
                .map_err(LoadError::from)?,
            false => host,
        };
        let settings = &plan.settings;
        let limits = Limits {
            vocab_size: shape.config.vocab_size,
            kv_blocks: plan.kv_blocks,
            block_tokens: settings.block_tokens,
            max_context_tokens: settings.max_context_tokens,
            max_step_tokens: settings.max_step_tokens,
            max_logit_rows: settings.max_logit_rows,
        };
        let (mut shard, mut activations) = (parts.shard, parts.activations);
        let loaded = free(&backend);
        let decoding = settings.max_sequences.min(settings.max_step_tokens);
        exec::record(
            &mut backend,
            &mut shard,
            &mut activations,
            decoding,
            collective.as_mut(),
        )?;
        let recorded = free(&backend);
        let sums = backend
            .sums_choice()
            .map(str::to_owned)
            .into_iter()
            .collect();
        Ok(Self {
            backend,
            shard,
            activations,
            collective,
            limits,
            sequences: Sequences::new(limits),
            next_step: 0,
            choices: [parts.choices, sums].concat(),
            taken_bytes: before.saturating_sub(recorded),
            recording_bytes: loaded.saturating_sub(recorded),
        })
    }

    /// Forgets every sequence.
    pub fn clear(&mut self) {
        self.sequences = Sequences::new(self.limits);
        self.next_step = 0;
    }

    /// Runs one step; how long it took on this rank's clock.
    ///
    /// # Errors
    /// Of the step.
    pub fn step(&mut self, rows: Vec<StepRow>) -> Result<Duration, BenchError> {
        let step = Step {
            number: self.next_step,
            rows,
            ended: Vec::new(),
        };
        self.next_step += 1;
        let start = Instant::now();
        let batch = self
            .sequences
            .batch(&step)
            .map_err(|error| BenchError::Step(error.to_string()))?;
        let collective = self.collective.as_mut();
        exec::forward(
            &mut self.backend,
            &mut self.shard,
            &mut self.activations,
            &batch,
            collective,
        )?;
        let outcome = exec::sample(
            &mut self.backend,
            &self.shard,
            &self.activations,
            &step,
            &batch,
            collective,
        )?;
        self.sequences.sampled(outcome.sampled);
        Ok(start.elapsed())
    }

    /// Seconds of every step of a prompt of `tokens` tokens, whose last one is sampled.
    ///
    /// # Errors
    /// Of a step.
    pub fn prompt(&mut self, sequence: SequenceId, tokens: usize) -> Result<f64, BenchError> {
        let mut seconds = 0.0;
        let mut position = 0;
        while position < tokens {
            let count = (tokens - position).min(self.limits.max_step_tokens);
            let last = position + count == tokens;
            let row = self.row(sequence, position, count, last);
            seconds += self.step(vec![row])?.as_secs_f64();
            position += count;
        }
        Ok(seconds)
    }

    /// Seconds of each of `steps` decoding steps of sequences `1..=sequences`, which hold `position`
    /// tokens at the first.
    ///
    /// # Errors
    /// Of a step.
    pub fn decode(
        &mut self,
        sequences: u64,
        position: usize,
        steps: usize,
    ) -> Result<Vec<f64>, BenchError> {
        (0..steps)
            .map(|step| {
                let rows = (1..=sequences)
                    .map(|id| self.row(id, position + step, 1, true))
                    .collect();
                Ok(self.step(rows)?.as_secs_f64())
            })
            .collect()
    }

    /// The next tokens of a sequence, with the blocks that they are the first to need.
    fn row(&self, sequence: SequenceId, position: usize, count: usize, sample: bool) -> StepRow {
        let each = self
            .limits
            .max_context_tokens
            .div_ceil(self.limits.block_tokens);
        // Block 0 is nobody's.
        let first = 1 + (sequence as usize - 1) * each;
        let blocks = |tokens: usize| first + tokens.div_ceil(self.limits.block_tokens);
        let tokens = (position..position + count).map(|at| (at * 7919 % 997) as u32);
        StepRow {
            sequence,
            position,
            input: RowInput::Tokens(tokens.collect()),
            new_blocks: (blocks(position)..blocks(position + count))
                .map(|b| b as u32)
                .collect(),
            sample: sample.then_some(Sampling {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 0,
                logprobs: None,
            }),
            prompt_targets: Vec::new(),
        }
    }
}
