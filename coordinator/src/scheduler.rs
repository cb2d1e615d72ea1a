//! Who runs when, and in which KV blocks. Pure: plain data in, plain data out; no clock, no I/O.
//!
//! [`Scheduler::submit`] queues a sequence; [`Scheduler::next_step`] says what
//! the group does next; [`Scheduler::commit`] takes what a step gave and says what that means for the
//! clients. The scheduler holds every token of every sequence, so that losing the whole group costs a
//! computation and no request ([`Scheduler::abort_epoch`]).
//!
//! # Rules
//! - Each running sequence has at most one row in a step: first those that decode, then chunks of
//!   prompts under `max_step_tokens`; and, if any decode, under `max_prefill_tokens` for each of up
//!   to four sequences that have not their first token yet: one long prompt cannot stretch the time
//!   between tokens much, and many prompts make better use of a step. If none decodes, the oldest prompt
//!   takes what it can, but for a few short ones behind it. A step takes at most
//!   `max_logit_rows` rows of logits.
//! - Up to two steps are in flight. The second feeds on the first through
//!   [`RowInput::Sampled`](secondwind_model::step::RowInput::Sampled). If the first turns out to end a
//!   sequence, what the second sampled for it is dropped.
//! - A sequence with a mask samples only once it was told what it may sample after the token before
//!   ([`Scheduler::allow`]), so it has one step in flight at the most; the others do not wait for it.
//! - A decoding row may bring guesses of the tokens to come (`lookup.rs`), in places and rows of logits that no
//!   other sequence needs. What it gives depends on how many are right, so the sequence waits for it.
//! - Blocks are taken as tokens are scheduled, the oldest sequence first. When none is left the
//!   youngest sequence is preempted: its blocks are freed and it waits, with all its tokens, to be
//!   computed again. If it is in flight, it is left out of steps until that is committed. The oldest
//!   is never preempted.
//! - Those that wait are let in by tenant and priority (`policy.rs`); who runs does so by age alone.
//! - A full block whose step is committed may be shared (`cache.rs`): a sequence that is let in begins
//!   after the cached blocks that hold its first tokens, and its first row brings them as `new_blocks`.
//!   A shared block is never written: what a sequence computes goes to blocks of its own.
//! - A sequence leaves the workers through [`Step::ended`](secondwind_model::step::Step::ended), once
//!   for each time it came there in an epoch. Workers forget `ended` before they run `rows`: the same id
//!   in both means forget, then start again. Block tables are per sequence and
//!   steps run in order, so a block may change hands in the step that tells of its owner's end. When
//!   nothing else is left to run, a step without rows carries the endings; it gets a result without
//!   rows.
#![forbid(unsafe_code)]

pub mod backlog;
mod batch;
pub mod blocks;
mod cache;
mod commit;
mod lookup;
mod policy;
pub mod replay;
mod sequence;
mod settings;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use secondwind_model::step::{PromptLogprob, SequenceId, TokenLogprobs, TokenSet};

use cache::KvCache;
use policy::{Policy, Waiting};
use sequence::{Mask, Phase, Sequence, SequenceTable};

pub use commit::CommitError;
pub use lookup::Speculation;
pub use sequence::NewSequence;
pub use settings::{SchedulerSettings, SettingsError};

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
        /// Tokens that have to leave the queue before it has room.
        tokens_ahead: usize,
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
    /// KV blocks that sequences own.
    pub blocks_used: usize,
    /// KV blocks that only the prefix cache owns: they are taken when no others are free.
    pub blocks_cached: usize,
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
    /// Sum: tokens of sequences let in, cached ones included.
    pub let_in_tokens: u64,
    /// Sum: tokens of sequences let in, for which the prefix cache was asked.
    pub prefix_queried_tokens: u64,
    /// Sum: those of them that it had, and that were not computed.
    pub prefix_hit_tokens: u64,
    /// Sum: rows with guesses.
    pub guessing_rows: u64,
    /// Sum: guesses of committed steps.
    pub guessed_tokens: u64,
    /// Sum: those of them that were right.
    pub right_guesses: u64,
    /// Sum: cached blocks that were taken for something else.
    pub prefix_evictions: u64,
}

/// Decides every step of the group.
#[derive(Clone, Debug)]
pub struct Scheduler {
    settings: SchedulerSettings,
    kv: KvCache,
    sequences: SequenceTable,
    /// Sequences in `Prefill` and `Decode`, oldest first.
    running: Vec<SequenceId>,
    waiting: VecDeque<Waiting>,
    /// Tokens that they have.
    waiting_tokens: usize,
    policy: Policy,
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
        settings.check()?;
        Ok(Self {
            settings,
            kv: KvCache::new(
                settings.kv_blocks,
                settings.block_tokens,
                settings.prefix_cache,
            ),
            sequences: SequenceTable::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            policy: Policy::default(),
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
        let (tenant, priority) = (new.tenant, new.priority);
        let speculates = self.settings.speculation.is_some();
        let sequence = Sequence::new(new, max_context_tokens, speculates);
        self.check_blocks(&sequence)?;
        let places = self
            .settings
            .max_running()
            .saturating_sub(self.running.len());
        let waiting = self.waiting.len();
        let tokens = self.waiting_tokens;
        let excess = (tokens + prompt_tokens).saturating_sub(self.settings.max_waiting_tokens);
        if waiting >= self.settings.max_waiting.saturating_add(places) {
            return Err(Refusal::QueueFull {
                waiting,
                tokens_ahead: excess.max(tokens / waiting.max(1)),
            });
        }
        if waiting > 0 && excess > 0 {
            return Err(Refusal::QueueFull {
                waiting,
                tokens_ahead: excess,
            });
        }
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.0.insert(id, sequence);
        let waiting = self.policy.arrive(&self.waiting, id, tenant, priority);
        self.waiting.push_back(waiting);
        self.waiting_tokens += prompt_tokens;
        Ok(id)
    }

    /// What a sequence that waits for it may sample after the last token that was emitted; not empty.
    pub fn allow(&mut self, id: SequenceId, mask: TokenSet) {
        let sequence = self.sequences.0.get_mut(&id);
        if let Some(sequence) = sequence.filter(|sequence| sequence.mask == Mask::Due) {
            sequence.mask = Mask::Ready(mask);
        }
    }

    /// Ends a sequence from outside: its client went away, or its text reached a stop string. No later
    /// step carries it and no later event names it; its blocks are free as soon as no step in flight
    /// uses them. False when it is not known or over already.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        match self.sequences.0.get(&id).map(|sequence| sequence.phase) {
            None | Some(Phase::Finishing) => false,
            Some(Phase::Waiting) => {
                self.waiting.retain(|waiting| waiting.id != id);
                let sequence = self.sequences.0.remove(&id);
                self.waiting_tokens -= sequence.map_or(0, |it| it.tokens.len());
                true
            }
            Some(Phase::Prefill | Phase::Decode) => {
                self.end(id);
                true
            }
        }
    }

    /// The group is gone. Steps in flight are dropped, every sequence waits to be computed again with
    /// the tokens it has, and steps count from 0 anew. Workers of a new epoch know no sequence, and their
    /// blocks hold nothing.
    pub fn abort_epoch(&mut self) {
        self.in_flight.clear();
        self.ended.clear();
        self.next_number = 0;
        for id in std::mem::take(&mut self.running).into_iter().rev() {
            self.wait_again(id);
        }
        let kv = &mut self.kv;
        self.sequences.0.retain(|_, sequence| {
            if sequence.phase == Phase::Finishing {
                sequence.release_blocks(kv);
            }
            sequence.phase == Phase::Waiting
        });
        self.kv.forget_prefixes();
        debug_assert_eq!(self.kv.available(), self.kv.total());
    }

    /// Begins an epoch with another number of KV blocks and other costs, after [`abort_epoch`](Self::abort_epoch).
    /// Sequences that could not finish any more are dropped and returned.
    pub fn replan(
        &mut self,
        kv_blocks: usize,
        speculation: Option<Speculation>,
    ) -> Vec<(SequenceId, Refusal)> {
        self.abort_epoch();
        self.settings.kv_blocks = kv_blocks;
        self.settings.speculation = speculation;
        self.totals.prefix_evictions += self.kv.evictions();
        let settings = &self.settings;
        self.kv = KvCache::new(kv_blocks, settings.block_tokens, settings.prefix_cache);
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
            blocks_used: self.kv.in_use(),
            blocks_cached: self.kv.resting(),
            blocks_total: self.kv.total(),
            prefix_evictions: self.totals.prefix_evictions + self.kv.evictions(),
            ..self.totals
        }
    }

    /// Sends a sequence that no step in flight carries back to wait, with all its tokens.
    fn wait_again(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        sequence.restart(&mut self.kv);
        let (tenant, priority) = (sequence.realm.tenant, sequence.priority);
        let waiting = self.policy.return_to_wait(id, tenant, priority);
        self.waiting.push_front(waiting);
        self.waiting_tokens += sequence.tokens.len();
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
            sequence.release_blocks(&mut self.kv);
            self.sequences.0.remove(&id);
        }
    }

    fn check_blocks(&self, sequence: &Sequence) -> Result<(), Refusal> {
        let needed = sequence
            .most_positions()
            .div_ceil(self.settings.block_tokens);
        let kv_blocks = self.kv.total();
        if needed > kv_blocks {
            Err(Refusal::TooFewBlocks { needed, kv_blocks })
        } else {
            Ok(())
        }
    }
}
