//! What clients call, over gRPC and HTTP: requests are checked here, sequences stream out, errors become
//! statuses. `access.rs` is the one way in; `frontend.rs` is what both APIs share; `http.rs` and `inference.rs` only translate.

mod access;
mod account;
mod connection;
mod defaults;
mod frontend;
mod http;
mod inference;
mod keys;
mod origin;
mod pace;
mod prompt;
mod request;
mod response;
mod rules;
mod server;
mod status;
#[cfg(test)]
mod tests;
mod trace;

pub use connection::{Connection, ConnectionLimits, Connections, Peer};
pub use defaults::SamplingDefaults;
pub use frontend::{Frontend, ServedModel};
pub use http::{HttpError, HttpSettings, Reasoning};
pub use inference::InferenceService;
pub use keys::{ApiKey, ApiKeys, KeyError, KeyHash, Role, Tenant, draw_key, is_key_name};
pub use request::{CheckedRequest, RequestError, check_generate};
pub use server::{SERVICE_NAME, ServingHandle, health, router};
pub use status::{ApiError, FieldMistake, grpc_deadline};
