//! A worker: one rank of the group. It loads its own slices of a checkpoint, executes the
//! coordinator's numbered steps and meets the other ranks in collectives.
//!
//! Modules in the order in which a step passes through them:
//!
//! 1. [`session`]: the stream to the coordinator; commands in, events out.
//! 2. [`engine`]: the one thread that owns weights, KV cache and collective.
//! 3. [`loader`]: a plan's slices from disk into the device's layout, as a [`shard`].
//! 4. [`batch`]: a step as flat arrays over its tokens.
//! 5. [`rules`]: what a sequence's penalties and biases change.
//! 6. [`exec`]: embed, layers, norm, logits.
//! 7. [`backend`]: the operations a decoder needs, on a device.
//! 8. [`collective`]: sums and gathers between ranks.
//! 9. [`sampler`]: logits to tokens.
//!
//! [`timeline`] names the parts of a step for those who time it, which [`mod@bench`] does.
//!
//! Invariants: steps of an epoch are executed in order and without gaps; after load no step allocates
//! on the device; a value that is not finite ends the step and never becomes a token.
#![deny(unsafe_code)] // collective/nccl.rs calls a C library and allows it.

pub mod backend;
pub mod batch;
pub mod bench;
mod capabilities;
pub mod collective;
pub mod engine;
pub mod exec;
pub mod loader;
pub mod rules;
mod run;
pub mod sampler;
pub mod session;
pub mod shard;
pub mod timeline;

pub use capabilities::{cuda_recordings, measure_cpu, measure_cuda};
pub use collective::local::LocalHub;
pub use run::{Device, WorkerConfig, WorkerError, run};
