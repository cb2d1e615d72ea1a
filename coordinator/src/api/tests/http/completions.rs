use secondwind_model::step::PromptLogprob;
use serde_json::{Value as Json, json};

use super::{answer, finished, likely, post, says, serve, token};
use crate::request::{FinishReason, SequenceEvent};
use crate::text::fixture::IM_END;

async fn ask(json: Json) -> (Json, Vec<crate::request::NewSequence>) {
    let served = serve(says(answer("abc"))).await;
    let reply = post(&served, "/v1/completions", &json).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let submitted = served.engine.submitted.lock().unwrap().clone();
    (reply.json(), submitted)
}

fn texts(json: &Json) -> Vec<&str> {
    let choices = json["choices"].as_array().unwrap().iter().enumerate();
    choices
        .map(|(index, choice)| {
            assert_eq!(choice["index"], index);
            choice["text"].as_str().unwrap()
        })
        .collect()
}

#[tokio::test]
async fn prompts_come_in_four_shapes() {
    for (prompt, ids) in [
        (json!("hello"), vec![vec![259]]),
        (json!(["hello", "a"]), vec![vec![259], vec![97]]),
        (json!([1, 2]), vec![vec![1, 2]]),
        (json!([[1, 2], [3]]), vec![vec![1, 2], vec![3]]),
    ] {
        let (json, submitted) = ask(json!({"prompt": prompt})).await;
        let given: Vec<Vec<u32>> = submitted.iter().map(|one| one.prompt.clone()).collect();
        assert_eq!(given, ids);
        // OpenAI's default.
        assert!(submitted.iter().all(|one| one.max_tokens == 16));
        assert_eq!(texts(&json), vec!["abc"; ids.len()]);
        assert_eq!(json["object"], "text_completion");
        assert!(json["id"].as_str().unwrap().starts_with("cmpl-"));
        let prompt_tokens: usize = ids.iter().map(Vec::len).sum();
        let usage = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 3 * ids.len(),
            "total_tokens": prompt_tokens + 3 * ids.len(),
            "prompt_tokens_details": {"cached_tokens": 0},
        });
        assert_eq!(json["usage"], usage);
    }
    // Prompts in order, and the choices of each.
    let (json, submitted) =
        ask(json!({"prompt": ["a", "b"], "n": 2, "echo": true, "seed": -1})).await;
    assert_eq!(texts(&json), ["aabc", "aabc", "babc", "babc"]);
    assert_eq!(json["usage"]["prompt_tokens"], 2);
    assert_eq!(submitted[0].sampling.seed, u64::MAX);
    assert_eq!(submitted[1].sampling.seed, submitted[3].sampling.seed);
}

#[tokio::test]
async fn sampling_is_handed_on() {
    let (_, submitted) = ask(json!({
        "prompt": "hello", "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 9,
        "stop": ["x", "<|im_start|>"], "stop_token_ids": [5], "ignore_eos": true, "max_tokens": 4,
        "typical_p": 0.75, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1,
        "logit_bias": {"7": -100, "3": 0.5}, "min_tokens": 2,
    }))
    .await;
    let sequence = &submitted[0];
    let sampling = &sequence.sampling;
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.seed
        ),
        (0.5, 0.25, 7, 0.125, 9)
    );
    assert_eq!(sequence.stop_token_ids, [5, crate::text::fixture::IM_START]);
    assert_eq!(sequence.max_tokens, 4);
    assert_eq!(sampling.typical_p, 0.75);
    let rules = sampling.rules.as_ref().unwrap();
    let penalties = (
        rules.repetition_penalty,
        rules.presence_penalty,
        rules.frequency_penalty,
    );
    assert_eq!(penalties, (1.5, 1.0, -1.0));
    assert_eq!(rules.logit_bias, [(3, 0.5), (7, -100.0)]);
    assert_eq!(rules.min_tokens, 2);
}

#[tokio::test]
async fn a_stop_string_is_no_part_of_the_text() {
    let served = serve(says(super::bytes("one, two, three"))).await;
    let ask = json!({"prompt": "hello", "stop": ", th"});
    let json = post(&served, "/v1/completions", &ask).await.json();
    assert_eq!(texts(&json), ["one, two"]);
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
}

/// As evaluation harnesses score a text.
#[tokio::test]
async fn a_prompt_is_scored_without_an_answer() {
    let script = vec![
        SequenceEvent::Started {
            cached_prompt_tokens: 2,
        },
        SequenceEvent::PromptLogprobs(vec![(-0.5).into(), (-1.5).into()]),
        finished(FinishReason::Length),
    ];
    let served = serve(says(script)).await;
    let ask = json!({"prompt": [[259, 262, 0xc3]], "max_tokens": 0, "echo": true, "logprobs": 0});
    let json = post(&served, "/v1/completions", &ask).await.json();
    let choice = json!({
        "index": 0,
        "text": "hello wor\u{fffd}",
        "logprobs": {
            "tokens": ["hello", " wor", "\u{fffd}"],
            "token_logprobs": [null, -0.5, -1.5],
            "top_logprobs": null,
            "text_offset": [0, 5, 9],
        },
        "finish_reason": "length",
    });
    assert_eq!(json["choices"], json!([choice]));
    assert_eq!(json["usage"]["completion_tokens"], 0);
    let details = json!({"cached_tokens": 2});
    assert_eq!(json["usage"]["prompt_tokens_details"], details);
    let submitted = served.engine.submitted.lock().unwrap();
    assert!(submitted[0].prompt_logprobs && submitted[0].max_tokens == 0);
}

#[tokio::test]
async fn log_probabilities_of_prompt_and_answer_stand_in_columns() {
    let script = vec![
        SequenceEvent::PromptLogprobs(vec![PromptLogprob {
            logprob: -0.5,
            top: vec![(99, -0.25), (98, -0.5)],
        }]),
        // A rival with another text, and a token that is not the likeliest.
        likely(257, -2.0, &[(97, -0.25)]),
        token_like_end(),
        finished(FinishReason::Stop),
    ];
    let served = serve(says(script)).await;
    let ask = json!({"prompt": [97, 98], "echo": true, "logprobs": 1, "stream": true});
    let reply = post(&served, "/v1/completions", &ask).await;
    let mut text = String::new();
    let mut columns = vec![Vec::new(); 4];
    for event in reply.events() {
        let choice = &event["choices"][0];
        text += choice["text"].as_str().unwrap();
        for (column, name) in
            columns
                .iter_mut()
                .zip(["tokens", "token_logprobs", "text_offset", "top_logprobs"])
        {
            column.extend(choice["logprobs"][name].as_array().unwrap().clone());
        }
    }
    assert_eq!(text, "abll");
    assert_eq!(
        Json::from(columns[0].clone()),
        json!(["a", "b", "ll", "<|im_end|>"])
    );
    assert_eq!(
        Json::from(columns[1].clone()),
        json!([null, -0.5, -2.0, -0.125])
    );
    assert_eq!(Json::from(columns[2].clone()), json!([0, 1, 2, 4]));
    assert_eq!(
        Json::from(columns[3].clone()),
        json!([null, {"c": -0.25, "b": -0.5}, {"a": -0.25, "ll": -2.0}, {"<|im_end|>": -0.125}])
    );
    let whole = post(
        &served,
        "/v1/completions",
        &json!({"prompt": [97, 98], "logprobs": 1}),
    )
    .await
    .json();
    let logprobs = &whole["choices"][0]["logprobs"];
    assert_eq!(logprobs["top_logprobs"][0], json!({"a": -0.25, "ll": -2.0}));
}

fn token_like_end() -> SequenceEvent {
    likely(IM_END, -0.125, &[(IM_END, -0.125)])
}

#[tokio::test]
async fn characters_are_whole_in_every_chunk() {
    let mut events: Vec<SequenceEvent> = "é".bytes().map(|byte| token(byte.into())).collect();
    events.push(finished(FinishReason::Length));
    let served = serve(says(events)).await;
    let reply = post(
        &served,
        "/v1/completions",
        &json!({"prompt": "a", "stream": true}),
    )
    .await;
    let texts: Vec<String> = reply
        .events()
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned())
        .filter(|text| !text.is_empty())
        .collect();
    assert_eq!(texts, ["é"]);
}
