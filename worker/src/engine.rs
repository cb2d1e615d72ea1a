//! The one thread that owns a rank's device, weights, KV cache and collective.
//!
//! It takes commands from a channel in order and answers with events; it sleeps when there are none.
//! Two steps may be queued: the second starts as soon as the first has ended.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
    time::{Duration, Instant},
};

use secondwind_model::{
    checkpoint::Checkpoint,
    plan::{self, ShardPlan},
    step::{SequenceId, Step, StepResult},
};

use crate::{
    backend::Backend,
    batch::{Limits, Sequences},
    collective::{Collective, CollectiveBuffer, CollectiveError},
    exec::{self, Activations, ExecError},
    loader::{self, LoadError},
    shard::Shard,
};

/// What the engine is asked to do.
pub enum Order {
    /// Become a rank of a new epoch; what was loaded for the same plan and rank is kept.
    Form(Box<Formation>),
    /// Execute a step of the current epoch.
    Step {
        /// The step's epoch; steps of a former one are dropped.
        epoch: u64,
        /// The work.
        step: Step,
    },
    /// Leave the epoch.
    Disband,
}

/// A rank's place in a new epoch.
pub struct Formation {
    /// The epoch.
    pub epoch: u64,
    /// This rank.
    pub rank: usize,
    /// Who holds what.
    pub plan: ShardPlan,
    /// Digest of plan and checkpoint.
    pub plan_digest: String,
    /// The exchange with the other ranks.
    pub collective: Box<dyn Collective>,
    /// Sums go over NCCL; `collective` is how the ranks agree on it.
    pub nccl: bool,
    /// Set when the epoch is over; a load in progress stops.
    pub cancelled: Arc<AtomicBool>,
}

/// What the engine says.
#[derive(Debug)]
pub enum Event {
    /// Bytes read of those this rank needs.
    LoadProgress {
        /// The epoch.
        epoch: u64,
        /// Read so far.
        loaded_bytes: u64,
        /// To read in all.
        total_bytes: u64,
    },
    /// The rank can execute steps.
    Ready {
        /// The epoch.
        epoch: u64,
        /// Of the plan that was loaded.
        plan_digest: String,
        /// What was chosen and why.
        choices: Vec<String>,
    },
    /// The rank could not load.
    LoadFailed {
        /// The epoch.
        epoch: u64,
        /// Why.
        message: String,
    },
    /// A step ended well.
    StepDone {
        /// The epoch.
        epoch: u64,
        /// Filled on rank 0.
        result: StepResult,
        /// From begin to end.
        took: Duration,
        /// Of that in each collective, in order, waiting included; `None` where the device sums on its own
        /// stream, unseen by the host.
        collectives: Option<Vec<Duration>>,
    },
    /// A step failed; the epoch is over for this rank.
    StepFailed {
        /// The epoch.
        epoch: u64,
        /// The step.
        number: u64,
        /// Layer, operation and cause.
        message: String,
        /// The cause lies with another rank.
        peer_lost: bool,
        /// The sequence whose values are the cause, where that is known.
        sequence: Option<SequenceId>,
    },
}

/// What a rank has loaded, and for which plan.
struct Loaded<B: Backend> {
    plan_digest: String,
    rank: usize,
    shard: Shard<B>,
    activations: Activations<B>,
    choices: Vec<String>,
}

/// A rank between Ready and the end of its epoch.
struct Running {
    epoch: u64,
    collective: Timed,
    sequences: Sequences,
    cancelled: Arc<AtomicBool>,
}

/// Runs until `orders` closes. `emit` takes events; it must not block.
pub fn run<B: Backend>(
    mut backend: B,
    checkpoint: &Checkpoint,
    orders: &Receiver<Order>,
    mut emit: impl FnMut(Event),
) {
    let mut loaded: Option<Loaded<B>> = None;
    let mut running: Option<Running> = None;
    while let Ok(order) = orders.recv() {
        match order {
            Order::Disband => end(&mut backend, &mut running),
            // Nobody waits for it any more; what is loaded may serve the next.
            Order::Form(formation) if formation.cancelled.load(Ordering::Relaxed) => {
                end(&mut backend, &mut running);
            }
            Order::Form(formation) => {
                end(&mut backend, &mut running);
                let epoch = formation.epoch;
                let cancelled = formation.cancelled.clone();
                // Whoever comes next may count epochs anew: no word of this one may reach them.
                let mut emit = |event| {
                    if !cancelled.load(Ordering::Relaxed) {
                        emit(event);
                    }
                };
                match form(
                    &mut backend,
                    checkpoint,
                    *formation,
                    loaded.take(),
                    &mut emit,
                ) {
                    Ok((now_loaded, now_running)) => {
                        emit(Event::Ready {
                            epoch,
                            plan_digest: now_loaded.plan_digest.clone(),
                            choices: now_loaded.choices.clone(),
                        });
                        loaded = Some(now_loaded);
                        running = Some(now_running);
                    }
                    Err(error) => emit(Event::LoadFailed {
                        epoch,
                        message: error.to_string(),
                    }),
                }
            }
            Order::Step { epoch, step } => {
                let (Some(loaded), Some(rank)) = (&mut loaded, &mut running) else {
                    continue;
                };
                if rank.epoch != epoch {
                    continue;
                }
                let event = execute(&mut backend, loaded, rank, &step);
                let failed = matches!(event, Event::StepFailed { .. });
                if !rank.cancelled.load(Ordering::Relaxed) {
                    emit(event);
                }
                if failed {
                    // Dropping the links tells the other ranks at once.
                    end(&mut backend, &mut running);
                }
            }
        }
    }
    end(&mut backend, &mut running);
}

/// Ends this rank's part in its epoch. Recordings go first: they sum over its links, and keep these from
/// ending.
fn end<B: Backend>(backend: &mut B, running: &mut Option<Running>) {
    backend.forget_recordings();
    *running = None;
}

fn form<B: Backend>(
    backend: &mut B,
    checkpoint: &Checkpoint,
    formation: Formation,
    loaded: Option<Loaded<B>>,
    emit: &mut impl FnMut(Event),
) -> Result<(Loaded<B>, Running), LoadError> {
    let Formation {
        epoch,
        rank,
        plan,
        plan_digest,
        collective,
        nccl,
        cancelled,
    } = formation;
    let own_digest = plan::digest(&plan, &checkpoint.digest_hex(), env!("CARGO_PKG_VERSION"));
    if own_digest != plan_digest {
        return Err(LoadError::Plan {
            what: format!("its digest is {own_digest} here and {plan_digest} at the coordinator"),
        });
    }
    // Decoding steps have a token of each sequence.
    let max_decoding = plan
        .settings
        .max_sequences
        .min(plan.settings.max_step_tokens);
    let limits = Limits {
        vocab_size: checkpoint.config().vocab_size,
        kv_blocks: plan.kv_blocks,
        block_tokens: plan.settings.block_tokens,
        max_context_tokens: plan.settings.max_context_tokens,
        max_step_tokens: plan.settings.max_step_tokens,
        max_logit_rows: plan.settings.max_logit_rows,
    };
    let kept = loaded.filter(|loaded| loaded.plan_digest == plan_digest && loaded.rank == rank);
    let mut loaded = match kept {
        Some(loaded) => loaded,
        None => {
            let progress = |loaded_bytes, total_bytes| {
                emit(Event::LoadProgress {
                    epoch,
                    loaded_bytes,
                    total_bytes,
                });
                !cancelled.load(Ordering::Relaxed)
            };
            let loader::Parts {
                shard,
                activations,
                choices,
                ..
            } = loader::load(backend, checkpoint, &plan, rank, progress)?;
            Loaded {
                plan_digest,
                rank,
                shard,
                activations,
                choices,
            }
        }
    };
    let mut collective = match nccl {
        true => backend.join_nccl(collective, cancelled.clone())?,
        false => collective,
    };
    exec::record(
        backend,
        &mut loaded.shard,
        &mut loaded.activations,
        max_decoding,
        collective.as_mut(),
    )
    .map_err(Box::new)?;
    let running = Running {
        epoch,
        collective: Timed {
            inner: collective,
            spent: Vec::new(),
        },
        sequences: Sequences::new(limits),
        cancelled,
    };
    Ok((loaded, running))
}

fn execute<B: Backend>(
    backend: &mut B,
    loaded: &mut Loaded<B>,
    rank: &mut Running,
    step: &Step,
) -> Event {
    let start = Instant::now();
    rank.collective.spent.clear();
    let epoch = rank.epoch;
    let failed = |message: String, peer_lost, sequence| Event::StepFailed {
        epoch,
        number: step.number,
        message,
        peer_lost,
        sequence,
    };
    let batch = match rank.sequences.batch(step) {
        Ok(batch) => batch,
        Err(error) => return failed(error.to_string(), false, error.sequence()),
    };
    let Loaded {
        shard, activations, ..
    } = loaded;
    let adjustments = match rank.sequences.adjustments(step, &batch, &shard.vocab) {
        Ok(adjustments) => adjustments,
        Err(error) => return failed(error.to_string(), false, error.sequence()),
    };
    let outcome: Result<_, ExecError> =
        exec::forward(backend, shard, activations, &batch, &mut rank.collective).and_then(|()| {
            exec::sample(
                backend,
                shard,
                activations,
                step,
                &batch,
                &adjustments,
                &mut rank.collective,
            )
        });
    match outcome {
        Err(error) => {
            // A mismatch is nobody's loss: the ranks no longer do the same thing.
            let peer_lost = matches!(
                &error,
                ExecError::Collective {
                    source: CollectiveError::PeerLost { .. } | CollectiveError::Late { .. },
                    ..
                }
            );
            let sequence = error.token(&batch).and_then(|token| {
                let row = *batch.row_of_token.get(token)?;
                let row = *batch.step_rows.get(row as usize)?;
                Some(step.rows.get(row)?.sequence)
            });
            failed(error.to_string(), peer_lost, sequence)
        }
        Ok(outcome) => {
            rank.sequences.sampled(step, &outcome.sampled);
            let spent = std::mem::take(&mut rank.collective.spent);
            Event::StepDone {
                epoch: rank.epoch,
                result: outcome.result,
                took: start.elapsed(),
                collectives: (!rank.collective.takes_device()).then_some(spent),
            }
        }
    }
}

/// A collective that knows how long its calls took.
struct Timed {
    inner: Box<dyn Collective>,
    /// Of each call.
    spent: Vec<Duration>,
}

impl Timed {
    fn time<T>(&mut self, call: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let start = Instant::now();
        let result = call(self.inner.as_mut());
        self.spent.push(start.elapsed());
        result
    }
}

impl Collective for Timed {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&mut self, data: CollectiveBuffer<'_>) -> Result<(), CollectiveError> {
        self.time(|inner| inner.all_reduce_sum(data))
    }

    fn takes_device(&self) -> bool {
        self.inner.takes_device()
    }

    fn expect_device_sums(&mut self) -> Result<(), CollectiveError> {
        self.inner.expect_device_sums()
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        self.inner.settle()
    }

    fn gather_to_root(&mut self, data: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.time(|inner| inner.gather_to_root(data))
    }

    fn broadcast(&mut self, data: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        self.time(|inner| inner.broadcast(data))
    }
}
