//! Changes of split rows against the definitions over whole rows.

use proptest::prelude::*;
use secondwind_kernels::cpu;

use super::*;

const VOCAB: usize = 40;

/// The definitions, one token at a time, in f64.
fn reference(logits: &[f32], rules: &LogitRules, tokens: &[u32]) -> Vec<f64> {
    let (_, output) = tokens.split_at(rules.prompt_tokens);
    let changed = logits.iter().zip(0_u32..).map(|(&logit, token)| {
        let mut x = f64::from(logit);
        for &(biased, bias) in &rules.logit_bias {
            if biased == token {
                x += f64::from(bias);
            }
        }
        if tokens.contains(&token) {
            let penalty = f64::from(rules.repetition_penalty);
            x = if x > 0.0 { x / penalty } else { x * penalty };
        }
        let count = output.iter().filter(|&&other| other == token).count();
        x -= f64::from(rules.frequency_penalty) * count as f64;
        if count > 0 {
            x -= f64::from(rules.presence_penalty);
        }
        if output.len() < rules.min_tokens as usize && rules.stop_tokens.contains(&token) {
            x = f64::NEG_INFINITY;
        }
        x
    });
    changed.collect()
}

fn rules() -> impl Strategy<Value = LogitRules> {
    let tokens = || prop::collection::btree_set(0..VOCAB as u32, 0..6);
    (
        prop_oneof![Just(1.0_f32), 0.3_f32..3.0],
        prop_oneof![Just(0.0_f32), -2.0_f32..2.0],
        prop_oneof![Just(0.0_f32), -2.0_f32..2.0],
        prop::collection::btree_map(0..VOCAB as u32, -100.0_f32..100.0, 0..6),
        0_u32..20,
        tokens(),
    )
        .prop_map(
            |(repetition, presence, frequency, bias, min_tokens, stops)| LogitRules {
                repetition_penalty: repetition,
                presence_penalty: presence,
                frequency_penalty: frequency,
                logit_bias: bias.into_iter().collect(),
                min_tokens,
                stop_tokens: stops.into_iter().collect(),
                ..LogitRules::default()
            },
        )
}

proptest! {
    #[test]
    fn rows_change_as_the_definitions_say_whatever_the_split_and_the_chunks(
        rules in rules(),
        logits in prop::collection::vec(-9.0_f32..9.0, VOCAB),
        tokens in prop::collection::vec(0..VOCAB as u32, 1..40),
        prompt in 1_usize..40,
        // Where the row begins that brings the rules, and how the tokens come from there on.
        start in 0_usize..40,
        chunk in 1_usize..9,
        cuts in prop::collection::vec(0..VOCAB, 0..3),
    ) {
        let rules = LogitRules { prompt_tokens: prompt.min(tokens.len()), ..rules };
        let start = start.min(tokens.len() - 1);
        let from = rules.history_start(start);
        let brought = LogitRules { history: tokens[from..start].to_vec(), ..rules.clone() };
        let mut known = Rules::new(&brought, start, VOCAB).unwrap();
        let mut position = start;
        for part in tokens[start..].chunks(chunk) {
            known.count(position, part);
            position += part.len();
        }
        let expected = reference(&logits, &rules, &tokens);
        let mut bounds = vec![0, VOCAB];
        bounds.extend(cuts);
        bounds.sort_unstable();
        for range in bounds.windows(2).map(|pair| pair[0]..pair[1]) {
            // The second row of its rank's logits.
            let own = &logits[range.clone()];
            let mut rows = [own, own].concat();
            let mut changes = Vec::new();
            known.adjust(tokens.len(), &range, range.len() as u32, &mut changes);
            cpu::adjust_logits(&mut rows, &changes, None).unwrap();
            let (first, second) = rows.split_at(range.len());
            prop_assert_eq!(first, own);
            for (got, expected) in second.iter().zip(&expected[range]) {
                let same = f64::from(*got) == *expected
                    || (f64::from(*got) - expected).abs() <= 1e-5 * expected.abs().max(10.0);
                prop_assert!(same, "{} {}", got, expected);
            }
            // No two changes are of the same logit.
            let mut elements: Vec<u32> = changes.iter().map(|change| change.element).collect();
            elements.sort_unstable();
            prop_assert!(elements.is_sorted_by(|a, b| a < b));
        }
    }
}

#[test]
fn rules_that_do_not_follow_are_refused() {
    let refused = |rules: LogitRules, position| Rules::new(&rules, position, VOCAB).unwrap_err();
    let penalty = LogitRules {
        repetition_penalty: 2.0,
        prompt_tokens: 3,
        ..LogitRules::default()
    };
    assert_eq!(
        refused(penalty.clone(), 2),
        "its rules came with 0 earlier tokens, 2 are due"
    );
    for number in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let rules = LogitRules {
            repetition_penalty: number,
            ..LogitRules::default()
        };
        assert!(refused(rules, 0).contains("no legal numbers"), "{number}");
    }
    let foreign = LogitRules {
        history: vec![1, 40],
        ..penalty.clone()
    };
    assert!(refused(foreign, 2).contains("token 40, which is outside the vocabulary of 40"));
    let unsorted = LogitRules {
        logit_bias: vec![(3, 1.0), (3, 1.0)],
        ..LogitRules::default()
    };
    assert!(refused(unsorted, 0).contains("out of order"));
    // Output penalties do not depend on the prompt.
    let output = LogitRules {
        presence_penalty: 1.0,
        prompt_tokens: 3,
        ..LogitRules::default()
    };
    assert!(Rules::new(&output, 3, VOCAB).is_ok());
    assert!(refused(output, 4).contains("0 earlier tokens, 1 are due"));
}
