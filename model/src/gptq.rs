//! GPTQ: what the quantisation block says, and what the packed integers mean.
//!
//! A linear of K inputs and N outputs at b bits and group size g is stored as
//! `qweight` i32 (K * b / 32, N), `qzeros` i32 (ceil(K / g), N * b / 32), `scales` (ceil(K / g), N) and
//! `g_idx` i32 (K). Column n of `qweight`, read downwards, is one little-endian bit stream of K codes, at
//! 3 bits too, where codes straddle words; each row of `qzeros` is such a stream of N zero points. The
//! weight is `(code - zero(g_idx[k], n)) * scale(g_idx[k], n)`.

mod config;
mod dynamic;
mod packed;

pub use config::{QUANTIZE_CONFIG_FILE, QuantConfig};
pub use dynamic::Dynamic;
pub use packed::{
    check_scales, dequantise, floats, group_indices, ordered_groups, suspicious_zeros,
    unpack_codes, unpack_zeros, words,
};
