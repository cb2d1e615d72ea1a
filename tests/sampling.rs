//! Rules and filters against the logits processors of transformers (`tests/golden/sampling.py`): each rank
//! changes and reduces its part of a row, as in a step, and the merged row is drawn from.

use std::{collections::BTreeMap, ops::Range};

use secondwind_kernels::{cpu, logits::CANDIDATES};
use secondwind_model::step::{LogitRules, Sampling};
use secondwind_worker::{
    rules::Rules,
    sampler::{self, Draw, Row},
};
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    let numbers = value.as_array().unwrap().iter();
    numbers
        .map(|value| value.as_f64().unwrap_or(f64::NEG_INFINITY))
        .collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

/// [[token, number], …].
fn pairs(value: &Value) -> Vec<(u32, f64)> {
    let pairs = value.as_array().unwrap().iter();
    pairs
        .map(|pair| (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap()))
        .collect()
}

#[test]
fn processors_and_warpers_of_transformers_agree_in_every_split() {
    let text = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/sampling.json"
    ));
    let cases: Vec<Value> = serde_json::from_str(&text.unwrap()).unwrap();
    assert_eq!(cases.len(), 32);
    for (index, case) in cases.iter().enumerate() {
        let logits: Vec<f32> = numbers(&case["logits"]).iter().map(|&x| x as f32).collect();
        let vocab = logits.len();
        let (prompt, output) = (tokens(&case["prompt"]), tokens(&case["output"]));
        let given = &case["parameters"];
        let or = |name: &str, off: f64| given[name].as_f64().unwrap_or(off) as f32;
        let min_tokens = given["min_tokens"].as_u64().unwrap() as u32;
        let biases = pairs(&given["logit_bias"]).into_iter();
        let rules = LogitRules {
            repetition_penalty: or("repetition_penalty", 1.0),
            logit_bias: biases.map(|(token, bias)| (token, bias as f32)).collect(),
            min_tokens,
            stop_tokens: tokens(&given["stop_tokens"]),
            prompt_tokens: prompt.len(),
            ..LogitRules::default()
        };
        let sampling = Sampling {
            temperature: or("temperature", 1.0),
            top_k: or("top_k", 0.0) as u32,
            top_p: or("top_p", 1.0),
            min_p: or("min_p", 0.0),
            typical_p: or("typical_p", 1.0),
            seed: 7,
            ..Sampling::default()
        };
        let all = [prompt, output].concat();
        let mut known = Rules::new(&rules, 0, vocab).unwrap();
        known.count(0, &all);

        let scores = numbers(&case["scores"]);
        let probabilities: BTreeMap<u32, f64> = pairs(&case["probabilities"]).into_iter().collect();
        for cut in [0, 1, 17, 30] {
            let ranges: Vec<_> = [0..cut, cut..vocab]
                .into_iter()
                .filter(|range| !range.is_empty())
                .collect();
            let mut parts = Vec::new();
            for range in &ranges {
                let mut own = logits[range.clone()].to_vec();
                let mut changes = Vec::new();
                known.adjust(all.len(), range, 0, &mut changes);
                cpu::adjust_logits(&mut own, &changes, None).unwrap();
                for (own, score) in own.iter().zip(&scores[range.clone()]) {
                    let own = f64::from(*own);
                    let same = own == *score || (own - score).abs() < 1e-5;
                    assert!(same, "case {index}: {own} {score}");
                }
                let first = range.start as u32;
                let row = cpu::reduce_row(&own, sampling.temperature, first, CANDIDATES);
                parts.push(Row {
                    max: row.max,
                    sum_exp: row.sum_exp,
                    sum_exp_at_temperature: row.sum_exp_t,
                    sum_x_exp_at_temperature: row.sum_x_exp_t,
                    candidates: row.candidates,
                    own: None,
                });
            }
            let merged = sampler::merge(&parts, sampling.temperature);
            let lengths: Vec<usize> = ranges.iter().map(Range::len).collect();
            let covered = sampler::covered(&parts, &lengths, CANDIDATES, &merged);
            let mut drawn: BTreeMap<u32, usize> = BTreeMap::new();
            const DRAWS: usize = 20_000;
            for position in 0..DRAWS {
                match sampler::draw(&merged, covered, vocab, &sampling, position) {
                    Draw::Token(token) => *drawn.entry(token.token).or_default() += 1,
                    Draw::NeedsWholeRow => panic!("case {index}: every token is a candidate"),
                }
            }
            for (token, count) in &drawn {
                assert!(
                    probabilities.contains_key(token),
                    "case {index}: {token} is filtered out, and was drawn {count} times"
                );
            }
            for (token, &probability) in &probabilities {
                let share = *drawn.get(token).unwrap_or(&0) as f64 / DRAWS as f64;
                // Five standard deviations.
                let most = 5.0 * (probability * (1.0 - probability) / DRAWS as f64).sqrt() + 1e-9;
                assert!(
                    (share - probability).abs() <= most,
                    "case {index}: {token} was drawn {share}, {probability} is due"
                );
            }
        }
    }
}
