//! What clients call, over gRPC and HTTP: requests are checked here, sequences stream out, errors become
//! statuses. `frontend.rs` is what both share; `http.rs` and `inference.rs` only translate.

mod connection;
mod defaults;
mod frontend;
mod http;
mod inference;
mod pace;
mod prompt;
mod request;
mod response;
mod rules;
mod server;
mod status;
#[cfg(test)]
mod tests;

pub use connection::{Connection, Connections};
pub use defaults::SamplingDefaults;
pub use frontend::{Frontend, Reasoning, ServedModel};
pub use http::{HttpError, HttpSettings};
pub use inference::InferenceService;
pub use request::{AnswerKind, CheckedRequest, RequestError, check_generate};
pub use server::{SERVICE_NAME, ServingHandle, health, router};
pub use status::{ApiError, FieldMistake, grpc_deadline};
