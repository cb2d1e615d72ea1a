//! Errors to gRPC statuses, in one place. The status has public words only; detail goes to the log.

use std::time::{Duration, Instant};

use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::request::RequestError;
use crate::request::SubmitError;
use crate::text::template::TemplateError;
use crate::text::tokenizer::TokenizerError;

/// Why a call fails.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// The request is wrong, or the model cannot do what it asks.
    #[error(transparent)]
    Request(#[from] RequestError),
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

impl ApiError {
    /// The status code.
    pub fn code(&self) -> Code {
        match self {
            Self::Request(error) => request_code(error),
            Self::Submit(error) => match error {
                SubmitError::NoGroup { .. }
                | SubmitError::Draining
                | SubmitError::WorkerLost { .. } => Code::Unavailable,
                SubmitError::QueueFull { .. } => Code::ResourceExhausted,
                SubmitError::KvCacheTooSmall { .. } => Code::FailedPrecondition,
                SubmitError::DeadlineExceeded => Code::DeadlineExceeded,
                SubmitError::Internal { .. } => Code::Internal,
            },
            Self::Tokenize(_) | Self::Timeout { .. } => Code::InvalidArgument,
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
        if let ApiError::Submit(
            SubmitError::WorkerLost { detail } | SubmitError::Internal { detail },
        ) = &error
        {
            tracing::error!(%error, %detail, "a sequence failed");
        }
        Self::new(error.code(), error.to_string())
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
