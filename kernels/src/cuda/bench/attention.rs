//! Attention over long sequences, timed.

use super::{COLD_BYTES, LONG_SECONDS, MAX_LAUNCHES, median, random};
use crate::cuda::{
    Attention, AttentionBatch, AttentionLimits, AttentionScratch, Device, Guard, KvPages, attention,
};
use crate::error::KernelError;
use crate::kv::{KvDtype, KvShape};
use crate::select::AttentionPath;

const BLOCK_TOKENS: usize = 16;

/// One call of attention: sequences of the same length.
#[derive(Debug, Clone, Copy)]
pub struct AttentionCall {
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Storage of keys and values.
    pub kv: KvDtype,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each that the cache holds afterwards.
    pub context: usize,
    /// Of these, the tokens that attend.
    pub tokens: usize,
}

impl AttentionCall {
    /// Bytes of the keys and values that the call reads at least.
    pub fn kv_bytes(&self) -> u64 {
        let rows = self.sequences * self.context * self.kv_heads;
        2 * self.kv.row_bytes(rows, self.head_dim) as u64
    }

    /// Multiply-adds of scores and weighted values.
    pub fn multiply_adds(&self) -> f64 {
        // Token i of n sees context - n + 1 + i keys.
        let keys = self.tokens as f64 * (self.context as f64 - (self.tokens as f64 - 1.0) / 2.0);
        2.0 * keys * (self.sequences * self.query_heads * self.head_dim) as f64
    }
}

/// Seconds of `call` by `path`.
///
/// # Errors
/// A path that is not a card's, or the card's.
pub fn time_attention(
    device: &Device,
    path: AttentionPath,
    call: AttentionCall,
) -> Result<f64, KernelError> {
    let AttentionCall {
        query_heads,
        kv_heads,
        head_dim,
        kv,
        sequences,
        context,
        tokens,
    } = call;
    let blocks = context.div_ceil(BLOCK_TOKENS);
    let shape = KvShape {
        blocks: 1 + sequences * blocks,
        block_tokens: BLOCK_TOKENS,
        kv_heads,
        head_dim,
        dtype: kv,
    };
    // As many layers as no cache of the card holds.
    let layers = (COLD_BYTES as u64)
        .div_ceil(call.kv_bytes())
        .clamp(1, MAX_LAUNCHES as u64);
    let caches = (1..=layers)
        .map(|layer| KvPages::random(device, shape, layer as u32))
        .collect::<Result<Vec<_>, _>>()?;
    // Blocks lie anywhere, as after hours of serving.
    let mut tables: Vec<u32> = (1..=(sequences * blocks) as u32).collect();
    let mut words = random(5);
    for at in (1..tables.len()).rev() {
        let other = words.next().unwrap_or(0) as usize % (at + 1);
        tables.swap(at, other);
    }
    let offsets: Vec<u32> = (0..=sequences).map(|row| (row * blocks) as u32).collect();
    let row_of_token: Vec<u32> = (0..sequences)
        .flat_map(|row| std::iter::repeat_n(row as u32, tokens))
        .collect();
    let lengths: Vec<u32> = (0..sequences)
        .flat_map(|_| (context - tokens + 1..=context).map(|length| length as u32))
        .collect();
    let positions: Vec<u32> = lengths.iter().map(|length| length - 1).collect();
    let what = "attention";
    let all = sequences * tokens;
    let kv_of: Vec<u32> = (0..query_heads)
        .map(|head| (head * kv_heads / query_heads) as u32)
        .collect();
    let kv_of = device.upload(&kv_of, what)?;
    let limits = AttentionLimits {
        tokens: all,
        decode_tokens: if tokens == 1 { all } else { 1 },
        rows: sequences,
        query_heads,
        kv_heads,
        largest_group: query_heads.div_ceil(kv_heads),
        head_dim,
        max_context: context,
    };
    let mut scratch = AttentionScratch::new(device, &limits)?;
    let extents = (0..sequences).map(|_| (context - tokens, tokens));
    scratch.write_tiles(device, extents, std::slice::from_ref(&(0..all)))?;
    let width = query_heads * head_dim;
    let query: Vec<f32> = random(3)
        .take(all * width)
        .map(|word| word as f32 / 2e9 - 1.0)
        .collect();
    let query = device.upload(&query, what)?;
    let out = device.zeros(all * width, what)?;
    let guard = Guard::new(device)?;
    let (tables, offsets) = (
        device.upload(&tables, what)?,
        device.upload(&offsets, what)?,
    );
    let (row_of_token, lengths, positions) = (
        device.upload(&row_of_token, what)?,
        device.upload(&lengths, what)?,
        device.upload(&positions, what)?,
    );
    let batch = AttentionBatch {
        block_tables: &tables,
        table_offsets: &offsets,
        row_of_token: &row_of_token,
        context_lengths: &lengths,
        positions: &positions,
        // Only what writes the cache reads them.
        slots: &positions,
        tokens: 0..all,
        max_context: context,
    };
    let layer = Attention {
        query_heads,
        kv_head_of_query_head: &kv_of,
        largest_group: limits.largest_group,
    };
    let run = |cache: &KvPages| {
        attention(
            device, path, &query, cache, &batch, layer, &scratch, &out, &guard, 0,
        )
    };
    run(&caches[0])?;
    let start = device.event()?;
    run(&caches[0])?;
    let once = device.seconds_between(&start, &device.event()?)?;
    let launches = match once < LONG_SECONDS {
        true => caches.len().max(4),
        false => 1,
    };
    let graph = device
        .record(|| (0..launches).try_for_each(|launch| run(&caches[launch % caches.len()])))?;
    Ok(median(device, || device.replay(&graph))? / launches as f64)
}
