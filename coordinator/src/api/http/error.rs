//! Errors to HTTP statuses and OpenAI's error object, in one place.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value as Json, json};

use super::super::keys::KeyError;
use super::super::request::RequestError;
use super::super::status::{ApiError, FieldMistake};
use crate::request::SubmitError;
use crate::text::template::TemplateError;

/// Why an HTTP request is none for us, before any of its fields is looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The body is not worth reading.
    #[error("the body is larger than {limit_bytes} bytes")]
    TooLarge {
        /// What is taken.
        limit_bytes: usize,
    },
    /// The body is not JSON by its header.
    #[error("content-type: {found:?} is not application/json")]
    MediaType {
        /// What it says; empty if nothing.
        found: String,
    },
    /// The body is compressed.
    #[error("content-encoding: {found:?} is not taken; send the body as it is")]
    Encoding {
        /// What it says.
        found: String,
    },
    /// The body does not come.
    #[error("the body did not arrive within {seconds} s")]
    SlowBody {
        /// How long it was awaited.
        seconds: u64,
    },
    /// The connection broke in the body.
    #[error("the body broke off")]
    BrokenBody,
    /// The body is not JSON by its bytes.
    #[error("the body is not JSON: {detail}")]
    Json {
        /// Where and why.
        detail: String,
    },
    /// The body is JSON of another kind.
    #[error("the body is {found}, not a JSON object")]
    NotObject {
        /// What it is.
        found: &'static str,
    },
    /// Nothing is served there.
    #[error("there is no {method} {path}")]
    NoSuchPath {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
    },
    /// Something is served there, by another method.
    #[error("{path} does not take {method}")]
    Method {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
    },
    /// The headers are not worth keeping.
    #[error("the headers are larger than {limit_bytes} bytes")]
    Headers {
        /// What is taken.
        limit_bytes: usize,
    },
    /// A part of OpenAI's API that this server does not have.
    #[error("{what} are not offered; this server generates text")]
    NotOffered {
        /// What was asked for.
        what: &'static str,
    },
}

impl HttpError {
    fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType { .. } | Self::Encoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::SlowBody { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::NoSuchPath { .. } => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Headers { .. } => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BrokenBody
            | Self::Json { .. }
            | Self::NotObject { .. }
            | Self::NotOffered { .. } => StatusCode::BAD_REQUEST,
        }
    }
}

/// The HTTP status of an error.
pub(super) fn status(error: &ApiError) -> StatusCode {
    match error {
        ApiError::Request(error) | ApiError::Named { source: error, .. } => match error {
            RequestError::Template(TemplateError::Thread { .. }) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        },
        ApiError::Field { .. } | ApiError::Tokenize(_) | ApiError::Timeout { .. } => {
            StatusCode::BAD_REQUEST
        }
        ApiError::ModelNotFound { .. } => StatusCode::NOT_FOUND,
        ApiError::Http(error) => error.status(),
        ApiError::Key(KeyError::Missing | KeyError::Unknown) => StatusCode::UNAUTHORIZED,
        ApiError::Key(KeyError::Role { .. }) => StatusCode::FORBIDDEN,
        ApiError::SlowReader => StatusCode::REQUEST_TIMEOUT,
        ApiError::Submit(error) => match error {
            SubmitError::NoGroup { .. }
            | SubmitError::Draining
            | SubmitError::WorkerLost { .. } => StatusCode::SERVICE_UNAVAILABLE,
            SubmitError::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            SubmitError::KvCacheTooSmall { .. } | SubmitError::Grammar { .. } => {
                StatusCode::BAD_REQUEST
            }
            SubmitError::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            SubmitError::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

/// OpenAI's error object.
pub(super) fn object(error: &ApiError) -> Json {
    let kind = match status(error) {
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::FORBIDDEN => "permission_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let (param, code) = param_and_code(error);
    json!({"error": {"message": error.to_string(), "type": kind, "param": param, "code": code}})
}

fn param_and_code(error: &ApiError) -> (Option<String>, Option<&'static str>) {
    match error {
        ApiError::Request(source) => (Some(source.field()), Some(request_code(source))),
        ApiError::Named { field, source } => (Some(field.clone()), Some(request_code(source))),
        ApiError::Field { field, kind, .. } => {
            let code = match kind {
                FieldMistake::Value => "invalid_value",
                FieldMistake::Unsupported => "unsupported_parameter",
                FieldMistake::Unknown => "unknown_parameter",
            };
            (Some(field.clone()), Some(code))
        }
        ApiError::ModelNotFound { .. } => (Some("model".to_owned()), Some("model_not_found")),
        ApiError::Key(KeyError::Missing | KeyError::Unknown) => (None, Some("invalid_api_key")),
        ApiError::Key(KeyError::Role { .. }) => (None, Some("insufficient_role")),
        ApiError::Submit(SubmitError::KvCacheTooSmall { .. }) => (
            Some("max_tokens".to_owned()),
            Some("context_length_exceeded"),
        ),
        ApiError::Submit(SubmitError::QueueFull { .. }) => (None, Some("queue_full")),
        ApiError::Submit(SubmitError::NoGroup { .. }) => (None, Some("not_ready")),
        _ => (None, None),
    }
}

fn request_code(error: &RequestError) -> &'static str {
    match error {
        RequestError::PromptTooLong { .. } => "context_length_exceeded",
        RequestError::NoTools => "unsupported_parameter",
        _ => "invalid_value",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let mut response = json_response(status(&self), &object(&self));
        if let Some(after) = self.retry_after() {
            let seconds = HeaderValue::from(after.as_secs());
            response.headers_mut().insert(RETRY_AFTER, seconds);
        }
        if response.status() == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// A response of JSON.
pub(super) fn json_response(status: StatusCode, json: &Json) -> Response {
    let mut response = Response::new(Body::from(json.to_string()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
