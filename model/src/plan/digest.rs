//! The plan digest: what every rank of a group must agree on before it starts.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::{KvDType, LayerPlan, LmHead, PlanSettings, Precision, RankMemory, RankPlan, ShardPlan};

/// SHA-256, in lower-case hex, over the plan, the checkpoint digest and the program's version.
///
/// The serialisation is canonical: fields in the order of their declaration, integers as 64-bit
/// little-endian, floats by their bits, lists and strings with their length before them. Ranks whose
/// digests differ never start.
pub fn digest(plan: &ShardPlan, checkpoint_digest: &str, version: &str) -> String {
    let mut writer = Writer(Sha256::new());
    writer.text("secondwind plan 1");
    writer.text(version);
    writer.text(checkpoint_digest);
    // No `..` in these patterns: a new field must be written, or this does not compile.
    let ShardPlan {
        settings,
        layer_ranges,
        layers,
        vocab,
        kv_blocks,
        ranks,
    } = plan;
    writer.settings(settings);
    writer.ranges(layer_ranges);
    writer.length(layers.len());
    for LayerPlan { query_heads, ffn } in layers {
        writer.ranges(query_heads);
        writer.ranges(ffn);
    }
    writer.ranges(vocab);
    writer.length(*kv_blocks);
    writer.length(ranks.len());
    for RankPlan {
        device,
        usable_bytes,
        memory,
        decode_step_seconds,
        row_seconds,
    } in ranks
    {
        writer.text(device);
        writer.integer(*usable_bytes);
        let RankMemory {
            weights,
            padding,
            scales,
            kv_cache,
            scratch,
            buffers,
            graphs,
            nccl,
        } = memory;
        for bytes in [
            weights, padding, scales, kv_cache, scratch, buffers, graphs, nccl,
        ] {
            writer.integer(*bytes);
        }
        writer.integer(decode_step_seconds.to_bits());
        writer.integer(row_seconds.to_bits());
    }
    writer
        .0
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

struct Writer(Sha256);

impl Writer {
    fn integer(&mut self, value: u64) {
        self.0.update(value.to_le_bytes());
    }

    fn length(&mut self, value: usize) {
        self.integer(value as u64);
    }

    fn text(&mut self, text: &str) {
        self.length(text.len());
        self.0.update(text.as_bytes());
    }

    fn ranges(&mut self, ranges: &[Range<usize>]) {
        self.length(ranges.len());
        for range in ranges {
            self.length(range.start);
            self.length(range.end);
        }
    }

    fn settings(&mut self, settings: &PlanSettings) {
        let PlanSettings {
            max_context_tokens,
            max_sequences,
            max_step_tokens,
            max_logit_rows,
            block_tokens,
            kv_dtype,
            precision,
            lm_head,
            memory_reserve_bytes,
            forced_split,
        } = settings;
        for value in [
            max_context_tokens,
            max_sequences,
            max_step_tokens,
            max_logit_rows,
            block_tokens,
        ] {
            self.length(*value);
        }
        self.integer(match kv_dtype {
            KvDType::F32 => 0,
            KvDType::F16 => 1,
            KvDType::Int8 => 2,
        });
        self.integer(match precision {
            Precision::Exact => 0,
            Precision::Fast => 1,
        });
        self.integer(match lm_head {
            LmHead::Fp16 => 0,
            LmHead::Int8 => 1,
        });
        self.integer(*memory_reserve_bytes);
        let shares = forced_split.as_deref().unwrap_or_default();
        self.length(shares.len());
        for share in shares {
            self.integer(share.to_bits());
        }
    }
}
