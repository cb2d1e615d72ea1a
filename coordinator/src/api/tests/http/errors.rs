use std::time::Duration;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use hyper::{Method, Request};
use serde_json::{Value as Json, json};

use super::{
    answer, get, model_with, post, request, says, send, serve, serve_model, serve_with, token,
};
use crate::api::{HttpSettings, Reasoning};
use crate::request::{SequenceEvent, SubmitError};
use crate::text::Text;
use crate::text::fixture::{VOCAB_SIZE, files};

pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const TEXT: &str = "/v1/completions";

/// `changes` over a request that is right.
pub(super) fn asking(path: &str, changes: Json) -> Json {
    let mut base = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "hi"}]}),
        _ => json!({"prompt": "hi"}),
    };
    for (field, value) in changes.as_object().unwrap() {
        base[field] = value.clone();
    }
    base
}

#[tokio::test]
async fn a_prompt_over_the_context_is_told_limit_and_count() {
    let served = serve(says(answer("x"))).await;
    for (path, changes, param) in [
        (TEXT, json!({"prompt": "x".repeat(65)}), "prompt"),
        (TEXT, json!({"prompt": ["a", "x".repeat(65)]}), "prompt[1]"),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "x".repeat(46)}]}),
            "messages",
        ),
    ] {
        let reply = post(&served, path, &asking(path, changes)).await;
        assert_eq!(reply.status, 400, "{}", reply.body);
        let error = &reply.json()["error"];
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["param"], param);
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("the prompt has 65 tokens, but the context of 64 tokens"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn what_changes_the_answer_and_is_not_supported_is_refused_by_name() {
    let served = serve(says(answer("x"))).await;
    for (path, field, value) in [
        (CHAT, "best_of", json!(2)),
        (CHAT, "guided_json", json!({})),
        (CHAT, "parallel_tool_calls", json!(false)),
        (TEXT, "tools", json!([{"type": "function"}])),
        (TEXT, "tool_choice", json!("required")),
        (CHAT, "reasoning_effort", json!("high")),
        (CHAT, "echo", json!(true)),
        (CHAT, "continue_final_message", json!(true)),
        (CHAT, "prompt_logprobs", json!(1)),
        (CHAT, "skip_special_tokens", json!(false)),
        (TEXT, "suffix", json!("end")),
        (TEXT, "top_logprobs", json!(1)),
        (TEXT, "use_beam_search", json!(true)),
    ] {
        let reply = post(&served, path, &asking(path, json!({field: value}))).await;
        assert_eq!(reply.status, 400, "{field}: {}", reply.body);
        let error = &reply.json()["error"];
        assert_eq!(
            error["message"],
            format!("{field}: is not supported; leave it out")
        );
        assert_eq!(error["param"], field);
        assert_eq!(error["code"], "unsupported_parameter");
    }
}

#[tokio::test]
async fn strict_servers_refuse_what_nobody_knows() {
    let settings = HttpSettings { strict: true };
    let served = serve_with(
        super::model(),
        Reasoning::Split,
        settings,
        says(answer("x")),
    )
    .await;
    let reply = post(
        &served,
        CHAT,
        &asking(CHAT, json!({"tempreture": 1, "b": {}, "user": "u"})),
    )
    .await;
    assert_eq!(reply.status, 400);
    let error = &reply.json()["error"];
    assert_eq!(error["param"], "tempreture, b");
    assert_eq!(error["code"], "unknown_parameter");
    let nested = json!({"messages": [{"role": "user", "content": "hi", "colour": 1}]});
    let reply = post(&served, CHAT, &nested).await;
    assert_eq!(reply.json()["error"]["param"], "messages[0].colour");
    let reply = post(
        &served,
        CHAT,
        &asking(CHAT, json!({"user": "u", "b": null})),
    )
    .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
}

#[tokio::test]
async fn another_model_does_not_exist() {
    let served = serve(says(answer("x"))).await;
    for path in [CHAT, TEXT, "/tokenize"] {
        let reply = post(&served, path, &asking(path, json!({"model": "gpt-4"}))).await;
        assert_eq!(reply.status, 404);
        let error = &reply.json()["error"];
        assert_eq!(
            error["message"],
            "the model \"gpt-4\" does not exist; this server serves \"fixture\""
        );
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!("model"), &json!("model_not_found"))
        );
    }
}

#[tokio::test]
async fn bodies_are_limited_before_they_are_parsed() {
    let served = serve(says(answer("x"))).await;
    let body = |body: Vec<u8>| request(Method::POST, CHAT, body);
    let typed = |kind: Option<&'static str>| {
        let mut asked = body(b"{}".to_vec());
        match kind {
            Some(kind) => asked
                .headers_mut()
                .insert(CONTENT_TYPE, kind.parse().unwrap()),
            None => asked.headers_mut().remove(CONTENT_TYPE),
        };
        asked
    };
    let mut packed = body(b"{}".to_vec());
    packed
        .headers_mut()
        .insert(CONTENT_ENCODING, "gzip".parse().unwrap());
    let mut wide = body(b"{}".to_vec());
    wide.headers_mut()
        .insert("x-wide", "x".repeat(20_000).parse().unwrap());
    let deep = format!("{{\"a\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: Vec<(u16, &str, Request<_>)> = vec![
        (
            413,
            "the body is larger than 4194304 bytes",
            body(vec![b' '; 10_000_000]),
        ),
        (
            415,
            "content-type: \"text/plain\" is not application/json",
            typed(Some("text/plain")),
        ),
        (
            415,
            "content-type: \"\" is not application/json",
            typed(None),
        ),
        (
            415,
            "content-encoding: \"gzip\" is not taken; send the body as it is",
            packed,
        ),
        (431, "the headers are larger than 16384 bytes", wide),
        (
            400,
            "the body is not JSON: EOF while parsing a value at line 1 column 0",
            body(vec![]),
        ),
        (
            400,
            "the body is a list, not a JSON object",
            body(b"[]".to_vec()),
        ),
        (
            400,
            "the body is not JSON: recursion limit exceeded at line 1 column 133",
            body(deep.into()),
        ),
        (
            400,
            "the body is not JSON: expected value at line 1 column 17",
            body(b"{\"temperature\": NaN}".to_vec()),
        ),
        (
            400,
            "the body is not JSON: number out of range at line 1 column 21",
            body(b"{\"temperature\": 1e999}".to_vec()),
        ),
        (
            400,
            "the body is not JSON: invalid unicode code point at line 1 column 13",
            body(b"{\"prompt\": \"\xff\"}".to_vec()),
        ),
    ];
    for (status, message, asked) in cases {
        let reply = send(served.address, asked).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        let error = &reply.json()["error"];
        assert_eq!(error["message"], message);
        assert_eq!(error["type"], "invalid_request_error");
    }
    let reply = send(
        served.address,
        typed(Some("Application/JSON; charset=utf-8")),
    )
    .await;
    assert_eq!(reply.json()["error"]["message"], "messages: is missing");
}

#[tokio::test]
async fn paths_and_methods_that_are_none_are_refused() {
    let served = serve(says(answer("x"))).await;
    for (method, path, status, message) in [
        (Method::GET, "/v1/chat", 404, "there is no GET /v1/chat"),
        (
            Method::POST,
            "/v1/models",
            405,
            "/v1/models does not take POST",
        ),
        (
            Method::GET,
            CHAT,
            405,
            "/v1/chat/completions does not take GET",
        ),
        (
            Method::POST,
            "/v1/embeddings",
            400,
            "embeddings are not offered; this server generates text",
        ),
    ] {
        let reply = send(served.address, request(method, path, "{}")).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        assert_eq!(reply.json()["error"]["message"], message);
        assert!(reply.headers.contains_key("x-request-id"));
    }
}

#[tokio::test]
async fn failures_of_the_step_loop_become_statuses() {
    let cases = [
        (
            SubmitError::QueueFull {
                limit: 9,
                retry_after: Duration::from_secs(4),
            },
            429,
            "rate_limit_error",
            Some("4"),
        ),
        (
            SubmitError::NoGroup {
                detail: "1 of 2".to_owned(),
            },
            503,
            "server_error",
            Some("5"),
        ),
        (SubmitError::Draining, 503, "server_error", Some("5")),
        (
            SubmitError::WorkerLost {
                detail: "secret".to_owned(),
            },
            503,
            "server_error",
            Some("5"),
        ),
        (SubmitError::DeadlineExceeded, 504, "server_error", None),
        (
            SubmitError::KvCacheTooSmall {
                needed_tokens: 64,
                capacity_tokens: 32,
            },
            400,
            "invalid_request_error",
            None,
        ),
        (
            SubmitError::Internal {
                detail: "secret".to_owned(),
            },
            500,
            "server_error",
            None,
        ),
    ];
    for (error, status, kind, retry) in cases {
        let at_once = error.clone();
        let served = serve(move |_, _| Err(at_once.clone())).await;
        for ask in [json!({}), json!({"stream": true})] {
            let reply = post(&served, CHAT, &asking(CHAT, ask)).await;
            assert_eq!(reply.status, status, "{}", reply.body);
            assert_eq!(reply.json()["error"]["type"], kind);
            assert_eq!(reply.json()["error"]["message"], error.to_string());
            assert!(!reply.body.contains("secret"));
            let after = reply
                .headers
                .get("retry-after")
                .map(|after| after.to_str().unwrap());
            assert_eq!(after, retry);
        }
        // So it is when the step loop says it later, as long as nothing came before.
        let served = serve(says(vec![SequenceEvent::Failed(error.clone())])).await;
        let reply = post(&served, CHAT, &asking(CHAT, json!({"stream": true}))).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        // Then it is the whole answer's status, and an event of a stream that does not look complete.
        let served = serve(says(vec![token(259), SequenceEvent::Failed(error.clone())])).await;
        let reply = post(&served, CHAT, &asking(CHAT, json!({}))).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        let reply = post(&served, CHAT, &asking(CHAT, json!({"stream": true}))).await;
        assert_eq!(reply.status, 200);
        assert!(!reply.body.contains("[DONE]"), "{}", reply.body);
        let last = reply.body.trim_end().rsplit("data: ").next().unwrap();
        let last: Json = serde_json::from_str(last).unwrap();
        assert_eq!(last["error"]["type"], kind);
    }
}

#[tokio::test]
async fn a_chat_needs_a_template() {
    let text = Text::load(&files(None), VOCAB_SIZE).unwrap();
    let served = serve_model(model_with(text), says(answer("x"))).await;
    let reply = post(&served, CHAT, &asking(CHAT, json!({}))).await;
    assert_eq!(reply.status, 400);
    let message = "messages: the model fixture has no chat template; send a text or token ids";
    assert_eq!(reply.json()["error"]["message"], message);
    assert_eq!(
        post(&served, TEXT, &asking(TEXT, json!({}))).await.status,
        200
    );
    assert_eq!(get(&served, "/health").await.status, 200);
}
