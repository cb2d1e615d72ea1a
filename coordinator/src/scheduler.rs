//! Who runs when, and in which KV blocks. Pure: plain data in, plain data out; no clock, no I/O.
//!
//! [`Scheduler::submit`] puts a sequence at the end of the queue; [`Scheduler::next_step`] says what
//! the group does next; [`Scheduler::commit`] takes what a step gave and says what that means for the
//! clients. The scheduler holds every token of every sequence, so that losing the whole group costs a
//! computation and no request ([`Scheduler::abort_epoch`]).
//!
//! # Rules
//! - Each running sequence has at most one row in a step: first those that decode, then chunks of
//!   prompts under `max_step_tokens`. A step takes at most `max_logit_rows` rows of logits.
//! - Up to two steps are in flight. The second feeds on the first through
//!   [`RowInput::Sampled`](secondwind_model::step::RowInput::Sampled). If the first turns out to end a
//!   sequence, what the second sampled for it is dropped.
//! - Blocks are taken as tokens are scheduled, the oldest sequence first. When none is left the
//!   youngest sequence is preempted: its blocks are freed and it waits, with all its tokens, to be
//!   computed again. If it is in flight, it is left out of steps until that is committed. The oldest
//!   is never preempted.
//! - A sequence leaves the workers through [`Step::ended`](secondwind_model::step::Step::ended), once
//!   for each time it came there in an epoch. Workers forget `ended` before they run `rows`: the same id
//!   in both means forget, then start again at position 0. Block tables are per sequence and
//!   steps run in order, so a block may change hands in the step that tells of its owner's end. When
//!   nothing else is left to run, a step without rows carries the endings; it gets a result without
//!   rows.
#![forbid(unsafe_code)]

mod batch;
pub mod blocks;
mod commit;
mod policy;
mod sequence;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use secondwind_model::step::{PromptLogprob, SequenceId, TokenLogprobs};

use blocks::BlockPool;
use policy::Waiting;
use sequence::{Phase, Sequence, SequenceTable};

pub use commit::CommitError;
pub use sequence::NewSequence;

/// What the plan and the operator allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// Sequences that may run at once. No more run than a step has tokens or logit rows for, so that
    /// neither decodes nor prompts starve.
    pub max_sequences: usize,
    /// Tokens of one step.
    pub max_step_tokens: usize,
    /// Rows of one step for which logits are computed.
    pub max_logit_rows: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// KV blocks of the group, the padding block included.
    pub kv_blocks: usize,
    /// Longest sequence, prompt and output together.
    pub max_context_tokens: usize,
    /// Steps in flight: 1 or 2.
    pub max_in_flight: usize,
    /// Sequences that may wait beyond those for which there is a place to run.
    pub max_waiting: usize,
}

/// Settings under which nothing could run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A limit that must be positive is not.
    #[error("{setting} must be at least 1")]
    Zero {
        /// Its name.
        setting: &'static str,
    },
    /// Only one or two steps can be in flight: a row feeds on the step before its own at most.
    #[error("max_in_flight must be 1 or 2, not {max_in_flight}")]
    InFlight {
        /// What was asked for.
        max_in_flight: usize,
    },
}

/// Why a sequence is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no first position to compute.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Neither an output token nor a prompt log-probability is wanted.
    #[error("max_tokens is 0 and no prompt log-probabilities are wanted")]
    NothingToDo,
    /// Too many wait already; later there may be room.
    #[error("{waiting} sequences wait already")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// The prompt leaves no room in the context for what is wanted.
    #[error(
        "the prompt has {prompt_tokens} tokens, the context holds {max_context_tokens} with the output"
    )]
    PromptTooLong {
        /// Its length.
        prompt_tokens: usize,
        /// The limit.
        max_context_tokens: usize,
    },
    /// Even alone it could not finish.
    #[error("the sequence may need {needed} kv blocks, the group has {kv_blocks}")]
    TooFewBlocks {
        /// Blocks at its full length.
        needed: usize,
        /// Blocks that a sequence can have.
        kv_blocks: usize,
    },
}

/// Why a sequence ended of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// It sampled one of its stop tokens, which was emitted last.
    StopToken,
    /// It reached `max_tokens` or the end of the context.
    Length,
}

/// What a committed step means for a client.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next token.
    Token {
        /// Whose.
        sequence: SequenceId,
        /// The token and its log-probabilities.
        token: TokenLogprobs,
    },
    /// Log-probabilities of the next prompt tokens; the first token has none.
    PromptLogprobs {
        /// Whose.
        sequence: SequenceId,
        /// Index in the prompt of the token of the first of them.
        position: usize,
        /// One for each.
        logprobs: Vec<PromptLogprob>,
    },
    /// No event of the sequence follows.
    Finished {
        /// Whose.
        sequence: SequenceId,
        /// Why.
        reason: FinishReason,
    },
}

/// How things stand, and sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Accepted sequences that hold no place.
    pub waiting: usize,
    /// Sequences with a place on the workers.
    pub running: usize,
    /// Steps sent and not committed.
    pub steps_in_flight: usize,
    /// KV blocks owned.
    pub blocks_used: usize,
    /// KV blocks that can be owned.
    pub blocks_total: usize,
    /// Sum: sequences sent back to wait because blocks ran out.
    pub preemptions: u64,
    /// Sum: tokens whose steps were committed.
    pub computed_tokens: u64,
    /// Sum: those of them that had been computed before.
    pub recomputed_tokens: u64,
    /// Sum: tokens emitted.
    pub sampled_tokens: u64,
}

/// Decides every step of the group.
#[derive(Clone, Debug)]
pub struct Scheduler {
    settings: SchedulerSettings,
    pool: BlockPool,
    sequences: SequenceTable,
    /// Sequences in `Prefill` and `Decode`, oldest first.
    running: Vec<SequenceId>,
    waiting: VecDeque<Waiting>,
    in_flight: VecDeque<commit::InFlightStep>,
    /// Left the workers since the last step.
    ended: Vec<SequenceId>,
    next_number: u64,
    next_id: SequenceId,
    totals: Counters,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    pub fn new(settings: SchedulerSettings) -> Result<Self, SettingsError> {
        for (setting, value) in [
            ("max_sequences", settings.max_sequences),
            ("max_step_tokens", settings.max_step_tokens),
            ("max_logit_rows", settings.max_logit_rows),
            ("block_tokens", settings.block_tokens),
            ("max_context_tokens", settings.max_context_tokens),
        ] {
            if value == 0 {
                return Err(SettingsError::Zero { setting });
            }
        }
        if !(1..=2).contains(&settings.max_in_flight) {
            return Err(SettingsError::InFlight {
                max_in_flight: settings.max_in_flight,
            });
        }
        Ok(Self {
            settings,
            pool: BlockPool::new(settings.kv_blocks),
            sequences: SequenceTable::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: VecDeque::new(),
            ended: Vec::new(),
            next_number: 0,
            next_id: 1,
            totals: Counters::default(),
        })
    }

    /// Accepts a sequence, or says why not. Ids are never used again and grow with arrival.
    pub fn submit(&mut self, new: NewSequence) -> Result<SequenceId, Refusal> {
        let prompt_tokens = new.prompt.len();
        let max_context_tokens = self.settings.max_context_tokens;
        if prompt_tokens == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if new.max_tokens == 0 && !new.prompt_logprobs {
            return Err(Refusal::NothingToDo);
        }
        if prompt_tokens + usize::from(new.max_tokens > 0) > max_context_tokens {
            return Err(Refusal::PromptTooLong {
                prompt_tokens,
                max_context_tokens,
            });
        }
        let sequence = Sequence::new(new, max_context_tokens);
        self.check_blocks(&sequence)?;
        let places = self.max_running().saturating_sub(self.running.len());
        if self.waiting.len() >= self.settings.max_waiting.saturating_add(places) {
            return Err(Refusal::QueueFull {
                waiting: self.waiting.len(),
            });
        }
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.0.insert(id, sequence);
        self.waiting.push_back(Waiting { id });
        Ok(id)
    }

    /// Ends a sequence from outside: its client went away, or its text reached a stop string. No later
    /// step carries it and no later event names it; its blocks are free as soon as no step in flight
    /// uses them. False when it is not known or over already.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        match self.sequences.0.get(&id).map(|sequence| sequence.phase) {
            None | Some(Phase::Finishing) => false,
            Some(Phase::Waiting) => {
                self.waiting.retain(|waiting| waiting.id != id);
                self.sequences.0.remove(&id);
                true
            }
            Some(Phase::Prefill | Phase::Decode) => {
                self.end(id);
                true
            }
        }
    }

    /// The group is gone. Steps in flight are dropped, every sequence waits to be computed again with
    /// the tokens it has, and steps count from 0 anew. Workers of a new epoch know no sequence.
    pub fn abort_epoch(&mut self) {
        self.in_flight.clear();
        self.ended.clear();
        self.next_number = 0;
        for id in std::mem::take(&mut self.running).into_iter().rev() {
            self.sequences[id].restart(&mut self.pool);
            self.waiting.push_front(Waiting { id });
        }
        let pool = &mut self.pool;
        self.sequences.0.retain(|_, sequence| {
            if sequence.phase == Phase::Finishing {
                sequence.release_blocks(pool);
            }
            sequence.phase == Phase::Waiting
        });
        debug_assert_eq!(self.pool.used(), 0);
    }

    /// Begins an epoch with another number of KV blocks, after [`abort_epoch`](Self::abort_epoch).
    /// Sequences that could not finish any more are dropped and returned.
    pub fn replan(&mut self, kv_blocks: usize) -> Vec<(SequenceId, Refusal)> {
        self.abort_epoch();
        self.settings.kv_blocks = kv_blocks;
        self.pool = BlockPool::new(kv_blocks);
        let mut refused = Vec::new();
        for (&id, sequence) in &self.sequences.0 {
            if let Err(refusal) = self.check_blocks(sequence) {
                refused.push((id, refusal));
            }
        }
        for (id, _) in &refused {
            self.cancel(*id);
        }
        refused
    }

    /// Nothing is accepted and unfinished, nothing in flight, and the workers know no sequence.
    pub fn is_idle(&self) -> bool {
        self.sequences.0.is_empty() && self.in_flight.is_empty() && self.ended.is_empty()
    }

    /// How things stand.
    pub fn counters(&self) -> Counters {
        Counters {
            waiting: self.waiting.len(),
            running: self.running.len(),
            steps_in_flight: self.in_flight.len(),
            blocks_used: self.pool.used(),
            blocks_total: self.pool.total(),
            ..self.totals
        }
    }

    /// Takes a running sequence off the workers for good.
    fn end(&mut self, id: SequenceId) {
        if let Ok(index) = self.running.binary_search(&id) {
            self.running.remove(index);
        }
        self.sequences[id].phase = Phase::Finishing;
        self.ended.push(id);
        self.drop_if_over(id);
    }

    /// Forgets a finishing sequence that no step in flight carries.
    fn drop_if_over(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        if sequence.phase == Phase::Finishing && sequence.in_flight == 0 {
            sequence.release_blocks(&mut self.pool);
            self.sequences.0.remove(&id);
        }
    }

    fn check_blocks(&self, sequence: &Sequence) -> Result<(), Refusal> {
        let needed = sequence
            .most_positions()
            .div_ceil(self.settings.block_tokens);
        let kv_blocks = self.pool.total();
        if needed > kv_blocks {
            Err(Refusal::TooFewBlocks { needed, kv_blocks })
        } else {
            Ok(())
        }
    }

    /// Sequences that run at once: each of them must find a token and a row of logits in a step.
    fn max_running(&self) -> usize {
        let settings = &self.settings;
        settings
            .max_sequences
            .min(settings.max_step_tokens)
            .min(settings.max_logit_rows)
    }
}
