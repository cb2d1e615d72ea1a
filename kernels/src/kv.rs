//! The paged key and value cache of one attention layer.
//!
//! Keys stand 16 tokens a vector, `[block][kv head][16 tokens][head_dim][16]`, so that 16 scores
//! are made without a horizontal sum; values are `[block][kv head][token][head_dim]` with the head
//! padded to 16. A slot is `block * block_tokens + offset`.
//!
//! An int8 cache holds, for every row (a head of a token) of keys and of values, integers and one
//! scale, `[block][kv head][token]`: a number is its code times its row's scale. The code is the
//! nearest, ties to even, and the scale is the row's largest magnitude / 127, so that the error is at
//! most half a scale. Scales are f32: in f16 they would overflow for activations beyond 8.3e6 and
//! lose bits below 7.8e-3, to save two bytes of a row of 128.

use half::f16;

use crate::buffer::Aligned;
use crate::error::{KernelError, expect_shape};

/// Tokens of one key vector; block sizes are multiples of it.
pub const KEY_TOKENS: usize = 16;

/// Element type of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE single precision: exact.
    F32,
    /// IEEE half precision: half the bytes, rounded to nearest even when written.
    F16,
    /// 8-bit integers with one f32 scale per token and head: about a quarter of the bytes.
    Int8,
}

impl KvDtype {
    /// Every one of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Scales of a cache of `rows` heads of tokens, keys and values each.
    pub const fn scales(self, rows: usize) -> usize {
        match self {
            Self::F32 | Self::F16 => 0,
            Self::Int8 => rows,
        }
    }

    /// Bytes of `rows` heads of tokens, of keys or of values, with their scales.
    pub const fn row_bytes(self, rows: usize, head_dim: usize) -> usize {
        rows * head_dim * self.bytes() + self.scales(rows) * size_of::<f32>()
    }
}

impl std::fmt::Display for KvDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

/// Shape of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks that the cache holds.
    pub blocks: usize,
    /// Tokens of one block: a multiple of [`KEY_TOKENS`].
    pub block_tokens: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Heap bytes of a cache of this shape: exactly [`KvCache::bytes`].
    pub fn bytes(&self) -> u64 {
        [self.key_elements(), self.value_elements()]
            .map(|elements| match self.dtype {
                KvDtype::F32 => Aligned::<f32>::heap_bytes(elements),
                KvDtype::F16 => Aligned::<u16>::heap_bytes(elements),
                KvDtype::Int8 => {
                    Aligned::<i8>::heap_bytes(elements) + Aligned::<f32>::heap_bytes(self.rows())
                }
            })
            .iter()
            .sum()
    }

    /// Slots: blocks x block tokens.
    pub fn slots(&self) -> usize {
        self.blocks * self.block_tokens
    }

    /// Rows of keys, and of values: heads of tokens.
    pub(crate) fn rows(&self) -> usize {
        self.slots() * self.kv_heads
    }

    /// Elements of one value row as stored.
    pub(crate) fn value_width(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    fn key_elements(&self) -> usize {
        self.rows() * self.head_dim
    }

    fn value_elements(&self) -> usize {
        self.rows() * self.value_width()
    }

    /// Which row a token of a block's head is: also where its scales stand.
    pub(crate) fn row(&self, block: usize, head: usize, token: usize) -> usize {
        (block * self.kv_heads + head) * self.block_tokens + token
    }

    /// Where the 16-token key tile with `token` of a block's head starts.
    pub(crate) fn key_tile(&self, block: usize, head: usize, token: usize) -> usize {
        self.row(block, head, token / KEY_TOKENS * KEY_TOKENS) * self.head_dim
    }

    /// Where the value row of a token of a block's head starts.
    pub(crate) fn value_row(&self, block: usize, head: usize, token: usize) -> usize {
        self.row(block, head, token) * self.value_width()
    }
}

/// Keys or values.
#[derive(Debug)]
pub(crate) enum KvStore {
    F32(Aligned<f32>),
    F16(Aligned<u16>),
    Int8 {
        codes: Aligned<i8>,
        /// Of every row.
        scales: Aligned<f32>,
    },
}

impl KvStore {
    fn zeroed(dtype: KvDtype, elements: usize, rows: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(Aligned::zeroed(elements)),
            KvDtype::F16 => Self::F16(Aligned::zeroed(elements)),
            KvDtype::Int8 => Self::Int8 {
                codes: Aligned::zeroed(elements),
                scales: Aligned::zeroed(rows),
            },
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::F32(data) => data.bytes(),
            Self::F16(data) => data.bytes(),
            Self::Int8 { codes, scales } => codes.bytes() + scales.bytes(),
        }
    }

    /// One element of a row, widened.
    fn get(&self, index: usize, row: usize) -> f32 {
        match self {
            Self::F32(data) => data[index],
            Self::F16(data) => f16::from_bits(data[index]).to_f32(),
            Self::Int8 { codes, scales } => f32::from(codes[index]) * scales[row],
        }
    }

    /// Writes the `values` of a row to `start`, `start + stride`, ...
    fn scatter(&mut self, start: usize, stride: usize, row: usize, values: &[f32]) {
        match self {
            Self::F32(data) => {
                for (slot, &value) in data[start..].iter_mut().step_by(stride).zip(values) {
                    *slot = value;
                }
            }
            Self::F16(data) => {
                for (slot, &value) in data[start..].iter_mut().step_by(stride).zip(values) {
                    *slot = f16::from_f32(value).to_bits();
                }
            }
            Self::Int8 { codes, scales } => {
                let scale = int8_scale(values);
                scales[row] = scale;
                for (slot, &value) in codes[start..].iter_mut().step_by(stride).zip(values) {
                    *slot = int8_code(value, scale);
                }
            }
        }
    }
}

/// Largest code of an int8 cache; the smallest is its negative.
const MOST_CODE: f32 = 127.0;

/// The scale of a row: its largest magnitude / 127, which is 0 for a row of zeros. Magnitudes are
/// compared by their bits, which puts what is not finite above all else: the scale then is not finite
/// either, nor is what attention makes of it.
fn int8_scale(values: &[f32]) -> f32 {
    let magnitudes = values.iter().map(|value| value.abs().to_bits());
    f32::from_bits(magnitudes.max().unwrap_or(0)) / MOST_CODE
}

/// The code nearest to `value`, ties to even. A denormal scale may be too small for its row's largest
/// value, hence the bounds; what is not a number becomes 0.
fn int8_code(value: f32, scale: f32) -> i8 {
    (value / scale)
        .round_ties_even()
        .clamp(-MOST_CODE, MOST_CODE) as i8
}

/// The paged cache of one layer. Zero until written.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    pub(crate) keys: KvStore,
    pub(crate) values: KvStore,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// Block tokens that are no multiple of 16, an empty dimension, or more elements than can be
    /// addressed.
    pub fn new(shape: KvShape) -> Result<Self, KernelError> {
        const OP: &str = "kv cache";
        let KvShape {
            blocks,
            block_tokens,
            kv_heads,
            head_dim,
            ..
        } = shape;
        let whole = block_tokens > 0 && block_tokens.is_multiple_of(KEY_TOKENS);
        expect_shape(OP, "block_tokens", whole, || {
            format!("is {block_tokens}, must be a multiple of {KEY_TOKENS}")
        })?;
        expect_shape(OP, "heads", kv_heads > 0 && head_dim > 0, || {
            format!("({kv_heads}, {head_dim}) is empty")
        })?;
        let elements = [blocks, block_tokens, kv_heads, shape.value_width(), 8]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        let addressable = elements.is_some_and(|bytes| isize::try_from(bytes).is_ok())
            && u32::try_from(shape.slots()).is_ok();
        expect_shape(OP, "blocks", addressable, || {
            format!("{blocks} are too many")
        })?;
        Ok(Self {
            shape,
            keys: KvStore::zeroed(shape.dtype, shape.key_elements(), shape.rows()),
            values: KvStore::zeroed(shape.dtype, shape.value_elements(), shape.rows()),
        })
    }

    /// The shape it was made with.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> u64 {
        self.keys.bytes() + self.values.bytes()
    }

    /// Stores one token's key and value of one head, (head_dim) each; indices are checked before.
    pub(crate) fn store(&mut self, slot: usize, head: usize, key: &[f32], value: &[f32]) {
        let (block, token) = (
            slot / self.shape.block_tokens,
            slot % self.shape.block_tokens,
        );
        let row = self.shape.row(block, head, token);
        let key_start = self.shape.key_tile(block, head, token) + token % KEY_TOKENS;
        self.keys.scatter(key_start, KEY_TOKENS, row, key);
        let value_start = self.shape.value_row(block, head, token);
        self.values.scatter(value_start, 1, row, value);
    }

    /// One element of a stored key, widened.
    pub(crate) fn key(&self, block: usize, token: usize, head: usize, d: usize) -> f32 {
        let index = self.shape.key_tile(block, head, token) + d * KEY_TOKENS + token % KEY_TOKENS;
        self.keys.get(index, self.shape.row(block, head, token))
    }

    /// One element of a stored value, widened.
    pub(crate) fn value(&self, block: usize, token: usize, head: usize, d: usize) -> f32 {
        let index = self.shape.value_row(block, head, token) + d;
        self.values.get(index, self.shape.row(block, head, token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(values: &[f32]) -> Vec<f32> {
        let scale = int8_scale(values);
        let code = |&value: &f32| f32::from(int8_code(value, scale)) * scale;
        values.iter().map(code).collect()
    }

    #[test]
    fn int8_is_off_by_half_a_scale_at_most_and_keeps_the_largest() {
        // Magnitudes from near the smallest normal number to near the largest.
        for exponent in (-120..=120).step_by(8) {
            let unit = 2f32.powi(exponent);
            let row: Vec<f32> = (-50..=77).map(|i| (i as f32 * 0.37).sin() * unit).collect();
            let scale = int8_scale(&row);
            for (value, back) in row.iter().zip(round_trip(&row)) {
                assert!(
                    (value - back).abs() <= 0.5001 * scale,
                    "{value:e} became {back:e}, the scale is {scale:e}"
                );
            }
            let most = row.iter().copied().fold(0.0, |a: f32, b| a.max(b.abs()));
            let kept = round_trip(&row)
                .into_iter()
                .fold(0.0, |a: f32, b| a.max(b.abs()));
            assert!(
                (most - kept).abs() <= 1e-6 * most,
                "{most:e} became {kept:e}"
            );
        }
    }

    #[test]
    fn int8_takes_ties_to_even_and_zeros_and_denormals_and_tells_what_is_not_finite() {
        // The scale of a row whose largest magnitude is 127 is 1.
        let row = [127.0, 0.5, 1.5, -2.5, -126.6];
        assert_eq!(round_trip(&row), [127.0, 0.0, 2.0, -2.0, -127.0]);
        assert_eq!(round_trip(&[0.0, -0.0]), [0.0, 0.0]);
        let smallest = f32::from_bits(1);
        for times in 1..400 {
            let row = [smallest * times as f32, 0.0];
            assert!(round_trip(&row)[0] <= 2.0 * row[0]);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!int8_scale(&[1.0, bad, 3.0e38]).is_finite());
        }
    }
}
