//! The coordinator: requests, tokens, scheduling and the plan. It holds every token of every accepted
//! request, so that losing workers costs time and no request. It computes nothing itself.
//!
//! Modules in the order in which a request passes through them:
//!
//! 1. [`api`]: checks a request.
//! 2. [`text`]: chat template and tokenizer, and tokens back to text.
//! 3. [`request`]: what API and step loop say to each other.
//! 4. [`step_loop`]: the loop; the only place where scheduler and cluster meet.
//! 5. [`scheduler`]: pure: who runs when, in which KV blocks.
//! 6. [`cluster`]: workers, groups, epochs.
//!
//! [`metrics`]: what all of them tell Prometheus. [`rack`]: how things stand, for people who look.
#![forbid(unsafe_code)]

pub mod api;
pub mod cluster;
pub mod metrics;
pub mod rack;
pub mod request;
mod run;
pub mod scheduler;
pub mod step_loop;
pub mod text;

pub use api::{
    ApiKey, ConnectionLimits, HttpSettings, KeyHash, Reasoning, Role, draw_key, is_key_name,
};
pub use cluster::Collective;
pub use run::{
    ClientSettings, Coordinator, CoordinatorConfig, CoordinatorError, Settings, plan_settings,
};
