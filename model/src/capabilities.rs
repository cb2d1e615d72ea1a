//! What a worker says it can do: the only thing about a worker that the planner reads.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::modules::{DType, WeightFormat};

/// A worker's own account of its device, computed with the one path selector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Human name of the device, such as `cpu (avx512, 2 threads)` or `Tesla P40`.
    pub device: String,
    /// Device memory that a plan may use, before the coordinator's reserve.
    pub usable_bytes: u64,
    /// Measured bytes per second of a large read of device memory.
    pub read_bytes_per_second: f64,
    /// Seconds of a small all-reduce.
    pub all_reduce_latency_seconds: f64,
    /// Seconds of fixed cost per operation launched.
    pub op_latency_seconds: f64,
    /// Linear paths, one entry per (format, row bucket).
    pub linears: Vec<LinearCapability>,
    /// What the device keeps beside a model.
    pub recordings: Recordings,
}

/// What a device keeps to replay decoding steps and to sum with other cards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recordings {
    /// Tokens of the decoding steps that it wants to record, rising; none if it records nothing.
    pub sizes: Vec<usize>,
    /// Bytes of a recorded layer without its sums.
    pub bytes_per_layer: u64,
    /// Bytes of a recorded sum over ranks.
    pub bytes_per_sum: u64,
    /// Bytes of its part of an NCCL communicator; 0 if it has no NCCL.
    pub nccl_bytes: u64,
}

/// Weight storage that a capability speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightKind {
    /// GPTQ integers of this width.
    Gptq {
        /// 2, 3, 4 or 8.
        bits: u8,
    },
    /// 16-bit floats.
    Dense16,
    /// 32-bit floats.
    Dense32,
}

/// The path that would run a linear, and what it costs.
///
/// Weights are stored once, so the entries of one weight kind agree on the layout
/// ([`Layout`]); row buckets differ in path, scratch and time only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearCapability {
    /// Weight storage.
    pub weights: WeightKind,
    /// Largest number of rows (tokens) that this entry speaks for, and the number at which
    /// its time was taken. More rows than the last entry's run in several passes of it.
    pub max_rows: usize,
    /// Name of the path.
    pub path: String,
    /// Bytes per weight in the path's own layout, without scales and zero points.
    pub bytes_per_weight: f64,
    /// Columns are padded to a multiple of this.
    pub column_multiple: usize,
    /// Rows of each group's run are padded to a multiple of this.
    pub row_multiple: usize,
    /// Rows that share a scale at most, a multiple of 4: rows are padded to it in all, and scales
    /// stand for all, half or a quarter of that many rows, as finely as runs need. 0: one per run.
    pub scale_rows: usize,
    /// Bytes of a scale and its zero point, half for each; symmetric modules store no zero points.
    pub bytes_per_scale: f64,
    /// Scratch bytes: `scratch_bytes_per_row * rows + scratch_bytes`.
    pub scratch_bytes_per_row: f64,
    /// See `scratch_bytes_per_row`.
    pub scratch_bytes: f64,
    /// Seconds per byte of weights read, at `max_rows` rows.
    pub seconds_per_byte: f64,
}

/// How a device stores the weights of one kind: what the planner needs to count bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Bytes per weight, without scales and zero points.
    pub bytes_per_weight: f64,
    /// Columns are padded to a multiple of this.
    pub column_multiple: usize,
    /// Rows of each group's run are padded to a multiple of this.
    pub row_multiple: usize,
    /// Rows that share a scale at most, a multiple of 4: rows are padded to it in all, and scales
    /// stand for all, half or a quarter of that many rows, as finely as runs need. 0: one per run.
    pub scale_rows: usize,
    /// Bytes of a scale and its zero point, half for each; symmetric modules store no zero points.
    pub bytes_per_scale: f64,
}

impl Capabilities {
    /// The entry that speaks for `rows` rows of weights of this kind: the smallest bucket that
    /// holds them, else the largest one; `None` when the device has no path for the kind.
    pub fn linear(&self, weights: WeightKind, rows: usize) -> Option<&LinearCapability> {
        let of_kind = || self.linears.iter().filter(|entry| entry.weights == weights);
        of_kind()
            .filter(|entry| entry.max_rows >= rows)
            .min_by_key(|entry| entry.max_rows)
            .or_else(|| of_kind().max_by_key(|entry| entry.max_rows))
    }

    /// Scratch bytes that linears of these kinds need in steps of up to `rows` rows.
    ///
    /// Every bucket that such a step may fall into counts at its own largest number of rows.
    pub fn scratch_bytes(&self, kinds: &[WeightKind], rows: usize) -> u64 {
        kinds
            .iter()
            .flat_map(|kind| {
                let last = self.linear(*kind, rows).map(|entry| entry.max_rows);
                self.linears
                    .iter()
                    .filter(move |entry| entry.weights == *kind && Some(entry.max_rows) <= last)
            })
            .map(|entry| {
                let rows = entry.max_rows.min(rows) as f64;
                (entry.scratch_bytes_per_row * rows + entry.scratch_bytes).ceil() as u64
            })
            .max()
            .unwrap_or(0)
    }
}

impl LinearCapability {
    /// The part that says how weights are stored.
    pub fn layout(&self) -> Layout {
        Layout {
            bytes_per_weight: self.bytes_per_weight,
            column_multiple: self.column_multiple,
            row_multiple: self.row_multiple,
            scale_rows: self.scale_rows,
            bytes_per_scale: self.bytes_per_scale,
        }
    }
}

impl From<DType> for WeightKind {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::Dense32,
            DType::F16 | DType::Bf16 => Self::Dense16,
        }
    }
}

impl From<&WeightFormat> for WeightKind {
    fn from(format: &WeightFormat) -> Self {
        match format {
            WeightFormat::Dense(dtype) => (*dtype).into(),
            WeightFormat::Gptq(gptq) => Self::Gptq { bits: gptq.bits },
        }
    }
}

impl fmt::Display for WeightKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gptq { bits } => write!(f, "{bits}-bit gptq"),
            Self::Dense16 => f.write_str("16-bit float"),
            Self::Dense32 => f.write_str("32-bit float"),
        }
    }
}
