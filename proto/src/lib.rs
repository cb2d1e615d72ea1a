//! The wire: generated messages, and their conversion to and from the model's plain data. Nothing
//! here decides anything.
//!
//! Converting *to* the wire cannot fail. Converting *from* it can: what arrives is from outside, so
//! every missing field, unknown enum value and out-of-range number is a [`WireError`] that names it.
#![forbid(unsafe_code)]

mod capabilities;
pub mod fuzz;
mod plan;
mod step;

/// Generated messages, clients and servers of package `secondwind.v1`.
#[allow(missing_docs, clippy::all, unused_qualifications, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("secondwind.v1");
}

/// Generated messages, clients and servers of package `vllm`, as vLLM's engines speak it.
#[allow(missing_docs, clippy::all, unused_qualifications, rustdoc::all)]
pub mod vllm {
    tonic::include_proto!("vllm");
}

/// Generated messages, clients and servers of package `inference`: KServe's protocol, with Triton's stream.
#[allow(missing_docs, clippy::all, unused_qualifications, rustdoc::all)]
pub mod kserve {
    tonic::include_proto!("inference");
}

/// The compiled descriptors, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use step::{step_from_wire, step_result_from_wire, step_result_to_wire, step_to_wire};

/// A message that the other side should not have sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("{message} lacks {field}")]
    Missing {
        /// Message type.
        message: &'static str,
        /// Field name.
        field: &'static str,
    },
    /// A field holds what it must not.
    #[error("{message}.{field} holds {value}")]
    Invalid {
        /// Message type.
        message: &'static str,
        /// Field name.
        field: &'static str,
        /// What it holds.
        value: String,
    },
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// A count from the wire as an index of this machine.
fn index(value: u64, message: &'static str, field: &'static str) -> Result<usize, WireError> {
    usize::try_from(value).map_err(|_| WireError::Invalid {
        message,
        field,
        value: value.to_string(),
    })
}
