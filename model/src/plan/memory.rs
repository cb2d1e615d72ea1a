//! Bytes that a rank needs, by purpose: exact from the layout that its device reports.

use std::ops::Range;

use super::recordings::recorded_bytes;
use super::shape::{act_order, attention};
use super::{KvDType, LmHead, ModelShape, PlanSettings, RankMemory, ShardPlan};
use crate::capabilities::{Capabilities, Layout, WeightKind};
use crate::config::ModelConfig;
use crate::modules::{
    DType, GptqFormat, LinearModule, LinearRole, PlainRole, PlainTensor, Split, WeightFormat,
};

/// Bytes of a row's index, kept where act-order lets rows stand in any order.
const ROW_INDEX_BYTES: u64 = 4;
/// Bytes of a bias, a norm weight and every activation.
const F32_BYTES: u64 = 4;

/// Bytes of one linear, or of the part of it that a rank holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinearBytes {
    /// Weights, without padding, and the bias.
    pub weights: u64,
    /// What fills columns and group runs up to the layout's multiples.
    pub padding: u64,
    /// Scales with zero points, and row indices under act-order.
    pub scales: u64,
}

impl LinearBytes {
    /// All of it: what one pass over the linear reads.
    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.padding)
            .saturating_add(self.scales)
    }

    /// Bytes of `count` such linears.
    pub fn times(&self, count: u64) -> Self {
        Self {
            weights: self.weights.saturating_mul(count),
            padding: self.padding.saturating_mul(count),
            scales: self.scales.saturating_mul(count),
        }
    }
}

/// Bytes of the `rows` by `columns` part of a module in a layout. `bias` says whether this rank adds
/// the module's bias: its own columns of it, or, of a row-parallel module, all of it.
///
/// Quantised rows are stored as one run per group that the range touches, each padded to
/// `row_multiple`, with one scale per touched group and column, or as [`Layout`] says. Under act-order the worst case
/// counts: a cut of the rows touches every group, and each of their runs is short of a multiple by
/// one row less than it.
pub fn linear_bytes(
    module: &LinearModule,
    rows: &Range<usize>,
    columns: &Range<usize>,
    layout: &Layout,
    bias: bool,
) -> LinearBytes {
    let (height, width) = (rows.len() as u64, columns.len() as u64);
    if height == 0 || width == 0 {
        return LinearBytes::default();
    }
    let padded_width = width.next_multiple_of(layout.column_multiple as u64);
    let runs = runs(module, rows, layout);
    let weights = bytes_of(height, width, layout.bytes_per_weight);
    let per_scale = match &module.format {
        WeightFormat::Gptq(format) if format.sym => layout.bytes_per_scale / 2.0,
        _ => layout.bytes_per_scale,
    };
    let scales = bytes_of(runs.scales, width, per_scale);
    let padded = bytes_of(runs.padded_rows, padded_width, layout.bytes_per_weight)
        .saturating_add(bytes_of(runs.scales, padded_width, per_scale));
    let bias_bytes = if bias && module.bias {
        width * F32_BYTES
    } else {
        0
    };
    LinearBytes {
        weights: weights.saturating_add(bias_bytes),
        padding: padded.saturating_sub(weights).saturating_sub(scales),
        scales: scales.saturating_add(if runs.indexed {
            height * ROW_INDEX_BYTES
        } else {
            0
        }),
    }
}

/// Rows of a module as stored: group runs.
struct Runs {
    padded_rows: u64,
    /// Scales of a column.
    scales: u64,
    indexed: bool,
}

fn runs(module: &LinearModule, rows: &Range<usize>, layout: &Layout) -> Runs {
    let multiple = layout.row_multiple;
    let WeightFormat::Gptq(format) = &module.format else {
        return Runs {
            padded_rows: rows.len().next_multiple_of(multiple) as u64,
            scales: 0,
            indexed: false,
        };
    };
    let groups = groups_of(format, module.k, rows);
    let size = format.group_size.unwrap_or(module.k);
    let indexed = act_order(format);
    let of = |padded, starts: &dyn Fn(usize) -> bool| {
        Runs::of(padded, groups.len(), indexed, layout.scale_rows, starts)
    };
    if indexed && *rows != (0..module.k) {
        let worst = rows.len() + groups.len() * (multiple - 1);
        return of(worst.min(rows.len().saturating_mul(multiple)), &|_| false);
    }
    if groups.len() == 1 {
        return of(rows.len().next_multiple_of(multiple), &|_| true);
    }
    let first = ((groups.start + 1) * size - rows.start).next_multiple_of(multiple);
    let middle = size.next_multiple_of(multiple);
    let last = (rows.end - (groups.end - 1) * size).next_multiple_of(multiple);
    of(first + (groups.len() - 2) * middle + last, &|rows| {
        first.is_multiple_of(rows) && (groups.len() == 2 || middle.is_multiple_of(rows))
    })
}

impl Runs {
    /// `starts` says whether every run starts at a multiple of so many rows.
    fn of(
        padded_rows: usize,
        groups: usize,
        indexed: bool,
        scale_rows: usize,
        starts: &dyn Fn(usize) -> bool,
    ) -> Self {
        let (padded_rows, scales) = match scale_rows {
            0 => (padded_rows, groups),
            _ => {
                let parts = [1, 2].into_iter().find(|parts| starts(scale_rows / parts));
                let blocks = padded_rows.div_ceil(scale_rows);
                (blocks * scale_rows, blocks * parts.unwrap_or(4))
            }
        };
        Self {
            padded_rows: padded_rows as u64,
            scales: scales as u64,
            indexed,
        }
    }
}

/// Groups of a module of `k` input rows whose scales a rank that holds `rows` keeps: those that the
/// range touches, or, where act-order may be on, all of them.
pub fn groups_of(format: &GptqFormat, k: usize, rows: &Range<usize>) -> Range<usize> {
    let size = format.group_size.unwrap_or(k).max(1);
    if rows.is_empty() {
        let start = rows.start / size;
        start..start
    } else if act_order(format) {
        0..k.div_ceil(size)
    } else {
        rows.start / size..rows.end.div_ceil(size)
    }
}

/// Bytes of `count * width` elements of a possibly fractional size, rounded up.
fn bytes_of(count: u64, width: u64, bytes_each: f64) -> u64 {
    (count as f64 * width as f64 * bytes_each).ceil() as u64
}

/// Product of sizes; saturates, so that an absurd request does not fit instead of wrapping round.
pub(super) fn product(factors: &[u64]) -> u64 {
    factors
        .iter()
        .fold(1, |product, factor| product.saturating_mul(*factor))
}

/// Bytes of an unquantised element.
pub fn dtype_bytes(dtype: DType) -> u64 {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::Bf16 => 2,
    }
}

/// Bytes of one head of a token's key, or of its value, with the scale that an int8 cache keeps of it.
pub fn kv_row_bytes(dtype: KvDType, head_dim: usize) -> u64 {
    let (element, scale) = match dtype {
        KvDType::F32 => (4, 0),
        KvDType::F16 => (2, 0),
        KvDType::Int8 => (1, 4),
    };
    product(&[head_dim as u64, element]).saturating_add(scale)
}

/// Bytes of keys and values of one KV block of one layer.
pub fn kv_block_bytes(settings: &PlanSettings, kv_heads_local: usize, head_dim: usize) -> u64 {
    product(&[
        2,
        settings.block_tokens as u64,
        kv_heads_local as u64,
        kv_row_bytes(settings.kv_dtype, head_dim),
    ])
}

/// Blocks that hold one sequence of `max_context_tokens`, and the reserved block: the least with
/// which a group may run.
pub fn least_blocks(settings: &PlanSettings) -> usize {
    settings
        .max_context_tokens
        .div_ceil(settings.block_tokens)
        .saturating_add(1)
}

/// Blocks that hold `max_sequences` sequences of `max_context_tokens`, and the reserved block.
pub fn wanted_blocks(settings: &PlanSettings) -> usize {
    let each = settings.max_context_tokens.div_ceil(settings.block_tokens);
    each.saturating_mul(settings.max_sequences)
        .saturating_add(1)
}

/// Widths of a rank's own activations, in elements: the largest over the layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalWidths {
    /// Columns of the query projection.
    pub query: usize,
    /// Columns of the key projection, and of the value projection.
    pub kv: usize,
    /// Rows of the attention output projection.
    pub attention: usize,
    /// Channels between gate/up and down.
    pub ffn: usize,
    /// Rows of the vocabulary.
    pub vocab: usize,
}

impl LocalWidths {
    /// Widens by what a rank holds of one module.
    pub fn include(&mut self, role: LinearRole, rows: &Range<usize>, columns: &Range<usize>) {
        let (field, width) = match role {
            LinearRole::Query => (&mut self.query, columns.len()),
            LinearRole::Key | LinearRole::Value => (&mut self.kv, columns.len()),
            LinearRole::Output => (&mut self.attention, rows.len()),
            LinearRole::Gate | LinearRole::Up => (&mut self.ffn, columns.len()),
            LinearRole::Down => (&mut self.ffn, rows.len()),
            LinearRole::LmHead => (&mut self.vocab, columns.len()),
        };
        *field = (*field).max(width);
    }

    /// The wider of two, field by field.
    pub fn max(self, other: Self) -> Self {
        Self {
            query: self.query.max(other.query),
            kv: self.kv.max(other.kv),
            attention: self.attention.max(other.attention),
            ffn: self.ffn.max(other.ffn),
            vocab: self.vocab.max(other.vocab),
        }
    }
}

/// Rows of logits that one step may ask for.
pub fn logit_rows(settings: &PlanSettings) -> usize {
    settings.max_logit_rows.min(settings.max_step_tokens)
}

/// Every activation buffer and table that a worker allocates before its first step, with its bytes.
/// The worker allocates by this list, so that what is planned is what is used.
pub fn buffer_sizes(
    config: &ModelConfig,
    settings: &PlanSettings,
    widths: &LocalWidths,
) -> Vec<(&'static str, u64)> {
    let rows = settings.max_step_tokens;
    let logit_rows = logit_rows(settings);
    let rotary = config
        .layers
        .iter()
        .map(|layer| attention(&layer.attention).head_dim / 2)
        .max();
    let f32s = |rows: usize, width: usize| product(&[rows as u64, width as u64, F32_BYTES]);
    vec![
        ("residual", f32s(rows, config.hidden_size)),
        ("normed", f32s(rows, config.hidden_size)),
        ("partial_sum", f32s(rows, config.hidden_size)),
        ("query", f32s(rows, widths.query)),
        ("key", f32s(rows, widths.kv)),
        ("value", f32s(rows, widths.kv)),
        ("attention", f32s(rows, widths.attention)),
        ("gate", f32s(rows, widths.ffn)),
        ("up", f32s(rows, widths.ffn)),
        ("logits", f32s(logit_rows, widths.vocab)),
        // Cosines and sines of every position.
        (
            "rotary",
            f32s(settings.max_context_tokens, rotary.unwrap_or(0)).saturating_mul(2),
        ),
    ]
}

/// Bytes of the norms, which every rank holds whole, in f32.
pub fn norm_bytes(shape: &ModelShape) -> u64 {
    let norms = shape
        .plain
        .iter()
        .filter(|tensor| tensor.role != PlainRole::Embedding);
    let elements = |tensor: &PlainTensor| {
        tensor
            .shape
            .iter()
            .fold(1, |all: u64, size| all.saturating_mul(*size as u64))
    };
    norms
        .map(|tensor| elements(tensor).saturating_mul(F32_BYTES))
        .fold(0, u64::saturating_add)
}

/// Bytes of `rows` rows of the embedding in its own dtype; none where `lm_head` holds them.
pub fn embedding_bytes(shape: &ModelShape, rows: usize) -> u64 {
    if shape.shares_embedding() {
        return 0;
    }
    product(&[
        rows as u64,
        shape.config.hidden_size as u64,
        dtype_bytes(shape.embedding_dtype()),
    ])
}

/// Weight kinds that a model's linears need, in the order of their first use.
pub fn weight_kinds(shape: &ModelShape) -> Vec<WeightKind> {
    let mut kinds = Vec::new();
    for linear in &shape.linears {
        let kind = WeightKind::from(&linear.format);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

/// Weight kinds that any plan of a model may need: `lm_head` may be requantised.
pub fn possible_weight_kinds(shape: &ModelShape) -> Vec<WeightKind> {
    let mut kinds = weight_kinds(shape);
    for kind in weight_kinds(&shape.clone().with_lm_head(LmHead::Int8)) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

/// Scratch bytes of the largest operation of a step.
pub fn scratch_bytes(shape: &ModelShape, settings: &PlanSettings, worker: &Capabilities) -> u64 {
    worker.scratch_bytes(&weight_kinds(shape), settings.max_step_tokens)
}

/// Whether a rank adds a module's bias: each rank its own columns, and rank 0 alone that of a
/// module whose outputs are summed over the ranks.
pub fn adds_bias(module: &LinearModule, rank: usize) -> bool {
    module.bias && (rank == 0 || module.split != Split::Row)
}

impl ShardPlan {
    /// Widths of a rank's own activations.
    ///
    /// # Panics
    /// As [`ShardPlan::kv_heads`].
    pub fn local_widths(&self, shape: &ModelShape, rank: usize) -> LocalWidths {
        let mut widths = LocalWidths::default();
        for module in &shape.linears {
            let (rows, columns) = self.extent(&shape.config, module, rank);
            widths.include(module.role, &rows, &columns);
        }
        widths
    }

    /// Bytes that a rank of this plan needs, where `workers` are all ranks', counted module by module.
    ///
    /// # Panics
    /// As [`ShardPlan::kv_heads`], and when the worker has no path for a module.
    pub fn rank_memory(
        &self,
        shape: &ModelShape,
        workers: &[Capabilities],
        rank: usize,
    ) -> RankMemory {
        let (config, worker) = (&shape.config, &workers[rank]);
        let beside = recorded_bytes(config.layers.len(), &self.settings, workers, rank);
        let mut memory = RankMemory {
            weights: norm_bytes(shape)
                .saturating_add(embedding_bytes(shape, self.vocab[rank].len())),
            scratch: scratch_bytes(shape, &self.settings, worker),
            graphs: beside.graphs,
            nccl: beside.nccl,
            ..RankMemory::default()
        };
        for module in &shape.linears {
            let (rows, columns) = self.extent(config, module, rank);
            let entry = worker.linear((&module.format).into(), 1);
            let layout = entry
                .expect("a planned worker has a path for every module")
                .layout();
            memory.add_linear(&linear_bytes(
                module,
                &rows,
                &columns,
                &layout,
                adds_bias(module, rank),
            ));
        }
        for (layer, kind) in config.layers.iter().enumerate() {
            let heads = self.kv_heads(config, layer, rank).len();
            let block = kv_block_bytes(&self.settings, heads, attention(&kind.attention).head_dim);
            let bytes = block.saturating_mul(self.kv_blocks as u64);
            memory.kv_cache = memory.kv_cache.saturating_add(bytes);
        }
        let buffers = buffer_sizes(config, &self.settings, &self.local_widths(shape, rank));
        memory.buffers = buffers
            .iter()
            .fold(0, |sum: u64, buffer| sum.saturating_add(buffer.1));
        memory
    }
}

impl RankMemory {
    /// Adds the bytes of one linear.
    pub(super) fn add_linear(&mut self, bytes: &LinearBytes) {
        self.weights = self.weights.saturating_add(bytes.weights);
        self.padding = self.padding.saturating_add(bytes.padding);
        self.scales = self.scales.saturating_add(bytes.scales);
    }
}
