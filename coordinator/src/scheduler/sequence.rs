//! One sequence: its tokens, how far they are computed, and what its next row would be.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut, Range};

use secondwind_model::step::{LogitRules, RowInput, Sampling, SequenceId, TokenSet};

use super::cache::{KvCache, Realm};
use super::lookup::{Lookup, Speculation};
use crate::request::CacheSalt;

/// What a caller asks for. Everything is resolved: defaults are filled in, text is tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct NewSequence {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to sample; the end of the context may come first.
    pub max_tokens: usize,
    /// Tokens that end the sequence (they are emitted); empty to ignore them all.
    pub stop_tokens: Vec<u32>,
    /// How each token is drawn.
    pub sampling: Sampling,
    /// Report the log-probability of every prompt token but the first.
    pub prompt_logprobs: bool,
    /// The only tokens that may be sampled first. After each token the sequence waits to be told the next
    /// ([`super::Scheduler::allow`]). Absent: all tokens may be sampled, always.
    pub mask: Option<TokenSet>,
    /// Whose it is; 0 when nobody said. Tenants share the group's time evenly, and no prefix.
    pub tenant: u32,
    /// Among those of its tenant the higher one is let in first; 0 when nobody said.
    pub priority: i8,
    /// Prefixes are shared only with sequences of the same.
    pub cache_salt: Option<CacheSalt>,
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Holds no block and no place on the workers.
    Waiting,
    /// On the workers; tokens that it has are still to be scheduled.
    Prefill,
    /// On the workers; one token at a time.
    Decode,
    /// Finished or cancelled; keeps its blocks until no step in flight uses them.
    Finishing,
}

/// Which tokens a sequence may sample next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Mask {
    /// All of them, always.
    Free,
    /// It waits to be told.
    Due,
    /// These, after the tokens that it has.
    Ready(TokenSet),
}

/// A sequence from its acceptance until its last step in flight is committed.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Prompt and output; a token enters when its step is committed.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// Tokens to sample at most, the context considered.
    pub max_output: usize,
    pub stop_tokens: Vec<u32>,
    pub sampling: Sampling,
    /// Taken out of `sampling`: workers are told once.
    pub rules: Option<Box<LogitRules>>,
    pub mask: Mask,
    /// Of one whose tokens may be guessed.
    pub lookup: Option<Lookup>,
    pub prompt_logprobs: bool,
    pub realm: Realm,
    pub priority: i8,
    pub phase: Phase,
    /// Positions whose KV a step, committed or in flight, has written.
    pub scheduled: usize,
    /// Positions whose step is committed.
    pub computed: usize,
    /// Most positions that were ever committed: what lies below is computed again.
    pub high_water: usize,
    /// Tokens that steps in flight sample, guesses that may be right left out.
    pub pending: usize,
    /// A step in flight carries guesses: how many tokens it gives is not known.
    pub guessing: bool,
    /// Step and row of the last of those.
    pub last_sample: (u64, usize),
    /// Steps in flight that carry it.
    pub in_flight: usize,
    /// Leading positions whose prompt log-probabilities were emitted.
    pub logprobs_done: usize,
    /// Its KV blocks in order of position.
    pub blocks: Vec<u32>,
    /// Leading blocks that workers have in its table.
    pub sent_blocks: usize,
    /// Leading full blocks that the prefix cache was told of, or gave.
    pub registered_blocks: usize,
}

impl Sequence {
    pub fn new(mut new: NewSequence, max_context_tokens: usize, speculates: bool) -> Self {
        let prompt_tokens = new.prompt.len();
        let guessable = speculates && new.mask.is_none() && new.sampling.rules.is_none();
        Self {
            tokens: new.prompt,
            prompt_tokens,
            max_output: new
                .max_tokens
                .min(max_context_tokens.saturating_sub(prompt_tokens)),
            stop_tokens: new.stop_tokens,
            rules: new.sampling.rules.take(),
            sampling: new.sampling,
            mask: new.mask.map_or(Mask::Free, Mask::Ready),
            lookup: guessable.then(Lookup::default),
            prompt_logprobs: new.prompt_logprobs,
            realm: Realm {
                tenant: new.tenant,
                salt: new.cache_salt,
            },
            priority: new.priority,
            phase: Phase::Waiting,
            scheduled: 0,
            computed: 0,
            high_water: 0,
            pending: 0,
            guessing: false,
            last_sample: (0, 0),
            in_flight: 0,
            logprobs_done: 0,
            blocks: Vec::new(),
            sent_blocks: 0,
            registered_blocks: 0,
        }
    }

    /// Most positions whose KV it ever needs: the last token it samples is not computed.
    pub fn most_positions(&self) -> usize {
        self.prompt_tokens + self.max_output.saturating_sub(1)
    }

    /// Positions that it needs to sample its next token and compute it.
    pub fn next_positions(&self) -> usize {
        (self.tokens.len() + self.pending + 1).min(self.most_positions())
    }

    pub fn output_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Nothing is left to schedule: its last step is in flight.
    pub fn is_exhausted(&self) -> bool {
        if self.max_output == 0 {
            self.scheduled == self.tokens.len()
        } else {
            self.output_tokens() + self.pending >= self.max_output
        }
    }

    /// Tokens of its next row under what is left of a step; 0 when it has none to give.
    pub fn next_row_tokens(&self, step_tokens: usize, logit_rows: usize) -> usize {
        if self.is_exhausted() || self.guessing {
            return 0;
        }
        let start = self.scheduled;
        let mut tokens = (self.tokens.len() + self.pending - start).min(step_tokens);
        let last_target = self.prompt_tokens - 1;
        if self.prompt_logprobs && start < self.logprobs_done && self.logprobs_done < last_target {
            // Computed again: a row reports all of its targets or none.
            tokens = tokens.min(self.logprobs_done - start);
        }
        if self.wants_targets(start) {
            tokens = tokens.min(logit_rows);
        }
        let samples = self.samples_at(start + tokens);
        if samples && !(logit_rows > self.targets(tokens).len() && self.may_sample()) {
            tokens = tokens.saturating_sub(1);
        }
        tokens
    }

    /// Whether it is known what may be sampled after the last of its tokens.
    fn may_sample(&self) -> bool {
        match self.mask {
            Mask::Free => true,
            Mask::Due => false,
            Mask::Ready(_) => self.pending == 0,
        }
    }

    /// The guesses of its next row, which decodes, at most `most`; `None` if it should wait for the token in
    /// flight, to go on with guesses then. `alone`: no other sequence is being decoded.
    pub fn guesses(
        &mut self,
        speculation: Option<&Speculation>,
        alone: bool,
        most: usize,
    ) -> Option<Vec<u32>> {
        let (Some(lookup), Some(speculation)) = (&mut self.lookup, speculation) else {
            return Some(Vec::new());
        };
        let left = self.max_output - (self.tokens.len() - self.prompt_tokens) - self.pending;
        let guess = lookup.guess(&self.tokens);
        // The first is for the token in flight.
        let guess = guess.get(self.pending..).unwrap_or(&[]);
        let most = most.min(left.saturating_sub(1)).min(guess.len());
        let drafts = most.min(speculation.drafts(lookup.right(), alone));
        match (drafts, self.pending) {
            (0, _) => Some(Vec::new()),
            (_, 0) => Some(guess[..drafts].to_vec()),
            _ => None,
        }
    }

    /// What its next row may sample, if that samples.
    pub fn allowed(&self) -> Option<TokenSet> {
        match &self.mask {
            Mask::Ready(mask) => Some(mask.clone()),
            Mask::Free | Mask::Due => None,
        }
    }

    /// Rows of logits that its next `tokens` tokens take.
    pub fn logit_rows(&self, tokens: usize) -> usize {
        let end = self.scheduled + tokens;
        self.targets(tokens).len() + usize::from(self.samples_at(end))
    }

    /// Indices into `tokens` of the targets of its next `tokens` tokens.
    pub fn targets(&self, tokens: usize) -> Range<usize> {
        let start = self.scheduled;
        if self.wants_targets(start) {
            start + 1..(start + tokens + 1).min(self.prompt_tokens)
        } else {
            0..0
        }
    }

    /// Whether a row that ends before position `end` samples.
    pub fn samples_at(&self, end: usize) -> bool {
        self.max_output > 0 && end == self.tokens.len() + self.pending
    }

    /// How its next row draws, if that samples. The first that does so since the sequence came to the workers
    /// brings its rules, with the tokens before the row, of which workers may have the KV alone.
    pub fn draws(&self) -> Sampling {
        let first = self.phase == Phase::Prefill;
        let rules = self.rules.as_deref().filter(|_| first).map(|rules| {
            let from = rules.history_start(self.scheduled);
            Box::new(LogitRules {
                history: self.tokens[from..self.scheduled].to_vec(),
                ..rules.clone()
            })
        });
        Sampling {
            rules,
            ..self.sampling.clone()
        }
    }

    /// The input of its next `tokens` tokens.
    pub fn input(&self, tokens: usize) -> RowInput {
        match self.tokens.get(self.scheduled..self.scheduled + tokens) {
            Some(literal) => RowInput::Tokens(literal.to_vec()),
            None => {
                let (step, row) = self.last_sample;
                RowInput::Sampled { step, row }
            }
        }
    }

    /// The tokens whose KV it may take from a cache. At least one token is computed, for its logits, and
    /// so is every token whose prompt log-probability is still to be reported.
    pub fn reusable_tokens(&self) -> &[u32] {
        let end = if self.prompt_logprobs && self.logprobs_done + 1 < self.prompt_tokens {
            self.logprobs_done
        } else {
            self.tokens.len() - 1
        };
        &self.tokens[..end]
    }

    /// Begins where `cached` ends: blocks that hold its first tokens, which it owns from now on.
    pub fn start_after(&mut self, cached: Vec<u32>, block_tokens: usize) {
        self.scheduled = cached.len() * block_tokens;
        self.computed = self.scheduled;
        self.registered_blocks = cached.len();
        self.blocks = cached;
    }

    /// Tells the cache of the blocks that are full of tokens whose steps are committed.
    pub fn register_blocks(&mut self, kv: &mut KvCache, block_tokens: usize) {
        // Of a cancelled sequence the last tokens may be unknown.
        let full = self.computed.min(self.tokens.len()) / block_tokens;
        for index in self.registered_blocks..full {
            let tokens = &self.tokens[index * block_tokens..(index + 1) * block_tokens];
            kv.register(&self.realm, tokens, &self.blocks[..=index]);
            self.registered_blocks = index + 1;
        }
    }

    /// Gives its blocks back.
    pub fn release_blocks(&mut self, kv: &mut KvCache) {
        for block in self.blocks.drain(..).rev() {
            kv.release(block);
        }
        self.sent_blocks = 0;
        self.registered_blocks = 0;
    }

    /// Back to waiting, to be computed again but for what is cached then. Tokens and emitted
    /// log-probabilities stay.
    pub fn restart(&mut self, kv: &mut KvCache) {
        self.release_blocks(kv);
        self.phase = Phase::Waiting;
        self.scheduled = 0;
        self.computed = 0;
        self.pending = 0;
        self.guessing = false;
        self.in_flight = 0;
    }

    fn wants_targets(&self, start: usize) -> bool {
        self.prompt_logprobs && start >= self.logprobs_done && start + 1 < self.prompt_tokens
    }
}

/// Every sequence that is not over, by id. Asking for one that is not there is a fault of the scheduler.
#[derive(Clone, Debug, Default)]
pub(super) struct SequenceTable(pub BTreeMap<SequenceId, Sequence>);

impl Index<SequenceId> for SequenceTable {
    type Output = Sequence;

    fn index(&self, id: SequenceId) -> &Sequence {
        &self.0[&id]
    }
}

impl IndexMut<SequenceId> for SequenceTable {
    fn index_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.0
            .get_mut(&id)
            .expect("the scheduler lists only sequences that it has")
    }
}
