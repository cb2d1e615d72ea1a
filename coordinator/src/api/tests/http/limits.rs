//! What clients may do to a server, and what it does to them. Time is paused where there is something to wait
//! for: it goes on by itself when everybody waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::Method;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, pause};

use super::connections::{endless, until};
use super::{answer, get, post, request, says, serve};
use crate::api::tests::{Served, model, serve_behind};
use crate::api::{ApiKeys, ConnectionLimits, HttpSettings, Reasoning};

async fn limited(limits: ConnectionLimits) -> Served {
    let (settings, keys) = (HttpSettings::default(), ApiKeys::default());
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

/// Everything that comes until the server closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    // A connection that is reset is closed too.
    let _ = stream.read_to_end(&mut all).await;
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn connections_that_find_no_place_are_told_and_closed_and_places_come_back() {
    // Both ends are files of this process, which may often have no more than 1024.
    let max_connections = 300;
    let served = limited(ConnectionLimits {
        max_connections,
        ..ConnectionLimits::default()
    })
    .await;
    // The client of the fixture has one.
    let mut idle = Vec::new();
    for _ in 1..max_connections {
        idle.push(TcpStream::connect(served.address).await.unwrap());
    }
    let mut refused = TcpStream::connect(served.address).await.unwrap();
    let reply = rest(&mut refused).await;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    let length = format!("content-length: {}", body.len());
    assert!(
        head.contains(&length) && head.contains("retry-after: 5"),
        "{head}"
    );
    let error: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(error["error"]["code"], "too_many_connections");
    // Those that have a place are served, and a place that is given back is taken.
    let mut held = idle.pop().unwrap();
    held.write_all(b"GET /health HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    assert!(rest(&mut held).await.starts_with("HTTP/1.0 200 "));
    drop(idle);
    loop {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        let asked = stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await;
        if asked.is_ok() && rest(&mut stream).await.starts_with("HTTP/1.0 200 ") {
            break;
        }
    }
}

#[tokio::test]
async fn headers_that_do_not_come_are_not_awaited_for_ever() {
    let served = limited(ConnectionLimits::default()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nho")
        .await
        .unwrap();
    pause();
    let reply = rest(&mut stream).await;
    assert!(!reply.contains(" 200 "), "{reply}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_awaited_for_ever() {
    let served = limited(ConnectionLimits::default()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
                content-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    pause();
    let reply = rest(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 408 "), "{reply}");
}

#[tokio::test]
async fn a_connection_that_asks_nothing_more_is_closed() {
    let idle = Duration::from_secs(600);
    let limits = ConnectionLimits {
        idle,
        ..ConnectionLimits::default()
    };
    let served = limited(limits).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    // HTTP/2 answers pings all the while, which asks nothing.
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let uri = format!("http://{}/health", served.address);
    let reply = sender.send_request(request(Method::GET, &uri, "")).await;
    assert_eq!(reply.unwrap().status(), 200);
    pause();
    let begun = Instant::now();
    rest(&mut stream).await;
    // The server closes; how the client takes it is its own affair.
    let _ = connection.await.unwrap();
    assert!(begun.elapsed() >= idle - Duration::from_secs(1));
    drop(sender);
}

#[tokio::test]
async fn a_connection_with_an_answer_under_way_is_not_idle() {
    let (served, running) = endless().await;
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    let body = json!({"prompt": "a", "stream": true}).to_string();
    let asked = request(Method::POST, "/v1/completions", body);
    let answer = sender.send_request(asked).await.unwrap();
    until(&running, 1).await;
    pause();
    // Three times as long as an idle one may stay.
    tokio::time::sleep(Duration::from_secs(1800)).await;
    assert_eq!(running.load(Ordering::SeqCst), 1);
    drop(answer);
}

#[tokio::test]
async fn calls_of_one_connection_are_limited() {
    let (served, running) = endless().await;
    let socket = TcpStream::connect(served.address).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let mut sender = sender.clone();
        let uri = format!("http://{}/v1/completions", served.address);
        let body = json!({"prompt": "a", "stream": true}).to_string();
        calls.spawn(async move {
            let answer = sender.send_request(request(Method::POST, &uri, body)).await;
            let _answer = answer.unwrap();
            std::future::pending::<()>().await;
        });
    }
    until(&running, 256).await;
    // Another connection has places of its own.
    assert_eq!(get(&served, "/health").await.status, 200);
    assert_eq!(running.load(Ordering::SeqCst), 256);
    drop((calls, sender));
    until(&running, 0).await;
}

#[tokio::test]
async fn who_asks_twice_and_leaves_is_not_answered_for_ever() {
    let (served, running) = endless().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let body = r#"{"prompt": "a", "stream": true}"#;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n";
    let one = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(one.repeat(3).as_bytes()).await.unwrap();
    until(&running, 1).await;
    drop(stream);
    // The server reads no further while it answers, and notices when it writes the next sign of life.
    pause();
    until(&running, 0).await;
}

#[tokio::test]
async fn an_answer_that_takes_longer_than_its_timeout_is_given_up() {
    let (served, running) = endless().await;
    for stream in [false, true] {
        let ask = json!({"prompt": "a", "timeout": 0.2, "stream": stream});
        let reply = post(&served, "/v1/completions", &ask).await;
        assert_eq!(
            reply.status,
            if stream { 200 } else { 504 },
            "{}",
            reply.body
        );
        assert!(
            reply.body.contains("the deadline has passed"),
            "{}",
            reply.body
        );
        assert!(!reply.body.contains("[DONE]"), "{}", reply.body);
        until(&running, 0).await;
    }
    // One that is long enough changes nothing.
    let served = serve(says(answer("hi"))).await;
    let ask = json!({"prompt": "a", "timeout": 1e9});
    assert_eq!(post(&served, "/v1/completions", &ask).await.status, 200);
    let deadline = served.engine.submitted.lock().unwrap()[0].deadline;
    assert!(deadline.is_some());
}
