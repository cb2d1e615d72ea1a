//! Numbers in, numbers out: the CPU kernels of a tensor-parallel transformer worker, and the one
//! selector that names the path each op takes. Knows no model and no network.
//!
//! A layer's way through this crate: the loader fills a [`weights::QuantBuilder`] or
//! [`weights::DenseBuilder`] with its slices; [`select`] names the path; each step calls the ops
//! of [`cpu`] on plain `f32` buffers, sharing one [`pool::ThreadPool`]. Every op of [`cpu`] has a
//! plain twin in [`mod@reference`].
//!
//! Invariants:
//! - arithmetic is fp32 throughout; f16 and bf16 are storage formats, widened exactly at use;
//! - a row's bits depend on its own inputs, the weights and the instruction set: not on the other
//!   rows of the call, its place among them, the chunks it came in, or the number of threads;
//! - nothing spins when idle, and no op reads a clock, a file or the environment;
//! - outside data that does not fit is an error that names op and tensor, never a panic.

pub mod isa;
pub mod select;

pub mod embedding;
pub mod weights;

pub mod heads;
pub mod kv;
pub mod logits;

pub mod cpu;
pub mod cuda;
pub mod pool;
pub mod reference;

pub mod bench;

mod buffer;
mod error;
mod rows;

pub use error::KernelError;
