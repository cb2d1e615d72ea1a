//! Draws from split rows against the plain definition over the whole row.

use proptest::prelude::*;

use super::*;

fn sampling() -> Sampling {
    Sampling {
        temperature: 1.0,
        seed: 7,
        logprobs: Some(2),
        ..Sampling::default()
    }
}

/// One rank's part, with at most `keep` candidates.
fn part(logits: &[f32], first: u32, temperature: f32, keep: usize) -> Row {
    let max = largest(logits.iter().copied());
    let scale = if temperature > 0.0 {
        f64::from(temperature)
    } else {
        1.0
    };
    let mut candidates: Vec<_> = logits
        .iter()
        .enumerate()
        .map(|(i, &logit)| (first + i as u32, logit))
        .filter(|(_, logit)| *logit > f32::NEG_INFINITY)
        .collect();
    sort_candidates(&mut candidates);
    candidates.truncate(keep);
    let sum = |scale: f64, weigh: fn(f64) -> f64| {
        let alive = logits.iter().filter(|l| **l > f32::NEG_INFINITY);
        alive
            .map(|&l| (f64::from(l) - f64::from(max)) / scale)
            .map(|x| weigh(x) * x.exp())
            .sum::<f64>()
    };
    Row {
        max,
        sum_exp: sum(1.0, |_| 1.0),
        sum_exp_at_temperature: sum(scale, |_| 1.0),
        sum_x_exp_at_temperature: sum(scale, |x| x),
        candidates,
        own: None,
    }
}

fn bounds(len: usize, cuts: &[usize]) -> Vec<usize> {
    let mut bounds = vec![0];
    bounds.extend(cuts.iter().map(|cut| cut % len));
    bounds.push(len);
    bounds.sort_unstable();
    bounds.dedup();
    bounds
}

fn split_draw(logits: &[f32], cuts: &[usize], keep: usize, s: &Sampling, position: usize) -> Draw {
    let bounds = bounds(logits.len(), cuts);
    let parts: Vec<Row> = bounds
        .windows(2)
        .map(|w| part(&logits[w[0]..w[1]], w[0] as u32, s.temperature, keep))
        .collect();
    let lengths: Vec<usize> = bounds.windows(2).map(|w| w[1] - w[0]).collect();
    let merged = merge(&parts, s.temperature);
    draw(
        &merged,
        covered(&parts, &lengths, keep, &merged),
        logits.len(),
        s,
        position,
    )
}

/// The textbook: softmax, sort, filter one after the other, renormalise each time, invert the cumulative
/// distribution. Also how near a decision was: within rounding it may go either way.
fn reference(logits: &[f32], s: &Sampling, position: usize) -> (u32, f64) {
    let mut sorted: Vec<(u32, f32)> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| (i as u32, l))
        .filter(|(_, l)| *l > f32::NEG_INFINITY)
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
    let normalise = |p: &mut Vec<f64>| {
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    };
    normalise(&mut p);
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
    p.truncate(kept);
    normalise(&mut p);
    let mut distance = f64::INFINITY;
    if s.typical_p < 1.0 {
        let entropy: f64 = -p.iter().map(|p| p * p.ln()).sum::<f64>();
        let off = |p: f64| (-p.ln() - entropy).abs();
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| off(p[a]).total_cmp(&off(p[b])));
        let mut mass = 0.0;
        let mut threshold = f64::INFINITY;
        for &i in &order {
            mass += p[i];
            distance = distance.min((mass - f64::from(s.typical_p)).abs());
            if mass >= f64::from(s.typical_p) {
                threshold = off(p[i]);
                break;
            }
        }
        // Equally near up to rounding: kept together or not.
        let near = |p: &f64| (off(*p) - threshold).abs();
        let tied = |p: &&f64| near(p) > 0.0 && near(p) < 1e-9;
        if p.iter().any(|p| tied(&p)) {
            distance = 0.0;
        }
        p.iter_mut()
            .filter(|p| off(**p) > threshold)
            .for_each(|p| *p = 0.0);
        normalise(&mut p);
    }
    let target = uniform(s.seed, position);
    let mut cumulative = 0.0;
    let last = p.iter().rposition(|p| *p > 0.0).unwrap();
    let mut choice = sorted[last].0;
    for (i, &x) in p.iter().enumerate() {
        cumulative += x;
        distance = distance.min((target - cumulative).abs());
        if target < cumulative {
            choice = sorted[i].0;
            break;
        }
    }
    (choice, distance)
}

fn samplings() -> impl Strategy<Value = Sampling> {
    (
        prop_oneof![Just(0.0_f32), 0.2_f32..3.0],
        prop_oneof![Just(0_u32), 1_u32..70],
        prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
        prop_oneof![Just(0.0_f32), 0.0_f32..0.9],
        prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
        any::<u64>(),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, typical_p, seed)| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                typical_p,
                seed,
                logprobs: Some(1),
                rules: None,
            },
        )
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![9 => -8.0_f32..8.0, 1 => Just(f32::NEG_INFINITY)];
    prop::collection::vec(logit, 1..60).prop_filter("all are banned", |logits| {
        logits.iter().any(|logit| logit.is_finite())
    })
}

proptest! {
    #[test]
    fn any_split_draws_what_the_whole_row_draws(
        logits in logits(),
        cuts in prop::collection::vec(0_usize..60, 0..4),
        keep in 1_usize..64,
        s in samplings(),
        position in 0_usize..100_000,
    ) {
        let (expected, distance) = reference(&logits, &s, position);
        // A draw within rounding of a boundary may go either way.
        prop_assume!(s.temperature == 0.0 || distance > 1e-9);
        match split_draw(&logits, &cuts, keep, &s, position) {
            Draw::Token(token) => prop_assert_eq!(token.token, expected),
            Draw::NeedsWholeRow => {
                let alive = logits.iter().filter(|logit| logit.is_finite()).count();
                prop_assert!(keep <= alive, "everything that can be drawn was there");
            }
        }
        // With every logit at hand there is always an answer.
        let Draw::Token(token) = split_draw(&logits, &cuts, logits.len(), &s, position) else {
            return Err(TestCaseError::fail("a whole row needed more"));
        };
        prop_assert_eq!(token.token, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn few_candidates_decide_what_is_typical_or_say_that_they_cannot(
        logits in prop::collection::vec(-3.0_f32..3.0, 2..60),
        cuts in prop::collection::vec(0_usize..60, 0..2),
        keep in 1_usize..20,
        typical_p in 0.02_f32..0.99,
        seed in any::<u64>(),
    ) {
        let s = Sampling { typical_p, seed, ..sampling() };
        let (expected, distance) = reference(&logits, &s, 0);
        prop_assume!(distance > 1e-9);
        if let Draw::Token(token) = split_draw(&logits, &cuts, keep, &s, 0) {
            prop_assert_eq!(token.token, expected);
        }
    }
}

#[test]
fn typical_tokens_are_decided_by_candidates_where_they_can_be() {
    // One likely token, a dozen that carry the entropy, and a long tail.
    let mut logits = vec![-9.0_f32; 1000];
    logits[7] = 6.0;
    (0..12).for_each(|i| logits[i * 80 + 1] = 4.0 + 0.01 * i as f32);
    let s = Sampling {
        typical_p: 0.3,
        ..sampling()
    };
    let draws = |s: &Sampling, keep| -> Vec<Option<u32>> {
        let draw = |position| match split_draw(&logits, &[500], keep, s, position) {
            Draw::Token(token) => Some(token.token),
            Draw::NeedsWholeRow => None,
        };
        (0..100).map(draw).collect()
    };
    let whole = draws(&s, 1000);
    assert_eq!(draws(&s, 256), whole);
    // The likeliest token is less surprising than a typical one.
    assert!(whole.iter().all(|token| token.unwrap() != 7));
    // All but the tail: what lies beyond the candidates might count.
    let nearly_all = Sampling {
        typical_p: 0.999_999,
        ..s
    };
    assert!(draws(&nearly_all, 256).iter().all(Option::is_none));
}

#[test]
fn log_probabilities_are_the_models_own_where_rules_changed_the_row() {
    let own = [1.0_f32, 3.0, 2.0, 0.5];
    // Token 1 is banned and token 3 raised.
    let changed = [1.0_f32, f32::NEG_INFINITY, 2.0, 90.0];
    let s = sampling();
    for cut in 0..4 {
        let bounds = bounds(4, &[cut]);
        let parts: Vec<Row> = bounds
            .windows(2)
            .map(|w| {
                let (first, range) = (w[0] as u32, w[0]..w[1]);
                let before = part(&own[range.clone()], first, 1.0, 4);
                let here = (first..).zip(own[range.clone()].iter().copied());
                let touched = here
                    .filter(|(token, _)| [1, 3].contains(token))
                    .collect::<Vec<_>>();
                let after = part(&changed[range], first, 1.0, 4);
                Row {
                    own: (!touched.is_empty()).then_some(OwnRow {
                        max: before.max,
                        sum_exp: before.sum_exp,
                        best: before.candidates,
                        changed: touched,
                    }),
                    ..after
                }
            })
            .collect();
        let lengths: Vec<usize> = bounds.windows(2).map(|w| w[1] - w[0]).collect();
        let merged = merge(&parts, 1.0);
        let known = covered(&parts, &lengths, 4, &merged);
        let Draw::Token(token) = draw(&merged, known, 4, &s, 3) else {
            panic!("all tokens are candidates");
        };
        let ln_sum = own.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        let expected = |id: u32| (f64::from(own[id as usize]) - ln_sum) as f32;
        assert_eq!(token.token, 3);
        assert!(
            (token.logprob.unwrap() - expected(3)).abs() < 1e-6,
            "{token:?}"
        );
        assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!(
            token
                .top
                .iter()
                .all(|&(id, p)| (p - expected(id)).abs() < 1e-6)
        );
    }
}

#[test]
fn a_rank_whose_tokens_are_all_banned_adds_nothing() {
    let logits = [f32::NEG_INFINITY, f32::NEG_INFINITY, 1.0, 2.0];
    for s in [
        sampling(),
        Sampling {
            typical_p: 0.9,
            ..sampling()
        },
    ] {
        // Two of four are left: a rank with room for three has them all.
        for position in 0..50 {
            let together = split_draw(&logits, &[], 3, &s, position);
            assert_eq!(split_draw(&logits, &[2], 3, &s, position), together);
            assert!(matches!(together, Draw::Token(token) if token.token >= 2));
        }
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
