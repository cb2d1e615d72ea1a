//! The next step: who gets a row, which blocks it takes, who is preempted for them.

use secondwind_model::step::{SequenceId, Step, StepRow};

use super::Scheduler;
use super::cache::KvCache;
use super::commit::{InFlightRow, InFlightStep};
use super::sequence::{Phase, Sequence};

/// Prompts that get their `max_prefill_tokens` in a step in which others decode. More of them would make
/// of a flood of requests what the limit is to keep from one long one.
const PROMPTS_AT_ONCE: usize = 4;

/// A row decided, not yet written down.
struct Grant {
    id: SequenceId,
    tokens: usize,
    decodes: bool,
    /// The last of its tokens.
    guesses: Vec<u32>,
}

/// A step while it is decided.
struct Draft {
    grants: Vec<Grant>,
    /// Tokens that may still come into the step, those of sequences that decode taken off.
    left: usize,
    /// What the sequences that decode leave to chunks of prompts.
    step_tokens: usize,
    /// Of them, what one prompt may take.
    prompt_tokens: usize,
    /// A prompt with more tokens to compute is long.
    short_tokens: usize,
    /// Of `step_tokens`, what long prompts leave to short ones behind them.
    long_tokens: usize,
    logit_rows: usize,
    /// Places of the step that nobody can need, for guesses.
    places: usize,
    /// One sequence decodes, and no prompt is there to be computed.
    alone: bool,
    /// `running[runnable..]` gets no row: it is about to be preempted.
    runnable: usize,
    /// Sequences that got no row for want of a block.
    stalled: usize,
    /// Blocks that are free or can be taken once the steps in flight are committed.
    coming: Option<usize>,
}

impl Draft {
    /// Tokens that the prompt of `sequence` may take.
    fn for_prompt(&self, sequence: &Sequence) -> usize {
        let tokens = self.step_tokens.min(self.left).min(self.prompt_tokens);
        match self.is_long(sequence) {
            true => tokens.min(self.long_tokens),
            false => tokens,
        }
    }

    fn is_long(&self, sequence: &Sequence) -> bool {
        sequence.tokens.len() - sequence.scheduled > self.short_tokens
    }
}

enum Outcome {
    Granted,
    NothingToDo,
    NoBlock,
}

impl Scheduler {
    /// The step to send now; `None` while enough are in flight or nothing can run before the next
    /// commit, submission or epoch.
    pub fn next_step(&mut self) -> Option<Step> {
        if self.in_flight.len() >= self.settings.max_in_flight {
            return None;
        }
        let mut draft = self.draft();
        self.extend_running(&mut draft);
        self.admit_waiting(&mut draft);
        if draft.grants.is_empty() && (self.ended.is_empty() || !self.in_flight.is_empty()) {
            return None;
        }
        Some(self.write_step(&draft.grants))
    }

    fn draft(&self) -> Draft {
        let decoding = self.running.iter().filter(|id| self.decodes(**id)).count();
        let left = self.settings.max_step_tokens - decoding;
        let step_tokens = if decoding == 0 {
            left
        } else {
            let not_computed = |id: &&SequenceId| self.sequences[**id].phase == Phase::Prefill;
            let prompts = self.running.iter().filter(not_computed).count() + self.waiting.len();
            let shares = prompts.min(PROMPTS_AT_ONCE);
            left.min(self.settings.max_prefill_tokens.saturating_mul(shares))
        };
        // Where nobody decodes a step is one prompt's as far as it reaches, but for short ones behind it.
        let short_tokens = left / PROMPTS_AT_ONCE;
        let kept = match decoding {
            0 => self.short_prompts(short_tokens),
            _ => 0,
        };
        Draft {
            grants: Vec::with_capacity(
                self.settings
                    .max_running()
                    .min(self.running.len() + self.waiting.len()),
            ),
            left,
            short_tokens,
            long_tokens: left - kept,
            step_tokens,
            prompt_tokens: match decoding {
                0 => left,
                _ => self.settings.max_prefill_tokens,
            },
            logit_rows: self.settings.max_logit_rows - decoding,
            places: self
                .settings
                .max_running()
                .saturating_sub(self.running.len() + self.waiting.len()),
            alone: self.running.len() == 1 && self.waiting.is_empty(),
            runnable: self.running.len(),
            stalled: 0,
            coming: None,
        }
    }

    /// Tokens of the short prompts that are next, so few that a long one keeps a share.
    fn short_prompts(&self, short_tokens: usize) -> usize {
        let places = self.settings.max_running() - self.running.len();
        let tokens_left = |id: SequenceId| {
            let sequence = &self.sequences[id];
            sequence.tokens.len().saturating_sub(sequence.scheduled)
        };
        let short = |tokens: &usize| (1..=short_tokens).contains(tokens);
        let running = self.running.iter().map(|&id| tokens_left(id)).filter(short);
        let waiting = self.waiting.iter().take(places);
        let waiting = waiting
            .map(|waiting| tokens_left(waiting.id))
            .take_while(short);
        running.chain(waiting).take(PROMPTS_AT_ONCE - 1).sum()
    }

    fn decodes(&self, id: SequenceId) -> bool {
        let sequence = &self.sequences[id];
        sequence.phase == Phase::Decode && !sequence.is_exhausted()
    }

    /// Rows for the running sequences, the oldest first, so that the oldest gets the blocks.
    fn extend_running(&mut self, draft: &mut Draft) {
        let mut index = 0;
        while index < draft.runnable {
            let id = self.running[index];
            let mut outcome = self.grant(id, draft);
            if matches!(outcome, Outcome::NoBlock) && self.make_room(index, draft) {
                outcome = self.grant(id, draft);
            }
            if matches!(outcome, Outcome::NoBlock) {
                draft.stalled += 1;
            }
            index += 1;
        }
    }

    /// A row for `id`, with the blocks it takes, if there are any.
    fn grant(&mut self, id: SequenceId, draft: &mut Draft) -> Outcome {
        let block_tokens = self.settings.block_tokens;
        let decodes = self.decodes(id);
        let speculation = self.settings.speculation.as_ref();
        let sequence = &mut self.sequences[id];
        let (step_tokens, logit_rows) = if decodes {
            (1, 1)
        } else {
            (draft.for_prompt(sequence), draft.logit_rows)
        };
        let mut wanted = sequence.next_row_tokens(step_tokens, logit_rows);
        if wanted == 0 {
            return Outcome::NothingToDo;
        }
        let mut guesses = Vec::new();
        if decodes {
            // The last blocks are for tokens that are sure to come.
            let own = (sequence.blocks.len() * block_tokens).saturating_sub(sequence.scheduled + 1);
            let room = match self.kv.available() > self.running.len() {
                true => usize::MAX,
                false => own,
            };
            let most = draft.places.min(draft.left).min(draft.logit_rows).min(room);
            let Some(found) = sequence.guesses(speculation, draft.alone, most) else {
                return Outcome::NothingToDo;
            };
            guesses = found;
            wanted += guesses.len();
        }
        let reach = (sequence.blocks.len() + self.kv.available()).saturating_mul(block_tokens);
        let tokens = wanted.min(reach - sequence.scheduled);
        if tokens == 0 {
            return Outcome::NoBlock;
        }
        while sequence.blocks.len() * block_tokens < sequence.scheduled + tokens {
            sequence
                .blocks
                .push(self.kv.allocate().expect("counted above"));
        }
        if decodes {
            guesses.truncate(tokens - 1);
            draft.places -= guesses.len();
            draft.left -= guesses.len();
            draft.logit_rows -= guesses.len();
        } else {
            if draft.is_long(sequence) {
                draft.long_tokens -= tokens;
            }
            draft.step_tokens -= tokens;
            draft.left -= tokens;
            draft.logit_rows -= sequence.logit_rows(tokens);
        }
        draft.grants.push(Grant {
            id,
            tokens,
            decodes,
            guesses,
        });
        Outcome::Granted
    }

    /// Frees a block for `running[index]` at the cost of younger ones; false when it has to wait for
    /// the steps in flight, or is itself the youngest.
    fn make_room(&mut self, index: usize, draft: &mut Draft) -> bool {
        if draft.coming.is_none() {
            draft.coming = Some(self.blocks_coming());
        }
        let coming = draft.coming.get_or_insert(0);
        while *coming <= draft.stalled && draft.runnable > index + 1 {
            let victim = draft.runnable - 1;
            let id = self.running[victim];
            let sequence = &self.sequences[id];
            draft.runnable = victim;
            if sequence.in_flight == 0 {
                self.wait_again(id);
                self.ended.push(id);
                self.running.remove(victim);
                self.totals.preemptions += 1;
                if self.kv.available() > 0 {
                    return true;
                }
            } else if !sequence.is_exhausted() {
                *coming += blocks_of_its_own(&self.kv, sequence);
            }
        }
        false
    }

    /// Blocks that only sequences whose last step is in flight use.
    fn blocks_coming(&self) -> usize {
        let over = |sequence: &&Sequence| match sequence.phase {
            Phase::Finishing => true,
            Phase::Prefill | Phase::Decode => sequence.is_exhausted(),
            Phase::Waiting => false,
        };
        self.sequences
            .0
            .values()
            .filter(over)
            .map(|sequence| blocks_of_its_own(&self.kv, sequence))
            .sum()
    }

    /// Lets sequences in while there is a place, a token and room for all the tokens they have. Nobody
    /// is preempted for a newcomer, and none comes in while blocks are short: it would be the next
    /// to be preempted. What is cached of a newcomer takes no room unless it would be evicted.
    fn admit_waiting(&mut self, draft: &mut Draft) {
        if self.waiting.is_empty() {
            return;
        }
        let block_tokens = self.settings.block_tokens;
        let promised = |scheduler: &Self, id: SequenceId| {
            let sequence = &scheduler.sequences[id];
            sequence
                .next_positions()
                .div_ceil(block_tokens)
                .saturating_sub(sequence.blocks.len())
        };
        // What the running ones need soon, and a block for each to grow into.
        let mut taken: usize = self.running.iter().map(|&id| promised(self, id) + 1).sum();
        while self.running.len() < self.settings.max_running() {
            let Some(index) = self.policy.next(&self.waiting) else {
                return;
            };
            let id = self.waiting[index].id;
            if !self.let_in(id, taken, draft) {
                return;
            }
            if let Some(waiting) = self.waiting.remove(index) {
                let sequence = &self.sequences[id];
                let computed = sequence.tokens.len() - sequence.scheduled;
                self.waiting_tokens -= sequence.tokens.len();
                self.policy.let_in(&waiting, computed);
            }
            let place = self.running.partition_point(|&other| other < id);
            self.running.insert(place, id);
            self.sequences[id].phase = Phase::Prefill;
            // It gets a row at once: whoever runs is known to the workers.
            let granted = self.grant(id, draft);
            debug_assert!(matches!(granted, Outcome::Granted));
            taken += promised(self, id) + 1;
        }
    }

    /// Gives a waiting sequence what is cached of it, if there is room for the rest beside the `taken`
    /// blocks, and a token for it in the step.
    fn let_in(&mut self, id: SequenceId, taken: usize, draft: &Draft) -> bool {
        let block_tokens = self.settings.block_tokens;
        let sequence = &mut self.sequences[id];
        if draft.step_tokens.min(draft.left) == 0 {
            return false;
        }
        let cached = self.kv.find(&sequence.realm, sequence.reusable_tokens());
        let own = sequence.next_positions().div_ceil(block_tokens) - cached.len();
        // A block that rests counts as available until it is shared.
        if taken + own + self.kv.resting_among(&cached) > self.kv.available() {
            return false;
        }
        sequence.start_after(cached, block_tokens);
        if sequence.next_row_tokens(draft.for_prompt(sequence), draft.logit_rows) == 0 {
            sequence.start_after(Vec::new(), block_tokens);
            return false;
        }
        for &block in &sequence.blocks {
            self.kv.share(block);
        }
        self.totals.let_in_tokens += sequence.tokens.len() as u64;
        if self.settings.prefix_cache {
            self.totals.prefix_queried_tokens += sequence.tokens.len() as u64;
            self.totals.prefix_hit_tokens += sequence.scheduled as u64;
        }
        true
    }

    /// Writes the rows down, decodes first, and remembers them as in flight.
    fn write_step(&mut self, grants: &[Grant]) -> Step {
        let number = self.next_number;
        self.next_number += 1;
        let mut rows = Vec::with_capacity(grants.len());
        let mut carried = Vec::with_capacity(grants.len());
        let decodes = grants.iter().filter(|grant| grant.decodes);
        for grant in decodes.chain(grants.iter().filter(|grant| !grant.decodes)) {
            let &Grant { id, tokens, .. } = grant;
            let drafts = grant.guesses.len();
            let sequence = &mut self.sequences[id];
            let end = sequence.scheduled + tokens;
            let samples = sequence.samples_at(end - drafts);
            let targets = sequence.targets(tokens - drafts);
            carried.push(InFlightRow {
                id,
                end,
                targets: targets.clone(),
                samples,
                drafts,
            });
            rows.push(StepRow {
                sequence: id,
                position: sequence.scheduled,
                input: sequence.input(tokens - drafts).followed_by(&grant.guesses),
                drafts,
                new_blocks: sequence.blocks[sequence.sent_blocks..].to_vec(),
                sample: samples.then(|| sequence.draws()),
                mask: sequence.allowed().filter(|_| samples),
                prompt_targets: sequence.tokens[targets].to_vec(),
            });
            sequence.scheduled = end;
            sequence.sent_blocks = sequence.blocks.len();
            sequence.in_flight += 1;
            if samples {
                sequence.phase = Phase::Decode;
                sequence.pending += 1;
                sequence.guessing = drafts > 0;
                sequence.last_sample = (number, rows.len() - 1);
            }
        }
        self.in_flight.push_back(InFlightStep {
            number,
            rows: carried,
        });
        Step {
            number,
            rows,
            ended: std::mem::take(&mut self.ended),
        }
    }
}

/// Blocks of a sequence that are available as soon as it lets go of them.
fn blocks_of_its_own(kv: &KvCache, sequence: &Sequence) -> usize {
    let blocks = sequence.blocks.iter();
    blocks.filter(|&&block| kv.has_one_user(block)).count()
}
