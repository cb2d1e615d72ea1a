//! Why a call fails, and its gRPC status; `http/error.rs` has the other mapping. Clients read public words
//! only; detail goes to the log.

use std::time::{Duration, Instant};

use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::http::HttpError;
use super::keys::KeyError;
use super::request::RequestError;
use crate::request::SubmitError;
use crate::text::template::TemplateError;
use crate::text::tokenizer::TokenizerError;

/// Of a status, at the most.
const MAX_MESSAGE_CHARS: usize = 1024;

/// Why a call fails.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// The request is wrong, or the model cannot do what it asks.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The same, with the field as an API spells it that is not gRPC.
    #[error("{field}: {}", source.detail())]
    Named {
        /// The field's name there.
        field: String,
        /// What is wrong with it.
        source: RequestError,
    },
    /// A field of a request in other words than ours cannot be taken.
    #[error("{field}: {detail}")]
    Field {
        /// Its name.
        field: String,
        /// What is wrong with it.
        detail: String,
        /// What kind of mistake it is.
        kind: FieldMistake,
    },
    /// Another model was asked for.
    #[error("the model {asked:?} does not exist; this server serves {served:?}")]
    ModelNotFound {
        /// What the client wants.
        asked: String,
        /// What there is.
        served: String,
    },
    /// The HTTP request is no request for us.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Nobody's request, or not one for this key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The client took nothing of its answer for too long.
    #[error("the answer was not read for too long")]
    SlowReader,
    /// The step loop did not take the sequence, or could not go on.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// A text to tokenize could not be.
    #[error("text: {0}")]
    Tokenize(#[from] TokenizerError),
    /// `grpc-timeout` is not a timeout.
    #[error(
        "grpc-timeout: {value:?} is not a number of at most 8 digits and one of H, M, S, m, u, n"
    )]
    Timeout {
        /// The header.
        value: String,
    },
}

/// What is wrong with a field of a request in other words than ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldMistake {
    /// Its type or value.
    Value,
    /// It changes the answer, and we do not support it.
    Unsupported,
    /// Nobody knows it, and requests are checked strictly.
    Unknown,
}

impl ApiError {
    /// `field` cannot have its value.
    pub(super) fn value(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            detail: detail.into(),
            kind: FieldMistake::Value,
        }
    }

    /// `field` would change the answer, and we do not support it.
    pub(super) fn unsupported(field: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            detail: "is not supported; leave it out".to_owned(),
            kind: FieldMistake::Unsupported,
        }
    }

    /// When to try again, where that may help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Submit(SubmitError::QueueFull { retry_after, .. }) => Some(*retry_after),
            Self::Submit(
                SubmitError::NoGroup { .. }
                | SubmitError::Draining
                | SubmitError::WorkerLost { .. },
            ) => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// Tells the log what clients are not told.
    pub(super) fn log(&self) {
        if let Self::Submit(SubmitError::WorkerLost { detail } | SubmitError::Internal { detail }) =
            self
        {
            tracing::error!(error = %self, %detail, "a sequence failed");
        }
    }

    /// The gRPC status code.
    pub fn code(&self) -> Code {
        match self {
            Self::Request(error) | Self::Named { source: error, .. } => request_code(error),
            Self::Submit(error) => match error {
                SubmitError::NoGroup { .. }
                | SubmitError::Draining
                | SubmitError::WorkerLost { .. } => Code::Unavailable,
                SubmitError::QueueFull { .. } => Code::ResourceExhausted,
                SubmitError::KvCacheTooSmall { .. } => Code::FailedPrecondition,
                SubmitError::Grammar { .. } => Code::InvalidArgument,
                SubmitError::DeadlineExceeded => Code::DeadlineExceeded,
                SubmitError::Internal { .. } => Code::Internal,
            },
            Self::Tokenize(_) | Self::Timeout { .. } | Self::Field { .. } | Self::Http(_) => {
                Code::InvalidArgument
            }
            Self::ModelNotFound { .. } => Code::NotFound,
            Self::Key(KeyError::Missing | KeyError::Unknown) => Code::Unauthenticated,
            Self::Key(KeyError::Role { .. }) => Code::PermissionDenied,
            Self::SlowReader => Code::Aborted,
        }
    }
}

fn request_code(error: &RequestError) -> Code {
    match error {
        RequestError::NoChatTemplate { .. } => Code::FailedPrecondition,
        RequestError::Template(error) => match error {
            TemplateError::Raised { .. } | TemplateError::Failed { .. } => Code::InvalidArgument,
            TemplateError::Thread { .. } => Code::ResourceExhausted,
            TemplateError::NoDefault { .. }
            | TemplateError::SourceTooLong { .. }
            | TemplateError::Syntax { .. }
            | TemplateError::Endless { .. }
            | TemplateError::TimedOut { .. }
            | TemplateError::OutputTooLong { .. } => Code::FailedPrecondition,
        },
        _ => Code::InvalidArgument,
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        error.log();
        let mut metadata = MetadataMap::new();
        if let Some(after) = error.retry_after() {
            metadata.insert("retry-after", after.as_secs().into());
        }
        // Names that clients sent are in it, and it travels in a header.
        let message = error
            .to_string()
            .chars()
            .take(MAX_MESSAGE_CHARS)
            .collect::<String>();
        Self::with_metadata(error.code(), message, metadata)
    }
}

/// When the client stops waiting, from the `grpc-timeout` header. None for a time beyond the clock's reach.
pub fn grpc_deadline(metadata: &MetadataMap, now: Instant) -> Result<Option<Instant>, ApiError> {
    let Some(value) = metadata.get("grpc-timeout") else {
        return Ok(None);
    };
    let wrong = || ApiError::Timeout {
        value: String::from_utf8_lossy(value.as_bytes()).into_owned(),
    };
    let text = value.to_str().map_err(|_| wrong())?;
    let unit = text.chars().last().ok_or_else(wrong)?;
    let digits = text.strip_suffix(unit).ok_or_else(wrong)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let amount: u64 = digits.parse().map_err(|_| wrong())?;
    let timeout = match unit {
        'H' => Duration::from_secs(amount * 3600),
        'M' => Duration::from_secs(amount * 60),
        'S' => Duration::from_secs(amount),
        'm' => Duration::from_millis(amount),
        'u' => Duration::from_micros(amount),
        'n' => Duration::from_nanos(amount),
        _ => return Err(wrong()),
    };
    Ok(now.checked_add(timeout))
}
