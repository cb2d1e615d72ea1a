//! Every module a model has, by its name in the checkpoint, and how it splits across ranks.

use std::collections::BTreeMap;

use crate::checkpoint::TensorInfo;

pub(crate) mod implied;
mod list;

pub use list::modules;

/// How a linear is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// By output columns; outputs are a rank's own.
    Column,
    /// By input rows; outputs are partial sums.
    Row,
    /// Every rank holds all of it.
    Replicated,
}

/// Dimension that a plan cuts into one range per rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Query heads of an attention layer.
    QueryHeads,
    /// KV heads, derived from the query heads that read them.
    KvHeads,
    /// Channels between gate/up and down.
    Ffn,
    /// Rows of the vocabulary.
    Vocab,
}

/// Element type of an unquantised tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

/// How a linear's weights are stored in the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightFormat {
    /// `.weight`, shape (out, in).
    Dense(DType),
    /// `.qweight`, `.qzeros`, `.scales`, `.g_idx`.
    Gptq(GptqFormat),
}

/// Quantisation of one GPTQ linear, after `dynamic` overrides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GptqFormat {
    /// 2, 3, 4 or 8.
    pub bits: u8,
    /// Rows of K per group; `None` is one group over the whole K (`-1`).
    pub group_size: Option<usize>,
    /// Symmetric: the zero point is 2^(bits-1) whatever `qzeros` says.
    pub sym: bool,
    /// Act-order was declared; whether `g_idx` is monotone is read from the tensor.
    pub desc_act: bool,
    /// How stored zero points are read.
    pub zeros: ZeroPoints,
}

/// Meaning of a stored zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroPoints {
    /// `gptq`: stored minus one.
    MinusOne,
    /// `gptq_v2`: stored as is.
    Exact,
}

/// What a linear computes in the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearRole {
    /// Attention input projections.
    Query,
    /// See [`LinearRole::Query`].
    Key,
    /// See [`LinearRole::Query`].
    Value,
    /// Attention output projection.
    Output,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
    /// Vocabulary projection.
    LmHead,
}

/// One linear of the model, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearModule {
    /// Prefix of its tensors, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `None` for `lm_head`.
    pub layer: Option<usize>,
    /// What it computes.
    pub role: LinearRole,
    /// Input width.
    pub k: usize,
    /// Output width.
    pub n: usize,
    /// A `.bias` tensor of `n` values exists.
    pub bias: bool,
    /// How it is cut.
    pub split: Split,
    /// What the cut follows.
    pub axis: Axis,
    /// Elements of `n` (Column) or `k` (Row) per unit of the axis: `head_dim` for heads, 1 elsewhere.
    pub unit: usize,
    /// How a device holds its weights; of a checkpoint also how they are stored, unless `requantised`.
    pub format: WeightFormat,
    /// The element type in the checkpoint, where `format` is made of unquantised weights at load.
    pub requantised: Option<DType>,
}

/// What an unquantised tensor outside the linears is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlainRole {
    /// Token embeddings, (vocabulary, hidden).
    Embedding,
    /// RMS norm before attention, (hidden).
    InputNorm,
    /// RMS norm before the MLP, (hidden).
    PostAttentionNorm,
    /// RMS norm of each query head, (head_dim).
    QueryNorm,
    /// RMS norm of each key head, (head_dim).
    KeyNorm,
    /// RMS norm before `lm_head`, (hidden).
    FinalNorm,
}

/// One tensor outside the linears, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct PlainTensor {
    /// Its full name, such as `model.norm.weight`.
    pub name: String,
    /// `None` for the embeddings and the final norm.
    pub layer: Option<usize>,
    /// What it is.
    pub role: PlainRole,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: DType,
}

/// Tensors of a checkpoint by name.
pub type TensorMap = BTreeMap<String, TensorInfo>;

/// Everything that a model is made of, and what else lies in its files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModuleList {
    /// Linears: by layer q, k, v, o, gate, up, down; `lm_head` last. A tied `lm_head` is the dense module
    /// `model.embed_tokens`.
    pub linears: Vec<LinearModule>,
    /// Embeddings and norms.
    pub plain: Vec<PlainTensor>,
    /// Tensors that nothing reads: not an error, but worth a warning. Left-over `rotary_emb.inv_freq`
    /// tensors of older exporters are not listed.
    pub extra: Vec<String>,
    /// `.bias` tensors of linears that have none in this architecture. Older exporters write zeros there;
    /// other engines skip them, and so do we.
    pub unused_biases: Vec<String>,
    /// `lm_head.weight` lies beside the embeddings that it is tied to.
    pub tied_head_stored: bool,
}
