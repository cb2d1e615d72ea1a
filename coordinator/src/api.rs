//! What clients call, over gRPC and HTTP: requests are checked here, sequences stream out, errors become
//! statuses. `access.rs` is the one way in; `frontend.rs` is what all APIs share; `http.rs`, `inference.rs`,
//! `vllm.rs` and `kserve.rs` only translate.

mod access;
mod account;
mod choices;
mod connection;
mod defaults;
mod frontend;
mod http;
mod inference;
mod keys;
mod kserve;
mod origin;
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
mod trace;
mod vllm;

pub use connection::{Connection, ConnectionLimits, Connections, Peer};
pub use defaults::SamplingDefaults;
pub use frontend::{Frontend, Reasoning, ServedModel};
pub use http::{HttpError, HttpSettings};
pub use inference::InferenceService;
pub use keys::{ApiKey, ApiKeys, KeyError, KeyHash, Role, Tenant, draw_key, is_key_name};
pub use request::{AnswerKind, CheckedRequest, RequestError, check_generate};
pub use server::{SERVICE_NAMES, ServingHandle, health, router};
pub use status::{ApiError, FieldMistake, grpc_deadline};
