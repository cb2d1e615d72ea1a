//! What a model is: configuration, checkpoint files, shards, memory. No network, no async, no device.
//!
//! Modules in the order in which a model passes through them:
//!
//! 1. [`config`]: what `config.json` says, as typed data; what each layer is.
//! 2. [`safetensors`], [`checkpoint`]: a folder of safetensors (or the embedded model), checked before use.
//! 3. [`gptq`]: the quantisation block, packed integers, zero points.
//! 4. [`modules`]: every tensor a model of this configuration has, and how it splits.
//! 5. [`capabilities`]: what a worker says it can do.
//! 6. [`plan`]: the pure planner: capabilities to an uneven tensor-parallel [`plan::ShardPlan`].
//! 7. [`slices`]: the pure slicer: a plan, a rank and a tensor to element ranges and bytes.
//! 8. [`step`]: one step of the group as plain data.
//!
//! [`synthetic`] writes random checkpoints of any shape for tests and benchmarks; [`error`] holds what can be
//! wrong with a checkpoint; [`fuzz`] holds what the fuzz targets of this crate do with their input.
#![forbid(unsafe_code)]

mod builtin;
pub mod capabilities;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod fuzz;
pub mod gptq;
pub mod modules;
pub mod plan;
pub mod safetensors;
pub mod slices;
pub mod step;
pub mod synthetic;
