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

use rayon::prelude::*;

use super::{CudaError, Device, Memory};
use crate::error::{KernelError, expect_length, expect_shape};
use crate::weights::{QuantSpec, WeightFormat, check_covered, check_quant};

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
/// In [`Rows::order`]: no row, activations are 0 there.
pub(super) const PADDING: u32 = u32::MAX;

/// Where the rows of K are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    k: usize,
    /// (k) the stored row of each row.
    positions: Vec<u32>,
    /// Superblocks of 128 stored rows.
    pub superblocks: usize,
    /// Scales per superblock and column: 1, 2 or 4.
    pub scales_per_superblock: usize,
    /// (superblocks * scales_per_superblock) the group of each; `None` where only padding lies.
    group_of_scale: Vec<Option<u32>>,
}

impl Rows {
    /// The stored order of rows in these groups.
    pub fn new(group_of_row: &[u32]) -> Self {
        let k = group_of_row.len();
        let mut sorted: Vec<u32> = (0..k as u32).collect();
        sorted.sort_by_key(|&row| group_of_row[row as usize]);
        let mut positions = vec![0; k];
        let mut runs = Vec::new();
        let mut stored = 0;
        for run in sorted.chunk_by(|&a, &b| group_of_row[a as usize] == group_of_row[b as usize]) {
            runs.push((stored, group_of_row[run[0] as usize]));
            for (offset, &row) in run.iter().enumerate() {
                positions[row as usize] = (stored + offset) as u32;
            }
            stored += run.len().next_multiple_of(BLOCK_ROWS);
        }
        let fits = |rows: usize| runs.iter().all(|(start, _)| start.is_multiple_of(rows));
        let scales_per_superblock = if fits(128) {
            1
        } else if fits(64) {
            2
        } else {
            4
        };
        let superblocks = stored.div_ceil(SUPERBLOCK_ROWS);
        let scale_rows = SUPERBLOCK_ROWS / scales_per_superblock;
        let group_of_scale = (0..superblocks * scales_per_superblock)
            .map(|scale| {
                let first = scale * scale_rows;
                let run = runs.partition_point(|(start, _)| *start <= first);
                (first < stored).then(|| runs[run - 1].1)
            })
            .collect();
        Self {
            k,
            positions,
            superblocks,
            scales_per_superblock,
            group_of_scale,
        }
    }

    /// Stored rows, padding included.
    pub fn stored(&self) -> usize {
        self.superblocks * SUPERBLOCK_ROWS
    }

    /// (stored) the row that stands at each place, [`PADDING`] where none does; `None` when rows
    /// stand in their own order with padding behind the last one only.
    pub(super) fn order(&self) -> Option<Vec<u32>> {
        let plain = self
            .positions
            .iter()
            .enumerate()
            .all(|(row, &at)| row == at as usize);
        (!plain).then(|| {
            let mut order = vec![PADDING; self.stored()];
            for (row, &at) in self.positions.iter().enumerate() {
                order[at as usize] = row as u32;
            }
            order
        })
    }
}

/// Bytes of codes of one tile's superblock.
const fn superblock_bytes(bits: u8) -> usize {
    SUPERBLOCK_ROWS * TILE_COLUMNS * bits as usize / 8
}

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

/// Rows of plain numbers being written to the card.
pub struct DenseStaging<'a> {
    device: &'a Device,
    row_bytes: usize,
    memory: Memory<u8>,
    written: Vec<bool>,
}

impl<'a> DenseStaging<'a> {
    /// Room for `rows` rows of `row_bytes` bytes.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &'a Device, rows: usize, row_bytes: usize) -> Result<Self, KernelError> {
        expect_shape("dense weights", "shape", rows > 0 && row_bytes > 0, || {
            format!("({rows}, {row_bytes} bytes) is empty")
        })?;
        let memory = device.zeros(rows * row_bytes, "dense weights")?;
        Ok(Self {
            device,
            row_bytes,
            memory,
            written: vec![false; rows],
        })
    }

    /// Writes whole rows, the first being row `first`.
    ///
    /// # Errors
    /// Rows outside, rows written before, or the card's.
    pub fn write_rows(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError> {
        const OP: &str = "write_rows";
        let rows = data.len() / self.row_bytes;
        expect_length(OP, "data", rows * self.row_bytes, data.len())?;
        let end = first.saturating_add(rows);
        let count = self.written.len();
        expect_shape(OP, "rows", end <= count, || {
            format!("{first}..{end} of {count}")
        })?;
        if self.written[first..end].contains(&true) {
            let (tensor, problem) = ("rows", "were written before");
            return Err(KernelError::Coverage {
                op: OP,
                tensor,
                first,
                end,
                problem,
            });
        }
        self.written[first..end].fill(true);
        Ok(self
            .device
            .write(&self.memory, first * self.row_bytes, data)?)
    }

    /// The rows, complete on the card.
    ///
    /// # Errors
    /// Rows that were never written, or the card's.
    pub fn finish(self) -> Result<Memory<u8>, KernelError> {
        check_covered("dense weights", "rows", &self.written)?;
        self.device.synchronize()?;
        Ok(self.memory)
    }
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

/// Up to 8 source rows that one call brings to one unit.
struct UnitSource {
    superblock: usize,
    /// Block of 32 within the superblock.
    t: usize,
    /// Unit of 8 within the block.
    j: usize,
    /// (value, source row).
    values: Vec<(usize, usize)>,
    /// First source row of 8 that stand in a row and fill whole words.
    straight: Option<usize>,
}

impl UnitSource {
    fn new(placed: &[(usize, usize)]) -> Self {
        let stored = placed[0].0;
        let first = placed[0].1;
        let straight = placed.len() == UNIT_ROWS
            && first.is_multiple_of(UNIT_ROWS)
            && placed
                .iter()
                .zip(first..)
                .all(|((_, source), due)| *source == due);
        Self {
            superblock: stored / SUPERBLOCK_ROWS,
            t: stored % SUPERBLOCK_ROWS / BLOCK_ROWS,
            j: stored % BLOCK_ROWS / UNIT_ROWS,
            values: placed
                .iter()
                .map(|(stored, source)| (stored % UNIT_ROWS, *source))
                .collect(),
            straight: straight.then_some(first),
        }
    }

    /// Writes the unit's values of one column into its tile's codes.
    fn write(&self, bits: u8, column: usize, codes: &mut [u8], word: impl Fn(usize) -> u32) {
        let lane = column * 4 + self.j;
        let base = self.superblock * superblock_bytes(bits);
        let t = self.t;
        match (bits, self.straight) {
            (4, Some(first)) => {
                put(
                    codes,
                    base + lane * 16 + t * 4,
                    interleave(word(first / 8)) ^ 0x8888_8888,
                );
            }
            (8, Some(first)) => {
                let at = base + t / 2 * 512 + lane * 16 + t % 2 * 8;
                put(codes, at, word(first / 4) ^ 0x8080_8080);
                put(codes, at + 4, word(first / 4 + 1) ^ 0x8080_8080);
            }
            _ => {
                for &(i, source) in &self.values {
                    let code = code(usize::from(bits), source, &word);
                    // Two's complement of `bits` bits: subtracting the centre flips the top bit.
                    let value = code ^ (1 << (bits - 1));
                    self.write_value(bits, lane, base, i, value, codes);
                }
            }
        }
    }

    /// Merges one value into zeroed codes.
    fn write_value(
        &self,
        bits: u8,
        lane: usize,
        base: usize,
        i: usize,
        value: u32,
        codes: &mut [u8],
    ) {
        let (t, byte, high) = (self.t, i % 4, i / 4);
        let mut merge = |at: usize, shift: usize, value: u32| codes[at] |= (value << shift) as u8;
        match bits {
            4 => merge(base + lane * 16 + t * 4 + byte, 4 * high, value),
            8 => merge(
                base + t / 2 * 512 + lane * 16 + t % 2 * 8 + high * 4 + byte,
                0,
                value,
            ),
            _ => {
                let low = base + lane * 8 + t / 2 * 4 + byte;
                merge(low, 2 * (t % 2 * 2 + high), value & 3);
                if bits == 3 {
                    merge(base + 256 + lane * 4 + byte, 2 * t + high, value >> 2);
                }
            }
        }
    }
}

fn put(codes: &mut [u8], at: usize, word: u32) {
    codes[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

/// Nibbles 0 to 3 into the low halves of the bytes, 4 to 7 into the high ones.
fn interleave(word: u32) -> u32 {
    let spread = |half: u32| {
        let pairs = (half | half << 8) & 0x00ff_00ff;
        (pairs | pairs << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

/// The code of source row `row`, packed along K from the least significant bit.
fn code(bits: usize, row: usize, word: impl Fn(usize) -> u32) -> u32 {
    let (first, shift) = (row * bits / 32, row * bits % 32);
    let low = u64::from(word(first)) >> shift;
    let rest = match shift + bits > 32 {
        true => u64::from(word(first + 1)) << (32 - shift),
        false => 0,
    };
    (low | rest) as u32 & ((1u32 << bits) - 1)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// The value at (stored row, column), read as the kernels do.
    fn stored_value(staging: &QuantStaging, stored: usize, column: usize) -> i32 {
        let (rows, codes, ..) = staging.parts();
        let bits = staging.bits;
        let (tile, lane) = (column / 8, column % 8 * 4 + stored % 32 / 8);
        let (superblock, t, i) = (stored / 128, stored % 128 / 32, stored % 8);
        let base = (tile * rows.superblocks + superblock) * superblock_bytes(bits);
        let word = |at: usize| u32::from_le_bytes(codes[base + at..][..4].try_into().unwrap());
        let high = i / 4;
        let packed = match bits {
            4 => {
                let w = word(lane * 16 + t * 4);
                if high == 1 {
                    w & 0xf0f0_f0f0
                } else {
                    (w << 4) & 0xf0f0_f0f0
                }
            }
            8 => word(t / 2 * 512 + lane * 16 + t % 2 * 8 + high * 4),
            _ => {
                let m = t % 2 * 2 + high;
                let low = word(lane * 8 + t / 2 * 4);
                if bits == 2 {
                    (low << (6 - 2 * m)) & 0xc0c0_c0c0
                } else {
                    let sign = (word(256 + lane * 4) << (7 - (2 * t + high))) & 0x8080_8080;
                    let field = if m == 3 { low >> 1 } else { low << (5 - 2 * m) };
                    sign | field & 0x6060_6060
                }
            }
        };
        i32::from((packed >> (8 * (i % 4))) as u8 as i8) >> (8 - bits)
    }

    #[test]
    fn codes_come_back_at_every_width_order_and_cut() {
        let mut state = 1u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for bits in [2usize, 3, 4, 8] {
            for (k, n, group_of) in [
                (256usize, 16usize, (|row| row / 128) as fn(usize) -> usize),
                (96, 9, |row| row / 32),
                (160, 3, |row| (row * 7) % 5),
                (128, 8, |_| 0),
                (72, 5, |row| (row + 24) / 64),
            ] {
                let source: Vec<Vec<u32>> = (0..k)
                    .map(|_| (0..n).map(|_| random() & ((1 << bits) - 1)).collect())
                    .collect();
                // A window that begins 8 rows before the shard.
                let skip = 8;
                let mut words = vec![0u32; (k + skip).next_multiple_of(32) * bits / 32 * n];
                for (row, codes) in source.iter().enumerate() {
                    for (column, code) in codes.iter().enumerate() {
                        for bit in 0..bits {
                            let at = (row + skip) * bits + bit;
                            words[at / 32 * n + column] |= (code >> bit & 1) << (at % 32);
                        }
                    }
                }
                let groups: Vec<u32> = (0..k).map(|row| group_of(row) as u32).collect();
                let count = *groups.iter().max().unwrap() as usize + 1;
                let scales: Vec<f16> = (0..count * n)
                    .map(|i| f16::from_f32(1.0 + i as f32))
                    .collect();
                let zeros: Vec<u16> = (0..count * n)
                    .map(|i| (i % ((1 << bits) + 1)) as u16)
                    .collect();
                let mut staging = QuantStaging::new(QuantSpec {
                    bits: bits as u8,
                    k,
                    n,
                    group_of_row: &groups,
                    scales: &scales,
                    zeros: &zeros,
                    bias: None,
                })
                .unwrap();
                let half = k / 2 / 8 * 8;
                staging.write_words(0, skip, half, &words).unwrap();
                assert!(staging.write_words(0, skip, 8, &words).is_err());
                staging
                    .write_words(half, skip + half, k - half, &words)
                    .unwrap();
                let (rows, _, stored_scales, stored_zeros) = staging.parts();
                let per_superblock = rows.scales_per_superblock;
                for (row, source) in source.iter().enumerate() {
                    let stored = rows.positions[row] as usize;
                    let scale_block =
                        stored / 128 * per_superblock + stored % 128 / 32 * per_superblock / 4;
                    for (column, &code) in source.iter().enumerate() {
                        let expected = code as i32 - (1 << (bits - 1));
                        let what = format!("{bits} bits, ({k}, {n}), row {row}, column {column}");
                        assert_eq!(stored_value(&staging, stored, column), expected, "{what}");
                        let at = (column / 8 * rows.superblocks * per_superblock + scale_block) * 8
                            + column % 8;
                        let of = groups[row] as usize * n + column;
                        assert_eq!(stored_scales[at], scales[of].to_bits(), "{what}");
                        let zero = i32::from(zeros[of]) - (1 << (bits - 1));
                        assert_eq!(stored_zeros.map_or(0, |z| i32::from(z[at])), zero, "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn scales_are_as_fine_as_the_runs_need() {
        let groups =
            |k: usize, size: usize| (0..k).map(|row| (row / size) as u32).collect::<Vec<_>>();
        for (k, size, expected, superblocks) in [
            (256, 128, 1, 2),
            (256, 64, 2, 2),
            (256, 32, 4, 2),
            (300, 1000, 1, 3),
            (100, 25, 4, 1),
        ] {
            let rows = Rows::new(&groups(k, size));
            assert_eq!(
                (rows.scales_per_superblock, rows.superblocks),
                (expected, superblocks)
            );
        }
        assert!(Rows::new(&groups(300, 128)).order().is_none());
        let shuffled = Rows::new(&[1, 0, 1, 0]);
        let order = shuffled.order().unwrap();
        assert_eq!(
            (order[0], order[1], order[2], order[32]),
            (1, 3, PADDING, 0)
        );
    }
}
