//! What a part of an axis costs a rank: seconds and bytes, counted exactly per candidate range.

use std::ops::Range;

use super::axis::{AxisKind, CostedModule, CutAxis, Grain, alike};
use super::memory::{
    LocalWidths, adds_bias, buffer_sizes, embedding_bytes, kv_block_bytes, kv_row_bytes,
    least_blocks, linear_bytes, norm_bytes, scratch_bytes, wanted_blocks,
};
use super::recordings::recorded_bytes;
use super::shape::{attention, channels, kv_heads_of, module_extent};
use super::{ModelShape, PlanError, PlanSettings, RankMemory};
use crate::capabilities::{Capabilities, Layout, WeightKind};
use crate::modules::{Axis, LinearModule};

/// Prompt tokens that the objective assumes for every generated token.
const PROMPT_TOKENS_PER_OUTPUT_TOKEN: f64 = 4.0;
/// Rows of a decode step of which further rows are reckoned.
const FEW_ROWS: usize = 8;
/// Tokens in the KV cache of the decode step that the objective times, at most.
const DECODE_CONTEXT_TOKENS: usize = 2048;
/// Launches of a layer's attention: norm, q, k, v, rotation and cache write, attention, output, sum.
const ATTENTION_OPS: f64 = 8.0;
/// Launches of a layer's MLP: norm, gate, up, activation, down, sum.
const MLP_OPS: f64 = 6.0;
/// Launches around the layers: embedding, norm, `lm_head`, sampling.
const VOCAB_OPS: f64 = 4.0;
/// What a device makes of a linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    layout: Layout,
    /// Seconds per byte of weights in a step of one row.
    decode: f64,
    /// What each further row of a decode step adds to them.
    further: f64,
    /// Seconds per byte of weights and per token in a step of many rows.
    prefill: f64,
}

/// What a range of one axis costs one rank.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AxisCost {
    /// What the objective counts: decode, and prefill by its weight.
    pub seconds: f64,
    /// A decode step's part.
    pub decode_seconds: f64,
    /// What each further row adds to it.
    pub row_seconds: f64,
    /// Weights, padding and scales only.
    pub memory: RankMemory,
    /// Bytes of one KV block in all the layers.
    pub kv_block: u64,
    pub widths: LocalWidths,
}

/// A planning problem with everything looked up that does not depend on the cut.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub shape: &'a ModelShape,
    pub settings: &'a PlanSettings,
    pub workers: &'a [Capabilities],
    pub axes: Vec<CutAxis>,
    pub least_blocks: usize,
    pub wanted_blocks: usize,
    /// Per rank, bytes that do not depend on the cut: norms, scratch and what is kept beside the model.
    fixed: Vec<RankMemory>,
}

impl<'a> Problem<'a> {
    /// Groups the layers by shape into axes and looks up every rank's rates.
    ///
    /// # Errors
    /// [`PlanError::NoPath`] when a worker cannot run a module.
    pub fn new(
        shape: &'a ModelShape,
        settings: &'a PlanSettings,
        workers: &'a [Capabilities],
        grain: Grain,
    ) -> Result<Self, PlanError> {
        let mut axes = Vec::new();
        for (index, layer) in shape.config.layers.iter().enumerate() {
            let kinds = [
                AxisKind::Heads(attention(&layer.attention)),
                AxisKind::Channels(channels(&layer.mlp)),
            ];
            for kind in kinds {
                let axis = find_or_push(
                    &mut axes,
                    |axis: &CutAxis| axis.kind == kind,
                    || CutAxis::empty(kind, shape),
                );
                axis.layers.push(index);
            }
        }
        axes.push(CutAxis::empty(AxisKind::Vocab, shape));
        let lookup = |module: &LinearModule| -> Result<Vec<Rate>, PlanError> {
            workers
                .iter()
                .enumerate()
                .map(|(rank, worker)| rate(rank, worker, module, settings))
                .collect()
        };
        for module in &shape.linears {
            let axis = axes.iter_mut().find(|axis| axis.holds(module));
            let Some(axis) = axis else { continue };
            let same = |known: &&mut CostedModule| alike(&known.module, module);
            match axis.modules.iter_mut().find(same) {
                Some(known) => known.count += 1,
                None => axis.modules.push(CostedModule {
                    module: module.clone(),
                    count: 1,
                    rates: lookup(module)?,
                }),
            }
        }
        for axis in &mut axes {
            axis.quantum = axis.quantum_for(workers.len(), grain);
            axis.least = usize::from(axis.quanta() >= workers.len());
        }
        let fixed = |(rank, worker)| {
            let beside = recorded_bytes(shape.config.layers.len(), settings, workers, rank);
            RankMemory {
                weights: norm_bytes(shape),
                scratch: scratch_bytes(shape, settings, worker),
                graphs: beside.graphs,
                nccl: beside.nccl,
                ..RankMemory::default()
            }
        };
        Ok(Self {
            shape,
            settings,
            workers,
            axes,
            least_blocks: least_blocks(settings),
            wanted_blocks: wanted_blocks(settings).max(least_blocks(settings)),
            fixed: workers.iter().enumerate().map(fixed).collect(),
        })
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.workers.len()
    }

    /// Bytes that a rank may use, after the reserve.
    pub fn usable(&self, rank: usize) -> u64 {
        self.workers[rank]
            .usable_bytes
            .saturating_sub(self.settings.memory_reserve_bytes)
    }

    /// What `units` of an axis cost a rank.
    pub fn cost(&self, axis: &CutAxis, rank: usize, units: &Range<usize>) -> AxisCost {
        let worker = &self.workers[rank];
        let mut cost = AxisCost::default();
        let mut prefill = 0.0;
        let held = match axis.kind {
            AxisKind::Heads(heads) => Held {
                units,
                kv: kv_heads_of(units, heads.query_heads / heads.kv_heads),
            },
            _ => Held { units, kv: 0..0 },
        };
        for CostedModule {
            module,
            count,
            rates,
        } in &axis.modules
        {
            let rate = &rates[rank];
            let (rows, columns) = module_extent(module, held.of(module));
            let bytes = linear_bytes(
                module,
                &rows,
                &columns,
                &rate.layout,
                adds_bias(module, rank),
            );
            let bytes = bytes.times(*count);
            cost.memory.add_linear(&bytes);
            let read = bytes.total() as f64;
            cost.decode_seconds += read * rate.decode;
            cost.row_seconds += read * rate.further;
            prefill += read * rate.prefill;
            cost.widths.include(module.role, &rows, &columns);
        }
        let layers = axis.layers.len() as f64;
        match axis.kind {
            AxisKind::Heads(heads) => {
                let block = kv_block_bytes(self.settings, held.kv.len(), heads.head_dim);
                cost.kv_block = block.saturating_mul(axis.layers.len() as u64);
                let context = self.settings.max_context_tokens.min(DECODE_CONTEXT_TOKENS);
                let per_token =
                    2 * kv_row_bytes(self.settings.kv_dtype, heads.head_dim) * held.kv.len() as u64;
                let read = layers * context as f64 * per_token as f64;
                let read = read / worker.read_bytes_per_second;
                cost.decode_seconds += read;
                cost.row_seconds += read;
                cost.decode_seconds += layers * ATTENTION_OPS * worker.op_latency_seconds;
            }
            AxisKind::Channels(_) => {
                cost.decode_seconds += layers * MLP_OPS * worker.op_latency_seconds
            }
            AxisKind::Vocab => {
                let embedding = embedding_bytes(self.shape, units.len());
                cost.memory.weights = cost.memory.weights.saturating_add(embedding);
                cost.decode_seconds += VOCAB_OPS * worker.op_latency_seconds;
                // Prompts need logits for their last token only.
                prefill = 0.0;
            }
        }
        cost.seconds = cost.decode_seconds + PROMPT_TOKENS_PER_OUTPUT_TOKEN * prefill;
        cost
    }

    /// Bytes of a rank whose ranges cost `costs`, with `blocks` KV blocks.
    pub fn memory(
        &self,
        rank: usize,
        costs: impl Iterator<Item = AxisCost>,
        blocks: usize,
    ) -> RankMemory {
        let mut memory = self.fixed[rank];
        let mut widths = LocalWidths::default();
        for cost in costs {
            let part = cost.memory;
            memory.weights = memory.weights.saturating_add(part.weights);
            memory.padding = memory.padding.saturating_add(part.padding);
            memory.scales = memory.scales.saturating_add(part.scales);
            memory.kv_cache = memory
                .kv_cache
                .saturating_add(cost.kv_block.saturating_mul(blocks as u64));
            widths = widths.max(cost.widths);
        }
        for (_, bytes) in buffer_sizes(&self.shape.config, self.settings, &widths) {
            memory.buffers = memory.buffers.saturating_add(bytes);
        }
        memory
    }

    /// Seconds that all-reduces take in a decode step: two per layer and one for the embedding, each
    /// at the pace of the slowest member. They cost every rank the same, whatever the cut.
    pub fn all_reduce_seconds(&self) -> f64 {
        if self.world() < 2 {
            return 0.0;
        }
        let slowest = self
            .workers
            .iter()
            .map(|worker| worker.all_reduce_latency_seconds)
            .fold(0.0, f64::max);
        slowest * (2 * self.shape.config.layers.len() + 1) as f64
    }
}

/// Ranges of a rank on the axes that modules of one cut follow.
struct Held<'r> {
    units: &'r Range<usize>,
    kv: Range<usize>,
}

impl Held<'_> {
    fn of(&self, module: &LinearModule) -> &Range<usize> {
        if module.axis == Axis::KvHeads {
            &self.kv
        } else {
            self.units
        }
    }
}

fn rate(
    rank: usize,
    worker: &Capabilities,
    module: &LinearModule,
    settings: &PlanSettings,
) -> Result<Rate, PlanError> {
    let weights = WeightKind::from(&module.format);
    let (Some(one), Some(many)) = (
        worker.linear(weights, 1),
        worker.linear(weights, settings.max_step_tokens),
    ) else {
        let (device, module) = (worker.device.clone(), module.name.clone());
        return Err(PlanError::NoPath {
            rank,
            device,
            weights,
            module,
        });
    };
    // A batch of few rows: sequences that decode, or guesses.
    let few = worker.linear(weights, FEW_ROWS).unwrap_or(one);
    let further = match few.max_rows.saturating_sub(one.max_rows) {
        // No more is known than what one row takes.
        0 => one.seconds_per_byte,
        rows => ((few.seconds_per_byte - one.seconds_per_byte) / rows as f64).max(0.0),
    };
    let prefill = many.seconds_per_byte / many.max_rows as f64;
    Ok(Rate {
        layout: one.layout(),
        decode: one.seconds_per_byte,
        further,
        prefill,
    })
}

fn find_or_push<T>(
    items: &mut Vec<T>,
    matches: impl Fn(&T) -> bool,
    new: impl FnOnce() -> T,
) -> &mut T {
    let index = items.iter().position(matches).unwrap_or_else(|| {
        items.push(new());
        items.len() - 1
    });
    &mut items[index]
}
