//! A model's configuration as typed data.

pub(crate) mod fields;
mod parse;
mod rope;

pub use parse::{CONFIG_FILE, GENERATION_CONFIG_FILE};

/// Longest context that is believed, in tokens.
pub(crate) const MOST_POSITIONS: usize = 1 << 28;

/// Decoder families that are served; others are refused by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `Qwen2ForCausalLM`: Qwen1.5, Qwen2, Qwen2.5, QwQ, Qwen2.5-Coder.
    Qwen2,
    /// `Qwen3ForCausalLM`: dense Qwen3.
    Qwen3,
}

/// What the whole model is. Field names follow `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Decoder family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding and of `lm_head`.
    pub vocab_size: usize,
    /// Longest sequence that the checkpoint was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// How rotary angles are computed.
    pub rope: RopeConfig,
    /// One entry per decoder layer.
    pub layers: Vec<LayerConfig>,
    /// Tokens that end a sequence: `config.json` and `generation_config.json` together.
    pub eos_token_ids: Vec<u32>,
    /// Sampling defaults from `generation_config.json`.
    pub generation: GenerationDefaults,
}

/// What one decoder layer is.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// The token mixer.
    pub attention: AttentionKind,
    /// The channel mixer.
    pub mlp: MlpKind,
}

/// Token mixers. Linear attention joins here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Softmax attention over the whole context, grouped queries.
    Full {
        /// Query heads.
        query_heads: usize,
        /// Key and value heads; divides `query_heads`.
        kv_heads: usize,
        /// Channels per head.
        head_dim: usize,
        /// q, k and v projections carry a bias.
        qkv_bias: bool,
        /// The output projection carries a bias (`attention_bias` of Qwen3). One rank alone adds it.
        output_bias: bool,
        /// q and k are RMS-normalised per head before the rotation.
        qk_norm: bool,
    },
}

/// Channel mixers. Mixtures of experts join here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`.
    Dense {
        /// Width between gate/up and down.
        intermediate_size: usize,
    },
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric sequence of wavelengths.
    pub theta: f64,
    /// How positions beyond the trained ones are reached.
    pub scaling: RopeScaling,
}

/// Rotary scaling types that are computed; others are refused by name.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Unscaled.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// NTK-aware base that grows once a sequence passes the trained length.
    Dynamic {
        /// Stretch of the context.
        factor: f64,
        /// Trained length, in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Trained length, in tokens.
        original_max_position_embeddings: usize,
        /// Rotations above which a channel is left alone.
        beta_fast: f64,
        /// Rotations below which a channel is interpolated.
        beta_slow: f64,
        /// Multiplies cos and sin; computed from `factor` when the file is silent.
        attention_factor: f64,
        /// Correction range is rounded to whole channels.
        truncate: bool,
    },
}

/// Sampling defaults of a checkpoint; a request overrides each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// `do_sample`; false means greedy unless a request sets a temperature.
    pub do_sample: Option<bool>,
    /// `temperature`.
    pub temperature: Option<f32>,
    /// `top_k`.
    pub top_k: Option<u32>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `typical_p`.
    pub typical_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
}
