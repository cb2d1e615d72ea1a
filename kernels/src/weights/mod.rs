//! Weights of one linear layer's shard in the layout that every CPU path reads.
//!
//! Output columns stand in panels of 16, rows of K in units of 8, panel-major:
//! `[panel][unit][...]`. One unit of one panel (128 weights) is
//!
//! | weights | unit | bytes |
//! |---|---|---|
//! | 2-bit | 16 x u16, value `i` in bits `2i..2i+2` | 32 |
//! | 3-bit | 16 x u16 (low two bits of 8 values), then 16 x u8 (their high bits) | 48 |
//! | 4-bit | 16 x u32, value `i` in bits `4i..4i+4`: the GPTQ word itself | 64 |
//! | 8-bit | 2 x 16 x u32, four values a word: two GPTQ words | 128 |
//! | f32 | 8 x 16 x f32 | 512 |
//! | f16, bf16 | 8 x 16 x u16 | 256 |
//!
//! Rows are sorted (stably) by quantisation group; the rows of one group are a *run*, padded to
//! whole units. Scales (f16, exact) and zero points are `[panel][run][16]`. When every zero point
//! is the centre of the code range they are not stored. Columns beyond N have scale 0.

mod bytes;
mod dense;
mod quant;
mod rows;

pub use bytes::{QuantBytes, dense_bytes, quant_bytes};
pub use dense::DenseBuilder;
pub(crate) use dense::check_covered;
pub(crate) use quant::check_quant;
pub use quant::{QuantBuilder, QuantSpec};
pub(crate) use rows::{RowOrder, SEGMENT_ROWS};

use std::fmt;

use half::{bf16, f16};

use crate::buffer::Aligned;

/// Output columns of one panel: the lanes of the widest vector.
pub const PANEL_COLUMNS: usize = 16;

/// Rows of K in one unit: the values of a 4-bit word.
pub const UNIT_ROWS: usize = 8;

/// Element type of weights that are not quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Widens the bits of one 16-bit element exactly.
    pub(crate) fn widen_bits(self, bits: u16) -> f32 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f32(),
            Self::F32 | Self::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// How the weights of a layer are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Integer codes of 2, 3, 4 or 8 bits with a scale and a zero point per (group, column).
    Quantised {
        /// Bits of one code.
        bits: u8,
    },
    /// Plain numbers.
    Dense(Dtype),
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quantised { bits } => write!(f, "int{bits}"),
            Self::Dense(dtype) => dtype.fmt(f),
        }
    }
}

/// The codes or numbers, `[panel][unit][...]`.
#[derive(Debug)]
pub(crate) enum Storage {
    /// Units of 32-bit words: 4-bit and 8-bit codes, f32 bits.
    Words(Aligned<u32>),
    /// Units of 16-bit words: 2-bit and 3-bit codes, f16 and bf16 bits.
    Halves(Aligned<u16>),
}

/// Scales and zero points, `[panel][run][16]`.
#[derive(Debug)]
pub(crate) struct Scaling {
    /// f16 bits.
    pub scales: Aligned<u16>,
    /// True zero points; absent if all are [`code_centre`].
    pub zeros: Option<Aligned<u16>>,
}

/// The middle of the code range, subtracted from every code before it is multiplied.
pub(crate) const fn code_centre(bits: u8) -> u32 {
    1 << (bits - 1)
}

/// One shard of a linear layer: `out = x * W + bias` with W of shape (k, n).
///
/// Made by [`QuantBuilder`] or [`DenseBuilder`]; immutable afterwards.
#[derive(Debug)]
pub struct LinearWeights {
    pub(crate) format: WeightFormat,
    pub(crate) n: usize,
    pub(crate) rows: RowOrder,
    pub(crate) storage: Storage,
    pub(crate) scaling: Option<Scaling>,
    /// (n rounded up to panels) f32, 0 beyond n.
    pub(crate) bias: Option<Vec<f32>>,
}

impl LinearWeights {
    /// Rows of W: the length of one activation row.
    pub fn k(&self) -> usize {
        self.rows.k
    }

    /// Columns of W: the length of one output row.
    pub fn n(&self) -> usize {
        self.n
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// True if the activations must be permuted first (act-order).
    pub fn is_permuted(&self) -> bool {
        self.rows.is_permuted()
    }

    /// Rows of K as stored, padding included: a multiple of 8.
    pub fn stored_rows(&self) -> usize {
        self.rows.stored_rows
    }

    /// Heap bytes that the layer holds: what [`quant_bytes`] or [`dense_bytes`] foretells.
    pub fn bytes(&self) -> u64 {
        let storage = match &self.storage {
            Storage::Words(words) => words.bytes(),
            Storage::Halves(halves) => halves.bytes(),
        };
        let scaling = self.scaling.as_ref().map_or(0, |scaling| {
            scaling.scales.bytes() + scaling.zeros.as_ref().map_or(0, Aligned::bytes)
        });
        let bias = self
            .bias
            .as_ref()
            .map_or(0, |bias| size_of_val(&bias[..]) as u64);
        storage + scaling + bias + self.rows.bytes()
    }

    /// Bytes of codes, scales and zero points that one pass over the weights reads.
    pub fn read_bytes(&self) -> u64 {
        let storage = match &self.storage {
            Storage::Words(words) => size_of_val(&words[..]),
            Storage::Halves(halves) => size_of_val(&halves[..]),
        };
        let scaling = self.scaling.as_ref().map_or(0, |scaling| {
            size_of_val(&scaling.scales[..])
                + scaling
                    .zeros
                    .as_ref()
                    .map_or(0, |zeros| size_of_val(&zeros[..]))
        });
        (storage + scaling) as u64
    }

    /// One line for logs: shape, format, runs, padding.
    pub fn describe(&self) -> String {
        let padding = self.rows.stored_rows - self.rows.k;
        let mut text = format!("{} ({}, {})", self.format, self.rows.k, self.n);
        if let Some(scaling) = &self.scaling {
            let zeros = if scaling.zeros.is_some() {
                "asymmetric"
            } else {
                "symmetric"
            };
            text += &format!(", {} runs, {zeros}", self.rows.runs.len());
        }
        if self.is_permuted() {
            text += ", act-order";
        }
        if padding > 0 {
            text += &format!(", {padding} padding rows");
        }
        text
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL_COLUMNS)
    }

    /// True if a product needs the sum of the activations of each run.
    pub(crate) fn needs_sums(&self) -> bool {
        self.scaling
            .as_ref()
            .is_some_and(|scaling| scaling.zeros.is_some())
    }

    /// One weight as stored, widened, without its scale: `code` or the number itself.
    ///
    /// Plain and slow: the reference path and tests read weights through it.
    pub(crate) fn stored_value(&self, stored_row: usize, column: usize) -> f32 {
        let (panel, lane) = (column / PANEL_COLUMNS, column % PANEL_COLUMNS);
        let (unit, i) = (stored_row / UNIT_ROWS, stored_row % UNIT_ROWS);
        let unit = panel * (self.rows.stored_rows / UNIT_ROWS) + unit;
        match (&self.storage, self.format) {
            (Storage::Halves(halves), WeightFormat::Quantised { bits: 2 }) => {
                f32::from(halves[unit * 16 + lane] >> (2 * i) & 3)
            }
            (Storage::Halves(halves), WeightFormat::Quantised { .. }) => {
                let low = halves[unit * 24 + lane] >> (2 * i) & 3;
                let high = halves[unit * 24 + 16 + lane / 2] >> (8 * (lane % 2) + i) & 1;
                f32::from(high << 2 | low)
            }
            (Storage::Words(words), WeightFormat::Quantised { bits: 4 }) => {
                (words[unit * 16 + lane] >> (4 * i) & 15) as f32
            }
            (Storage::Words(words), WeightFormat::Quantised { .. }) => {
                (words[unit * 32 + i / 4 * 16 + lane] >> (8 * (i % 4)) & 255) as f32
            }
            (Storage::Words(words), WeightFormat::Dense(_)) => {
                f32::from_bits(words[unit * 128 + i * 16 + lane])
            }
            (Storage::Halves(halves), WeightFormat::Dense(dtype)) => {
                dtype.widen_bits(halves[unit * 128 + i * 16 + lane])
            }
        }
    }

    /// Scale and zero point of a run and column; (1, 0) for dense weights.
    pub(crate) fn scale_and_zero(&self, run: usize, column: usize) -> (f32, f32) {
        let (Some(scaling), WeightFormat::Quantised { bits }) = (&self.scaling, self.format) else {
            return (1.0, 0.0);
        };
        let (panel, lane) = (column / PANEL_COLUMNS, column % PANEL_COLUMNS);
        let index = (panel * self.rows.runs.len() + run) * PANEL_COLUMNS + lane;
        let zero = match &scaling.zeros {
            Some(zeros) => f32::from(zeros[index]),
            None => code_centre(bits) as f32,
        };
        (f16::from_bits(scaling.scales[index]).to_f32(), zero)
    }
}

/// Copies a bias of n numbers into whole panels.
pub(crate) fn padded_bias(bias: &[f32]) -> Vec<f32> {
    let mut padded = vec![0.0; bias.len().next_multiple_of(PANEL_COLUMNS)];
    padded[..bias.len()].copy_from_slice(bias);
    padded
}
