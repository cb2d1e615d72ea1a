//! What goes wrong between client and coordinator, in words.

use std::{error::Error, fmt};

use tonic::{Code, Status};

/// A request that the coordinator refused or could not finish.
#[derive(Debug)]
pub struct RequestError {
    code: Code,
    message: String,
}

impl From<Status> for RequestError {
    fn from(status: Status) -> Self {
        Self {
            code: status.code(),
            message: match (status.code(), status.message()) {
                (Code::Unimplemented, "") => {
                    "this is not a coordinator's address for clients".into()
                }
                (_, message) => message.to_owned(),
            },
        }
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", code_name(self.code), self.message)
    }
}

impl Error for RequestError {}

/// Nobody answers at the endpoint.
#[derive(Debug)]
pub struct Unreachable {
    endpoint: String,
    reason: String,
}

impl Unreachable {
    /// With the innermost reason, which is the one that tells something.
    pub fn new(endpoint: String, error: &dyn Error) -> Self {
        let mut innermost = error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        Self {
            endpoint,
            reason: innermost.to_string(),
        }
    }
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no coordinator answers at {} ({}); start one with `secondwind coordinator --model DIR --world-size N`, \
             or name another with --endpoint",
            self.endpoint, self.reason
        )
    }
}

impl Error for Unreachable {}

/// The code as the gRPC documents spell it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
