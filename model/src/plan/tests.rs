//! Tests of the planner.

mod digest;
mod exhaustive;
mod fit;
mod memory;
mod planning;
mod presets;
mod refusals;
pub(crate) mod shapes;
