//! What clients call, over gRPC and HTTP: requests are checked here, sequences stream out, errors become
//! statuses. `frontend.rs` is what both share; `http.rs`, `inference.rs`, `vllm.rs` and
//! `kserve.rs` only translate.

mod choices;
mod connection;
mod defaults;
mod frontend;
mod http;
mod inference;
mod kserve;
mod pace;
mod prompt;
mod request;
mod response;
mod rules;
mod server;
mod shape;
mod status;
#[cfg(test)]
mod tests;
mod vllm;

pub use connection::{Connection, Connections};
pub use defaults::SamplingDefaults;
pub use frontend::{Frontend, Reasoning, ServedModel};
pub use http::{HttpError, HttpSettings};
pub use inference::InferenceService;
pub use request::{AnswerKind, CheckedRequest, RequestError, check_generate};
pub use server::{SERVICE_NAMES, ServingHandle, health, router};
pub use status::{ApiError, FieldMistake, grpc_deadline};
