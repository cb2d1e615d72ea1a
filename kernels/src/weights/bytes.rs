//! What a layer will take, before anything is allocated.

use crate::buffer::Aligned;

use super::rows::RowOrder;
use super::{Dtype, PANEL_COLUMNS, UNIT_ROWS};

/// Heap bytes of a quantised layer, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuantBytes {
    /// Everything: exactly [`LinearWeights::bytes`](super::LinearWeights::bytes).
    pub total: u64,
    /// The part of `total` that padding rows and columns take.
    pub padding: u64,
    /// The part of `total` that scales and zero points take.
    pub scaling: u64,
}

/// Heap bytes that a layer of `n` columns takes, before anything is allocated.
///
/// `run_rows`: the shard's rows in each group that has any; `permuted`: the groups of its rows do
/// not ascend; `symmetric`: every zero point is `2^(bits - 1)`; `bias`: it has one.
pub fn quant_bytes(
    bits: u8,
    n: usize,
    run_rows: &[usize],
    permuted: bool,
    symmetric: bool,
    bias: bool,
) -> QuantBytes {
    let columns = n.next_multiple_of(PANEL_COLUMNS);
    let k: usize = run_rows.iter().sum();
    let stored: usize = run_rows
        .iter()
        .map(|rows| rows.next_multiple_of(UNIT_ROWS))
        .sum();
    let words = columns / PANEL_COLUMNS * (stored / UNIT_ROWS) * unit_words(bits);
    let codes = match bits {
        2 | 3 => Aligned::<u16>::heap_bytes(words),
        _ => Aligned::<u32>::heap_bytes(words),
    };
    let scaling =
        Aligned::<u16>::heap_bytes(columns * run_rows.len()) * if symmetric { 1 } else { 2 };
    let bias = if bias { columns * size_of::<f32>() } else { 0 };
    let rows = RowOrder::bytes_for(run_rows.iter().copied(), permuted);
    let padding = (stored * columns - k * n) * usize::from(bits) / 8;
    QuantBytes {
        total: codes + scaling + bias as u64 + rows,
        padding: padding as u64,
        scaling,
    }
}

/// Heap bytes of dense weights of shape (k, n): exactly [`LinearWeights::bytes`](super::LinearWeights::bytes).
pub fn dense_bytes(dtype: Dtype, k: usize, n: usize, bias: bool) -> u64 {
    let columns = n.next_multiple_of(PANEL_COLUMNS);
    let elements = k.next_multiple_of(UNIT_ROWS) * columns;
    let storage = match dtype {
        Dtype::F32 => Aligned::<u32>::heap_bytes(elements),
        Dtype::F16 | Dtype::Bf16 => Aligned::<u16>::heap_bytes(elements),
    };
    let bias = if bias { columns * size_of::<f32>() } else { 0 };
    storage + bias as u64 + RowOrder::bytes_for([k], false)
}

/// Words (u32 for 4 and 8 bits, u16 for 2 and 3) of one unit of one panel.
pub(super) const fn unit_words(bits: u8) -> usize {
    match bits {
        3 => 24,
        8 => 32,
        _ => 16,
    }
}
