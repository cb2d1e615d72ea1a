//! GPTQ weights as every CUDA path reads them, laid out on the host and uploaded once.
//!
//! Rows of K are sorted (stably) by quantisation group; each group's run is padded to whole blocks
//! of 32 rows, for 32 rows are what one pair of tensor-core instructions sums before a scale can be
//! applied; the whole is padded to superblocks of 128. Columns stand in tiles of 8. Lane
//! `l = column % 8 * 4 + j` of a warp holds, of every block `t` of a superblock, the 8 rows of unit
//! `j`: a 16-byte load brings a lane its share of a 4-bit superblock, and a word splits into two
//! registers of four signed bytes that feed `dp4a` and `mma` as they are. Codes are stored as
//! `code - 2^(bits-1)`, so symmetric zero points vanish.
//!
//! | bits | bytes of a lane in a superblock |
//! |---|---|
//! | 4 | word `t`: byte `i` = value `i`, value `i + 4` in the high nibble |
//! | 8 | two planes of 16 bytes: words (t, first four), (t, last four) for two blocks each |
//! | 2 | word `t / 2`: byte `i`, bits `2m..2m+2`, m = `t % 2 * 2 + (value >= 4)` |
//! | 3 | low two bits as above, then a plane of sign bits: byte `i`, bit `2t + (value >= 4)` |
//!
//! Scales (f16, exact) and zero points stand per (tile, scale block, column); a superblock has one,
//! two or four scale blocks, as fine as the runs make necessary.

mod dense;
mod rows;
#[cfg(test)]
mod tests;
mod units;

use rayon::prelude::*;

use super::{CudaError, Device, Memory};
use crate::error::{KernelError, expect_length, expect_shape};
use crate::weights::{QuantSpec, WeightFormat, check_covered, check_quant};

pub use dense::DenseStaging;
pub use rows::Rows;
use units::{UnitSource, superblock_bytes};

/// What the layout takes of a card's memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayoutFacts {
    /// Without scales and zero points.
    pub bytes_per_weight: f64,
    /// Columns are padded to a multiple of this.
    pub column_multiple: usize,
    /// Rows of a group's run are padded to a multiple of this.
    pub row_multiple: usize,
    /// Most rows that share a scale, to which rows are padded in all; 0 without scales.
    pub scale_rows: usize,
    /// Bytes of a scale and its zero point, half for each.
    pub bytes_per_scale: f64,
}

impl LayoutFacts {
    /// How weights of this format are stored.
    pub fn of(format: WeightFormat) -> Self {
        match format {
            WeightFormat::Quantised { bits } => Self {
                bytes_per_weight: f64::from(bits) / 8.0,
                column_multiple: TILE_COLUMNS,
                row_multiple: BLOCK_ROWS,
                scale_rows: SUPERBLOCK_ROWS,
                bytes_per_scale: 4.0,
            },
            WeightFormat::Dense(dtype) => Self {
                bytes_per_weight: dtype.bytes() as f64,
                column_multiple: 1,
                row_multiple: 1,
                scale_rows: 0,
                bytes_per_scale: 0.0,
            },
        }
    }
}

/// Columns of a tile.
pub const TILE_COLUMNS: usize = 8;
/// Stored rows of a block: they share an activation scale and lie in one run.
pub const BLOCK_ROWS: usize = 32;
/// Stored rows of a superblock.
pub const SUPERBLOCK_ROWS: usize = 128;
const UNIT_ROWS: usize = 8;
/// A quantised linear being written.
pub struct QuantStaging {
    bits: u8,
    n: usize,
    rows: Rows,
    codes: Vec<u8>,
    scales: Vec<u16>,
    zeros: Option<Vec<i16>>,
    bias: Option<Vec<f32>>,
    written: Vec<bool>,
}

/// A quantised linear on the card.
pub struct QuantWeights {
    /// 2, 3, 4 or 8.
    pub bits: u8,
    /// Superblocks of 128 stored rows.
    pub superblocks: usize,
    /// 1, 2 or 4.
    pub scales_per_superblock: usize,
    /// \[tiles\]\[superblocks\] codes.
    pub codes: Memory<u8>,
    /// \[tiles\]\[scale blocks\]\[8\] f16 bits.
    pub scales: Memory<u16>,
    /// Like `scales`: zero point - 2^(bits-1); absent if all are 0.
    pub zeros: Option<Memory<i16>>,
    /// (stored) row of x at each stored row; absent if x is read as it stands.
    pub order: Option<Memory<u32>>,
    /// Tells orders apart without reading them back.
    pub order_hash: u64,
}

impl QuantStaging {
    /// An empty layer.
    ///
    /// # Errors
    /// As [`crate::weights::QuantBuilder::new`].
    pub fn new(spec: QuantSpec<'_>) -> Result<Self, KernelError> {
        check_quant(&spec)?;
        let QuantSpec {
            bits,
            k,
            n,
            group_of_row,
            scales,
            zeros,
            bias,
        } = spec;
        let rows = Rows::new(group_of_row);
        let tiles = n.div_ceil(TILE_COLUMNS);
        let centre = 1i32 << (bits - 1);
        let per_scale = |value: &dyn Fn(usize) -> u16| {
            let mut all = Vec::with_capacity(tiles * rows.group_of_scale.len() * TILE_COLUMNS);
            for tile in 0..tiles {
                for group in &rows.group_of_scale {
                    for column in tile * TILE_COLUMNS..(tile + 1) * TILE_COLUMNS {
                        let at = group.map(|group| group as usize * n + column);
                        all.push(at.filter(|_| column < n).map_or(0, value));
                    }
                }
            }
            all
        };
        let centred = |at: usize| i32::from(zeros[at]) - centre;
        let symmetric = group_of_row
            .iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .all(|&group| (0..n).all(|column| centred(group as usize * n + column) == 0));
        Ok(Self {
            bits,
            n,
            codes: vec![0; tiles * rows.superblocks * superblock_bytes(bits)],
            scales: per_scale(&|at| scales[at].to_bits()),
            zeros: (!symmetric).then(|| {
                let bits = per_scale(&|at| centred(at) as i16 as u16);
                bits.into_iter().map(|zero| zero as i16).collect()
            }),
            rows,
            bias: bias.map(<[f32]>::to_vec),
            written: vec![false; k],
        })
    }

    /// Writes rows `first_row..first_row + rows` from a window of GPTQ words, as
    /// [`crate::weights::QuantBuilder::write_words`] does.
    ///
    /// # Errors
    /// The same.
    pub fn write_words(
        &mut self,
        first_row: usize,
        skip_rows: usize,
        rows: usize,
        words: &[u32],
    ) -> Result<(), KernelError> {
        const OP: &str = "write_words";
        let (k, n, bits) = (self.written.len(), self.n, usize::from(self.bits));
        let end = first_row.saturating_add(rows);
        expect_shape(OP, "rows", end <= k, || {
            format!("{first_row}..{end} of {k}")
        })?;
        let word_rows = words.len() / n;
        expect_length(OP, "words", word_rows * n, words.len())?;
        let needed = skip_rows
            .saturating_add(rows)
            .saturating_mul(bits)
            .div_ceil(32);
        expect_shape(OP, "words", needed <= word_rows, || {
            format!("has {word_rows} word rows, {skip_rows} + {rows} rows need {needed}")
        })?;
        if self.written[first_row..end].contains(&true) {
            let problem = "were written before";
            return Err(KernelError::Coverage {
                op: OP,
                tensor: "rows",
                first: first_row,
                end,
                problem,
            });
        }
        self.written[first_row..end].fill(true);

        // Units of 8 stored rows, each with the source row of its values.
        let mut placed: Vec<(usize, usize)> = self.rows.positions[first_row..end]
            .iter()
            .zip(skip_rows..)
            .map(|(&stored, source)| (stored as usize, source))
            .collect();
        placed.sort_unstable();
        let units: Vec<UnitSource> = placed
            .chunk_by(|a, b| a.0 / UNIT_ROWS == b.0 / UNIT_ROWS)
            .map(UnitSource::new)
            .collect();
        let tile_bytes = self.rows.superblocks * superblock_bytes(self.bits);
        let bits = self.bits;
        self.codes
            .par_chunks_mut(tile_bytes)
            .enumerate()
            .for_each(|(tile, codes)| {
                let first = tile * TILE_COLUMNS;
                let columns = TILE_COLUMNS.min(n - first);
                for unit in &units {
                    for lane_column in 0..columns {
                        unit.write(bits, lane_column, codes, |word| {
                            words[word * n + first + lane_column]
                        });
                    }
                }
            });
        Ok(())
    }

    /// Uploads the layer; (weights, bias).
    ///
    /// # Errors
    /// Rows that were never written, or the card's.
    pub fn finish(
        self,
        device: &Device,
    ) -> Result<(QuantWeights, Option<Memory<f32>>), KernelError> {
        check_covered("quantised weights", "rows", &self.written)?;
        let order = self.rows.order();
        let bias = self
            .bias
            .map(|bias| device.upload(&bias, "a bias"))
            .transpose()?;
        let weights = QuantWeights {
            bits: self.bits,
            superblocks: self.rows.superblocks,
            scales_per_superblock: self.rows.scales_per_superblock,
            codes: device.upload(&self.codes, "quantised weights")?,
            scales: device.upload(&self.scales, "scales")?,
            zeros: upload_some(device, self.zeros.as_deref(), "zero points")?,
            order_hash: order.as_deref().map_or(0, hash),
            order: upload_some(device, order.as_deref(), "a row order")?,
        };
        Ok((weights, bias))
    }

    #[cfg(test)]
    pub(super) fn parts(&self) -> (&Rows, &[u8], &[u16], Option<&[i16]>) {
        (&self.rows, &self.codes, &self.scales, self.zeros.as_deref())
    }
}

fn upload_some<T: Copy>(
    device: &Device,
    values: Option<&[T]>,
    what: &'static str,
) -> Result<Option<Memory<T>>, CudaError> {
    values.map(|values| device.upload(values, what)).transpose()
}

/// Not 0, which stands for "in its own order".
fn hash(order: &[u32]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    order.hash(&mut hasher);
    hasher.finish() | 1
}
