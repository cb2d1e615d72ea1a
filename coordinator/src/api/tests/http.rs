//! The HTTP API over a real socket, with a client that is not ours.

mod bad_fields;
mod chat;
mod completions;
mod connections;
mod errors;
mod limits;
mod page;
mod rack;
mod service;

use std::net::SocketAddr;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use secondwind_model::step::TokenLogprobs;
use serde_json::Value as Json;
use tokio::net::TcpStream;

use super::{
    Served, bytes, finished, model, model_with, says, serve, serve_model, serve_with, token,
};
use crate::request::{FinishReason, SequenceEvent};

/// What came back.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

impl Reply {
    #[track_caller]
    pub(super) fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of server-sent events, but for the last one's, which says that they are all.
    #[track_caller]
    fn events(&self) -> Vec<Json> {
        let mut events: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").unwrap())
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        let events = events.into_iter();
        events
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

pub(super) async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Reply {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Reply {
        status: parts.status,
        headers: parts.headers,
        body: String::from_utf8(body.into()).unwrap(),
    }
}

pub(super) fn request(method: Method, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body.into()));
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().unwrap();
    let kind = "application/json".parse().unwrap();
    request.headers_mut().insert(CONTENT_TYPE, kind);
    request
}

pub(super) async fn post(served: &Served, path: &str, json: &Json) -> Reply {
    send(
        served.address,
        request(Method::POST, path, json.to_string()),
    )
    .await
}

pub(super) async fn get(served: &Served, path: &str) -> Reply {
    send(served.address, request(Method::GET, path, "")).await
}

/// As [`token`], with its log-probability and the likeliest ones in its place.
fn likely(id: u32, logprob: f32, top: &[(u32, f32)]) -> SequenceEvent {
    SequenceEvent::Token(TokenLogprobs {
        token: id,
        logprob: Some(logprob),
        top: top.to_vec(),
    })
}

/// An answer of these bytes that ends by itself.
pub(super) fn answer(text: &str) -> Vec<SequenceEvent> {
    let mut events = bytes(text);
    events.push(finished(FinishReason::Length));
    events
}
