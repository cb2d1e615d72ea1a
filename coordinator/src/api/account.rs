//! What is kept of a request while it is on its way: who asks, and what its line in the log will say.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::{Extensions, Method, StatusCode};
use opentelemetry::trace::{SpanContext, TraceId};
use secondwind_model::step::SequenceId;
use tonic::Code;
use tracing::Span;
use tracing::field::Empty;

use super::access::Gate;
use super::connection::{OpenRequest, Peer};
use super::keys::Tenant;
use super::status::ApiError;
use super::trace;
use crate::metrics::Metrics;
use crate::request::{SequenceTimings, SubmitError};

/// Of a path that is logged.
const MAX_PATH_CHARS: usize = 256;

/// Sequences that a line names; a stream may have any number.
const MAX_SEQUENCES: usize = 256;

/// Paths that are called again and again by machines.
const PROBES: &[&str] = &[
    "/health",
    "/ready",
    "/metrics",
    "/rack",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];

/// A request, from its first look to the end of its last sequence. Shared by all that work for it; the line is
/// written when the last of them is done.
pub(super) struct Account {
    request_id: Arc<str>,
    tenant: Tenant,
    method: Method,
    path: String,
    /// The client's, if it has one.
    trace: Option<TraceId>,
    model: Arc<str>,
    metrics: Arc<Metrics>,
    began: Instant,
    span: Span,
    client: Option<SocketAddr>,
    /// Held, so that the connection is not idle.
    _open: Option<OpenRequest>,
    totals: Mutex<Totals>,
}

/// How far it came.
#[derive(Debug, Default)]
struct Totals {
    /// None while there is no answer.
    status: Option<StatusCode>,
    grpc: Option<Code>,
    /// Of the answer's body, as far as it was taken.
    bytes: usize,
    complete: bool,
    /// As the step loop and the workers number them.
    sequences: Vec<SequenceId>,
    prompt_tokens: u64,
    cached_prompt_tokens: u64,
    completion_tokens: u64,
    /// Of the last sequence that ended.
    finish: Option<&'static str>,
    /// The longest of its sequences.
    queue: Option<Duration>,
    /// From the request's beginning.
    first_token: Option<Duration>,
}

/// What a sequence came to.
pub(super) struct SequenceEnd {
    pub prompt_tokens: u32,
    pub cached_prompt_tokens: u32,
    pub completion_tokens: u32,
    /// `stop`, `length`, or why it did not come to its end.
    pub finish: &'static str,
    /// None for one that did not.
    pub timings: Option<SequenceTimings>,
}

impl Account {
    /// Of a request that arrives.
    pub(super) fn open(
        gate: &Gate,
        request_id: Arc<str>,
        tenant: Tenant,
        request: &Request,
    ) -> Arc<Self> {
        let peer = request.extensions().get::<Peer>();
        // A path may hold what is not ASCII.
        let path: String = request.uri().path().chars().take(MAX_PATH_CHARS).collect();
        let span = tracing::info_span!(
            "request",
            %request_id,
            tenant = tenant.label(),
            otel.name = format!("{} {path}", request.method()),
            otel.kind = "server",
            status = Empty,
            prompt_tokens = Empty,
            completion_tokens = Empty,
            finish = Empty,
            queue_ms = Empty,
            first_token_ms = Empty,
        );
        let parent = trace::parent(request.headers());
        let trace = parent.as_ref().map(SpanContext::trace_id);
        if let Some(parent) = parent {
            trace::join(&span, parent);
        }
        Arc::new(Self {
            request_id,
            tenant,
            method: request.method().clone(),
            path,
            trace,
            model: Arc::clone(&gate.model),
            metrics: Arc::clone(&gate.metrics),
            began: Instant::now(),
            span,
            client: peer.and_then(|peer| peer.address),
            _open: peer.map(Peer::open_request),
            totals: Mutex::default(),
        })
    }

    /// Of a request that no server let in.
    #[cfg(test)]
    pub(super) fn of_nobody() -> Arc<Self> {
        let gate = Gate {
            keys: super::keys::ApiKeys::default(),
            metrics: Metrics::new("fixture"),
            model: "fixture".into(),
        };
        Self::open(&gate, "test".into(), Tenant::default(), &Request::default())
    }

    /// Of the request with these extensions.
    ///
    /// # Errors
    /// Internal, if it came past the gate: it would be nobody's.
    pub(super) fn of(extensions: &Extensions) -> Result<Arc<Self>, ApiError> {
        let account = extensions.get::<Arc<Self>>();
        account.cloned().ok_or_else(|| {
            let detail = "a request came past the gate".to_owned();
            SubmitError::Internal { detail }.into()
        })
    }

    pub(super) fn request_id(&self) -> &Arc<str> {
        &self.request_id
    }

    /// When it arrived.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    pub(super) fn tenant(&self) -> u32 {
        self.tenant.number
    }

    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// The answer begins.
    pub(super) fn answered(&self, status: StatusCode, grpc: Option<Code>) {
        let mut totals = self.totals();
        totals.status = Some(status);
        totals.grpc = grpc;
    }

    /// The answer's trailers.
    pub(super) fn trailed(&self, code: Code) {
        self.totals().grpc = Some(code);
    }

    /// So much of the answer was taken.
    pub(super) fn read(&self, bytes: usize, complete: bool) {
        let mut totals = self.totals();
        totals.bytes += bytes;
        totals.complete |= complete;
    }

    /// The step loop took a sequence.
    pub(super) fn queued(&self, sequence: SequenceId) {
        let sequences = &mut self.totals().sequences;
        if sequences.len() < MAX_SEQUENCES {
            sequences.push(sequence);
        }
    }

    /// A sequence's first token is there.
    pub(super) fn first_token(&self) {
        let after = self.began.elapsed();
        self.totals().first_token.get_or_insert(after);
    }

    /// A sequence is over.
    pub(super) fn ended(&self, end: &SequenceEnd) {
        let mut totals = self.totals();
        totals.prompt_tokens += u64::from(end.prompt_tokens);
        totals.cached_prompt_tokens += u64::from(end.cached_prompt_tokens);
        totals.completion_tokens += u64::from(end.completion_tokens);
        totals.finish = Some(end.finish);
        let queue = end.timings.map(|timings| timings.queue);
        totals.queue = totals.queue.max(queue);
    }

    fn totals(&self) -> MutexGuard<'_, Totals> {
        // Nothing panics while it holds the lock; figures would be right even so.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tenant {
    /// Its name in the log; none for whoever needs no key.
    fn label(&self) -> Option<&str> {
        (!self.name.is_empty()).then_some(&*self.name)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let totals = std::mem::take(&mut *self.totals());
        if let Some(tenant) = self.tenant.label() {
            let tokens = (totals.prompt_tokens, totals.completion_tokens);
            self.metrics.served(tenant, tokens.0, tokens.1);
        }
        // 499 is what others write for a client that went away before an answer.
        let status = totals.status.map_or(499, |status| status.as_u16());
        let end = if totals.complete {
            "complete"
        } else {
            "cut off"
        };
        let generated = totals.finish.is_some();
        let count = |tokens: u64| generated.then_some(tokens);
        let ms = |time: Option<Duration>| time.map(|time| time.as_millis() as u64);
        let sequences: Vec<String> = totals.sequences.iter().map(u64::to_string).collect();
        let sequences = sequences.join(",");
        let span = &self.span;
        span.record("status", status);
        span.record("prompt_tokens", count(totals.prompt_tokens));
        span.record("completion_tokens", count(totals.completion_tokens));
        span.record("finish", totals.finish);
        span.record("queue_ms", ms(totals.queue));
        span.record("first_token_ms", ms(totals.first_token));
        macro_rules! line {
            ($level:expr) => {
                tracing::event!(
                    parent: None,
                    $level,
                    request_id = %self.request_id,
                    trace_id = self.trace.map(tracing::field::display),
                    tenant = self.tenant.label(),
                    client = self.client.map(tracing::field::display),
                    method = %self.method,
                    path = self.path,
                    status,
                    grpc = totals.grpc.map(tracing::field::debug),
                    model = generated.then_some(&*self.model),
                    sequences = generated.then_some(sequences.as_str()),
                    prompt_tokens = count(totals.prompt_tokens),
                    cached_prompt_tokens = count(totals.cached_prompt_tokens),
                    completion_tokens = count(totals.completion_tokens),
                    finish = totals.finish,
                    queue_ms = ms(totals.queue),
                    first_token_ms = ms(totals.first_token),
                    ms = self.began.elapsed().as_millis() as u64,
                    bytes = totals.bytes,
                    end,
                    "request"
                )
            };
        }
        // Keys that fail leave a trace.
        let denied = matches!(status, 401 | 403);
        if !denied && PROBES.contains(&self.path.as_str()) {
            line!(tracing::Level::DEBUG);
        } else {
            line!(tracing::Level::INFO);
        }
    }
}
