use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::Method;
use serde_json::json;

use super::{answer, get, model, post, request, says, send, serve, serve_model};
use crate::request::SubmitError;
use crate::text::fixture::IM_END;

#[tokio::test]
async fn models_are_listed() {
    let mut named = model();
    named.name = "/srv/models/fixture".to_owned();
    let served = serve_model(named, says(answer("x"))).await;
    let list = get(&served, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1));
    let model = &list["data"][0];
    assert_eq!(model["id"], "/srv/models/fixture");
    assert_eq!(model["object"], "model");
    assert_eq!(model["max_model_len"], 64);
    for path in [
        "/v1/models/%2Fsrv%2Fmodels%2Ffixture",
        "/v1/models//srv/models/fixture",
        "/v1/models/srv/models/fixture",
    ] {
        let reply = get(&served, path).await;
        assert_eq!(
            (reply.status.as_u16(), &reply.json()),
            (200, model),
            "{path}"
        );
    }
    for path in ["/v1/models/gpt-4", "/v1/models/%ff"] {
        let reply = get(&served, path).await;
        assert_eq!(reply.status, 404);
        assert_eq!(reply.json()["error"]["code"], "model_not_found");
    }
}

#[tokio::test]
async fn health_is_the_process_and_readiness_the_group() {
    let served = serve(says(answer("x"))).await;
    assert_eq!(get(&served, "/health").await.status, 200);
    assert_eq!(get(&served, "/ready").await.status, 200);
    served.engine.no_group.store(true, Ordering::Relaxed);
    assert_eq!(get(&served, "/health").await.status, 200);
    let reply = get(&served, "/ready").await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.json()["error"]["code"], "not_ready");
    assert_eq!(reply.headers["retry-after"], "5");
}

#[tokio::test]
async fn what_ended_and_how_is_told_to_prometheus() {
    let served = serve(|sequence, sender| match sequence.prompt.len() {
        1 => Err(SubmitError::QueueFull {
            limit: 1,
            retry_after: Duration::from_secs(1),
        }),
        _ => says(answer("x"))(sequence, sender),
    })
    .await;
    let ask = |prompt: &[u32]| json!({"prompt": prompt, "max_tokens": 9});
    for (prompt, status) in [(&[97, 98][..], 200), (&[97, 98], 200), (&[97], 429)] {
        let reply = post(&served, "/v1/completions", &ask(prompt)).await;
        assert_eq!(reply.status, status, "{}", reply.body);
    }
    let reply = get(&served, "/metrics").await;
    assert_eq!(reply.status, 200);
    let kind = reply.headers["content-type"].to_str().unwrap();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    for line in [
        "secondwind_request_success_total{finished_reason=\"length\"} 2",
        "secondwind_request_failure_total{reason=\"refused\"} 1",
        "secondwind_e2e_request_latency_seconds_count 2",
    ] {
        assert!(
            reply.body.lines().any(|it| it == line),
            "{line}:\n{}",
            reply.body
        );
    }
    assert!(reply.body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let served = serve(says(answer("x"))).await;
    let ask = json!({"model": "fixture", "prompt": "hello<|im_end|>é", "return_token_strs": true});
    let json = post(&served, "/tokenize", &ask).await.json();
    let expected = json!({
        "count": 4,
        "max_model_len": 64,
        "tokens": [259, IM_END, 0xc3, 0xa9],
        "token_strs": ["hello", "<|im_end|>", "\u{fffd}", "\u{fffd}"],
    });
    assert_eq!(json, expected);
    let json = post(&served, "/detokenize", &json!({"tokens": json["tokens"]}))
        .await
        .json();
    assert_eq!(json, json!({"prompt": "hello<|im_end|>é"}));
    let ask = json!({"messages": [{"role": "user", "content": "hello"}]});
    let json = post(&served, "/tokenize", &ask).await.json();
    let json = post(&served, "/detokenize", &json!({"tokens": json["tokens"]}))
        .await
        .json();
    assert_eq!(
        json["prompt"],
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[tokio::test]
async fn a_clients_request_id_is_kept_if_it_is_one() {
    let served = serve(says(answer("x"))).await;
    for (given, kept) in [
        ("ann-1", true),
        ("", false),
        ("a b", false),
        (&"x".repeat(129), false),
    ] {
        let mut asked = request(Method::GET, "/health", "");
        asked
            .headers_mut()
            .insert("x-request-id", given.parse().unwrap());
        let reply = send(served.address, asked).await;
        let answered = reply.headers["x-request-id"].to_str().unwrap();
        assert_eq!(answered == given, kept, "{given:?}");
        assert!(!answered.is_empty());
    }
}

#[tokio::test]
async fn no_page_elsewhere_may_read_us() {
    let served = serve(says(answer("x"))).await;
    let mut asked = request(Method::OPTIONS, "/v1/chat/completions", "");
    asked
        .headers_mut()
        .insert("origin", "http://example.org".parse().unwrap());
    let reply = send(served.address, asked).await;
    assert_eq!(reply.status, 405);
    let cors = |name: &&hyper::header::HeaderName| name.as_str().starts_with("access-control");
    assert!(!reply.headers.keys().any(|name| cors(&name)));
}
