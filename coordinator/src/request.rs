//! What the API and the step loop say to each other about one sequence.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secondwind_model::step::{PromptLogprob, Sampling, SequenceId, TokenLogprobs};
use secondwind_proto::v1;
use tokio::sync::mpsc;

use crate::metrics::Metrics;
use crate::rack::Rack;
use crate::text::grammar::Grammar;

/// A checked request: what the step loop needs to run one sequence.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Never empty; each id is below the vocabulary size; shorter than the context.
    pub prompt: Vec<u32>,
    /// How every token is drawn; `seed` is already drawn when the request had none.
    pub sampling: Sampling,
    /// Tokens to generate at the most; prompt and these fit the context. 0 only with `prompt_logprobs`.
    pub max_tokens: usize,
    /// Tokens that end the sequence, sorted: end-of-sequence tokens, unless they are ignored, and the
    /// request's own.
    pub stop_token_ids: Vec<u32>,
    /// Report the log-probability of every prompt token from the second on.
    pub prompt_logprobs: bool,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// Whose it is.
    pub origin: Origin,
}

/// Where a sequence comes from: what it is called, whom it waits with, and whose KV it may share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Of its request, for the log.
    pub request_id: Arc<str>,
    /// The number of its API key; 0 without one. Tenants share the group's time evenly, and no prefix.
    pub tenant: u32,
    /// Among those of its tenant the higher one is let in first; 0 when nobody said.
    pub priority: i8,
    /// Prefixes are shared only with sequences of the same.
    pub cache_salt: Option<CacheSalt>,
}

/// SHA-256 of what a client gave to keep its prefixes apart.
pub type CacheSalt = [u32; 8];

/// What happens to a sequence, in this order: `Queued` once; `Started` once; `PromptLogprobs` once, when asked for; one
/// `Token` for each token, the stop token included; then `Finished`. `Failed` may end it at any point.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEvent {
    /// It was taken, and will run. Before that `Failed` may say that it was refused.
    Queued {
        /// What step loop and workers call it.
        sequence: SequenceId,
    },
    /// Its first step was sent.
    Started {
        /// Leading tokens of the prompt whose KV was cached, and which are not computed.
        cached_prompt_tokens: usize,
    },
    /// Of the prompt tokens from the second on.
    PromptLogprobs(Vec<PromptLogprob>),
    /// A token was sampled.
    Token(TokenLogprobs),
    /// It ended by itself.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Where its time went.
        timings: SequenceTimings,
    },
    /// It cannot go on.
    Failed(SubmitError),
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The last token is one of its stop tokens.
    Stop,
    /// It has `max_tokens` tokens.
    Length,
    /// Nothing can follow under its grammar.
    Complete,
}

impl FinishReason {
    /// For metrics and the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop | Self::Complete => "stop",
            Self::Length => "length",
        }
    }
}

/// Where a sequence's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceTimings {
    /// From submission to its first step.
    pub queue: Duration,
    /// From its first step to its first token.
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
}

/// Events of one sequence. Dropping it cancels the sequence: the step loop sees the sender closed, sends no
/// further step for it and frees its blocks.
///
/// Unbounded on purpose: the step loop must never wait for a slow client, and a sequence puts at most
/// `max_tokens` + 3 events into it, so that what queues up is bounded by the request itself.
pub type EventStream = mpsc::UnboundedReceiver<SequenceEvent>;

/// Why a sequence was not accepted, or did not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Workers are missing or still loading.
    #[error("no group is serving yet: {detail}")]
    NoGroup {
        /// What is awaited, for the client to read.
        detail: String,
    },
    /// Too many sequences wait.
    #[error(
        "the queue is full: {limit} sequences are waiting; try again in {} s",
        retry_after.as_secs()
    )]
    QueueFull {
        /// How many wait.
        limit: usize,
        /// When there may be room, at the pace of late; whole seconds.
        retry_after: Duration,
    },
    /// The sequence alone needs more KV blocks than the group has.
    #[error(
        "the sequence may grow to {needed_tokens} tokens, but the KV cache of the group holds {capacity_tokens}; ask for fewer max_tokens"
    )]
    KvCacheTooSmall {
        /// Prompt and `max_tokens`.
        needed_tokens: usize,
        /// What all blocks hold.
        capacity_tokens: usize,
    },
    /// The coordinator is shutting down.
    #[error("the coordinator is shutting down")]
    Draining,
    /// A worker went away, and the sequence could not be kept.
    #[error("a worker was lost")]
    WorkerLost {
        /// Rank and cause, for the log.
        detail: String,
    },
    /// The grammar of the answer cannot be followed any further.
    #[error("the shape asked of the answer is too complex: {detail}")]
    Grammar {
        /// The parser's words.
        detail: String,
    },
    /// The client's deadline has passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A fault of ours or of a worker.
    #[error("internal error")]
    Internal {
        /// What happened, for the log.
        detail: String,
    },
}

impl SubmitError {
    /// What kind of failure it is, for metrics and the log.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::DeadlineExceeded => "deadline",
            Self::WorkerLost { .. } | Self::Internal { .. } => "error",
            Self::NoGroup { .. }
            | Self::QueueFull { .. }
            | Self::KvCacheTooSmall { .. }
            | Self::Grammar { .. }
            | Self::Draining => "refused",
        }
    }
}

/// The step loop, as the API sees it.
pub trait Engine: Send + Sync + 'static {
    /// Queues a sequence; returns at once.
    fn submit(&self, sequence: NewSequence) -> Result<EventStream, SubmitError>;

    /// The group that serves, and its plan; `None` while there is none.
    fn group(&self) -> Option<v1::Group>;

    /// How the rack does at the moment.
    fn rack(&self) -> Rack;

    /// What is counted.
    fn metrics(&self) -> &Arc<Metrics>;
}
