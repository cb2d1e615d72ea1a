//! Shapes of real models, and workers to plan them for.

use crate::capabilities::{Capabilities, LinearCapability, Recordings, WeightKind};
use crate::config::{
    Architecture, AttentionKind, GenerationDefaults, LayerConfig, MlpKind, ModelConfig, RopeConfig,
    RopeScaling,
};
use crate::modules::{
    Axis, DType, GptqFormat, LinearModule, LinearRole, ModuleList, PlainRole, PlainTensor, Split,
    WeightFormat, ZeroPoints,
};
use crate::plan::{
    Arithmetic, KvDType, LmHead, ModelShape, PathFacts, PlanSettings, Precision, preset,
};

/// Sizes of a dense Qwen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub tied: bool,
}

const fn sizes(
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: (usize, usize, usize),
    vocab: usize,
) -> Sizes {
    let (query_heads, kv_heads, head_dim) = heads;
    Sizes {
        hidden,
        intermediate,
        layers,
        query_heads,
        kv_heads,
        head_dim,
        vocab,
        tied: false,
    }
}

pub(crate) const QWEN_0_5B: Sizes = Sizes {
    tied: true,
    ..sizes(896, 4864, 24, (14, 2, 64), 151_936)
};
pub(crate) const QWEN_7B: Sizes = sizes(3584, 18944, 28, (28, 4, 128), 152_064);
pub(crate) const QWEN_32B: Sizes = sizes(5120, 27648, 64, (40, 8, 128), 152_064);
pub(crate) const QWEN_72B: Sizes = sizes(8192, 29696, 80, (64, 8, 128), 152_064);

/// Int4, groups of 128, symmetric: what the official checkpoints are.
pub(crate) const INT4: GptqFormat = GptqFormat {
    bits: 4,
    group_size: Some(128),
    sym: true,
    desc_act: false,
    zeros: ZeroPoints::MinusOne,
};

/// A dense Qwen2 of these sizes with all layers quantised as `format`, the rest in F16.
pub(crate) fn shape(sizes: Sizes, format: GptqFormat) -> ModelShape {
    shape_of(sizes, WeightFormat::Gptq(format), true, false)
}

/// A dense Qwen with all layers stored as `format`, with biases or with head norms.
pub(crate) fn shape_of(
    sizes: Sizes,
    format: WeightFormat,
    qkv_bias: bool,
    qk_norm: bool,
) -> ModelShape {
    let Sizes {
        hidden,
        intermediate,
        layers,
        query_heads,
        kv_heads,
        head_dim,
        vocab,
        tied,
    } = sizes;
    let layer = LayerConfig {
        attention: AttentionKind::Full {
            query_heads,
            kv_heads,
            head_dim,
            qkv_bias,
            output_bias: false,
            qk_norm,
        },
        mlp: MlpKind::Dense {
            intermediate_size: intermediate,
        },
    };
    let config = ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: hidden,
        vocab_size: vocab,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: tied,
        rope: RopeConfig {
            theta: 1e6,
            scaling: RopeScaling::Default,
        },
        layers: vec![layer; layers],
        eos_token_ids: vec![0],
        generation: GenerationDefaults::default(),
    };
    let mut modules = ModuleList::default();
    let plain = |name: &str, layer, role, shape: &[usize]| PlainTensor {
        name: name.to_owned(),
        layer,
        role,
        shape: shape.to_vec(),
        dtype: DType::F16,
    };
    modules.plain.push(plain(
        "model.embed_tokens.weight",
        None,
        PlainRole::Embedding,
        &[vocab, hidden],
    ));
    for index in 0..layers {
        let prefix = format!("model.layers.{index}");
        let mut norm = |name: &str, role, width| {
            modules.plain.push(plain(
                &format!("{prefix}.{name}.weight"),
                Some(index),
                role,
                &[width],
            ));
        };
        norm("input_layernorm", PlainRole::InputNorm, hidden);
        norm(
            "post_attention_layernorm",
            PlainRole::PostAttentionNorm,
            hidden,
        );
        if qk_norm {
            norm("self_attn.q_norm", PlainRole::QueryNorm, head_dim);
            norm("self_attn.k_norm", PlainRole::KeyNorm, head_dim);
        }
        let (query, kv) = (query_heads * head_dim, kv_heads * head_dim);
        let mut linear = |name: &str, role, (k, n), split, axis, unit, bias| {
            let (name, format) = (format!("{prefix}.{name}"), format.clone());
            modules.linears.push(LinearModule {
                name,
                layer: Some(index),
                role,
                k,
                n,
                bias,
                split,
                axis,
                unit,
                format,
                requantised: None,
            });
        };
        use {Axis::*, LinearRole as Role, Split::*};
        linear(
            "self_attn.q_proj",
            Role::Query,
            (hidden, query),
            Column,
            QueryHeads,
            head_dim,
            qkv_bias,
        );
        linear(
            "self_attn.k_proj",
            Role::Key,
            (hidden, kv),
            Column,
            KvHeads,
            head_dim,
            qkv_bias,
        );
        linear(
            "self_attn.v_proj",
            Role::Value,
            (hidden, kv),
            Column,
            KvHeads,
            head_dim,
            qkv_bias,
        );
        linear(
            "self_attn.o_proj",
            Role::Output,
            (query, hidden),
            Row,
            QueryHeads,
            head_dim,
            false,
        );
        linear(
            "mlp.gate_proj",
            Role::Gate,
            (hidden, intermediate),
            Column,
            Ffn,
            1,
            false,
        );
        linear(
            "mlp.up_proj",
            Role::Up,
            (hidden, intermediate),
            Column,
            Ffn,
            1,
            false,
        );
        linear(
            "mlp.down_proj",
            Role::Down,
            (intermediate, hidden),
            Row,
            Ffn,
            1,
            false,
        );
    }
    modules.plain.push(plain(
        "model.norm.weight",
        None,
        PlainRole::FinalNorm,
        &[hidden],
    ));
    modules.linears.push(LinearModule {
        name: if tied {
            "model.embed_tokens"
        } else {
            "lm_head"
        }
        .to_owned(),
        layer: None,
        role: LinearRole::LmHead,
        k: hidden,
        n: vocab,
        bias: false,
        split: Split::Column,
        axis: Axis::Vocab,
        unit: 1,
        format: WeightFormat::Dense(DType::F16),
        requantised: None,
    });
    ModelShape::new(config, &modules)
}

/// Settings of a small server.
pub(crate) fn settings() -> PlanSettings {
    PlanSettings {
        max_context_tokens: 4096,
        max_sequences: 4,
        max_step_tokens: 512,
        max_logit_rows: 64,
        block_tokens: 16,
        kv_dtype: KvDType::F16,
        precision: Precision::Exact,
        lm_head: LmHead::Fp16,
        memory_reserve_bytes: 0,
        forced_split: None,
    }
}

/// Plausible paths for a card.
pub(crate) fn paths(weights: WeightKind, rows: usize) -> Option<PathFacts> {
    let bytes_per_weight = match weights {
        WeightKind::Gptq { bits } => f64::from(bits) / 8.0,
        WeightKind::Dense16 => 2.0,
        WeightKind::Dense32 => 4.0,
    };
    Some(PathFacts {
        path: if rows == 1 { "gemv" } else { "gemm" }.to_owned(),
        arithmetic: Arithmetic::Dp4a,
        bytes_per_weight,
        column_multiple: 8,
        row_multiple: 8,
        scale_rows: 0,
        bytes_per_scale: 4.0,
        scratch_bytes_per_row: 8192.0,
        scratch_bytes: 1e6,
    })
}

/// Cards by their specifications, with plausible paths.
pub(crate) fn cards(specs: &[&str]) -> Vec<Capabilities> {
    specs
        .iter()
        .map(|spec| preset(spec).expect("a known card").capabilities(paths))
        .collect()
}

/// A worker of this much memory and speed, with paths for every kind of weight.
pub(crate) fn worker(usable_bytes: u64, bytes_per_second: f64) -> Capabilities {
    let kinds = [2, 3, 4, 8].map(|bits| WeightKind::Gptq { bits });
    let linear = |weights, max_rows: usize| {
        let facts = paths(weights, max_rows).expect("every kind has a path");
        LinearCapability {
            weights,
            max_rows,
            path: facts.path,
            bytes_per_weight: facts.bytes_per_weight,
            column_multiple: facts.column_multiple,
            row_multiple: facts.row_multiple,
            scale_rows: facts.scale_rows,
            bytes_per_scale: facts.bytes_per_scale,
            scratch_bytes_per_row: 64.0,
            scratch_bytes: 1024.0,
            seconds_per_byte: (max_rows as f64).sqrt() / bytes_per_second,
        }
    };
    let kinds = kinds
        .into_iter()
        .chain([WeightKind::Dense16, WeightKind::Dense32]);
    Capabilities {
        device: format!("test {:.0} GB/s", bytes_per_second / 1e9),
        usable_bytes,
        read_bytes_per_second: bytes_per_second,
        all_reduce_latency_seconds: 20e-6,
        op_latency_seconds: 2e-6,
        linears: kinds
            .flat_map(|kind| [linear(kind, 1), linear(kind, 64)])
            .collect(),
        recordings: Recordings::default(),
    }
}

/// A small generator of seeded numbers (SplitMix64).
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `low..=high`.
    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// From `low` up to `high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.within(0, items.len() - 1)]
    }
}
