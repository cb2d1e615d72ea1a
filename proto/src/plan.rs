//! [`ShardPlan`] on the wire.

use std::ops::Range;

use secondwind_model::plan::{
    KvDType, LayerPlan, LmHead, PlanSettings, Precision, RankMemory, RankPlan, ShardPlan,
};

use crate::{WireError, index, v1};

impl From<&ShardPlan> for v1::Plan {
    fn from(from: &ShardPlan) -> Self {
        Self {
            settings: Some((&from.settings).into()),
            layer_ranges: ranges_to_wire(&from.layer_ranges),
            layers: from
                .layers
                .iter()
                .map(|layer| v1::LayerPlan {
                    query_heads: ranges_to_wire(&layer.query_heads),
                    ffn: ranges_to_wire(&layer.ffn),
                })
                .collect(),
            vocab: ranges_to_wire(&from.vocab),
            kv_blocks: from.kv_blocks as u64,
            ranks: from.ranks.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Plan> for ShardPlan {
    type Error = WireError;

    fn try_from(from: v1::Plan) -> Result<Self, WireError> {
        Ok(Self {
            settings: from
                .settings
                .ok_or(WireError::Missing {
                    message: "Plan",
                    field: "settings",
                })?
                .try_into()?,
            layer_ranges: ranges(from.layer_ranges, "layer_ranges")?,
            layers: from
                .layers
                .into_iter()
                .map(|layer| {
                    Ok(LayerPlan {
                        query_heads: ranges(layer.query_heads, "query_heads")?,
                        ffn: ranges(layer.ffn, "ffn")?,
                    })
                })
                .collect::<Result<_, WireError>>()?,
            vocab: ranges(from.vocab, "vocab")?,
            kv_blocks: index(from.kv_blocks, "Plan", "kv_blocks")?,
            ranks: from.ranks.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<&PlanSettings> for v1::PlanSettings {
    fn from(from: &PlanSettings) -> Self {
        Self {
            max_context_tokens: from.max_context_tokens as u64,
            max_sequences: from.max_sequences as u64,
            max_step_tokens: from.max_step_tokens as u64,
            max_logit_rows: from.max_logit_rows as u64,
            block_tokens: from.block_tokens as u64,
            kv_dtype: match from.kv_dtype {
                KvDType::F32 => v1::KvDType::F32,
                KvDType::F16 => v1::KvDType::F16,
                KvDType::Int8 => v1::KvDType::Int8,
            }
            .into(),
            precision: match from.precision {
                Precision::Exact => v1::Precision::Exact,
                Precision::Fast => v1::Precision::Fast,
            }
            .into(),
            lm_head: match from.lm_head {
                LmHead::Fp16 => v1::LmHead::Fp16,
                LmHead::Int8 => v1::LmHead::Int8,
            }
            .into(),
            memory_reserve_bytes: from.memory_reserve_bytes,
            forced_split: from.forced_split.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::PlanSettings> for PlanSettings {
    type Error = WireError;

    fn try_from(from: v1::PlanSettings) -> Result<Self, WireError> {
        let message = "PlanSettings";
        Ok(Self {
            max_context_tokens: index(from.max_context_tokens, message, "max_context_tokens")?,
            max_sequences: index(from.max_sequences, message, "max_sequences")?,
            max_step_tokens: index(from.max_step_tokens, message, "max_step_tokens")?,
            max_logit_rows: index(from.max_logit_rows, message, "max_logit_rows")?,
            block_tokens: index(from.block_tokens, message, "block_tokens")?,
            kv_dtype: match from.kv_dtype() {
                v1::KvDType::F32 => KvDType::F32,
                v1::KvDType::F16 => KvDType::F16,
                v1::KvDType::Int8 => KvDType::Int8,
                v1::KvDType::Unspecified => {
                    return Err(WireError::Invalid {
                        message,
                        field: "kv_dtype",
                        value: from.kv_dtype.to_string(),
                    });
                }
            },
            precision: match from.precision() {
                v1::Precision::Exact => Precision::Exact,
                v1::Precision::Fast => Precision::Fast,
                v1::Precision::Unspecified => {
                    return Err(WireError::Invalid {
                        message,
                        field: "precision",
                        value: from.precision.to_string(),
                    });
                }
            },
            lm_head: match from.lm_head() {
                v1::LmHead::Fp16 => LmHead::Fp16,
                v1::LmHead::Int8 => LmHead::Int8,
                v1::LmHead::Unspecified => {
                    return Err(WireError::Invalid {
                        message,
                        field: "lm_head",
                        value: from.lm_head.to_string(),
                    });
                }
            },
            memory_reserve_bytes: from.memory_reserve_bytes,
            forced_split: (!from.forced_split.is_empty()).then_some(from.forced_split),
        })
    }
}

impl From<&RankPlan> for v1::RankPlan {
    fn from(from: &RankPlan) -> Self {
        Self {
            device: from.device.clone(),
            usable_bytes: from.usable_bytes,
            weights_bytes: from.memory.weights,
            padding_bytes: from.memory.padding,
            scales_bytes: from.memory.scales,
            kv_cache_bytes: from.memory.kv_cache,
            scratch_bytes: from.memory.scratch,
            buffers_bytes: from.memory.buffers,
            graphs_bytes: from.memory.graphs,
            nccl_bytes: from.memory.nccl,
            decode_step_seconds: from.decode_step_seconds,
            row_seconds: from.row_seconds,
        }
    }
}

impl From<v1::RankPlan> for RankPlan {
    fn from(from: v1::RankPlan) -> Self {
        Self {
            device: from.device,
            usable_bytes: from.usable_bytes,
            memory: RankMemory {
                weights: from.weights_bytes,
                padding: from.padding_bytes,
                scales: from.scales_bytes,
                kv_cache: from.kv_cache_bytes,
                scratch: from.scratch_bytes,
                buffers: from.buffers_bytes,
                graphs: from.graphs_bytes,
                nccl: from.nccl_bytes,
            },
            decode_step_seconds: from.decode_step_seconds,
            row_seconds: from.row_seconds,
        }
    }
}

fn ranges_to_wire(from: &[Range<usize>]) -> Vec<v1::Range> {
    from.iter()
        .map(|range| v1::Range {
            start: range.start as u64,
            end: range.end as u64,
        })
        .collect()
}

fn ranges(from: Vec<v1::Range>, field: &'static str) -> Result<Vec<Range<usize>>, WireError> {
    from.into_iter()
        .map(|range| {
            let start = index(range.start, "Range", field)?;
            let end = index(range.end, "Range", field)?;
            if start > end {
                return Err(WireError::Invalid {
                    message: "Range",
                    field,
                    value: format!("{start}..{end}"),
                });
            }
            Ok(start..end)
        })
        .collect()
}
