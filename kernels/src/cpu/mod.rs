//! The fast ops, each with a twin of the same name and argument order in [`crate::reference`]
//! (less the path, the scratch buffers and the pool).
//!
//! `linear` and `attention` run the path that they are given; the small ops run on the best
//! instruction set of the machine.

mod attention;
mod exp;
mod formats;
mod gemm;
mod gemv;
pub(crate) mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
#[cfg(target_arch = "x86_64")]
mod lanes_avx512;
mod lanes_portable;
mod linear;
mod ops;

pub use attention::{AttentionScratch, attention, attention_scratch_bytes};
pub(crate) use linear::FUSED_ROWS;
pub use linear::{LinearScratch, linear, linear_scratch_bytes};
pub use ops::{
    add, adjust_logits, embed, head_norm, kv_write, mask_logits, reduce_row, rms_norm, rope,
    silu_mul,
};
