use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use secondwind_proto::v1;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

use super::{answer, get, post, request, says, serve, token};
use crate::api::tests::{Served, generate, text_request};

const PATIENCE: Duration = Duration::from_secs(30);

/// A server whose sequences say one token and go on until they are dropped, and how many are running.
pub(super) async fn endless() -> (Served, Arc<AtomicUsize>) {
    let running = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&running);
    let served = serve(move |_, sender| {
        counted.fetch_add(1, Ordering::SeqCst);
        let _ = sender.send(token(259));
        let counted = Arc::clone(&counted);
        tokio::spawn(async move {
            sender.closed().await;
            counted.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(())
    })
    .await;
    (served, running)
}

pub(super) async fn until(running: &AtomicUsize, count: usize) {
    let waiting = async {
        while running.load(Ordering::SeqCst) != count {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, waiting)
        .await
        .expect("sequences that are running");
}

fn chat(more: serde_json::Value) -> Request<Full<Bytes>> {
    let mut ask = json!({"messages": [{"role": "user", "content": "hi"}], "n": 3});
    for (field, value) in more.as_object().unwrap() {
        ask[field] = value.clone();
    }
    request(Method::POST, "/v1/chat/completions", ask.to_string())
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_all_its_sequences() {
    let (served, running) = endless().await;
    for stream in [false, true] {
        let socket = TcpStream::connect(served.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        let connection = tokio::spawn(connection);
        let answering = tokio::spawn(async move {
            let response = sender
                .send_request(chat(json!({"stream": stream})))
                .await
                .unwrap();
            let mut body = response.into_body();
            let mut frames = 0;
            while body.frame().await.is_some() {
                frames += 1;
            }
            frames
        });
        until(&running, 3).await;
        answering.abort();
        connection.abort();
        until(&running, 0).await;
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_cancels_its_sequences_and_no_others() {
    let (served, running) = endless().await;
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut start = async || {
        let mut asked = chat(json!({"stream": true}));
        let uri = format!("http://{}/v1/chat/completions", served.address);
        *asked.uri_mut() = uri.parse().unwrap();
        let mut body = sender.send_request(asked).await.unwrap().into_body();
        body.frame().await.unwrap().unwrap();
        body
    };
    let first = start().await;
    let second = start().await;
    until(&running, 6).await;
    drop(first);
    until(&running, 3).await;
    drop(second);
    until(&running, 0).await;
}

#[tokio::test]
async fn sequences_of_a_request_that_is_not_taken_whole_are_cancelled() {
    let running = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&running);
    let served = serve(move |_, sender| {
        if counted.load(Ordering::SeqCst) == 2 {
            return Err(crate::request::SubmitError::QueueFull {
                limit: 2,
                retry_after: Duration::from_secs(1),
            });
        }
        counted.fetch_add(1, Ordering::SeqCst);
        let counted = Arc::clone(&counted);
        tokio::spawn(async move {
            sender.closed().await;
            counted.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(())
    })
    .await;
    let ask = json!({"prompt": ["a", "b", "c"]});
    assert_eq!(post(&served, "/v1/completions", &ask).await.status, 429);
    until(&running, 0).await;
}

#[tokio::test]
async fn grpc_and_http_share_the_port() {
    let served = serve(says(answer("hi"))).await;
    assert_eq!(generate(&served, text_request("hello")).await.text, "hi");
    let reply = post(&served, "/v1/completions", &json!({"prompt": "hello"})).await;
    assert_eq!(reply.json()["choices"][0]["text"], "hi");
    // Over HTTP/2 too, beside gRPC's own paths.
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
        .await
        .unwrap();
    tokio::spawn(connection);
    let uri = format!("http://{}/v1/models", served.address);
    let response = sender
        .send_request(request(Method::GET, &uri, ""))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    // A gRPC method that is none is refused as gRPC refuses.
    let mut client = tonic::client::Grpc::new(served.channel.clone());
    client.ready().await.unwrap();
    let codec = tonic_prost_codec();
    let path = "/no.such.Service/Method".parse().unwrap();
    let status = client
        .unary(tonic::Request::new(v1::GetModelRequest {}), path, codec)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

fn tonic_prost_codec() -> tonic_prost::ProstCodec<v1::GetModelRequest, v1::GetModelResponse> {
    tonic_prost::ProstCodec::default()
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let served = serve(says(answer("hi"))).await;
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        sender.ready().await.unwrap();
        let mut asked = request(Method::POST, "/v1/completions", r#"{"prompt": "a"}"#);
        asked
            .headers_mut()
            .insert("host", "localhost".parse().unwrap());
        let response = sender.send_request(asked).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(get(&served, "/health").await.status, 200);
}
