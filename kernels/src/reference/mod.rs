//! The plain twin of every op: obviously right, slow, and what the fast paths are tested against.

mod attention;
mod halves;
mod linear;
mod ops;

pub use attention::attention;
pub(crate) use attention::check_attention;
pub use halves::{round_f16, split_f16};
pub use linear::{dequantise_column, linear};
pub use ops::{
    add, adjust_logits, embed, head_norm, kv_write, reduce_row, rms_norm, rope, silu_mul,
};
