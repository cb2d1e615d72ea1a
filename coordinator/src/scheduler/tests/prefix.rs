//! Sequences that begin alike.

use super::*;

fn cached(change: impl FnOnce(&mut SchedulerSettings)) -> Scheduler {
    scheduler(|settings| {
        settings.prefix_cache = true;
        settings.max_step_tokens = 32;
        settings.max_logit_rows = 32;
        change(settings);
    })
}

/// Runs all that was submitted to its end; the rows that were first of their sequence.
fn drain(it: &mut Scheduler) -> Vec<(SequenceId, usize, Vec<u32>)> {
    let mut first: Vec<(SequenceId, usize, Vec<u32>)> = Vec::new();
    while !it.is_idle() {
        for row in turn(it, 5).0.rows {
            if first.iter().all(|&(id, ..)| id != row.sequence) {
                first.push((row.sequence, row.position, row.new_blocks));
            }
        }
    }
    first
}

#[test]
fn a_prompt_starts_after_what_is_cached_and_computes_its_last_token() {
    let mut it = cached(|_| {});
    it.submit(request(10, 1)).unwrap();
    assert_eq!(drain(&mut it), [(1, 0, vec![1, 2, 3])]);
    assert_eq!(
        (it.counters().blocks_used, it.counters().blocks_cached),
        (0, 2)
    );
    // Its first eight tokens are cached; of the same eight alone, the last is computed.
    it.submit(request(14, 1)).unwrap();
    it.submit(request(8, 1)).unwrap();
    let first = drain(&mut it);
    assert_eq!(first[0].1, 8);
    assert_eq!(first[0].2[..2], [1, 2]);
    assert_eq!((first[1].1, &first[1].2[..1]), (4, [1].as_slice()));
    assert!(!first[0].2[2..].contains(&first[1].2[1]));
    let counters = it.counters();
    assert_eq!(
        (
            counters.prefix_queried_tokens,
            counters.prefix_hit_tokens,
            counters.computed_tokens
        ),
        (32, 12, 20)
    );
}

#[test]
fn what_a_sequence_said_is_cached_too() {
    let mut it = cached(|_| {});
    it.submit(request(3, 6)).unwrap();
    drain(&mut it);
    // Its last token was never computed: 8 of 9 positions are.
    let mut next = request(3, 1);
    next.prompt.extend([5; 9]);
    it.submit(next).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(2, 8, 4, true)]);
}

#[test]
fn two_share_blocks_while_both_run() {
    let mut it = cached(|_| {});
    it.submit(request(9, 9)).unwrap();
    turn(&mut it, 5);
    it.submit(request(10, 9)).unwrap();
    let (step, _) = turn(&mut it, 5);
    assert_eq!(shape(&step), [(1, 9, 1, true), (2, 8, 2, true)]);
    assert_eq!(it.counters().blocks_used, 4);
    assert!(it.cancel(1));
    turn(&mut it, 5);
    assert_eq!(it.counters().blocks_used, 3);
    assert!(it.cancel(2));
    assert_eq!(
        (it.counters().blocks_used, it.counters().blocks_cached),
        (0, 2)
    );
}

#[test]
fn a_block_is_shared_only_after_its_step_is_committed() {
    let mut it = cached(|_| {});
    it.submit(request(8, 2)).unwrap();
    let first = it.next_step().unwrap();
    it.submit(request(9, 2)).unwrap();
    assert_eq!(it.next_step().unwrap().rows[1].position, 0);
    it.commit(answer(&first, 5)).unwrap();
    it.submit(request(9, 2)).unwrap();
    let third = it.next_step().unwrap();
    assert_eq!(shape(&third)[1..], [(3, 8, 1, true)]);
}

#[test]
fn tenants_share_nothing() {
    let mut it = cached(|_| {});
    it.submit(request(9, 1)).unwrap();
    drain(&mut it);
    let other = |tenant| NewSequence {
        tenant,
        ..request(9, 1)
    };
    it.submit(other(1)).unwrap();
    it.submit(other(0)).unwrap();
    let first = drain(&mut it);
    assert_eq!((first[0].1, first[1].1), (0, 8));
}

#[test]
fn salts_share_nothing() {
    let mut it = cached(|_| {});
    let salted = |salt: u32| NewSequence {
        cache_salt: Some([salt; 8]),
        ..request(9, 1)
    };
    for (salt, cached) in [(1, 0), (2, 0), (1, 8), (2, 8)] {
        it.submit(salted(salt)).unwrap();
        assert_eq!(drain(&mut it)[0].1, cached, "salt {salt}");
    }
}

#[test]
fn prompt_log_probabilities_are_computed_in_spite_of_the_cache() {
    let mut it = cached(|_| {});
    it.submit(request(9, 1)).unwrap();
    drain(&mut it);
    it.submit(scored(9, 1)).unwrap();
    let (step, events) = turn(&mut it, 5);
    assert_eq!(shape(&step), [(2, 0, 9, true)]);
    assert_eq!((step.rows[0].prompt_targets.len(), events.len()), (8, 3));
    // A prompt of one token has no log-probability to report.
    it.submit(scored(1, 1)).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(3, 0, 1, true)]);
}

#[test]
fn one_that_was_preempted_finds_its_own_blocks_again() {
    let mut it = cached(|settings| (settings.kv_blocks, settings.max_in_flight) = (7, 1));
    it.submit(request(4, 13)).unwrap();
    let mut second = request(8, 9);
    second.prompt.reverse();
    it.submit(second).unwrap();
    // Each comes to have its share of the six blocks, until the first needs another.
    while it.counters().preemptions == 0 {
        turn(&mut it, 5);
    }
    assert_eq!(
        (it.counters().blocks_used, it.counters().blocks_cached),
        (4, 2)
    );
    let again = loop {
        let (step, _) = turn(&mut it, 5);
        if let Some(row) = step.rows.into_iter().find(|row| row.sequence == 2) {
            break row;
        }
    };
    // One of its three was evicted for the first.
    assert_eq!((again.position, again.input.len()), (8, 5));
    assert_eq!(it.counters().prefix_hit_tokens, 8);
    drain(&mut it);
    assert_eq!(it.counters().sampled_tokens, 22);
}

#[test]
fn cached_blocks_make_room_for_others() {
    let mut it = cached(|settings| settings.kv_blocks = 6);
    it.submit(request(16, 1)).unwrap();
    drain(&mut it);
    assert_eq!(it.counters().blocks_cached, 4);
    let mut other = request(17, 1);
    other.prompt.reverse();
    it.submit(other).unwrap();
    drain(&mut it);
    let counters = it.counters();
    assert_eq!((counters.prefix_evictions, counters.preemptions), (4, 0));
    assert_eq!((counters.blocks_used, counters.blocks_cached), (0, 4));
}

#[test]
fn a_new_epoch_knows_no_prefix() {
    let mut it = cached(|_| {});
    it.submit(request(9, 1)).unwrap();
    drain(&mut it);
    it.abort_epoch();
    assert_eq!(it.counters().blocks_cached, 0);
    it.submit(request(9, 1)).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(2, 0, 9, true)]);
    assert!(it.replan(9, None).is_empty());
    it.submit(request(9, 1)).unwrap();
    assert_eq!(shape(&turn(&mut it, 5).0), [(3, 0, 9, true)]);
}
