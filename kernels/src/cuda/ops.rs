//! Small operations, each the twin of the one in [`crate::cpu`] of the same name. Buffers may be
//! longer than what is worked on; rows are given.

use std::sync::Arc;

use super::{CudaError, Device, Memory, SUPERBLOCK_ROWS, launch};
use crate::weights::Dtype;

/// Where a step notes the first value that is not finite: (check, element), all ones for none.
pub struct Guard {
    /// One word.
    memory: Memory<u64>,
}

/// An embedding's rows on the card, (rows, width) row-major; a tied `lm_head` shares them.
#[derive(Clone)]
pub struct Table {
    /// Element type.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub width: usize,
    /// The numbers' bytes.
    pub bytes: Arc<Memory<u8>>,
}

impl Guard {
    /// Notes nothing yet.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let guard = Self {
            memory: device.zeros(1, "the guard")?,
        };
        guard.clear(device)?;
        Ok(guard)
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Forgets what was noted.
    ///
    /// # Errors
    /// The card's.
    pub fn clear(&self, device: &Device) -> Result<(), CudaError> {
        device.fill(&self.memory, 0xff)
    }

    /// The first (check, element) that was not finite; waits for the card.
    ///
    /// # Errors
    /// The card's.
    pub fn read(&self, device: &Device) -> Result<Option<(u32, usize)>, CudaError> {
        let mut word = [0u64];
        device.read(&self.memory, 0, &mut word)?;
        let [word] = word;
        Ok((word != u64::MAX).then_some(((word >> 32) as u32, word as u32 as usize)))
    }
}

/// Rows of `table` by id; ids outside `first_id..first_id + rows` give zeros.
///
/// # Errors
/// The card's.
pub fn embed(
    device: &Device,
    table: &Table,
    first_id: u32,
    tokens: &Memory<u32>,
    count: usize,
    out: &Memory<f32>,
) -> Result<(), CudaError> {
    assert!(
        count <= tokens.len() && count * table.width <= out.len(),
        "embed: lengths"
    );
    let kernel = match table.dtype {
        Dtype::F16 => "embed_f16",
        Dtype::Bf16 => "embed_bf16",
        Dtype::F32 => "embed_f32",
    };
    let columns = table.width.div_ceil(1024) as u32;
    launch!(device, kernel, [count as u32, columns, 1], [256, 1, 1], 0;
        table.bytes.address(), tokens.address(), first_id, table.rows as u32, table.width as i32, out.address())
}

/// Rows `rows[i]` of `x` one after the other.
///
/// # Errors
/// The card's.
pub fn take_rows(
    device: &Device,
    x: &Memory<f32>,
    rows: &Memory<u32>,
    count: usize,
    width: usize,
    out: &Memory<f32>,
) -> Result<(), CudaError> {
    assert!(
        count <= rows.len() && count * width <= out.len(),
        "take_rows: lengths"
    );
    launch!(device, "take_rows_f32", [count as u32, width.div_ceil(1024) as u32, 1], [256, 1, 1], 0;
        x.address(), rows.address(), width as i32, out.address())
}

/// Activations of some rows as the integer kernels read them; see `a8.cuh`.
pub struct Quantised {
    /// \[row tile\]\[superblock\] 1024 bytes.
    pub q: Memory<u8>,
    /// \[row tile\]\[superblock\]\[8\]\[4\] scale of each block of 32.
    pub d: Memory<f32>,
    /// Like `d`: scale times the sum of the integers.
    pub dsum: Memory<f32>,
}

impl Quantised {
    /// Room for `rows` rows of `superblocks` superblocks.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device, rows: usize, superblocks: usize) -> Result<Self, CudaError> {
        let cells = rows.next_multiple_of(8) * superblocks;
        let what = "quantised activations";
        Ok(Self {
            q: device.zeros(cells * 128, what)?,
            d: device.zeros(cells * 4, what)?,
            dsum: device.zeros(cells * 4, what)?,
        })
    }

    /// Bytes of [`Quantised::new`] for one row.
    pub const fn bytes_per_row(superblocks: usize) -> usize {
        superblocks * (SUPERBLOCK_ROWS + 2 * 4 * 4)
    }

    fn holds(&self, rows: usize, superblocks: usize) {
        assert!(
            rows.next_multiple_of(8) * superblocks * 128 <= self.q.len(),
            "a8: too many rows"
        );
    }
}

/// Quantises `rows` rows of width `k`; `order` names the row of x at each stored row.
///
/// # Errors
/// The card's.
pub fn quantise(
    device: &Device,
    x: &Memory<f32>,
    order: Option<&Memory<u32>>,
    rows: usize,
    k: usize,
    superblocks: usize,
    out: &Quantised,
) -> Result<(), CudaError> {
    assert!(rows * k <= x.len(), "quantise: lengths");
    out.holds(rows, superblocks);
    let (grid, block) = spread(rows.next_multiple_of(8), superblocks, order.is_some());
    let order = order.map_or(0, Memory::address);
    launch!(device, "quantise_a8", grid, block, 0;
        x.address(), order, rows as i32, k as i32, superblocks as i32,
        out.q.address(), out.d.address(), out.dsum.address())
}

/// Grid and block of a pass over rows: a warp for each superblock, or, where many rows are gathered
/// by an order, whole rows in one block, whose cache then serves every line once.
fn spread(rows: usize, superblocks: usize, ordered: bool) -> ([u32; 3], [u32; 3]) {
    match ordered && rows >= 64 {
        true => ([rows as u32, 1, 1], [512, 1, 1]),
        false => (
            [rows as u32, superblocks.div_ceil(8) as u32, 1],
            [256, 1, 1],
        ),
    }
}

/// `rows` rows of width `k` in stored order, padded with zeros, into (rows, superblocks * 128).
///
/// # Errors
/// The card's.
pub fn gather(
    device: &Device,
    x: &Memory<f32>,
    order: Option<&Memory<u32>>,
    rows: usize,
    k: usize,
    superblocks: usize,
    out: &Memory<f32>,
) -> Result<(), CudaError> {
    assert!(
        rows * k <= x.len() && rows * superblocks * 128 <= out.len(),
        "gather: lengths"
    );
    let (grid, block) = spread(rows, superblocks, order.is_some());
    let order = order.map_or(0, Memory::address);
    launch!(device, "gather_f32", grid, block, 0;
        x.address(), order, k as i32, superblocks as i32, out.address())
}

/// How activations become f16; `ops/quantise.cu` has the layouts and what is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum F16Form {
    /// One f16 each.
    Rounded,
    /// The sum of two.
    Split,
}

impl F16Form {
    /// Rows are padded to a multiple of this.
    pub const MOST_ROW_TILE: usize = 16;
}

/// `rows` rows of width `k` as f16 under a power of two of their row, in stored order: what
/// `row_scales` (rows) undoes. `out` has 4 bytes for each of (rows padded to 16, stored rows).
///
/// # Errors
/// The card's.
#[allow(clippy::too_many_arguments)]
pub fn to_f16(
    device: &Device,
    form: F16Form,
    x: &Memory<f32>,
    order: Option<&Memory<u32>>,
    rows: usize,
    k: usize,
    superblocks: usize,
    out: &Memory<f32>,
    row_scales: &Memory<f32>,
) -> Result<(), CudaError> {
    let padded = rows.next_multiple_of(F16Form::MOST_ROW_TILE);
    assert!(
        rows * k <= x.len()
            && padded * superblocks * SUPERBLOCK_ROWS <= out.len()
            && rows <= row_scales.len(),
        "to_f16: lengths"
    );
    // A block has one row, or one of each half of a tile of 16.
    let (kernel, blocks) = match form {
        F16Form::Rounded => ("round_f16", rows.next_multiple_of(8)),
        F16Form::Split => ("split_f16", padded / 2),
    };
    let threads = (32 * superblocks).clamp(32, 512) as u32;
    let order = order.map_or(0, Memory::address);
    launch!(device, kernel, [blocks as u32, 1, 1], [threads, 1, 1], 0;
        x.address(), order, rows as i32, k as i32, superblocks as i32,
        out.address(), row_scales.address())
}

/// Where a fused op leaves its rows: as f32, quantised for the next linear, or both.
pub struct Destination<'a> {
    /// (rows, width).
    pub f32: Option<&'a Memory<f32>>,
    /// In their own order.
    pub a8: Option<&'a Quantised>,
}

/// `residual += delta` if there is one, then `out = rms_norm(residual) * weight`.
///
/// # Errors
/// The card's.
#[allow(clippy::too_many_arguments)]
pub fn add_rms_norm(
    device: &Device,
    residual: &Memory<f32>,
    delta: Option<&Memory<f32>>,
    weight: &Memory<f32>,
    rows: usize,
    width: usize,
    eps: f32,
    out: Destination<'_>,
    guard: &Guard,
    check: u32,
) -> Result<(), CudaError> {
    assert!(
        rows * width <= residual.len() && width <= weight.len(),
        "rms_norm: lengths"
    );
    assert!(
        width <= 16384,
        "rms_norm: a row is kept in registers, {width} columns are too many"
    );
    let superblocks = width.div_ceil(128);
    // Few rows are a matter of latency, many of throughput: 8 or 16 values a thread.
    let values = if rows <= 32 && width <= 8192 { 8 } else { 16 };
    let threads = (superblocks * 128).div_ceil(values).next_multiple_of(32);
    let threads = [threads as u32, 1, 1];
    let (rows_i, width_i) = (rows as i32, width as i32);
    let (x, weight) = (residual.address(), weight.address());
    let (guard, plain) = (guard.address(), out.f32.map_or(0, Memory::address));
    match (out.a8, delta) {
        (None, None) => launch!(device, "rms_norm_f32", [rows as u32, 1, 1], threads, 0;
            x, weight, rows_i, width_i, eps, plain),
        (None, Some(delta)) => {
            launch!(device, "add_rms_norm_f32", [rows as u32, 1, 1], threads, 0;
                x, delta.address(), weight, rows_i, width_i, eps, plain, guard, check)
        }
        (Some(a8), delta) => {
            a8.holds(rows, superblocks);
            let grid = [rows.next_multiple_of(8) as u32, 1, 1];
            let (q, d, dsum) = (a8.q.address(), a8.d.address(), a8.dsum.address());
            match delta {
                None => launch!(device, "rms_norm_a8", grid, threads, 0;
                    x, weight, rows_i, width_i, eps, superblocks as i32, q, d, dsum, plain),
                Some(delta) => launch!(device, "add_rms_norm_a8", grid, threads, 0;
                    x, delta.address(), weight, rows_i, width_i, eps, superblocks as i32,
                    q, d, dsum, plain, guard, check),
            }
        }
    }
}

/// `silu(gate) * up`; as f32 it replaces `gate`.
///
/// # Errors
/// The card's.
#[allow(clippy::too_many_arguments)]
pub fn silu_mul(
    device: &Device,
    gate: &Memory<f32>,
    up: &Memory<f32>,
    rows: usize,
    width: usize,
    out: Destination<'_>,
    guard: &Guard,
    check: u32,
) -> Result<(), CudaError> {
    let count = rows * width;
    assert!(
        count <= gate.len() && count <= up.len(),
        "silu_mul: lengths"
    );
    let guard = guard.address();
    let Some(a8) = out.a8 else {
        return launch!(device, "silu_mul_f32", [count.div_ceil(1024) as u32, 1, 1], [256, 1, 1], 0;
            gate.address(), up.address(), count as i32, guard, check);
    };
    let superblocks = width.div_ceil(128);
    a8.holds(rows, superblocks);
    let (grid, block) = spread(rows.next_multiple_of(8), superblocks, false);
    launch!(device, "silu_mul_a8", grid, block, 0;
        gate.address(), up.address(), rows as i32, width as i32, superblocks as i32,
        a8.q.address(), a8.d.address(), a8.dsum.address(), out.f32.map_or(0, Memory::address),
        guard, check)
}
