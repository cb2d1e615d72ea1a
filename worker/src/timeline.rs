//! What of a step is timed when somebody wants to know where its time goes.
//!
//! A device that was told to time puts down a [`Mark`] after each part of a step; what lies between two
//! marks is the later one's time. Otherwise marks cost a comparison.

/// A part of a step, and the order of parts within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The batch's arrays are brought to the device.
    Begin,
    /// Rows of the embedding.
    Embed,
    /// Their sum over ranks.
    EmbedSum,
    /// The residual takes in the layer before, and the attention's norm.
    AttentionNorm,
    /// Queries, keys and values.
    Qkv,
    /// Rotation, and keys and values into the cache.
    Rotate,
    /// Softmax attention.
    Attention,
    /// Its output projection.
    Output,
    /// The sum of its output over ranks.
    AttentionSum,
    /// The residual takes in the attention, and the MLP's norm.
    MlpNorm,
    /// Gate and up projections.
    GateUp,
    /// Activation.
    Silu,
    /// Down projection.
    Down,
    /// The sum of its output over ranks.
    MlpSum,
    /// The residual takes in the last layer, the last norm, and the rows whose logits are wanted.
    FinalNorm,
    /// Logits.
    LmHead,
    /// The wait for the device, and the guard against values that are not finite.
    Check,
    /// Each row of logits down to what drawing needs.
    Reduce,
    /// Tokens of what all ranks reduced.
    Draw,
}

impl Part {
    /// Its place in the tree of a step, from the outermost group to its own name.
    pub const fn place(self) -> &'static [&'static str] {
        match self {
            Self::Begin => &["begin"],
            Self::Embed => &["embedding", "rows"],
            Self::EmbedSum => &["embedding", "all_reduce"],
            Self::AttentionNorm => &["layers", "attention", "norm"],
            Self::Qkv => &["layers", "attention", "qkv"],
            Self::Rotate => &["layers", "attention", "rope_kv_write"],
            Self::Attention => &["layers", "attention", "attention"],
            Self::Output => &["layers", "attention", "o_proj"],
            Self::AttentionSum => &["layers", "attention", "all_reduce"],
            Self::MlpNorm => &["layers", "mlp", "norm"],
            Self::GateUp => &["layers", "mlp", "gate_up"],
            Self::Silu => &["layers", "mlp", "silu"],
            Self::Down => &["layers", "mlp", "down"],
            Self::MlpSum => &["layers", "mlp", "all_reduce"],
            Self::FinalNorm => &["lm_head", "norm"],
            Self::LmHead => &["lm_head", "linear"],
            Self::Check => &["check"],
            Self::Reduce => &["sampling", "reduce"],
            Self::Draw => &["sampling", "draw"],
        }
    }

    /// True of sums over ranks.
    pub const fn is_sum(self) -> bool {
        matches!(self, Self::EmbedSum | Self::AttentionSum | Self::MlpSum)
    }
}

/// The end of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Absent outside the layers.
    pub layer: Option<usize>,
    /// What ended.
    pub part: Part,
}

impl Mark {
    /// The end of a part outside the layers.
    pub const fn of(part: Part) -> Self {
        Self { layer: None, part }
    }
}

/// A part's seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Which part, and whose.
    pub mark: Mark,
    /// From the mark before to this one, on the device's clock.
    pub seconds: f64,
}
