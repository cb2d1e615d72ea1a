//! A request's id, and its line in the log when it is over. Never a word of what was asked or answered.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that is taken from a client.
const MAX_ID_BYTES: usize = 128;

/// Of a path that is logged.
const MAX_PATH_CHARS: usize = 256;

/// Names a request in the log, in its answer and to the client.
#[derive(Clone, Debug)]
pub(super) struct RequestId(String);

impl RequestId {
    /// The client's own, if it is one; else drawn.
    fn of(headers: &HeaderMap) -> Self {
        let own = headers
            .get(REQUEST_ID)
            .and_then(|value| value.to_str().ok());
        let legal = |id: &&str| {
            (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
        };
        Self(own.filter(legal).map_or_else(drawn, str::to_owned))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Random letters for an id.
pub(in super::super) fn drawn() -> String {
    let mut bytes = [0; 12];
    // Without the system's random numbers ids repeat, which harms nothing but the reading of logs.
    let _ = getrandom::fill(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives the request its id, answers with it, and logs a line once the answer is sent or given up.
pub(super) async fn log(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    // A path may hold what is not ASCII.
    let path = request.uri().path().chars().take(MAX_PATH_CHARS).collect();
    let mut line = Line {
        method: request.method().clone(),
        path,
        id,
        begin: Instant::now(),
        status: None,
        bytes: 0,
        complete: false,
    };
    let mut response = next.run(request).await;
    line.status = Some(response.status());
    if let Ok(value) = HeaderValue::from_str(line.id.as_str()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response.map(|body| {
        // An empty body is not read at all.
        line.complete = body.is_end_stream();
        Body::new(Logged { body, line })
    })
}

/// The log's line; written when it is dropped.
#[derive(Debug)]
struct Line {
    method: Method,
    path: String,
    id: RequestId,
    begin: Instant,
    /// None while there is no answer.
    status: Option<StatusCode>,
    bytes: usize,
    complete: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Self {
            method,
            path,
            status,
            bytes,
            ..
        } = self;
        // 499 is what others write for a client that went away before an answer.
        let status = status.map_or(499, |status| status.as_u16());
        let ms = self.begin.elapsed().as_millis() as u64;
        let request_id = self.id.as_str();
        let end = if self.complete { "complete" } else { "cut off" };
        if matches!(path.as_str(), "/health" | "/ready" | "/metrics" | "/rack") {
            tracing::debug!(%method, path, status, ms, bytes, end, request_id, "http");
        } else {
            tracing::info!(%method, path, status, ms, bytes, end, request_id, "http");
        }
    }
}

/// A body that knows how far it was read.
struct Logged {
    body: Body,
    line: Line,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(None) => self.line.complete = true,
            Poll::Ready(Some(Ok(frame))) => {
                self.line.bytes += frame.data_ref().map_or(0, Bytes::len);
                self.line.complete |= self.body.is_end_stream();
            }
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
