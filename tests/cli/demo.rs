//! `demo`: a whole cluster in one process.

use std::process::{Output, Stdio};

use crate::{CHECKPOINT, run, secondwind, stderr, stdout};

/// A demo over a golden checkpoint.
fn demo(more: &[&str]) -> Output {
    run(&[&["demo", "--model", CHECKPOINT, "--threads", "1"], more].concat())
}

#[test]
fn demo_prints_exactly_one_json_object() {
    let output = demo(&[
        "--token-ids",
        "1,2,3",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--temperature",
        "0",
        "--logprobs",
        "2",
        "--prompt-logprobs",
        "--split",
        "2:1",
        "--json",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let answer: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let fields: Vec<&String> = answer.as_object().unwrap().keys().collect();
    let expected = [
        "prompt_token_ids",
        "prompt_logprobs",
        "token_ids",
        "logprobs",
        "text",
        "finish_reason",
        "usage",
        "timings",
        "plan",
    ];
    assert_eq!(fields, expected);
    assert_eq!(answer["prompt_token_ids"], serde_json::json!([1, 2, 3]));
    assert_eq!(answer["prompt_logprobs"].as_array().map(Vec::len), Some(3));
    assert!(
        answer["prompt_logprobs"][0].is_null() && answer["prompt_logprobs"][1].as_f64() < Some(0.0)
    );
    assert_eq!(answer["token_ids"].as_array().map(Vec::len), Some(4));
    assert_eq!(answer["logprobs"].as_array().map(Vec::len), Some(4));
    assert_eq!(answer["logprobs"][0]["token_id"], answer["token_ids"][0]);
    assert_eq!(
        answer["logprobs"][0]["top"].as_array().map(Vec::len),
        Some(2)
    );
    assert_eq!(answer["finish_reason"], "length");
    assert_eq!(answer["usage"]["total_tokens"], 7);
    assert_eq!(answer["plan"]["ranks"].as_array().map(Vec::len), Some(2));
}

#[test]
fn logits_are_changed_as_the_flags_say() {
    let output = demo(&[
        "--token-ids",
        "1,2,3",
        "--logit-bias",
        "7=100",
        "--logit-bias",
        "8=90",
        "--frequency-penalty",
        "2",
        "--max-tokens",
        "9",
        "--ignore-eos",
        "--temperature",
        "0",
        "--json",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let answer: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let tokens = answer["token_ids"].as_array().unwrap();
    assert!(
        tokens.iter().all(|token| *token == 7 || *token == 8),
        "{tokens:?}"
    );
    // Five times 2 make up for the difference of the biases, give or take what the model thinks.
    assert!(tokens.iter().any(|token| *token == 8), "{tokens:?}");
}

#[test]
fn demo_shows_plan_answer_and_speed() {
    let output = demo(&[
        "--token-ids",
        "5,6",
        "--max-tokens",
        "8",
        "--ignore-eos",
        "--seed",
        "1",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    for word in [
        "rank",
        "worker-0",
        "worker-1",
        "cpu",
        "KV cache",
        "8 tokens after a prompt of 2",
        "tokens per second",
    ] {
        assert!(
            stdout(&output).contains(word),
            "`{word}` is not in:\n{}",
            stdout(&output)
        );
    }
}

#[test]
fn a_refused_request_carries_its_code() {
    for flags in [
        ["--temperature", "-1"],
        ["--max-tokens", "0"],
        ["--top-p", "nan"],
        ["--typical-p", "0"],
        ["--repetition-penalty", "0"],
        ["--presence-penalty", "3"],
        ["--logit-bias", "5=-101"],
        ["--min-tokens", "100000"],
    ] {
        let output = demo(&[&["--token-ids", "1"], &flags[..]].concat());
        assert_eq!(
            output.status.code(),
            Some(1),
            "{flags:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains("INVALID_ARGUMENT: "),
            "{flags:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let flags = ["--token-ids", "1", "--max-tokens", "16", "--ignore-eos"];
    let command = [
        &["demo", "--model", CHECKPOINT, "--threads", "1"],
        &flags[..],
    ]
    .concat();
    let mut child = secondwind(&command)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}
