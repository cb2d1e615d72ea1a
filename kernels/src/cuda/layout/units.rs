//! Codes of 8 rows, from the words of a file to their place in a tile.

use super::{BLOCK_ROWS, SUPERBLOCK_ROWS, TILE_COLUMNS, UNIT_ROWS};

/// Bytes of codes of one tile's superblock.
pub(super) const fn superblock_bytes(bits: u8) -> usize {
    SUPERBLOCK_ROWS * TILE_COLUMNS * bits as usize / 8
}

/// Up to 8 source rows that one call brings to one unit.
pub(super) struct UnitSource {
    pub(super) superblock: usize,
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
    pub(super) fn new(placed: &[(usize, usize)]) -> Self {
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
    pub(super) fn write(
        &self,
        bits: u8,
        column: usize,
        codes: &mut [u8],
        word: impl Fn(usize) -> u32,
    ) {
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
