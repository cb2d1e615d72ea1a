//! Draws from split rows against the plain definition over the whole row.

use proptest::prelude::*;

use super::*;

fn sampling() -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        logprobs: Some(2),
    }
}

/// One rank's part, with at most `keep` candidates.
fn part(logits: &[f32], first: u32, temperature: f32, keep: usize) -> Row {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = if temperature > 0.0 {
        f64::from(temperature)
    } else {
        1.0
    };
    let mut candidates: Vec<_> = logits
        .iter()
        .enumerate()
        .map(|(i, &logit)| (first + i as u32, logit))
        .collect();
    sort_candidates(&mut candidates);
    candidates.truncate(keep);
    let sum = |scale: f64| {
        logits
            .iter()
            .map(|&l| ((f64::from(l) - f64::from(max)) / scale).exp())
            .sum::<f64>()
    };
    Row {
        max,
        sum_exp: sum(1.0),
        sum_exp_at_temperature: sum(scale),
        candidates,
    }
}

fn split_draw(logits: &[f32], cuts: &[usize], keep: usize, s: &Sampling, position: usize) -> Draw {
    let mut bounds = vec![0];
    bounds.extend(cuts.iter().map(|cut| cut % logits.len()));
    bounds.push(logits.len());
    bounds.sort_unstable();
    bounds.dedup();
    let parts: Vec<Row> = bounds
        .windows(2)
        .map(|w| part(&logits[w[0]..w[1]], w[0] as u32, s.temperature, keep))
        .collect();
    let lengths: Vec<usize> = bounds.windows(2).map(|w| w[1] - w[0]).collect();
    let merged = merge(&parts, s.temperature);
    draw(
        &merged,
        covered(&parts, &lengths, &merged),
        logits.len(),
        s,
        position,
    )
}

/// The textbook: softmax, sort, filter, renormalise, invert the cumulative distribution.
fn reference(logits: &[f32], s: &Sampling, position: usize) -> (u32, f64) {
    let mut sorted: Vec<(u32, f32)> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| (i as u32, l))
        .collect();
    sort_candidates(&mut sorted);
    if s.temperature == 0.0 {
        return (sorted[0].0, 1.0);
    }
    let t = f64::from(s.temperature);
    let mut p: Vec<f64> = sorted
        .iter()
        .map(|&(_, l)| ((f64::from(l) - f64::from(sorted[0].1)) / t).exp())
        .collect();
    if s.top_k > 0 {
        p.truncate(s.top_k as usize);
    }
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    let mut before = 0.0;
    let kept = p
        .iter()
        .position(|&x| {
            let out = s.top_p < 1.0 && before >= f64::from(s.top_p);
            before += x;
            out
        })
        .unwrap_or(p.len());
    let floor = p[0] * f64::from(s.min_p);
    let kept = kept
        .min(p.iter().position(|&x| x < floor).unwrap_or(p.len()))
        .max(1);
    let sum: f64 = p[..kept].iter().sum();
    let target = uniform(s.seed, position);
    let mut cumulative = 0.0;
    let mut distance = f64::INFINITY;
    let mut choice = sorted[kept - 1].0;
    for (i, &x) in p[..kept].iter().enumerate() {
        cumulative += x / sum;
        distance = distance.min((target - cumulative).abs());
        if target < cumulative {
            choice = sorted[i].0;
            break;
        }
    }
    (choice, distance)
}

proptest! {
    #[test]
    fn any_split_draws_what_the_whole_row_draws(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..60),
        cuts in prop::collection::vec(0_usize..60, 0..4),
        keep in 1_usize..64,
        temperature in prop_oneof![Just(0.0_f32), 0.2_f32..3.0],
        top_k in prop_oneof![Just(0_u32), 1_u32..70],
        top_p in prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..0.9],
        seed in any::<u64>(),
        position in 0_usize..100_000,
    ) {
        let s = Sampling { temperature, top_k, top_p, min_p, seed, logprobs: Some(1) };
        let (expected, distance) = reference(&logits, &s, position);
        // A draw within rounding of a boundary may go either way.
        prop_assume!(temperature == 0.0 || distance > 1e-9);
        match split_draw(&logits, &cuts, keep, &s, position) {
            Draw::Token(token) => prop_assert_eq!(token.token, expected),
            Draw::NeedsWholeRow => prop_assert!(keep < logits.len()),
        }
        // With every logit at hand there is always an answer.
        let Draw::Token(token) = split_draw(&logits, &cuts, logits.len(), &s, position) else {
            return Err(TestCaseError::fail("a whole row needed more"));
        };
        prop_assert_eq!(token.token, expected);
    }
}

#[test]
fn log_probabilities_are_of_the_unscaled_row() {
    let logits = [1.0_f32, 3.0, 2.0];
    let s = Sampling {
        temperature: 0.5,
        ..sampling()
    };
    let Draw::Token(token) = split_draw(&logits, &[1], 8, &s, 3) else {
        panic!("three candidates cover three logits");
    };
    let ln_sum = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
    let expected = |id: u32| (f64::from(logits[id as usize]) - ln_sum) as f32;
    assert!((token.logprob.unwrap() - expected(token.token)).abs() < 1e-6);
    assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    assert!(
        token
            .top
            .iter()
            .all(|&(id, p)| (p - expected(id)).abs() < 1e-6)
    );
}

#[test]
fn equal_logits_go_to_the_lowest_token_in_every_split() {
    let logits = [0.5_f32, 2.0, 2.0, 2.0, 1.0];
    let s = Sampling {
        temperature: 0.0,
        ..sampling()
    };
    for cut in 0..5 {
        let Draw::Token(token) = split_draw(&logits, &[cut], 1, &s, 0) else {
            panic!("greedy never needs the whole row");
        };
        assert_eq!(token.token, 1, "cut at {cut}");
    }
}

#[test]
fn a_flat_row_needs_its_tail_only_when_the_draw_lands_there() {
    let logits = vec![0.0_f32; 1000];
    let mut whole = 0;
    for position in 0..200 {
        match split_draw(&logits, &[500], 256, &sampling(), position) {
            Draw::Token(_) => {}
            Draw::NeedsWholeRow => whole += 1,
        }
    }
    // All logits are equal, so nothing but the greedy first place is beyond doubt.
    assert!(whole > 150, "{whole}");
    let mut peaked = vec![0.0_f32; 1000];
    (0..100).for_each(|i| peaked[i * 10] = 12.0 + i as f32 * 1e-3);
    let whole = (0..200)
        .filter(|&p| split_draw(&peaked, &[500], 256, &sampling(), p) == Draw::NeedsWholeRow)
        .count();
    assert!(whole < 5, "{whole}");
}

#[test]
fn uniform_is_uniform_and_a_function_of_its_arguments() {
    let mean = (0..10_000).map(|p| uniform(42, p)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
    assert_eq!(uniform(1, 2), uniform(1, 2));
    assert_ne!(uniform(1, 2), uniform(2, 1));
}
