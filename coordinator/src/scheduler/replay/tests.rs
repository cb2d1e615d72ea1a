//! What rules of the scheduler do to waiting times, in terms of the cost of two P40.

use proptest::prelude::*;

use super::*;

fn settings() -> SchedulerSettings {
    SchedulerSettings {
        max_sequences: 16,
        max_step_tokens: 512,
        max_prefill_tokens: 24,
        max_logit_rows: 64,
        block_tokens: 16,
        kv_blocks: 4096,
        max_context_tokens: 8192,
        max_in_flight: 2,
        max_waiting: 1000,
        max_waiting_tokens: usize::MAX,
        prefix_cache: true,
        speculation: None,
    }
}

fn arrival(at: f64, prompt_tokens: usize, output_tokens: usize) -> Arrival {
    Arrival {
        at,
        tenant: 0,
        priority: 0,
        prompt_tokens,
        output_tokens,
        conversation: 0,
        shared_tokens: 0,
    }
}

/// Eight answers of 1000 tokens, and a prompt of 4000 tokens that arrives among them.
fn long_prompt_among_answers(max_prefill_tokens: usize) -> Replay {
    let mut arrivals = vec![arrival(0.0, 100, 1000); 8];
    arrivals.push(arrival(5.0, 4000, 50));
    let settings = SchedulerSettings {
        max_prefill_tokens,
        ..settings()
    };
    replay(settings, &StepCost::TWO_P40, &arrivals).unwrap()
}

/// The largest gap between two tokens after second 4, in those usual before.
fn stretch(replay: &Replay) -> f64 {
    let tokens = &replay.outcomes[0].tokens;
    let before = tokens.iter().filter(|&&at| at < 4.9);
    let usual = (4.9 - tokens[0]) / before.count() as f64;
    let later = replay.outcomes[..8].iter().flat_map(|outcome| {
        let later = outcome.tokens.windows(2).filter(|pair| pair[0] > 4.0);
        later.map(|pair| pair[1] - pair[0])
    });
    later.fold(0.0, f64::max) / usual
}

#[test]
fn answers_go_on_at_half_their_pace_or_more_while_a_long_prompt_arrives() {
    let limited = long_prompt_among_answers(24);
    let whole = long_prompt_among_answers(512);
    assert!(stretch(&limited) < 2.0, "{}", stretch(&limited));
    assert!(stretch(&whole) > 10.0, "{}", stretch(&whole));
    println!(
        "largest gap, in usual ones: {:.2}, {:.2} without the limit",
        stretch(&limited),
        stretch(&whole)
    );
    // What it costs: the prompt itself waits longer.
    let first = |replay: &Replay| replay.outcomes[8].tokens[0] - 5.0;
    let slower = first(&limited) / first(&whole);
    println!("first token of the prompt: {slower:.2} times as late");
    assert!(slower < 2.0, "{slower}");
    assert!(
        limited
            .outcomes
            .iter()
            .all(|outcome| outcome.refusal.is_none())
    );
}

#[test]
fn alone_a_prompt_gets_whole_steps() {
    let alone = |max_prefill_tokens| {
        let settings = SchedulerSettings {
            max_prefill_tokens,
            ..settings()
        };
        let arrivals = [arrival(0.0, 4000, 2)];
        replay(settings, &StepCost::TWO_P40, &arrivals)
            .unwrap()
            .seconds
    };
    assert_eq!(alone(24), alone(512));
}

#[test]
fn those_without_a_place_give_a_long_prompt_no_more_of_a_step() {
    let mut arrivals = vec![arrival(0.0, 100, 1000); 15];
    arrivals.push(arrival(5.0, 4000, 50));
    arrivals.extend(vec![arrival(5.0, 100, 10); 8]);
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    assert!(stretch(&replayed) < 2.0, "{}", stretch(&replayed));
}

#[test]
fn a_long_prompt_leaves_its_share_to_short_ones() {
    let mut arrivals = vec![arrival(0.0, 100, 1000); 8];
    arrivals.push(arrival(5.0, 6000, 50));
    arrivals.extend(vec![arrival(5.1, 100, 10); 3]);
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    let first = |index: usize| replayed.outcomes[index].tokens[0];
    for short in 9..12 {
        assert!(first(short) < 6.5, "{}", first(short));
    }
    assert!(first(8) > 8.0, "{}", first(8));
}

#[test]
fn many_prompts_share_more_of_a_step_than_one() {
    let mut arrivals = vec![arrival(0.0, 10, 400)];
    arrivals.extend((0..15).map(|_| arrival(1.0, 1000, 10)));
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    let last = replayed.outcomes.iter().map(|outcome| outcome.tokens[0]);
    let last = last.fold(0.0, f64::max) - 1.0;
    // 15 000 tokens: at 24 a step it would take 625 steps of 20 ms each.
    let whole = 15_000.0 * (StepCost::TWO_P40.token + StepCost::TWO_P40.exchange);
    assert!(last < 1.25 * whole, "{last} s, {whole} s without answers");
}

#[test]
fn a_conversation_finds_what_was_said() {
    let turns = [(0.0, 100, 50), (10.0, 200, 50), (20.0, 300, 50)];
    let arrivals = turns.map(|(at, prompt, output)| Arrival {
        conversation: 7,
        shared_tokens: 1000,
        ..arrival(at, prompt, output)
    });
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    // 149 and 249 tokens were computed before: 9 and 15 whole blocks.
    assert_eq!(replayed.counters.prefix_hit_tokens, 144 + 240);
    // So 200 tokens took no longer than the first 100 did.
    let first = |turn: usize| replayed.outcomes[turn].tokens[0] - arrivals[turn].at;
    assert!(first(1) < first(0), "{} {}", first(1), first(0));
}

#[test]
fn a_cached_prefix_of_2000_tokens_cuts_the_wait_to_a_tenth_or_less() {
    let asked = |at| Arrival {
        conversation: 1,
        shared_tokens: 2000,
        ..arrival(at, 2010, 2)
    };
    let arrivals = [asked(0.0), asked(100.0)];
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    let wait = |index: usize| replayed.outcomes[index].tokens[0] - arrivals[index].at;
    assert!(10.0 * wait(1) < wait(0), "{} {}", wait(1), wait(0));
}

/// Tokens of work done for each tenant until second `end`, a prompt with its first token.
fn work(arrivals: &[Arrival], replay: &Replay, tenants: u32, end: f64) -> Vec<usize> {
    let mut work = vec![0; tenants as usize];
    for (arrival, outcome) in arrivals.iter().zip(&replay.outcomes) {
        let done = outcome.tokens.iter().filter(|&&at| at <= end).count();
        if done > 0 {
            work[arrival.tenant as usize] += arrival.prompt_tokens + 2 * done;
        }
    }
    work
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// While all of them have requests waiting, the work done for tenants differs by what can run at
    /// once, however long it goes on and however unlike their requests are.
    #[test]
    fn tenants_that_always_wait_get_the_same(
        sizes in prop::collection::vec((1..50_usize, 1..20_usize), 2..5),
        max_sequences in 1..5_usize,
        blocks in 12..60_usize,
    ) {
        let tenants = sizes.len() as u32;
        let mut arrivals = Vec::new();
        for (tenant, &(prompt, output)) in (0..).zip(&sizes) {
            // As many as make 6000 tokens of work, all of the first tenant before those of the second.
            let count = 6000 / (prompt + 2 * output) + 1;
            arrivals.extend((0..count).map(|_| Arrival { tenant, ..arrival(0.0, prompt, output) }));
        }
        let settings = SchedulerSettings {
            max_sequences,
            kv_blocks: blocks,
            max_waiting: arrivals.len(),
            ..settings()
        };
        let replay = replay(settings, &StepCost::TWO_P40, &arrivals).unwrap();
        let last_first_token = |tenant: u32| {
            let of_tenant = arrivals.iter().zip(&replay.outcomes).filter(|(it, _)| it.tenant == tenant);
            of_tenant.map(|(_, outcome)| outcome.tokens[0]).fold(0.0, f64::max)
        };
        let end = (0..tenants).map(last_first_token).fold(f64::INFINITY, f64::min);
        let work = work(&arrivals, &replay, tenants, end);
        let largest = sizes.iter().map(|(prompt, output)| prompt + 2 * output).max().unwrap();
        let (most, least) = (work.iter().max().unwrap(), work.iter().min().unwrap());
        prop_assert!(most - least <= 2 * (max_sequences + 1) * largest, "{:?}", work);
    }
}

#[test]
fn a_flood_of_one_tenant_does_not_drown_another() {
    let mut arrivals = vec![arrival(0.0, 500, 100); 200];
    arrivals.push(Arrival {
        tenant: 1,
        ..arrival(1.0, 500, 100)
    });
    let replayed = replay(settings(), &StepCost::TWO_P40, &arrivals).unwrap();
    let of_flood = replayed.outcomes[..200].iter();
    let before = of_flood.filter(|it| it.tokens[0] < replayed.outcomes[200].tokens[0]);
    // Those that ran when it came, and some that they made place for before it.
    assert!(before.count() <= 2 * 16);
}
