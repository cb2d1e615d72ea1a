//! Who is let in, over both APIs, and what the step loop is told of them.

use hyper::Method;
use hyper::header::{AUTHORIZATION, HOST};
use secondwind_proto::v1;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1 as reflection;

use super::http::{Reply, answer, get, request, send};
use super::{Served, model, says, serve, serve_behind, text_request};
use crate::api::{ApiKey, ApiKeys, ConnectionLimits, HttpSettings, KeyHash, Reasoning, Role};

const ANN: &str = "Bearer key-of-ann";
const BOB: &str = "Bearer key-of-bob";
const ROOT: &str = "Bearer key-of-root";

async fn guarded() -> Served {
    let key = |name: &str, role| ApiKey {
        name: name.to_owned(),
        hash: KeyHash::of(&format!("key-of-{name}")),
        role,
    };
    let keys = ApiKeys::new(&[
        key("ann", Role::User),
        key("bob", Role::User),
        key("root", Role::Admin),
    ]);
    let (settings, limits) = (HttpSettings::default(), ConnectionLimits::default());
    serve_behind(
        model(),
        Reasoning::default(),
        settings,
        keys,
        limits,
        says(answer("hi")),
    )
    .await
}

/// Asks with these headers.
async fn ask(
    served: &Served,
    (method, path): (Method, &str),
    body: &str,
    headers: &[(&'static str, &str)],
) -> Reply {
    let mut asked = request(method, path, body.to_owned());
    for (name, value) in headers {
        asked.headers_mut().append(*name, value.parse().unwrap());
    }
    send(served.address, asked).await
}

/// Everything over HTTP that a user's key opens, and nothing else does.
fn users() -> Vec<(Method, &'static str, &'static str, u16)> {
    let prompt = r#"{"prompt": "a"}"#;
    let chat = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    vec![
        (Method::POST, "/v1/completions", prompt, 200),
        (Method::POST, "/v1/chat/completions", chat, 200),
        (Method::POST, "/tokenize", prompt, 200),
        (Method::POST, "/detokenize", r#"{"tokens": [97]}"#, 200),
        (Method::GET, "/v1/models", "", 200),
        (Method::GET, "/v1/models/fixture", "", 200),
        (Method::POST, "/v1/embeddings", "{}", 400),
        (Method::GET, "/v1/completions", "", 405),
        (Method::POST, "/health/", "", 404),
        (Method::GET, "/%68ealth", "", 404),
        (Method::GET, "/no/such/path", "", 404),
    ]
}

#[tokio::test]
async fn every_path_needs_a_key_and_says_so_in_openais_shape() {
    let served = guarded().await;
    for (method, path, body, with_key) in users() {
        for wrong in [
            &[][..],
            &[("authorization", "Bearer key-of-nobody")],
            &[("authorization", "Basic key-of-ann")],
            &[("authorization", ANN), ("authorization", BOB)],
            &[("x-api-key", "key-of-ann"), ("host", "localhost")],
            &[
                ("x-forwarded-host", "localhost"),
                ("x-original-uri", "/health"),
            ],
        ] {
            let reply = ask(&served, (method.clone(), path), body, wrong).await;
            assert_eq!(reply.status, 401, "{path} {wrong:?}");
            assert_eq!(reply.headers["www-authenticate"], "Bearer");
            assert!(reply.headers.contains_key("x-request-id"));
            let error = &reply.json()["error"];
            assert_eq!(error["code"], "invalid_api_key");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(
                error["message"]
                    .as_str()
                    .is_some_and(|it| !it.contains("ann"))
            );
        }
        let headers = [("authorization", ANN)];
        let reply = ask(&served, (method, path), body, &headers).await;
        assert_eq!(reply.status, with_key, "{path}: {}", reply.body);
    }
    // Two generated, and nobody without a key.
    assert_eq!(served.engine.submitted.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn probes_and_the_page_need_no_key_and_metrics_an_admins() {
    let served = guarded().await;
    for path in [
        "/health",
        "/ready",
        "/",
        "/page/page.css",
        "/page/icon.svg",
        "/page/server.js",
        "/page/chat.js",
        "/page/rack.js",
    ] {
        assert_eq!(get(&served, path).await.status, 200, "{path}");
    }
    assert_ne!(get(&served, "/").await.status, 401);
    let metrics = (Method::GET, "/metrics");
    for (headers, status, code) in [
        (&[][..], 401, "invalid_api_key"),
        (&[("authorization", ANN)], 403, "insufficient_role"),
    ] {
        let reply = ask(&served, metrics.clone(), "", headers).await;
        assert_eq!(reply.status, status);
        assert_eq!(reply.json()["error"]["code"], code);
    }
    let body = r#"{"prompt": "ab"}"#;
    let completions = (Method::POST, "/v1/completions");
    ask(&served, completions, body, &[("authorization", BOB)]).await;
    let reply = ask(&served, metrics, "", &[("authorization", ROOT)]).await;
    assert_eq!(reply.status, 200);
    for line in [
        "secondwind_tenant_requests_total{tenant=\"bob\"} 1",
        "secondwind_tenant_prompt_tokens_total{tenant=\"bob\"} 2",
        "secondwind_tenant_generation_tokens_total{tenant=\"bob\"} 2",
    ] {
        assert!(
            reply.body.lines().any(|it| it == line),
            "{line}:\n{}",
            reply.body
        );
    }
}

#[tokio::test]
async fn a_client_that_sends_all_before_it_listens_hears_why() {
    let served = guarded().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let body = "x".repeat(3 << 20);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n";
    let all = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(all.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 401 "), "{reply}");
}

#[tokio::test]
async fn where_a_request_says_it_goes_does_not_matter() {
    let served = guarded().await;
    // The whole address stands in the first line, as proxies are asked; its path counts.
    for (path, status) in [("/health", 200), ("/v1/models", 401)] {
        let mut asked = request(Method::GET, &format!("http://localhost{path}"), "");
        asked.headers_mut().insert(HOST, "health".parse().unwrap());
        assert_eq!(send(served.address, asked).await.status, status, "{path}");
    }
}

#[tokio::test]
async fn grpc_has_the_same_door() {
    let served = guarded().await;
    let generate = async |key: Option<&str>| {
        let mut asked = Request::new(text_request("a"));
        if let Some(key) = key {
            asked
                .metadata_mut()
                .insert("authorization", key.parse().unwrap());
        }
        served.client.clone().generate(asked).await
    };
    for wrong in [None, Some("Bearer key-of-nobody"), Some("key-of-ann")] {
        let status = generate(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{wrong:?}");
        assert!(status.metadata().contains_key("x-request-id"));
    }
    for key in [ANN, BOB] {
        generate(Some(key)).await.unwrap();
    }
    let tenants: Vec<u32> = {
        let submitted = served.engine.submitted.lock().unwrap();
        submitted.iter().map(|it| it.origin.tenant).collect()
    };
    assert_eq!(tenants, [1, 2]);

    let mut health = HealthClient::new(served.channel.clone());
    let request = HealthCheckRequest::default();
    health.check(request.clone()).await.unwrap();
    health.watch(request).await.unwrap();
    use reflection::server_reflection_client::ServerReflectionClient;
    let request = tokio_stream::once(reflection::ServerReflectionRequest::default());
    let mut client = ServerReflectionClient::new(served.channel.clone());
    let status = client.server_reflection_info(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = served
        .client
        .clone()
        .get_model(v1::GetModelRequest {})
        .await;
    assert_eq!(status.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn the_step_loop_is_told_whose_a_sequence_is_and_its_place() {
    let served = guarded().await;
    let body = json!({"prompt": "a", "priority": 5, "cache_salt": "s", "n": 2}).to_string();
    let headers = [("authorization", BOB), ("x-request-id", "call-1")];
    let path = (Method::POST, "/v1/completions");
    assert_eq!(ask(&served, path, &body, &headers).await.status, 200);
    let mut asked = Request::new(v1::GenerateRequest {
        priority: Some(5),
        cache_salt: Some("s".to_owned()),
        ..text_request("a")
    });
    let metadata = asked.metadata_mut();
    metadata.insert(AUTHORIZATION.as_str(), BOB.parse().unwrap());
    metadata.insert("x-request-id", "call-1".parse().unwrap());
    served.client.clone().generate(asked).await.unwrap();
    let submitted = served.engine.submitted.lock().unwrap();
    assert_eq!(submitted.len(), 3);
    for sequence in submitted.iter() {
        let origin = &sequence.origin;
        assert_eq!((&*origin.request_id, origin.tenant), ("call-1", 2));
        assert_eq!(origin.priority, -5);
        assert!(origin.cache_salt.is_some());
        assert_eq!(*origin, submitted[0].origin);
    }
}

#[tokio::test]
async fn grpc_calls_have_ids_too() {
    let served = serve(says(answer("hi"))).await;
    let id = |metadata: &MetadataMap| metadata.get("x-request-id").cloned().unwrap();
    for (given, kept) in [("ann-1", true), ("a b", false)] {
        let mut asked = Request::new(text_request("a"));
        asked
            .metadata_mut()
            .insert("x-request-id", given.parse().unwrap());
        let reply = served.client.clone().generate(asked).await.unwrap();
        assert_eq!(id(reply.metadata()) == given, kept, "{given}");
        let mut asked = Request::new(text_request(""));
        asked
            .metadata_mut()
            .insert("x-request-id", given.parse().unwrap());
        let status = served.client.clone().generate(asked).await.unwrap_err();
        assert_eq!(id(status.metadata()) == given, kept, "{given}");
    }
}
