//! The scheduler against a worker that only remembers: block tables, and in each KV slot which token was
//! written there, after which others.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use secondwind_model::step::{LogitRules, Sampling, SequenceId, StepResult};

use super::*;
use worker::{Text, Worker};

mod worker;

const STOP_TOKEN: u32 = 0;

fn greedy() -> Sampling {
    Sampling {
        seed: 7,
        ..Sampling::default()
    }
}

/// What a client has seen and must see.
struct Client {
    prompt_tokens: usize,
    expected: Vec<u32>,
    reason: FinishReason,
    logprobs: bool,
    got: Vec<u32>,
    got_logprobs: usize,
    /// Finished or cancelled: nothing may follow.
    over: bool,
}

struct Simulation {
    scheduler: Scheduler,
    worker: Worker,
    results: VecDeque<StepResult>,
    clients: BTreeMap<SequenceId, Client>,
    /// Masked ones whose last token was emitted.
    due: VecDeque<SequenceId>,
    settings: SchedulerSettings,
}

#[derive(Clone, Debug)]
enum Action {
    Submit {
        prompt_tokens: usize,
        max_tokens: usize,
        stops: bool,
        logprobs: bool,
        tenant: u32,
        priority: i8,
        /// 0 for none.
        salt: u32,
        /// The text begins as all texts of this number do, for so many tokens.
        begins_as: (u64, usize),
        masked: bool,
    },
    /// The next sequence that waits for its mask is told.
    Allow,
    Cancel(usize),
    Step,
    Commit,
    Abort,
    Replan(usize),
}

impl Simulation {
    fn new(settings: SchedulerSettings) -> Self {
        Self {
            scheduler: Scheduler::new(settings).unwrap(),
            worker: Worker::new(settings),
            results: VecDeque::new(),
            clients: BTreeMap::new(),
            due: VecDeque::new(),
            settings,
        }
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Submit { .. } => self.submit(action),
            Action::Cancel(pick) => self.cancel(pick),
            Action::Step => {
                self.step();
            }
            Action::Commit => {
                self.commit();
            }
            Action::Allow => {
                self.allow();
            }
            Action::Abort => {
                self.scheduler.abort_epoch();
                self.begin_epoch();
            }
            Action::Replan(kv_blocks) => {
                for (id, _) in self.scheduler.replan(kv_blocks, self.settings.speculation) {
                    assert!(!self.clients.remove(&id).unwrap().over);
                }
                self.settings.kv_blocks = kv_blocks;
                self.begin_epoch();
            }
        }
        check_books(&self.scheduler);
    }

    fn begin_epoch(&mut self) {
        assert_eq!(self.scheduler.counters().blocks_used, 0);
        assert_eq!(self.scheduler.counters().blocks_cached, 0);
        let texts = std::mem::take(&mut self.worker.texts);
        self.worker = Worker::new(self.settings);
        self.worker.texts = texts;
        self.results.clear();
    }

    fn submit(&mut self, action: &Action) {
        let &Action::Submit {
            prompt_tokens,
            max_tokens,
            stops,
            logprobs,
            tenant,
            priority,
            salt,
            begins_as,
            masked,
        } = action
        else {
            return;
        };
        let id = self.scheduler.next_id;
        let length = prompt_tokens.max(self.settings.max_context_tokens);
        let mut text = Text::new(id, 4 * tenant + salt, begins_as, length);
        text.masked = masked && max_tokens > 0 && prompt_tokens < length;
        text.ruled = id.is_multiple_of(3);
        let submitted = self.scheduler.submit(NewSequence {
            prompt: text.tokens[..prompt_tokens].to_vec(),
            tenant,
            priority,
            max_tokens,
            stop_tokens: if stops { vec![STOP_TOKEN] } else { Vec::new() },
            sampling: Sampling {
                rules: text.ruled.then(|| {
                    Box::new(LogitRules {
                        repetition_penalty: 1.1,
                        prompt_tokens,
                        ..LogitRules::default()
                    })
                }),
                ..greedy()
            },
            prompt_logprobs: logprobs,
            mask: text.masked.then(|| text.mask(prompt_tokens)).flatten(),
            cache_salt: (salt > 0).then_some([salt; 8]),
        });
        let Ok(accepted) = submitted else { return };
        assert_eq!(accepted, id);
        let end = prompt_tokens + max_tokens.min(self.settings.max_context_tokens - prompt_tokens);
        let mut expected = text.tokens[prompt_tokens..end].to_vec();
        self.worker.texts.insert(id, text);
        let mut reason = FinishReason::Length;
        if let Some(stop) = expected
            .iter()
            .position(|&token| stops && token == STOP_TOKEN)
        {
            expected.truncate(stop + 1);
            reason = FinishReason::StopToken;
        }
        let (got, got_logprobs, over) = (Vec::new(), 0, false);
        self.clients.insert(
            id,
            Client {
                prompt_tokens,
                expected,
                reason,
                logprobs,
                got,
                got_logprobs,
                over,
            },
        );
    }

    fn cancel(&mut self, pick: usize) {
        if self.clients.is_empty() {
            return;
        }
        let id = *self.clients.keys().nth(pick % self.clients.len()).unwrap();
        let client = self.clients.get_mut(&id).unwrap();
        assert_eq!(self.scheduler.cancel(id), !client.over);
        client.over = true;
    }

    fn step(&mut self) -> bool {
        let Some(step) = self.scheduler.next_step() else {
            return false;
        };
        for id in &step.ended {
            // A live one was preempted: not the oldest of those that the worker has.
            let live = |id: &SequenceId| !self.clients[id].over;
            let oldest = self.worker.tables.keys().find(|id| live(id));
            assert!(!live(id) || oldest != Some(id), "the oldest was preempted");
        }
        for row in &step.rows {
            let client = &self.clients[&row.sequence];
            assert!(!client.over, "a row for {} that is over", row.sequence);
            let samples_token = row.position + row.input.len() + 1;
            let end = client.prompt_tokens + client.expected.len();
            let stops = client.reason == FinishReason::StopToken;
            assert!(
                row.sample.is_none() || stops || samples_token <= end,
                "a row beyond max_tokens"
            );
            let sampling = row.sample.clone().map(|sample| Sampling {
                rules: None,
                ..sample
            });
            assert_eq!(sampling, row.sample.is_some().then(greedy));
        }
        self.results.push_back(self.worker.run(&step));
        assert!(self.results.len() <= self.settings.max_in_flight);
        true
    }

    fn commit(&mut self) -> bool {
        let Some(result) = self.results.pop_front() else {
            return false;
        };
        for event in self.scheduler.commit(result).unwrap() {
            let (Event::Token { sequence: id, .. }
            | Event::PromptLogprobs { sequence: id, .. }
            | Event::Finished { sequence: id, .. }) = event;
            let client = self.clients.get_mut(&id).unwrap();
            assert!(!client.over, "an event for {id} that is over: {event:?}");
            match event {
                Event::Token { token, .. } => {
                    client.got.push(token.token);
                    if self.worker.texts[&id].masked {
                        self.due.push_back(id);
                    }
                }
                Event::PromptLogprobs {
                    position, logprobs, ..
                } => {
                    assert!(client.logprobs && client.got.is_empty() && !logprobs.is_empty());
                    assert_eq!(position, client.got_logprobs + 1);
                    for logprob in logprobs {
                        client.got_logprobs += 1;
                        assert_eq!(logprob.logprob, -(client.got_logprobs as f32));
                    }
                }
                Event::Finished { reason, .. } => {
                    assert_eq!(reason, client.reason);
                    assert_eq!(client.got, client.expected);
                    client.over = true;
                }
            }
            assert!(client.expected.starts_with(&client.got));
            if !client.got.is_empty() || client.over {
                assert_eq!(
                    client.got_logprobs,
                    if client.logprobs {
                        client.prompt_tokens - 1
                    } else {
                        0
                    }
                );
            }
        }
        true
    }

    fn allow(&mut self) -> bool {
        let Some(id) = self.due.pop_front() else {
            return false;
        };
        // A plan may have had no room for it any more.
        if let Some(client) = self.clients.get(&id).filter(|client| !client.over) {
            let position = client.prompt_tokens + client.got.len();
            let mask = self.worker.texts[&id].mask(position);
            self.scheduler.allow(id, mask.unwrap());
        }
        true
    }

    /// Runs until nothing is left, then looks for what was.
    fn drain(&mut self) {
        for _ in 0..20_000 {
            let stepped = self.step();
            check_books(&self.scheduler);
            if !stepped && !self.commit() && !self.allow() {
                break;
            }
        }
        assert!(
            self.scheduler.is_idle(),
            "stuck: {:?}",
            self.scheduler.counters()
        );
        let counters = self.scheduler.counters();
        assert_eq!(
            (counters.blocks_used, counters.waiting, counters.running),
            (0, 0, 0)
        );
        assert!(
            self.worker.tables.is_empty(),
            "the worker was told of every end"
        );
        // Nobody but the cache owns a block, and without it nobody does.
        assert_eq!(self.scheduler.kv.available(), counters.blocks_total);
        self.scheduler.kv.forget_prefixes();
        assert_eq!(self.scheduler.counters().blocks_cached, 0);
        check_books(&self.scheduler);
        assert!(self.clients.values().all(|client| client.over));
    }
}

/// No block leaks or is freed while somebody uses it, and lists agree with phases.
fn check_books(scheduler: &Scheduler) {
    let sequences = scheduler.sequences.0.iter();
    let tables = sequences.map(|(&id, sequence)| (id, sequence.blocks.as_slice()));
    scheduler.kv.check(&tables.collect());
    for (id, sequence) in &scheduler.sequences.0 {
        let carried = scheduler
            .in_flight
            .iter()
            .flat_map(|step| &step.rows)
            .filter(|row| row.id == *id);
        assert_eq!(carried.count(), sequence.in_flight);
        assert!(sequence.sent_blocks <= sequence.blocks.len());
        assert!(sequence.computed <= sequence.scheduled);
        assert!(
            sequence.guessing || sequence.scheduled <= sequence.tokens.len() + sequence.pending
        );
        match sequence.phase {
            Phase::Waiting => assert!(
                scheduler.waiting.iter().any(|waiting| waiting.id == *id)
                    && sequence.blocks.is_empty()
            ),
            Phase::Prefill | Phase::Decode => assert!(scheduler.running.contains(id)),
            Phase::Finishing => assert!(sequence.in_flight > 0 && !scheduler.running.contains(id)),
        }
    }
    assert!(scheduler.running.is_sorted());
    let waiting = scheduler.waiting.iter();
    let tokens = waiting.map(|waiting| scheduler.sequences[waiting.id].tokens.len());
    assert_eq!(tokens.sum::<usize>(), scheduler.waiting_tokens);
    let listed = scheduler.running.len() + scheduler.waiting.len();
    let finishing = scheduler
        .sequences
        .0
        .values()
        .filter(|sequence| sequence.phase == Phase::Finishing);
    assert_eq!(listed + finishing.count(), scheduler.sequences.0.len());
}

fn settings() -> impl Strategy<Value = SchedulerSettings> {
    let step = (1..8_usize, 1..24_usize, 1..12_usize, 1..16_usize);
    let memory = (1..5_usize, 2..24_usize, 2..48_usize);
    let rest = (
        1..=2_usize,
        (0..12_usize, 0..200_usize),
        prop::bool::weighted(0.8),
        prop::option::of(1..6_usize),
    );
    (step, memory, rest).prop_map(
        |(step, memory, (max_in_flight, waiting, prefix_cache, max_drafts))| {
            let (max_waiting, max_waiting_tokens) = waiting;
            let (max_sequences, max_step_tokens, max_prefill_tokens, max_logit_rows) = step;
            let (block_tokens, kv_blocks, max_context_tokens) = memory;
            SchedulerSettings {
                max_sequences,
                max_step_tokens,
                max_prefill_tokens,
                max_logit_rows,
                block_tokens,
                kv_blocks,
                max_context_tokens,
                max_in_flight,
                max_waiting,
                max_waiting_tokens,
                prefix_cache,
                speculation: max_drafts.map(|max_drafts| Speculation {
                    max_drafts,
                    row_cost_percent: 5,
                }),
            }
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    let submit = (
        1..20_usize,
        0..40_usize,
        any::<bool>(),
        prop::bool::weighted(0.3),
        (0..2_u32, -1..=1_i8, 0..3_u32),
        ((0..3_u64, 0..40_usize), prop::bool::weighted(0.3)),
    );
    let submit = submit.prop_map(
        |(prompt_tokens, max_tokens, stops, logprobs, (tenant, priority, salt), rest)| {
            let (begins_as, masked) = rest;
            Action::Submit {
                prompt_tokens,
                max_tokens,
                stops,
                logprobs,
                tenant,
                priority,
                salt,
                begins_as,
                masked,
            }
        },
    );
    prop_oneof![
        10 => submit,
        3 => any::<usize>().prop_map(Action::Cancel),
        16 => Just(Action::Step),
        14 => Just(Action::Commit),
        6 => Just(Action::Allow),
        1 => Just(Action::Abort),
        1 => (2..24_usize).prop_map(Action::Replan),
    ]
}

#[test]
fn every_token_is_computed_on_its_own_kv_and_nothing_leaks() {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 8000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let cases = (settings(), prop::collection::vec(action(), 0..200));
    let seen = Cell::new(Counters::default());
    let ran = runner.run(&cases, |(settings, actions)| {
        let mut simulation = Simulation::new(settings);
        for action in &actions {
            simulation.act(action);
        }
        simulation.drain();
        let (mut sum, counters) = (seen.get(), simulation.scheduler.counters());
        assert!(settings.prefix_cache || counters.prefix_hit_tokens == 0);
        sum.preemptions += counters.preemptions;
        sum.prefix_hit_tokens += counters.prefix_hit_tokens;
        sum.prefix_evictions += counters.prefix_evictions;
        sum.guessed_tokens += counters.guessed_tokens;
        sum.right_guesses += counters.right_guesses;
        seen.set(sum);
        Ok(())
    });
    ran.unwrap_or_else(|failure| panic!("{failure}"));
    let seen = seen.get();
    let wrong = seen.guessed_tokens - seen.right_guesses;
    assert!(
        seen.right_guesses > 300 && wrong > 50,
        "the cases no longer guess: {seen:?}"
    );
    assert!(
        seen.preemptions > 1000 && seen.prefix_hit_tokens > 1000 && seen.prefix_evictions > 1000,
        "the cases no longer meet what they are for: {seen:?}"
    );
}
