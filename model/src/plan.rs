//! Uneven tensor-parallel plans: who holds what, what it takes, and why a model does not fit.
//!
//! # What is cut
//!
//! Layers of the same shape share one cut of their query heads and one of their channels; the
//! vocabulary is cut once. A range goes to each rank, in the order of the workers given. Query heads
//! are cut anywhere (KV heads follow, [`kv_heads_of`]); channels at the quantisation groups of the
//! down projection wherever every rank can get one, else at multiples of 8, else anywhere (finer
//! cuts are also tried before a model is said not to fit); the vocabulary at multiples of 16. Every
//! rank gets a query head, a vocabulary row, and a channel step if there are as many.
//!
//! # The objective
//!
//! Ranks wait for each other at every all-reduce, so a rank that is late in the attention is not
//! helped by being early in the MLP. The planner therefore minimises the sum, over attention, MLP and
//! vocabulary, of the **slowest rank's** time, where a rank's time is that of a one-row decode step
//! (every byte of its weights, scales and padding at the device's rate for one row, its KV heads over
//! up to 2048 tokens of context at its read bandwidth, and its launches), plus four prompt tokens'
//! share of a prefill step for each generated token. Attention's own prefill arithmetic is left out.
//!
//! Memory is a limit: what a rank needs with one full context must fit. Between plans that fit, one
//! that holds a fraction f of the KV blocks that `max_sequences` full contexts would take counts as
//! 1 + (1 - f) / 2 times as slow. Of equal plans the one with the least sum of squared times wins:
//! least shared work, most evenly spread. The search is described in `search.rs`; it is a pure
//! function of its input.

mod axis;
mod candidate;
mod check;
mod cost;
mod digest;
mod error;
mod fit;
mod memory;
mod presets;
mod recordings;
mod search;
mod shape;
mod starts;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use check::check_settings;
pub use digest::digest;
pub use error::{PlanError, RankShortfall, Shortfall};
pub use memory::{
    LinearBytes, LocalWidths, adds_bias, buffer_sizes, dtype_bytes, embedding_bytes, groups_of,
    kv_block_bytes, kv_row_bytes, least_blocks, linear_bytes, logit_rows, norm_bytes,
    possible_weight_kinds, scratch_bytes, wanted_blocks, weight_kinds,
};
pub use presets::{
    Arithmetic, ArithmeticRates, CardPreset, PathFacts, PresetError, card_names, parse_bytes,
    preset,
};
pub use recordings::{RecordedBytes, recorded_bytes, recorded_sizes};
pub use shape::{ModelShape, act_order, kv_heads_of, module_extent};
pub use table::table;

use crate::capabilities::Capabilities;
use axis::{AxisKind, CutAxis, Grain};
use candidate::Candidate;
use cost::Problem;

/// Storage type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// 8-bit integers with one binary32 scale per token and head.
    Int8,
}

impl KvDType {
    /// As settings and reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

impl std::str::FromStr for KvDType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::F32, Self::F16, Self::Int8]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| format!("`{name}` is not f32, f16 or int8"))
    }
}

/// Which family of arithmetic ranks may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// fp32 activations and sums.
    #[default]
    Exact,
    /// Activations rounded to 8-bit integers where a card gains from it.
    Fast,
}

/// How `lm_head` is held where the checkpoint has it unquantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LmHead {
    /// As the checkpoint stores it.
    #[default]
    Fp16,
    /// Requantised at load: 8 bits, symmetric, a scale for every 128 rows of a column.
    Int8,
}

/// What the coordinator decides for the whole group; part of the plan and its digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanSettings {
    /// Longest sequence, prompt and output together.
    pub max_context_tokens: usize,
    /// Sequences that may run at once.
    pub max_sequences: usize,
    /// Tokens of one step, all rows together.
    pub max_step_tokens: usize,
    /// Rows of one step for which logits are computed.
    pub max_logit_rows: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// KV cache type.
    pub kv_dtype: KvDType,
    /// Family of arithmetic.
    pub precision: Precision,
    /// How `lm_head` is held.
    pub lm_head: LmHead,
    /// Bytes of each device that the plan leaves free.
    pub memory_reserve_bytes: u64,
    /// Relative shares per rank instead of the planner's own (`--split 3:1`).
    pub forced_split: Option<Vec<f64>>,
}

/// The plan: who holds what, and what it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// The settings it was made for.
    pub settings: PlanSettings,
    /// Per rank, the layers it runs: `0..layers` for pure tensor parallelism.
    pub layer_ranges: Vec<Range<usize>>,
    /// Per layer, the cuts of its axes.
    pub layers: Vec<LayerPlan>,
    /// Per rank, its rows of the vocabulary.
    pub vocab: Vec<Range<usize>>,
    /// KV blocks of the group: the least over ranks, one of them reserved.
    pub kv_blocks: usize,
    /// Per rank, what it takes.
    pub ranks: Vec<RankPlan>,
}

/// Cuts of one layer, one range per rank; each axis's ranges tile it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Query heads.
    pub query_heads: Vec<Range<usize>>,
    /// Channels between gate/up and down.
    pub ffn: Vec<Range<usize>>,
}

/// What a rank holds and needs, in bytes, and how long it is expected to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankPlan {
    /// The device's own name.
    pub device: String,
    /// Bytes it may use, after the reserve.
    pub usable_bytes: u64,
    /// Memory by purpose.
    pub memory: RankMemory,
    /// Expected seconds of a one-row decode step, without waiting for others; all-reduces count at
    /// the latency of the group's slowest member.
    pub decode_step_seconds: f64,
    /// Expected seconds that each further row of a decode step adds, up to eight rows.
    pub row_seconds: f64,
}

/// No row is free, whatever noise made of the measurements.
const LEAST_ROW_COST: f64 = 0.01;

impl ShardPlan {
    /// What a further row of a decode step is expected to cost, as a share of a step of one row.
    pub fn row_cost(&self) -> f64 {
        let slowest =
            |seconds: fn(&RankPlan) -> f64| self.ranks.iter().map(seconds).fold(0.0, f64::max);
        let step = slowest(|rank| rank.decode_step_seconds);
        match step > 0.0 {
            true => (slowest(|rank| rank.row_seconds) / step).max(LEAST_ROW_COST),
            false => LEAST_ROW_COST,
        }
    }
}

/// Planned bytes by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    /// Weights in the engine's layout, embeddings, biases and norms included.
    pub weights: u64,
    /// Rows and columns added to fill the layout's units.
    pub padding: u64,
    /// Scales and zero points, of which a cut inside a group is held twice, and act-order indices.
    pub scales: u64,
    /// KV cache.
    pub kv_cache: u64,
    /// Scratch of the largest operation.
    pub scratch: u64,
    /// Activations and logits.
    pub buffers: u64,
    /// Recorded decoding steps.
    pub graphs: u64,
    /// The link over which cards sum.
    pub nccl: u64,
}

impl RankMemory {
    /// All of it; saturates.
    pub fn total(&self) -> u64 {
        self.purposes()
            .iter()
            .fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// Each purpose with its name.
    pub fn purposes(&self) -> [(&'static str, u64); 8] {
        let Self {
            weights,
            padding,
            scales,
            kv_cache,
            scratch,
            buffers,
            graphs,
            nccl,
        } = *self;
        [
            ("weights", weights),
            ("padding", padding),
            ("scales", scales),
            ("kv cache", kv_cache),
            ("scratch", scratch),
            ("buffers", buffers),
            ("graphs", graphs),
            ("nccl", nccl),
        ]
    }
}

/// Plans `shape` over `workers`, rank by rank in the order given. Same input, same plan.
///
/// # Errors
/// [`PlanError`]: no workers, more of them than query heads, a worker without a path for a module or
/// with impossible capabilities, unusable settings, or no cut that fits, with the reason per rank.
pub fn plan(
    shape: &ModelShape,
    settings: &PlanSettings,
    workers: &[Capabilities],
) -> Result<ShardPlan, PlanError> {
    check::input(shape, settings, workers)?;
    let mut closest: Option<(Problem<'_>, Candidate)> = None;
    for grain in [Grain::Group, Grain::Eight, Grain::One] {
        let problem = Problem::new(shape, settings, workers, grain)?;
        let candidate = solve(&problem);
        if candidate.score.overflow_bytes == 0 {
            return Ok(assemble(&problem, &candidate));
        }
        let closer = |(_, known): &(_, Candidate)| {
            candidate.score.overflow_bytes < known.score.overflow_bytes
        };
        if closest.as_ref().is_none_or(closer) {
            closest = Some((problem, candidate));
        }
    }
    let (problem, candidate) = closest.expect("there are grains");
    Err(PlanError::DoesNotFit(Box::new(fit::explain(
        &problem, &candidate,
    ))))
}

/// The best cut, or the forced one.
fn solve(problem: &Problem<'_>) -> Candidate {
    match &problem.settings.forced_split {
        None => search::best(problem),
        Some(shares) => forced(problem, shares),
    }
}

/// Every axis in these shares, rounded.
fn forced(problem: &Problem<'_>, shares: &[f64]) -> Candidate {
    let cut = |axis: &CutAxis| starts::rounded(shares, axis.quanta(), axis.least);
    Candidate::new(problem, problem.axes.iter().map(cut).collect())
}

fn assemble(problem: &Problem<'_>, candidate: &Candidate) -> ShardPlan {
    let config = &problem.shape.config;
    let layers = config.layers.len();
    let empty = LayerPlan {
        query_heads: Vec::new(),
        ffn: Vec::new(),
    };
    let mut plan = ShardPlan {
        settings: problem.settings.clone(),
        layer_ranges: vec![0..layers; problem.world()],
        layers: vec![empty; layers],
        vocab: Vec::new(),
        kv_blocks: candidate.blocks(problem),
        ranks: Vec::new(),
    };
    for (axis, bounds) in problem.axes.iter().zip(&candidate.cuts) {
        let ranges: Vec<_> = bounds
            .windows(2)
            .map(|pair| axis.range(pair[0], pair[1]))
            .collect();
        match axis.kind {
            AxisKind::Vocab => plan.vocab = ranges,
            AxisKind::Heads(_) => axis
                .layers
                .iter()
                .for_each(|layer| plan.layers[*layer].query_heads = ranges.clone()),
            AxisKind::Channels(_) => axis
                .layers
                .iter()
                .for_each(|layer| plan.layers[*layer].ffn = ranges.clone()),
        }
    }
    for (rank, worker) in problem.workers.iter().enumerate() {
        let costs = || candidate.costs.iter().map(|axis| axis[rank]);
        let own: f64 = costs().map(|cost| cost.decode_seconds).sum();
        plan.ranks.push(RankPlan {
            device: worker.device.clone(),
            usable_bytes: problem.usable(rank),
            memory: problem.memory(rank, costs(), plan.kv_blocks),
            decode_step_seconds: own + problem.all_reduce_seconds(),
            row_seconds: costs().map(|cost| cost.row_seconds).sum(),
        });
    }
    plan
}
