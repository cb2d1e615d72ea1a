//! The paged key and value cache of one attention layer.
//!
//! Keys stand 16 tokens a vector, `[block][kv head][16 tokens][head_dim][16]`, so that 16 scores
//! are made without a horizontal sum; values are `[block][kv head][token][head_dim]` with the head
//! padded to 16. A slot is `block * block_tokens + offset`.

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
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

impl std::fmt::Display for KvDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
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
            })
            .iter()
            .sum()
    }

    /// Slots: blocks x block tokens.
    pub fn slots(&self) -> usize {
        self.blocks * self.block_tokens
    }

    /// Elements of one value row as stored.
    pub(crate) fn value_width(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    fn key_elements(&self) -> usize {
        self.slots() * self.kv_heads * self.head_dim
    }

    fn value_elements(&self) -> usize {
        self.slots() * self.kv_heads * self.value_width()
    }

    /// Where the 16-token key tile with `token` of a block's head starts.
    pub(crate) fn key_tile(&self, block: usize, head: usize, token: usize) -> usize {
        let row = (block * self.kv_heads + head) * self.block_tokens;
        (row + token / KEY_TOKENS * KEY_TOKENS) * self.head_dim
    }

    /// Where the value row of a token of a block's head starts.
    pub(crate) fn value_row(&self, block: usize, head: usize, token: usize) -> usize {
        ((block * self.kv_heads + head) * self.block_tokens + token) * self.value_width()
    }
}

/// Keys or values.
#[derive(Debug)]
pub(crate) enum KvStore {
    F32(Aligned<f32>),
    F16(Aligned<u16>),
}

impl KvStore {
    fn zeroed(dtype: KvDtype, elements: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(Aligned::zeroed(elements)),
            KvDtype::F16 => Self::F16(Aligned::zeroed(elements)),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::F32(data) => data.bytes(),
            Self::F16(data) => data.bytes(),
        }
    }

    fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(data) => data[index],
            Self::F16(data) => f16::from_bits(data[index]).to_f32(),
        }
    }

    /// Writes `values` to `start`, `start + stride`, ...
    fn scatter(&mut self, start: usize, stride: usize, values: &[f32]) {
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
        }
    }
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
            keys: KvStore::zeroed(shape.dtype, shape.key_elements()),
            values: KvStore::zeroed(shape.dtype, shape.value_elements()),
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
        let key_start = self.shape.key_tile(block, head, token) + token % KEY_TOKENS;
        self.keys.scatter(key_start, KEY_TOKENS, key);
        self.values
            .scatter(self.shape.value_row(block, head, token), 1, value);
    }

    /// One element of a stored key, widened.
    pub(crate) fn key(&self, block: usize, token: usize, head: usize, d: usize) -> f32 {
        let tile = self.shape.key_tile(block, head, token);
        self.keys.get(tile + d * KEY_TOKENS + token % KEY_TOKENS)
    }

    /// One element of a stored value, widened.
    pub(crate) fn value(&self, block: usize, token: usize, head: usize, d: usize) -> f32 {
        self.values
            .get(self.shape.value_row(block, head, token) + d)
    }
}
