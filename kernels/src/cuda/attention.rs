//! Attention on a card: the paged cache, and the launch of each path.

use std::ops::Range;

use super::{CudaError, Device, Memory, bench::random_halves, launch, ops::Guard};
use crate::error::KernelError;
use crate::kv::{KvDtype, KvShape};
use crate::select::AttentionPath;

/// One layer's keys and values, \[block\]\[kv_head\]\[block_tokens\]\[head_dim\], and, of an int8
/// cache, their scales, \[block\]\[kv_head\]\[block_tokens\].
pub struct KvPages {
    /// Sizes and type.
    pub shape: KvShape,
    keys: Memory<u8>,
    values: Memory<u8>,
    scales: Option<[Memory<f32>; 2]>,
}

/// `struct Cache` of `attention/batch.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cache {
    keys: u64,
    values: u64,
    key_scales: u64,
    value_scales: u64,
}

/// What attention reads of a step; the same for all layers.
pub struct AttentionBatch<'a> {
    /// Blocks of all rows, one row after the other.
    pub block_tables: &'a Memory<u32>,
    /// (rows + 1) where each row's blocks start.
    pub table_offsets: &'a Memory<u32>,
    /// (tokens).
    pub row_of_token: &'a Memory<u32>,
    /// (tokens) keys that each attends to, itself included.
    pub context_lengths: &'a Memory<u32>,
    /// (tokens) where each stands in its sequence.
    pub positions: &'a Memory<u32>,
    /// (tokens) where its key and value go.
    pub slots: &'a Memory<u32>,
    /// Those of the step that are worked on: rows of the same numbers in every array and buffer.
    pub tokens: Range<usize>,
    /// No context is longer.
    pub max_context: usize,
}

/// One layer's heads.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads of this rank.
    pub query_heads: usize,
    /// (query_heads) the KV head that each reads, ascending.
    pub kv_head_of_query_head: &'a Memory<u32>,
    /// Most query heads of one KV head.
    pub largest_group: usize,
}

/// Norms of single heads.
pub struct HeadNorms<'a> {
    /// (head_dim).
    pub query: &'a Memory<f32>,
    /// (head_dim).
    pub key: &'a Memory<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// The largest call of attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionLimits {
    /// Tokens of a call.
    pub tokens: usize,
    /// Tokens of a call that decodes.
    pub decode_tokens: usize,
    /// Rows of a call.
    pub rows: usize,
    /// Most query heads of a layer.
    pub query_heads: usize,
    /// Most KV heads of a layer.
    pub kv_heads: usize,
    /// Most query heads of one KV head.
    pub largest_group: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a sequence.
    pub max_context: usize,
}

/// Memory between the launches of one attention, and the tiles of a prompt's step.
pub struct AttentionScratch {
    limits: AttentionLimits,
    scores: Memory<f32>,
    /// (tokens, query_heads, splits, head_dim).
    partial: Memory<f32>,
    /// (tokens, query_heads, splits) pairs.
    stats: Memory<f32>,
    /// (tokens, KV heads, slices) zero between launches.
    arrivals: Memory<u32>,
    /// (tiles, 3): first token of the part, tokens, row.
    tiles: Memory<u32>,
    /// (tokens of the step, their tiles) of each part.
    parts: Vec<(Range<usize>, Range<usize>)>,
}

/// `struct AttentionBatch` of `attention/batch.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    block_tables: u64,
    table_offsets: u64,
    row_of_token: u64,
    context_lengths: u64,
    kv_head_of_query_head: u64,
    tokens: i32,
    query_heads: i32,
    kv_heads: i32,
    block_tokens: i32,
    q_stride: i32,
    scale: f32,
}

impl KvPages {
    /// An empty cache.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device, shape: KvShape) -> Result<Self, CudaError> {
        let bytes = shape.rows() * shape.head_dim * shape.dtype.bytes();
        let what = "the KV cache";
        let scales = match shape.dtype.scales(shape.rows()) {
            0 => None,
            rows => Some([device.zeros(rows, what)?, device.zeros(rows, what)?]),
        };
        Ok(Self {
            shape,
            keys: device.zeros(bytes, what)?,
            values: device.zeros(bytes, what)?,
            scales,
        })
    }

    fn cache(&self) -> Cache {
        let scales = |of: usize| self.scales.as_ref().map_or(0, |both| both[of].address());
        Cache {
            keys: self.keys.address(),
            values: self.values.address(),
            key_scales: scales(0),
            value_scales: scales(1),
        }
    }

    /// A cache full of random numbers, for measurements.
    pub(super) fn random(device: &Device, shape: KvShape, seed: u32) -> Result<Self, CudaError> {
        let halves = shape.rows() * shape.head_dim * shape.dtype.bytes() / 2;
        let scales = match shape.dtype.scales(shape.rows()) {
            0 => None,
            rows => {
                let scales = vec![1.0 / 127.0; rows];
                let upload = || device.upload(&scales, "the KV cache");
                Some([upload()?, upload()?])
            }
        };
        Ok(Self {
            shape,
            keys: random_halves(device, halves, 2 * seed)?,
            values: random_halves(device, halves, 2 * seed + 1)?,
            scales,
        })
    }
}

/// Query heads of a KV head that the widest `decode_split` takes at once.
const MOST_GROUP: usize = 8;

/// Parts of a prompt's step.
const MOST_PARTS: usize = 2;

impl AttentionScratch {
    /// Room for calls within `limits`. Eager attention goes through a prompt in pieces whose scores
    /// fit into 16 MiB, or token by token.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device, limits: &AttentionLimits) -> Result<Self, CudaError> {
        let limits = *limits;
        let slices = limits.largest_group.div_ceil(MOST_GROUP);
        let parts = (1..=limits.decode_tokens)
            .map(|tokens| tokens * splits(device, &limits, tokens))
            .max()
            .unwrap_or(1);
        let scores = (limits.query_heads * limits.max_context).max(4 << 20);
        let tiles = limits.tokens / tile_tokens(&limits) + limits.rows + MOST_PARTS;
        let what = "attention";
        Ok(Self {
            scores: device.zeros(scores, what)?,
            partial: device.zeros(parts * limits.query_heads * limits.head_dim, what)?,
            stats: device.zeros(2 * parts * limits.query_heads, what)?,
            arrivals: device.zeros(limits.decode_tokens * limits.kv_heads * slices, what)?,
            tiles: device.zeros(3 * tiles, what)?,
            parts: Vec::new(),
            limits,
        })
    }

    /// Cuts the parts of a prompt's step into tiles: `rows` has each row's (tokens before, tokens of the
    /// step), `parts` the tokens that are worked on together, one after the other.
    ///
    /// # Errors
    /// The card's.
    pub fn write_tiles(
        &mut self,
        device: &Device,
        rows: impl Iterator<Item = (usize, usize)> + Clone,
        parts: &[Range<usize>],
    ) -> Result<(), CudaError> {
        let most = tile_tokens(&self.limits);
        let mut all = Vec::new();
        self.parts.clear();
        for part in parts {
            let first = all.len();
            all.extend(tiles(rows.clone(), part, most));
            self.parts.push((part.clone(), first..all.len()));
        }
        device.write(&self.tiles, 0, all.as_flattened())
    }
}

/// Tokens of a tile: their queries of one KV head fill 64 rows, or 32 where a row is twice as long.
fn tile_tokens(limits: &AttentionLimits) -> usize {
    let rows = if limits.head_dim > 128 { 32 } else { 64 };
    (rows / limits.largest_group.max(1)).max(1)
}

/// (first token, counted from the part's, tokens, row) of tiles of up to `most` tokens of `part`, those with
/// the longest context first: they take longest.
fn tiles(
    rows: impl Iterator<Item = (usize, usize)>,
    part: &Range<usize>,
    most: usize,
) -> Vec<[u32; 3]> {
    let mut tiles = Vec::new();
    let mut first = 0;
    for (row, (before, tokens)) in rows.enumerate() {
        let own = first.max(part.start)..(first + tokens).min(part.end);
        for at in own.clone().step_by(most) {
            let count = most.min(own.end - at);
            tiles.push((
                before + at - first + count,
                [(at - part.start) as u32, count as u32, row as u32],
            ));
        }
        first += tokens;
    }
    tiles.sort_by_key(|(context, _)| std::cmp::Reverse(*context));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

/// Parts of a sequence that different blocks read: as many as keep the card evenly busy. A part costs
/// a fixed time beside its keys, 192 of them by measurement.
fn splits(device: &Device, limits: &AttentionLimits, tokens: usize) -> usize {
    let slices = limits.largest_group.div_ceil(MOST_GROUP);
    let pairs = limits.kv_heads * slices * tokens;
    let slots = 2 * device.facts().multiprocessors as usize;
    let cost = |splits: usize| {
        let keys = limits
            .max_context
            .div_ceil(splits)
            .max(128)
            .next_multiple_of(32);
        (pairs * splits).div_ceil(slots) * (keys + 192)
    };
    let most = limits.max_context.div_ceil(128).clamp(1, 64);
    (1..=most).min_by_key(|splits| cost(*splits)).unwrap_or(1)
}

/// Normalises and rotates queries (in place) and keys, and writes keys and values to the cache.
///
/// `cos`, `sin`: (positions, head_dim / 2).
///
/// # Errors
/// The card's.
#[allow(clippy::too_many_arguments)]
pub fn rope_kv(
    device: &Device,
    query: &Memory<f32>,
    key: &Memory<f32>,
    value: &Memory<f32>,
    norms: Option<&HeadNorms<'_>>,
    (cos, sin): (&Memory<f32>, &Memory<f32>),
    batch: &AttentionBatch<'_>,
    layer: Attention<'_>,
    cache: &KvPages,
) -> Result<(), CudaError> {
    let KvShape {
        kv_heads,
        head_dim,
        block_tokens,
        ..
    } = cache.shape;
    let (first, tokens) = (batch.tokens.start, batch.tokens.len());
    let rows = |of: &Memory<f32>, heads: usize| {
        let width = heads * head_dim;
        of.part(first * width, tokens * width).address()
    };
    let (query, key, value) = (
        rows(query, layer.query_heads),
        rows(key, kv_heads),
        rows(value, kv_heads),
    );
    let (positions, slots) = (
        batch.positions.part(first, tokens).address(),
        batch.slots.part(first, tokens).address(),
    );
    let heads = tokens * (layer.query_heads + 2 * kv_heads);
    let kernel = format!("rope_kv_{}", cache.shape.dtype);
    let norm = |of: fn(&HeadNorms<'_>) -> u64| norms.map_or(0, of);
    launch!(device, &kernel, [heads.div_ceil(4) as u32, 1, 1], [128, 1, 1], 0;
        query, key, value,
        norm(|norms| norms.query.address()), norm(|norms| norms.key.address()),
        cos.address(), sin.address(), positions, slots,
        cache.cache(), tokens as i32, layer.query_heads as i32, kv_heads as i32, head_dim as i32, block_tokens as i32, norms.map_or(0.0, |norms| norms.eps))
}

/// Softmax attention of every token over its own sequence up to itself.
///
/// # Errors
/// A path that is not a card's, or the card's.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    device: &Device,
    path: AttentionPath,
    query: &Memory<f32>,
    cache: &KvPages,
    batch: &AttentionBatch<'_>,
    layer: Attention<'_>,
    scratch: &AttentionScratch,
    out: &Memory<f32>,
    guard: &Guard,
    check: u32,
) -> Result<(), KernelError> {
    let KvShape {
        kv_heads,
        head_dim,
        block_tokens,
        ..
    } = cache.shape;
    let width = layer.query_heads * head_dim;
    let (first, tokens) = (batch.tokens.start, batch.tokens.len());
    let device_batch = Batch {
        block_tables: batch.block_tables.address(),
        table_offsets: batch.table_offsets.address(),
        row_of_token: batch.row_of_token.part(first, tokens).address(),
        context_lengths: batch.context_lengths.part(first, tokens).address(),
        kv_head_of_query_head: layer.kv_head_of_query_head.address(),
        tokens: tokens as i32,
        query_heads: layer.query_heads as i32,
        kv_heads: kv_heads as i32,
        block_tokens: block_tokens as i32,
        q_stride: width as i32,
        scale: 1.0 / (head_dim as f32).sqrt(),
    };
    let rows = |of: &Memory<f32>| of.part(first * width, tokens * width).address();
    let (query, out, guard) = (rows(query), rows(out), guard.address());
    let pages = cache.cache();
    match path {
        AttentionPath::Eager => {
            let kernel = format!("attention_eager_{}", cache.shape.dtype);
            let at_once = (scratch.scores.len() / (layer.query_heads * batch.max_context)).max(1);
            for first in (0..tokens).step_by(at_once) {
                let count = at_once.min(tokens - first);
                launch!(device, &kernel, [layer.query_heads as u32, count as u32, 1], [256, 1, 1], 0;
                    query, pages, device_batch, head_dim as i32, first as i32,
                    scratch.scores.address(), batch.max_context as i32, out, guard, check)?;
            }
            Ok(())
        }
        AttentionPath::DecodeSplit => {
            let groups: &[usize] = match cache.shape.dtype {
                KvDtype::F16 => &[1, 2, 4, 5, 6, 7, 8],
                KvDtype::F32 => &[2, 4, 8],
                KvDtype::Int8 => &[2, 5, 8],
            };
            let group = groups.iter().find(|group| **group >= layer.largest_group);
            let group = group.copied().unwrap_or(MOST_GROUP);
            let slices = layer.largest_group.div_ceil(group);
            let splits = splits(device, &scratch.limits, tokens);
            assert!(
                tokens * splits * width <= scratch.partial.len()
                    && tokens * kv_heads * slices <= scratch.arrivals.len(),
                "decode_split: scratch"
            );
            let kernel = format!("decode_split_{}_{head_dim}_g{group}", cache.shape.dtype);
            let grid = [splits as u32, (kv_heads * slices) as u32, tokens as u32];
            launch!(device, &kernel, grid, [128, 1, 1], 0;
                query, pages, device_batch, slices as i32, scratch.partial.address(),
                scratch.stats.address(), scratch.arrivals.address(), out, guard, check)?;
            Ok(())
        }
        AttentionPath::PrefillTile | AttentionPath::PrefillMma => {
            let kernel = format!("{path}_{}_{head_dim}", cache.shape.dtype);
            let part = scratch.parts.iter().find(|(of, _)| *of == batch.tokens);
            let (_, tiles) = part.expect("tiles are written for every part of the step");
            let grid = [tiles.len() as u32, kv_heads as u32, 1];
            let tiles = scratch.tiles.part(3 * tiles.start, 3 * tiles.len());
            launch!(device, &kernel, grid, [128, 1, 1], 0;
                query, pages, device_batch, tiles.address(), out, guard, check)?;
            Ok(())
        }
        other => Err(KernelError::PathRefused {
            path: other.name(),
            reason: "it is not for a card".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_token_once_and_stay_within_rows_and_parts() {
        let rows = [(0, 5), (100, 1), (7, 20), (0, 0), (3, 9)];
        let row_of = |token: u32| match token {
            0..5 => 0,
            5 => 1,
            6..26 => 2,
            _ => 4,
        };
        for cut in [0, 16] {
            let mut covered = [0; 35];
            for part in [0..cut, cut..35] {
                for [first, tokens, row] in tiles(rows.into_iter(), &part, 9) {
                    assert!((1..=9).contains(&tokens));
                    let first = first + part.start as u32;
                    assert!(part.end >= (first + tokens) as usize);
                    for token in first..first + tokens {
                        assert_eq!(row_of(token), row);
                        covered[token as usize] += 1;
                    }
                }
            }
            assert_eq!(covered, [1; 35]);
        }
        assert_eq!(tiles(rows.into_iter(), &(0..35), 9)[0], [5, 1, 1]);
        // The tile with the longest context of a part that begins within a row.
        assert_eq!(tiles(rows.into_iter(), &(16..35), 9)[0], [9, 1, 2]);
    }
}
