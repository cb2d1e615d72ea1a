//! One rule a test.

use secondwind_model::step::{
    LogitRules, RowInput, RowResult, Sampling, Step, StepResult, TokenLogprobs,
};

use super::*;

mod prefix;
mod recovery;
mod scoring;

const STOP: u32 = 99;

fn settings() -> SchedulerSettings {
    SchedulerSettings {
        max_sequences: 4,
        max_step_tokens: 8,
        max_prefill_tokens: 8,
        max_logit_rows: 8,
        block_tokens: 4,
        kv_blocks: 17,
        max_context_tokens: 32,
        max_in_flight: 2,
        max_waiting: 4,
        max_waiting_tokens: 1000,
        prefix_cache: false,
        speculation: None,
    }
}

fn scheduler(change: impl FnOnce(&mut SchedulerSettings)) -> Scheduler {
    let mut settings = settings();
    change(&mut settings);
    Scheduler::new(settings).unwrap()
}

/// A request whose prompt is 100, 101, …
fn request(prompt_tokens: u32, max_tokens: usize) -> NewSequence {
    NewSequence {
        prompt: (100..100 + prompt_tokens).collect(),
        max_tokens,
        stop_tokens: vec![STOP],
        sampling: Sampling {
            temperature: 0.5,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            seed: 7,
            logprobs: Some(2),
            ..Sampling::default()
        },
        prompt_logprobs: false,
        mask: None,
        tenant: 0,
        priority: 0,
        cache_salt: None,
    }
}

fn scored(prompt_tokens: u32, max_tokens: usize) -> NewSequence {
    NewSequence {
        prompt_logprobs: true,
        ..request(prompt_tokens, max_tokens)
    }
}

fn plain(token: u32) -> TokenLogprobs {
    TokenLogprobs {
        token,
        logprob: None,
        top: Vec::new(),
    }
}

/// The result in which every row that samples gives `token`.
fn answer(step: &Step, token: u32) -> StepResult {
    let rows = step.rows.iter().enumerate().filter_map(|(row, sent)| {
        let tokens: Vec<_> = sent.sample.iter().map(|_| plain(token)).collect();
        let prompt_logprobs: Vec<_> = sent
            .prompt_targets
            .iter()
            .map(|&target| (-(target as f32)).into())
            .collect();
        (!tokens.is_empty() || !prompt_logprobs.is_empty()).then_some(RowResult {
            row,
            tokens,
            prompt_logprobs,
        })
    });
    StepResult {
        number: step.number,
        rows: rows.collect(),
        gathered_rows: 0,
    }
}

/// Runs one step to its end.
fn turn(scheduler: &mut Scheduler, token: u32) -> (Step, Vec<Event>) {
    let step = scheduler.next_step().expect("there is something to run");
    let events = scheduler.commit(answer(&step, token)).unwrap();
    (step, events)
}

/// (sequence, position, tokens, samples) of each row.
fn shape(step: &Step) -> Vec<(SequenceId, usize, usize, bool)> {
    step.rows
        .iter()
        .map(|row| {
            (
                row.sequence,
                row.position,
                row.input.len(),
                row.sample.is_some(),
            )
        })
        .collect()
}

fn token(sequence: SequenceId, token: u32) -> Event {
    Event::Token {
        sequence,
        token: TokenLogprobs {
            token,
            logprob: None,
            top: Vec::new(),
        },
    }
}

fn finished(sequence: SequenceId, reason: FinishReason) -> Event {
    Event::Finished { sequence, reason }
}

#[test]
fn settings_under_which_nothing_runs_are_refused() {
    let no_tokens = SchedulerSettings {
        max_step_tokens: 0,
        ..settings()
    };
    assert_eq!(
        Scheduler::new(no_tokens).unwrap_err(),
        SettingsError::Zero {
            setting: "max_step_tokens"
        }
    );
    let three = SchedulerSettings {
        max_in_flight: 3,
        ..settings()
    };
    assert_eq!(
        Scheduler::new(three).unwrap_err().to_string(),
        "max_in_flight must be 1 or 2, not 3"
    );
}

#[test]
fn what_cannot_run_is_refused() {
    let mut it = scheduler(|settings| settings.kv_blocks = 4);
    assert_eq!(it.submit(request(0, 4)), Err(Refusal::EmptyPrompt));
    assert_eq!(it.submit(request(4, 0)), Err(Refusal::NothingToDo));
    let too_long = Refusal::PromptTooLong {
        prompt_tokens: 32,
        max_context_tokens: 32,
    };
    assert_eq!(it.submit(request(32, 1)), Err(too_long));
    // 9 + 5 tokens, the last of which is never computed: 13 positions.
    assert_eq!(
        it.submit(request(9, 5)),
        Err(Refusal::TooFewBlocks {
            needed: 4,
            kv_blocks: 3
        })
    );
    assert_eq!(it.submit(request(9, 4)), Ok(1));
    assert!(!it.is_idle());
}

#[test]
fn the_queue_is_full_when_places_and_waiting_room_are() {
    let mut it = scheduler(|settings| (settings.max_sequences, settings.max_waiting) = (1, 1));
    assert!(it.submit(request(4, 4)).is_ok() && it.submit(request(4, 4)).is_ok());
    assert_eq!(
        it.submit(request(4, 4)),
        Err(Refusal::QueueFull {
            waiting: 2,
            tokens_ahead: 4
        })
    );
    turn(&mut it, 5);
    assert_eq!(
        it.submit(request(4, 4)),
        Err(Refusal::QueueFull {
            waiting: 1,
            tokens_ahead: 4
        })
    );
    it.cancel(2);
    assert_eq!(it.submit(request(4, 4)), Ok(3));
}

#[test]
fn the_queue_is_full_when_its_tokens_are() {
    let mut it =
        scheduler(|settings| (settings.max_sequences, settings.max_waiting_tokens) = (1, 20));
    // A lone one is taken whatever its length.
    assert_eq!(it.submit(request(25, 4)), Ok(1));
    let full = |tokens_ahead| {
        Err(Refusal::QueueFull {
            waiting: 1,
            tokens_ahead,
        })
    };
    assert_eq!(it.submit(request(5, 4)), full(10));
    turn(&mut it, 5);
    assert_eq!(it.submit(request(12, 4)), Ok(2));
    assert_eq!(it.submit(request(9, 4)), full(1));
    assert_eq!(it.submit(request(8, 4)), Ok(3));
}

#[test]
fn a_prompt_goes_in_chunks_and_its_last_one_samples() {
    let mut it = scheduler(|_| {});
    it.submit(request(18, 2)).unwrap();
    let (step, events) = turn(&mut it, 5);
    assert_eq!((shape(&step), events), (vec![(1, 0, 8, false)], vec![]));
    assert_eq!(step.rows[0].new_blocks, [1, 2]);
    assert_eq!(step.rows[0].input, RowInput::Tokens((100..108).collect()));
    assert_eq!(shape(&turn(&mut it, 5).0), [(1, 8, 8, false)]);
    let (step, events) = turn(&mut it, 5);
    assert_eq!(
        (shape(&step), events),
        (vec![(1, 16, 2, true)], vec![token(1, 5)])
    );
    assert_eq!(step.rows[0].sample, Some(request(1, 1).sampling));
}

#[test]
fn a_long_prompt_leaves_room_for_short_ones_behind_it() {
    let mut it = scheduler(|settings| settings.max_context_tokens = 64);
    it.submit(request(40, 2)).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(1, 0, 8, false)]);
    it.submit(request(2, 2)).unwrap();
    it.submit(request(1, 2)).unwrap();
    it.submit(request(9, 2)).unwrap();
    assert_eq!(
        shape(&turn(&mut it, 5).0),
        [(1, 8, 5, false), (2, 0, 2, true), (3, 0, 1, true)]
    );
}

#[test]
fn those_that_decode_go_first_and_a_prompt_gets_what_they_leave() {
    let mut it = scheduler(|_| {});
    it.submit(request(12, 9)).unwrap();
    it.submit(request(2, 9)).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(1, 0, 8, false)]);
    assert_eq!(
        shape(&turn(&mut it, 5).0),
        [(1, 8, 4, true), (2, 0, 2, true)]
    );
    it.submit(request(20, 9)).unwrap();
    assert_eq!(
        shape(&turn(&mut it, 5).0),
        [(1, 12, 1, true), (2, 2, 1, true), (3, 0, 6, false)]
    );
}

#[test]
fn a_second_step_feeds_on_the_first_and_none_is_third() {
    let mut it = scheduler(|_| {});
    it.submit(request(3, 9)).unwrap();
    let first = it.next_step().unwrap();
    let second = it.next_step().unwrap();
    assert_eq!(shape(&second), [(1, 3, 1, true)]);
    assert_eq!(second.rows[0].input, RowInput::Sampled { step: 0, row: 0 });
    assert_eq!(it.next_step(), None);
    assert_eq!(it.commit(answer(&first, 5)).unwrap(), [token(1, 5)]);
    let third = it.next_step().unwrap();
    assert_eq!(third.rows[0].input, RowInput::Sampled { step: 1, row: 0 });
    it.commit(answer(&second, 6)).unwrap();
    it.commit(answer(&third, 7)).unwrap();
    let fourth = it.next_step().unwrap();
    assert_eq!(
        (fourth.rows[0].position, &fourth.rows[0].input),
        (5, &RowInput::Tokens(vec![7]))
    );
}

#[test]
fn what_follows_a_stop_token_is_dropped() {
    let mut it = scheduler(|_| {});
    it.submit(request(4, 9)).unwrap();
    let first = it.next_step().unwrap();
    let second = it.next_step().unwrap();
    assert_eq!(
        it.commit(answer(&first, STOP)).unwrap(),
        [token(1, STOP), finished(1, FinishReason::StopToken)]
    );
    assert_eq!(it.counters().blocks_used, 2);
    assert_eq!((it.next_step(), it.cancel(1)), (None, false));
    assert_eq!(it.commit(answer(&second, 6)).unwrap(), []);
    assert_eq!(it.counters().blocks_used, 0);
    let (last, events) = turn(&mut it, 0);
    assert_eq!(
        (last.number, last.rows, last.ended, events),
        (2, vec![], vec![1], vec![])
    );
    assert!(it.is_idle() && it.next_step().is_none());
}

#[test]
fn no_row_goes_beyond_max_tokens_or_the_context() {
    for (prompt, max_tokens) in [(4, 2), (30, usize::MAX)] {
        let mut it = scheduler(|settings| settings.max_step_tokens = 32);
        it.submit(request(prompt, max_tokens)).unwrap();
        let first = it.next_step().unwrap();
        let second = it.next_step().unwrap();
        it.commit(answer(&first, 5)).unwrap();
        assert_eq!(it.next_step(), None);
        assert_eq!(
            it.commit(answer(&second, 6)).unwrap(),
            [token(1, 6), finished(1, FinishReason::Length)]
        );
    }
}

#[test]
fn a_stop_token_as_the_last_one_counts_as_a_stop() {
    let mut it = scheduler(|_| {});
    it.submit(request(4, 1)).unwrap();
    assert_eq!(
        turn(&mut it, STOP).1[1],
        finished(1, FinishReason::StopToken)
    );
}

#[test]
fn a_result_that_does_not_fit_changes_nothing() {
    let mut it = scheduler(|settings| settings.max_sequences = 2);
    it.submit(request(1, 9)).unwrap();
    it.submit(scored(4, 9)).unwrap();
    let step = it.next_step().unwrap();
    let good = answer(&step, 5);
    let mut spoil = |change: &dyn Fn(&mut StepResult)| {
        let mut result = good.clone();
        change(&mut result);
        it.commit(result).unwrap_err()
    };
    assert_eq!(
        spoil(&|result| result.number = 1),
        CommitError::OutOfOrder {
            number: 1,
            expected: 0
        }
    );
    let missing = spoil(&|result| result.rows.truncate(1));
    assert_eq!(
        missing,
        CommitError::Rows {
            step: 0,
            answers: 1,
            expected: 2
        }
    );
    let swapped = spoil(&|result| result.rows.reverse());
    assert_eq!(
        swapped,
        CommitError::Rows {
            step: 0,
            answers: 2,
            expected: 2
        }
    );
    for tokens in [0, 2] {
        let spoilt = spoil(&|result| result.rows[1].tokens = vec![plain(5); tokens]);
        let (step, row, least, most) = (0, 1, 1, 1);
        assert_eq!(
            spoilt,
            CommitError::Tokens {
                step,
                row,
                tokens,
                least,
                most
            }
        );
    }
    let short = spoil(&|result| result.rows[1].prompt_logprobs.truncate(2));
    assert_eq!(
        short,
        CommitError::PromptLogprobs {
            step: 0,
            row: 1,
            logprobs: 2,
            targets: 3
        }
    );
    assert_eq!(it.commit(good).unwrap().len(), 3);
}

#[test]
fn counters_add_up() {
    let mut it = scheduler(|_| {});
    it.submit(request(4, 2)).unwrap();
    turn(&mut it, 5);
    it.next_step().unwrap();
    let expected = Counters {
        running: 1,
        steps_in_flight: 1,
        blocks_used: 2,
        blocks_total: 16,
        computed_tokens: 4,
        sampled_tokens: 1,
        let_in_tokens: 4,
        ..Counters::default()
    };
    assert_eq!(it.counters(), expected);
}

#[test]
fn no_more_run_than_can_decode_at_once() {
    for (max_sequences, max_step_tokens, max_logit_rows) in [(2, 8, 8), (4, 2, 8), (4, 8, 2)] {
        let mut it = scheduler(|settings| {
            settings.max_sequences = max_sequences;
            settings.max_step_tokens = max_step_tokens;
            settings.max_logit_rows = max_logit_rows;
        });
        for _ in 0..4 {
            it.submit(request(3, 9)).unwrap();
        }
        for _ in 0..5 {
            turn(&mut it, 5);
        }
        assert_eq!((it.counters().running, it.counters().waiting), (2, 2));
    }
}
