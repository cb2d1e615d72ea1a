//! Cancellation, preemption, and the loss of the group.

use super::*;

#[test]
fn a_cancelled_sequence_leaves_with_the_next_step() {
    let mut it = scheduler(|settings| settings.max_sequences = 2);
    for _ in 0..3 {
        it.submit(request(4, 9)).unwrap();
    }
    let first = it.next_step().unwrap();
    assert!(it.cancel(1) && it.cancel(3) && !it.cancel(1) && !it.cancel(7));
    let second = it.next_step().unwrap();
    assert_eq!(
        (shape(&second), &second.ended),
        (vec![(2, 4, 1, true)], &vec![1])
    );
    assert_eq!(it.commit(answer(&first, 5)).unwrap(), [token(2, 5)]);
    assert_eq!((it.counters().blocks_used, it.counters().running), (2, 1));
}

#[test]
fn the_youngest_is_preempted_and_starts_again_with_its_tokens() {
    let mut it = scheduler(|settings| (settings.kv_blocks, settings.max_in_flight) = (5, 1));
    it.submit(request(4, 9)).unwrap();
    it.submit(request(3, 6)).unwrap();
    let (step, mut emitted) = turn(&mut it, 5);
    assert_eq!(shape(&step), [(1, 0, 4, true), (2, 0, 3, true)]);
    emitted.remove(0);
    // Each comes to have two blocks of the four, until the first needs a third for position 8.
    let step = loop {
        let (step, events) = turn(&mut it, 5);
        if !step.ended.is_empty() {
            break step;
        }
        emitted.extend(
            events
                .into_iter()
                .filter(|event| matches!(event, Event::Token { sequence: 2, .. })),
        );
    };
    assert_eq!(
        (step.ended.as_slice(), shape(&step).as_slice()),
        ([2].as_slice(), [(1, 8, 1, true)].as_slice())
    );
    assert_eq!((it.counters().waiting, it.counters().preemptions), (1, 1));
    let mut again = None;
    while !it.is_idle() {
        let (step, events) = turn(&mut it, 5);
        let row = step.rows.into_iter().find(|row| row.sequence == 2);
        again = again.or(row.filter(|row| row.position == 0));
        emitted.extend(
            events
                .into_iter()
                .filter(|event| matches!(event, Event::Token { sequence: 2, .. })),
        );
    }
    assert_eq!(emitted, vec![token(2, 5); 6]);
    assert_eq!(
        again.unwrap().input,
        RowInput::Tokens([100, 101, 102].into_iter().chain([5; 5]).collect())
    );
    assert!(it.counters().recomputed_tokens > 0);
}

#[test]
fn rules_come_once_and_again_with_the_tokens_that_they_need() {
    let rules = |repetition_penalty, presence_penalty| LogitRules {
        repetition_penalty,
        presence_penalty,
        prompt_tokens: 12,
        ..LogitRules::default()
    };
    let mut it = scheduler(|settings| settings.max_in_flight = 1);
    for rules in [rules(1.2, 0.0), rules(1.0, 0.5), rules(1.0, 0.0)] {
        let request = request(12, 9);
        let sampling = Sampling {
            rules: Some(Box::new(rules)),
            ..request.sampling
        };
        it.submit(NewSequence {
            sampling,
            ..request
        })
        .unwrap();
    }
    // (where the row begins, how many earlier tokens the rules bring) of each row that brings rules.
    let brought = |it: &mut Scheduler| -> [Vec<(usize, usize)>; 3] {
        let mut brought = [const { Vec::new() }; 3];
        for _ in 0..8 {
            let (step, _) = turn(it, 5);
            for row in step.rows {
                let sample = row.sample.and_then(|sample| sample.rules);
                let history = sample.map(|rules| rules.history);
                let at = |history: Vec<u32>| {
                    assert!(
                        history
                            .iter()
                            .all(|token| (100..112).contains(token) || *token == 5)
                    );
                    (row.position, history.len())
                };
                brought[row.sequence as usize - 1].extend(history.map(at));
            }
        }
        brought
    };
    let [prompt, output, neither] = brought(&mut it);
    let row = |brought: &[(usize, usize)]| {
        assert_eq!(brought.len(), 1, "{brought:?}");
        brought[0]
    };
    // A prompt longer than a step, so that the row that samples is not its first.
    assert!(row(&prompt).0 > 0 && row(&prompt).1 == row(&prompt).0);
    assert_eq!((row(&output).1, row(&neither).1), (0, 0));
    it.abort_epoch();
    let [prompt, output, neither] = brought(&mut it);
    assert_eq!(row(&prompt).1, row(&prompt).0);
    assert_eq!(row(&output).1, row(&output).0.saturating_sub(12));
    assert_eq!(row(&neither).1, 0);
}

#[test]
fn one_in_flight_is_preempted_after_its_step() {
    let mut it = scheduler(|settings| settings.kv_blocks = 5);
    it.submit(request(4, 9)).unwrap();
    it.submit(request(3, 6)).unwrap();
    let mut in_flight = it.next_step().unwrap();
    while let Some(next) = it.next_step() {
        assert_eq!(next.rows.len(), 2);
        it.commit(answer(&in_flight, 5)).unwrap();
        in_flight = next;
    }
    // The first needs a third block; the second is in flight, and left out.
    assert_eq!(shape(&in_flight), [(1, 7, 1, true), (2, 6, 1, true)]);
    assert_eq!(
        (it.counters().preemptions, it.counters().blocks_used),
        (0, 4)
    );
    assert_eq!(
        it.commit(answer(&in_flight, 5)).unwrap(),
        [token(1, 5), token(2, 5)]
    );
    let step = it.next_step().unwrap();
    assert_eq!(
        (step.ended.as_slice(), shape(&step)),
        ([2].as_slice(), vec![(1, 8, 1, true)])
    );
}

#[test]
fn nothing_is_lost_with_an_epoch() {
    let mut it = scheduler(|_| {});
    it.submit(request(4, 3)).unwrap();
    it.submit(request(2, 3)).unwrap();
    turn(&mut it, 5);
    let lost = it.next_step().unwrap();
    it.cancel(2);
    it.abort_epoch();
    assert_eq!((it.counters().blocks_used, it.counters().waiting), (0, 1));
    assert_eq!(
        it.commit(answer(&lost, 6)),
        Err(CommitError::NothingInFlight { number: 1 })
    );
    let (step, events) = turn(&mut it, 7);
    assert_eq!((step.number, step.ended.len()), (0, 0));
    assert_eq!(
        step.rows[0].input,
        RowInput::Tokens(vec![100, 101, 102, 103, 5])
    );
    assert_eq!(events, [token(1, 7)]);
    assert_eq!(
        turn(&mut it, 8).1,
        [token(1, 8), finished(1, FinishReason::Length)]
    );
}

#[test]
fn a_smaller_group_drops_only_what_it_cannot_hold() {
    let mut it = scheduler(|_| {});
    it.submit(request(20, 3)).unwrap();
    it.submit(request(2, 3)).unwrap();
    turn(&mut it, 5);
    assert_eq!(
        it.replan(4, None),
        [(
            1,
            Refusal::TooFewBlocks {
                needed: 6,
                kv_blocks: 3
            }
        )]
    );
    assert_eq!(shape(&turn(&mut it, 5).0), [(2, 0, 2, true)]);
}

#[test]
fn a_large_sequence_is_not_overtaken_for_ever() {
    let mut it = scheduler(|settings| (settings.kv_blocks, settings.max_in_flight) = (7, 1));
    it.submit(request(8, 4)).unwrap();
    it.submit(request(16, 4)).unwrap();
    it.submit(request(1, 4)).unwrap();
    for position in [0, 8, 9, 10] {
        let (step, _) = turn(&mut it, 5);
        assert_eq!((step.rows.len(), step.rows[0].position), (1, position));
    }
    assert_eq!(shape(&turn(&mut it, 5).0), [(2, 0, 8, false)]);
}

#[test]
fn no_more_are_preempted_than_blocks_are_wanted() {
    let mut it = scheduler(|settings| {
        (
            settings.kv_blocks,
            settings.max_step_tokens,
            settings.max_logit_rows,
        ) = (7, 16, 16);
    });
    it.submit(request(4, 9)).unwrap();
    it.submit(request(2, 9)).unwrap();
    it.submit(request(2, 9)).unwrap();
    let mut in_flight = it.next_step().unwrap();
    assert_eq!(in_flight.rows.len(), 3);
    let held = loop {
        let next = it.next_step().unwrap();
        if next.rows.len() < 3 {
            break next;
        }
        it.commit(answer(&in_flight, 5)).unwrap();
        in_flight = next;
    };
    // The first needs a third block, the third one will give it, and the second goes on.
    assert_eq!(shape(&held), [(2, 6, 1, true)]);
    it.commit(answer(&in_flight, 5)).unwrap();
    let step = it.next_step().unwrap();
    assert_eq!(step.ended, [3]);
    assert_eq!(shape(&step), [(1, 8, 1, true), (2, 7, 1, true)]);
    assert_eq!(it.counters().preemptions, 1);
}
