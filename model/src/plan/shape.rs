//! The model as the planner and the slicer see it, and what one rank holds of each module.

use std::ops::Range;

use super::{LmHead, PlanError, ShardPlan};
use crate::config::{AttentionKind, MlpKind, ModelConfig, RopeScaling};
use crate::modules::{
    Axis, DType, GptqFormat, LinearModule, LinearRole, ModuleList, PlainRole, PlainTensor, Split,
    WeightFormat, ZeroPoints,
};

/// A model, whole: what planning and slicing read.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// The configuration.
    pub config: ModelConfig,
    /// Every linear, `lm_head` included. A module whose `g_idx` was seen not to be monotone must have
    /// `desc_act` set, whatever the quantisation block says.
    pub linears: Vec<LinearModule>,
    /// Embedding and norms.
    pub plain: Vec<PlainTensor>,
}

/// What an unquantised `lm_head` is made into.
const REQUANTISED: GptqFormat = GptqFormat {
    bits: 8,
    group_size: Some(128),
    sym: true,
    desc_act: false,
    zeros: ZeroPoints::Exact,
};

impl ModelShape {
    /// The shape of a model of these modules.
    pub fn new(config: ModelConfig, modules: &ModuleList) -> Self {
        Self {
            config,
            linears: modules.linears.clone(),
            plain: modules.plain.clone(),
        }
    }

    /// The shape with an unquantised `lm_head` held as `held` says.
    #[must_use]
    pub fn with_lm_head(mut self, held: LmHead) -> Self {
        let heads = self
            .linears
            .iter_mut()
            .filter(|linear| linear.role == LinearRole::LmHead && held == LmHead::Int8);
        for head in heads {
            if let WeightFormat::Dense(dtype) = head.format {
                head.format = WeightFormat::Gptq(REQUANTISED);
                head.requantised = Some(dtype);
            }
        }
        self
    }

    fn embedding(&self) -> Option<&PlainTensor> {
        let mut plain = self.plain.iter();
        plain.find(|tensor| tensor.role == PlainRole::Embedding)
    }

    /// Element type of the embedding as stored; 16-bit when the list has none.
    pub fn embedding_dtype(&self) -> DType {
        self.embedding().map_or(DType::F16, |tensor| tensor.dtype)
    }

    /// The tensor that holds the embedding.
    pub(crate) fn embedding_name(&self) -> Option<&str> {
        self.embedding().map(|tensor| tensor.name.as_str())
    }

    /// The embedding is read from `lm_head`'s storage: tied, and not quantised.
    pub fn shares_embedding(&self) -> bool {
        self.config.tie_word_embeddings
            && self.linears.iter().any(|linear| {
                linear.role == LinearRole::LmHead && matches!(linear.format, WeightFormat::Dense(_))
            })
    }

    /// Longest context that the rotary positions reach, in tokens: `max_position_embeddings`, or
    /// the trained length times the factor where scaling reaches farther.
    pub fn context_limit(&self) -> usize {
        let trained = self.config.max_position_embeddings;
        match self.config.rope.scaling {
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            }
            | RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                ..
            } if factor.is_finite() => trained.max((original as f64 * factor) as usize),
            RopeScaling::Linear { factor } if factor.is_finite() => {
                trained.max((trained as f64 * factor) as usize)
            }
            _ => trained,
        }
    }

    /// Largest world size that the model allows, with what limits it and how many of it there are.
    pub fn largest_world(&self) -> (usize, &'static str, usize) {
        let heads = self
            .config
            .layers
            .iter()
            .map(|layer| attention(&layer.attention).query_heads)
            .min();
        let heads = heads.unwrap_or(0);
        let vocab = self.config.vocab_size;
        if vocab < heads {
            (vocab, "vocabulary rows", vocab)
        } else {
            (heads, "query heads", heads)
        }
    }

    /// Checks that the linears agree with the configuration on every dimension that is cut.
    ///
    /// # Errors
    /// [`PlanError::BadShape`] with the module and what is wrong with it.
    pub(super) fn check(&self) -> Result<(), PlanError> {
        let bad = |module: &str, why: String| {
            Err(PlanError::BadShape {
                module: module.to_owned(),
                why,
            })
        };
        let config = &self.config;
        for (name, value) in [
            ("hidden_size", config.hidden_size),
            ("vocab_size", config.vocab_size),
        ] {
            if value == 0 || value > MOST_ELEMENTS {
                return bad(name, format!("{value} is not a size"));
            }
        }
        if config.layers.is_empty() {
            return bad("layers", "there are none".to_owned());
        }
        for (index, layer) in config.layers.iter().enumerate() {
            let AttentionKind::Full {
                query_heads,
                kv_heads,
                head_dim,
                ..
            } = layer.attention;
            let MlpKind::Dense { intermediate_size } = layer.mlp;
            let name = format!("layer {index}");
            let sizes = [query_heads, kv_heads, head_dim, intermediate_size];
            if sizes.iter().any(|size| *size == 0 || *size > MOST_ELEMENTS) {
                return bad(&name, "a size is zero or absurd".to_owned());
            }
            if query_heads % kv_heads != 0 {
                return bad(
                    &name,
                    format!("{query_heads} query heads do not divide into {kv_heads} kv heads"),
                );
            }
        }
        for linear in &self.linears {
            if linear
                .layer
                .is_some_and(|layer| layer >= config.layers.len())
            {
                return bad(&linear.name, "its layer does not exist".to_owned());
            }
            if linear.layer.is_none() != (linear.axis == Axis::Vocab) {
                return bad(
                    &linear.name,
                    "only modules of the vocabulary stand outside the layers".to_owned(),
                );
            }
            if linear.k > MOST_ELEMENTS
                || linear.n > MOST_ELEMENTS
                || linear.k == 0
                || linear.n == 0
            {
                return bad(
                    &linear.name,
                    format!("{} by {} is not a size", linear.k, linear.n),
                );
            }
            if let WeightFormat::Gptq(GptqFormat {
                group_size: Some(0),
                ..
            }) = linear.format
            {
                return bad(&linear.name, "groups of 0 rows".to_owned());
            }
            let cut = match linear.split {
                Split::Column => linear.n,
                Split::Row => linear.k,
                Split::Replicated => continue,
            };
            let units = self.axis_units(linear);
            if units.checked_mul(linear.unit) != Some(cut) {
                return bad(
                    &linear.name,
                    format!("{units} units of {} do not make {cut}", linear.unit),
                );
            }
        }
        if !self
            .linears
            .iter()
            .any(|linear| linear.role == LinearRole::LmHead)
        {
            return bad("lm_head", "missing".to_owned());
        }
        for tensor in &self.plain {
            let expected = tensor.role != PlainRole::Embedding
                || tensor.shape == [config.vocab_size, config.hidden_size];
            if !expected
                || tensor
                    .shape
                    .iter()
                    .any(|size| *size == 0 || *size > MOST_ELEMENTS)
            {
                return bad(&tensor.name, format!("{:?} is not its shape", tensor.shape));
            }
        }
        let embeddings = self
            .plain
            .iter()
            .filter(|tensor| tensor.role == PlainRole::Embedding)
            .count();
        if embeddings != 1 {
            return bad(
                "model.embed_tokens.weight",
                format!("there are {embeddings} of it"),
            );
        }
        Ok(())
    }

    /// Units of the axis that a module follows, in its own layer.
    fn axis_units(&self, linear: &LinearModule) -> usize {
        let layer = linear.layer.and_then(|layer| self.config.layers.get(layer));
        match (linear.axis, layer) {
            (Axis::Vocab, _) => self.config.vocab_size,
            (_, None) => 0,
            (Axis::QueryHeads, Some(layer)) => attention(&layer.attention).query_heads,
            (Axis::KvHeads, Some(layer)) => attention(&layer.attention).kv_heads,
            (Axis::Ffn, Some(layer)) => channels(&layer.mlp),
        }
    }
}

/// No dimension of any model comes near this; the bytes of a matrix of two of them fit in 64 bits.
const MOST_ELEMENTS: usize = 1 << 28;

/// Head counts of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heads {
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Head counts of a token mixer.
pub(super) fn attention(kind: &AttentionKind) -> Heads {
    match *kind {
        AttentionKind::Full {
            query_heads,
            kv_heads,
            head_dim,
            ..
        } => Heads {
            query_heads,
            kv_heads,
            head_dim,
        },
    }
}

/// Channels of a channel mixer that are cut.
pub(super) fn channels(kind: &MlpKind) -> usize {
    match *kind {
        MlpKind::Dense { intermediate_size } => intermediate_size,
    }
}

/// KV heads that the query heads of a range read, with `queries_per_kv` query heads to each:
/// `floor(start / g) .. ceil(end / g)`. Two ranks share one exactly where a boundary cuts its group.
pub fn kv_heads_of(query_heads: &Range<usize>, queries_per_kv: usize) -> Range<usize> {
    let start = query_heads.start / queries_per_kv;
    if query_heads.is_empty() {
        return start..start;
    }
    start..query_heads.end.div_ceil(queries_per_kv)
}

/// Input rows and output columns that a rank holds of a module, in elements, when it holds `units`
/// of the module's axis.
pub fn module_extent(module: &LinearModule, units: &Range<usize>) -> (Range<usize>, Range<usize>) {
    let cut = units.start * module.unit..units.end * module.unit;
    match module.split {
        Split::Column => (0..module.k, cut),
        Split::Row => (cut, 0..module.n),
        Split::Replicated => (0..module.k, 0..module.n),
    }
}

/// Rows of a module may belong to groups in any order: every cut of its rows may touch every group.
pub fn act_order(format: &GptqFormat) -> bool {
    format.desc_act && format.group_size.is_some()
}

impl ShardPlan {
    /// Ranks in the group.
    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// KV heads that a rank holds of a layer.
    ///
    /// # Panics
    /// When the plan was not made for this configuration, or has no such layer or rank.
    pub fn kv_heads(&self, config: &ModelConfig, layer: usize, rank: usize) -> Range<usize> {
        let heads = attention(&config.layers[layer].attention);
        kv_heads_of(
            &self.layers[layer].query_heads[rank],
            heads.query_heads / heads.kv_heads,
        )
    }

    /// Units of a module's axis that a rank holds.
    ///
    /// # Panics
    /// As [`ShardPlan::kv_heads`].
    pub fn units(&self, config: &ModelConfig, module: &LinearModule, rank: usize) -> Range<usize> {
        match (module.axis, module.layer) {
            (Axis::Vocab, _) | (_, None) => self.vocab[rank].clone(),
            (Axis::QueryHeads, Some(layer)) => self.layers[layer].query_heads[rank].clone(),
            (Axis::KvHeads, Some(layer)) => self.kv_heads(config, layer, rank),
            (Axis::Ffn, Some(layer)) => self.layers[layer].ffn[rank].clone(),
        }
    }

    /// Input rows and output columns that a rank holds of a module, in elements.
    ///
    /// # Panics
    /// As [`ShardPlan::kv_heads`].
    pub fn extent(
        &self,
        config: &ModelConfig,
        module: &LinearModule,
        rank: usize,
    ) -> (Range<usize>, Range<usize>) {
        module_extent(module, &self.units(config, module, rank))
    }
}
