//! The way in and out of every request, whichever API it is for: before any routing it gets its id and is
//! admitted by its key; when it is over its line is logged. Never a word of what was asked or answered.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Frame, SizeHint};
use tonic::{Code, Status};
use tracing::Instrument;

use super::account::Account;
use super::http;
use super::keys::{ApiKeys, Tenant};
use super::status::ApiError;
use crate::metrics::Metrics;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Longest id that is taken from a client.
const MAX_ID_BYTES: usize = 128;

/// What every request passes.
pub(super) struct Gate {
    pub keys: ApiKeys,
    pub metrics: Arc<Metrics>,
    /// The model that is served.
    pub model: Arc<str>,
}

/// The client's own id, if it is one; else drawn.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let own = headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok());
    let legal = |id: &&str| {
        (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match own.filter(legal) {
        Some(own) => own.into(),
        None => drawn().into(),
    }
}

/// Random letters for an id.
pub(super) fn drawn() -> String {
    let mut bytes = [0; 12];
    // Without the system's random numbers ids repeat, which harms nothing but the reading of logs.
    let _ = getrandom::fill(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// True for what a gRPC client asks.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Names the request, lets it in or not, and answers with its id.
pub(super) async fn enter(
    State(gate): State<Arc<Gate>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(request.headers());
    let admitted = gate.keys.admit(request.uri().path(), request.headers());
    let (tenant, refusal) = match admitted {
        Ok(tenant) => (tenant, None),
        Err(error) => (Tenant::default(), Some(ApiError::from(error))),
    };
    let account = Account::open(&gate, id, tenant, &request);
    let answer = async {
        match refusal {
            None => {
                request.extensions_mut().insert(Arc::clone(&account));
                next.run(request).await
            }
            Some(error) if is_grpc(request.headers()) => Status::from(error).into_http(),
            Some(error) => {
                http::discard(request).await;
                error.into_response()
            }
        }
    };
    let mut response = answer.instrument(account.span().clone()).await;
    account.answered(response.status(), grpc_code(response.headers()));
    if let Ok(value) = HeaderValue::from_str(account.request_id()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response.map(|body| {
        // An empty body is not read at all.
        account.read(0, body.is_end_stream());
        Body::new(Logged { body, account })
    })
}

fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get(GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}

/// A body whose account knows how far it was read.
struct Logged {
    body: Body,
    account: Arc<Account>,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let body = Pin::new(&mut this.body);
        let polled = this.account.span().in_scope(|| body.poll_frame(cx));
        match &polled {
            Poll::Ready(None) => this.account.read(0, true),
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(code) = frame.trailers_ref().and_then(grpc_code) {
                    this.account.trailed(code);
                }
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                let last = frame.is_trailers() || this.body.is_end_stream();
                this.account.read(bytes, last);
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
