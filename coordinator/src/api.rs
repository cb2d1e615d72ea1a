//! What clients call: requests are checked here, sequences stream out, errors become statuses.

mod defaults;
mod inference;
mod prompt;
mod request;
mod response;
mod rules;
mod server;
mod status;
#[cfg(test)]
mod tests;

pub use defaults::SamplingDefaults;
pub use inference::{InferenceService, ServedModel};
pub use request::{CheckedRequest, RequestError, check_generate};
pub use server::{SERVICE_NAME, ServingHandle, health, router};
pub use status::{ApiError, grpc_deadline};
