//! Ranks driven step by step without a coordinator: what `secondwind bench model` and `secondwind profile`
//! time.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use secondwind_kernels::KernelError;
use secondwind_model::{
    plan::{ModelShape, ShardPlan},
    step::{RowInput, Sampling, SequenceId, Step, StepRow},
};

use crate::{
    backend::{Backend, LinearUse},
    batch::{BatchError, Limits, Sequences},
    collective::{Collective, CollectiveError},
    exec::{self, Activations, ExecError},
    loader::{LoadError, Parts, Phase, Readings},
    shard::Shard,
    timeline::{Mark, Part, Span},
};

/// One rank on one device.
pub struct BenchRank<B: Backend> {
    backend: B,
    shard: Shard<B>,
    activations: Activations<B>,
    collective: Box<dyn Collective>,
    limits: Limits,
    sequences: Sequences,
    next_step: u64,
    /// Which path runs what, and why.
    pub choices: Vec<String>,
    /// Device memory in use, from before anything was loaded until every decoding step was recorded.
    pub readings: Readings,
}

/// Where a step's time went.
#[derive(Clone, Debug)]
pub struct Profiled {
    /// On this rank's clock.
    pub wall_seconds: f64,
    /// On the device's.
    pub spans: Vec<Span>,
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
    /// The ranks cannot sum.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The device failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A step that does not follow.
    #[error("{0}")]
    Step(String),
}

impl<B: Backend> BenchRank<B> {
    /// Makes a rank of `plan` of what `load` brings to the device of `backend`; `host` joins it with the
    /// others, whose sums go over NCCL if `nccl`.
    ///
    /// # Errors
    /// Of loading, of the device, or that the ranks did not come together.
    pub fn new(
        mut backend: B,
        shape: &ModelShape,
        plan: &ShardPlan,
        load: impl FnOnce(&mut B) -> Result<Parts<B>, LoadError>,
        host: Box<dyn Collective>,
        nccl: bool,
    ) -> Result<Self, BenchError> {
        let Parts {
            mut shard,
            mut activations,
            choices,
            mut readings,
        } = load(&mut backend)?;
        let settings = &plan.settings;
        let mut collective = host;
        if nccl {
            collective = backend.join_nccl(collective, Arc::new(AtomicBool::new(false)))?;
            // NCCL takes most of its memory with the first sums.
            for tokens in [1, settings.max_step_tokens] {
                let elements = tokens * shard.hidden_size;
                let link = collective.as_mut();
                backend.all_reduce_sum(&mut activations.partial_sum, elements, link)?;
                backend.non_finite(true)?;
                collective.settle()?;
            }
            readings.read(&backend, Phase::Communicator);
        }
        let limits = Limits {
            vocab_size: shape.config.vocab_size,
            kv_blocks: plan.kv_blocks,
            block_tokens: settings.block_tokens,
            max_context_tokens: settings.max_context_tokens,
            max_step_tokens: settings.max_step_tokens,
            max_logit_rows: settings.max_logit_rows,
        };
        let decoding = settings.max_sequences.min(settings.max_step_tokens);
        exec::record(
            &mut backend,
            &mut shard,
            &mut activations,
            decoding,
            collective.as_mut(),
        )?;
        readings.read(&backend, Phase::Recordings);
        let sums = backend.sums_choice().map(str::to_owned);
        let choices = choices.into_iter().chain(sums).collect();
        Ok(Self {
            backend,
            shard,
            activations,
            collective,
            limits,
            sequences: Sequences::new(limits),
            next_step: 0,
            choices,
            readings,
        })
    }

    /// Device memory in use so far, now that steps ran.
    pub fn read_memory(&mut self) -> &Readings {
        self.readings.read(&self.backend, Phase::Steps);
        &self.readings
    }

    /// Times the parts of the steps that `run` takes this rank through; it says their seconds.
    ///
    /// # Errors
    /// Of `run`, or the device's.
    pub fn profile(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<f64, BenchError>,
    ) -> Result<Profiled, BenchError> {
        self.backend.start_timeline()?;
        let ran = run(self);
        // Also where the step failed: it must not go on.
        let spans = self.backend.finish_timeline();
        Ok(Profiled {
            wall_seconds: ran?,
            spans: spans?,
        })
    }

    /// What runs the linears of a step of `rows` tokens and `logit_rows` rows of logits, by the part of the
    /// step that they are.
    ///
    /// # Errors
    /// A forced path that cannot.
    pub fn linears(
        &self,
        rows: usize,
        logit_rows: usize,
    ) -> Result<Vec<(Mark, LinearUse)>, BenchError> {
        let mut uses = Vec::new();
        let mut add = |mark, linears: &[&B::Linear], rows| {
            for linear in linears {
                uses.push((mark, self.backend.linear_use(linear, rows)?));
            }
            Ok::<_, KernelError>(())
        };
        for (index, layer) in self.shard.layers.iter().enumerate() {
            let (attention, mlp) = (&layer.attention, &layer.mlp);
            let mark = |part| Mark {
                layer: Some(index),
                part,
            };
            let qkv = [&attention.query, &attention.key, &attention.value];
            add(mark(Part::Qkv), &qkv, rows)?;
            add(mark(Part::Output), &[&attention.output], rows)?;
            add(mark(Part::GateUp), &[&mlp.gate, &mlp.up], rows)?;
            add(mark(Part::Down), &[&mlp.down], rows)?;
        }
        add(Mark::of(Part::LmHead), &[&self.shard.lm_head], logit_rows)?;
        Ok(uses)
    }

    /// Seconds of all sums of a step of `tokens` tokens over the ranks, with nothing else to do; 0 for one rank.
    ///
    /// # Errors
    /// Of the collective.
    pub fn sums(&mut self, tokens: usize) -> Result<f64, BenchError> {
        let collective = self.collective.as_mut();
        if collective.world_size() == 1 {
            return Ok(0.0);
        }
        let start = Instant::now();
        for _ in 0..1 + 2 * self.shard.layers.len() {
            self.backend.all_reduce_sum(
                &mut self.activations.partial_sum,
                tokens * self.shard.hidden_size,
                collective,
            )?;
        }
        self.backend.non_finite(true)?;
        collective.settle()?;
        Ok(start.elapsed().as_secs_f64())
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
        let refused = |error: BatchError| BenchError::Step(error.to_string());
        let batch = self.sequences.batch(&step).map_err(refused)?;
        let vocab = &self.shard.vocab;
        let adjustments = self.sequences.adjustments(&step, &batch, vocab);
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
            &mut self.activations,
            &step,
            &batch,
            &adjustments.map_err(refused)?,
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
        let ids = self.limits.vocab_size.min(997);
        let tokens = (position..position + count).map(|at| (at * 7919 % ids) as u32);
        StepRow {
            sequence,
            position,
            input: RowInput::Tokens(tokens.collect()),
            new_blocks: (blocks(position)..blocks(position + count))
                .map(|b| b as u32)
                .collect(),
            sample: sample.then(Sampling::default),
            prompt_targets: Vec::new(),
            mask: None,
        }
    }
}
