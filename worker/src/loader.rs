//! A plan's slices from disk into the device's layout, piece by piece: no tensor is ever held twice.

mod assemble;
mod random;
mod read;
mod readings;
mod requantise;

use std::collections::BTreeSet;

use half::f16;
use secondwind_kernels::{KernelError, select::Precision};
use secondwind_model::{
    checkpoint::Checkpoint,
    error::{CheckpointError, GptqError},
    gptq,
    modules::{DType, GptqFormat, LinearModule, WeightFormat},
    plan::{self as model, ModelShape, ShardPlan, logit_rows},
    slices::{ModuleSlice, SliceKind, TensorPart, slices},
};

use crate::{
    backend::{Backend, QuantShape, StepLimits, largest_group},
    collective::CollectiveError,
    exec::{Activations, ExecError},
    shard::{AttentionShard, Shard},
};
use assemble::{ModelParts, activations, assemble, set_rotary};
pub use random::random;
use read::Reader;
pub use readings::{Phase, Readings};
use requantise::Requantised;

/// A rank's part, ready to run.
pub struct Parts<B: Backend> {
    /// Weights and KV cache.
    pub shard: Shard<B>,
    /// Buffers of a step.
    pub activations: Activations<B>,
    /// Which path runs what, and why: a line each.
    pub choices: Vec<String>,
    /// Device memory in use before anything was loaded and after each phase.
    pub readings: Readings,
}

/// Why a rank could not load.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Reading failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A GPTQ tensor is not what it should be.
    #[error(transparent)]
    Gptq(#[from] GptqError),
    /// The device or a kernel refused.
    #[error("{0}")]
    Kernel(#[from] KernelError),
    /// A kernel refused a module's weights.
    #[error("{module}: {source}")]
    Module {
        /// Prefix of its tensors.
        module: String,
        /// Why.
        source: Box<LoadError>,
    },
    /// A scale that the engine's 16-bit form cannot hold.
    #[error("{module}.scales: {scale} is not exact in F16; convert the checkpoint's scales to F16")]
    Scale {
        /// Prefix of its tensors.
        module: String,
        /// The value.
        scale: f32,
    },
    /// `g_idx` names a group outside those that this rank was told to read.
    #[error("{module}.g_idx: row {row} names group {group}, this rank reads {first}..{end}")]
    Group {
        /// Prefix of its tensors.
        module: String,
        /// Input row.
        row: usize,
        /// Its group.
        group: u32,
        /// Groups read.
        first: usize,
        /// See `first`.
        end: usize,
    },
    /// The plan is not one of this checkpoint.
    #[error("the plan does not fit the checkpoint: {what}")]
    Plan {
        /// What is missing or wrong.
        what: String,
    },
    /// The first steps failed.
    #[error("trying out steps: {0}")]
    Exec(#[from] Box<ExecError>),
    /// The ranks did not come together.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The epoch ended while loading.
    #[error("the epoch ended while loading")]
    Cancelled,
}

/// Loads `rank` of `plan`. `progress` is told bytes read and to read; when it answers false, loading
/// stops.
///
/// # Errors
/// Names module and tensor.
pub fn load<B: Backend>(
    backend: &mut B,
    checkpoint: &Checkpoint,
    plan: &ShardPlan,
    rank: usize,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Parts<B>, LoadError> {
    let shape = checkpoint.shape()?.with_lm_head(plan.settings.lm_head);
    plan.check(&shape).map_err(|error| LoadError::Plan {
        what: error.to_string(),
    })?;
    backend.set_precision(precision(plan));
    let readings = Readings::start(backend);
    let slices = slices(&shape, plan, rank);
    let reader = Reader::new(checkpoint, &slices, &mut progress)?;
    let mut loader = Loader {
        backend,
        reader,
        shape: &shape,
        choices: BTreeSet::new(),
    };
    let mut parts = ModelParts::new(shape.config.layers.len());
    for slice in &slices {
        loader
            .module(slice, &mut parts)
            .map_err(|error| in_module(&slice.module, error))?;
    }
    let choices = std::mem::take(&mut loader.choices);
    loader.reader.finish();
    complete(backend, &shape, plan, rank, parts, choices, readings)
}

/// Cache, tables and buffers around the weights.
fn complete<B: Backend>(
    backend: &mut B,
    shape: &ModelShape,
    plan: &ShardPlan,
    rank: usize,
    parts: ModelParts<B>,
    choices: BTreeSet<String>,
    mut readings: Readings,
) -> Result<Parts<B>, LoadError> {
    readings.read(backend, Phase::Weights);
    let shard = assemble(backend, shape, plan, rank, parts)?;
    readings.read(backend, Phase::KvCache);
    set_rotary(backend, &shape.config, plan.settings.max_context_tokens)?;
    backend.prepare(&limits(plan, &shard))?;
    let activations = activations(backend, shape, plan, rank)?;
    readings.read(backend, Phase::Buffers);
    let mut choices: Vec<String> = choices.into_iter().collect();
    let head_dims: BTreeSet<usize> = shard
        .layers
        .iter()
        .map(|layer| layer.attention.head_dim)
        .collect();
    choices.extend(
        head_dims
            .into_iter()
            .map(|size| backend.attention_choice(size, plan.settings.kv_dtype)),
    );
    Ok(Parts {
        shard,
        activations,
        choices,
        readings,
    })
}

fn precision(plan: &ShardPlan) -> Precision {
    match plan.settings.precision {
        model::Precision::Exact => Precision::Exact,
        model::Precision::Fast => Precision::Fast,
    }
}

/// The largest step that the plan allows this shard.
fn limits<B: Backend>(plan: &ShardPlan, shard: &Shard<B>) -> StepLimits {
    let most = |of: fn(&AttentionShard<B>) -> usize| {
        shard
            .layers
            .iter()
            .map(|layer| of(&layer.attention))
            .max()
            .unwrap_or(0)
    };
    let settings = &plan.settings;
    StepLimits {
        tokens: settings.max_step_tokens,
        rows: settings.max_sequences,
        context: settings.max_context_tokens,
        block_tokens: settings.block_tokens,
        hidden: shard.hidden_size,
        logit_rows: logit_rows(settings),
        vocab: shard.vocab.len(),
        query_heads: most(|attention| attention.query_heads),
        kv_heads: most(|attention| attention.kv_heads),
        largest_group: most(|attention| largest_group(&attention.kv_head_of_query_head)),
        head_dim: most(|attention| attention.head_dim),
    }
}

struct Loader<'a, 'r, B: Backend> {
    backend: &'a mut B,
    reader: Reader<'r>,
    shape: &'a ModelShape,
    choices: BTreeSet<String>,
}

impl<B: Backend> Loader<'_, '_, B> {
    fn module(&mut self, slice: &ModuleSlice, parts: &mut ModelParts<B>) -> Result<(), LoadError> {
        match slice.kind {
            SliceKind::Norm { layer, role } => {
                let weights = self.reader.floats(slice, TensorPart::Weight)?;
                let buffer = self.backend.upload(&weights)?;
                let place = parts.norm(layer, role).ok_or_else(|| unplaced(slice))?;
                *place = Some(buffer);
            }
            SliceKind::Embedding if self.shape.shares_embedding() => {
                let dtype = self.shape.embedding_dtype();
                let linear = self.dense(slice, dtype)?;
                parts.embedding = Some(self.backend.tied_embedding(&linear)?);
                self.note(&linear);
                parts.lm_head = Some(linear);
            }
            SliceKind::Embedding => {
                let dtype = kernel_dtype(self.shape.embedding_dtype());
                let (rows, width) = (slice.columns.len(), slice.rows.len());
                let reader = &mut self.reader;
                parts.embedding = Some(self.backend.embedding(dtype, rows, width, |sink| {
                    reader.dense(slice, |first, data| Ok(sink.write(first, data)?))
                })?);
            }
            // The embedding has brought it.
            SliceKind::TiedHead { .. } => {}
            SliceKind::Linear { index, role } => {
                let module = &self.shape.linears[index];
                let linear = match (&module.format, module.requantised) {
                    (WeightFormat::Dense(dtype), _) => self.dense(slice, *dtype)?,
                    (WeightFormat::Gptq(format), None) => self.quantised(slice, module, format)?,
                    (WeightFormat::Gptq(format), Some(dtype)) => {
                        self.requantised(slice, format, dtype)?
                    }
                };
                self.note(&linear);
                let place = parts
                    .linear(module.layer, role)
                    .ok_or_else(|| unplaced(slice))?;
                *place = Some(linear);
            }
        }
        Ok(())
    }

    fn dense(&mut self, slice: &ModuleSlice, dtype: DType) -> Result<B::Linear, LoadError> {
        let bias = self.bias(slice)?;
        let (k, n) = (slice.rows.len(), slice.columns.len());
        let reader = &mut self.reader;
        self.backend
            .dense(kernel_dtype(dtype), k, n, bias.as_deref(), |sink| {
                reader.dense(slice, |first, data| Ok(sink.write(first, data)?))
            })
    }

    fn quantised(
        &mut self,
        slice: &ModuleSlice,
        module: &LinearModule,
        format: &GptqFormat,
    ) -> Result<B::Linear, LoadError> {
        let (k, n) = (slice.rows.len(), slice.columns.len());
        let name = &slice.module;
        let groups = self.reader.rows(slice, TensorPart::Scales)?;
        let group_of_row = self.group_of_row(slice, module, format, &groups)?;
        let bias = self.bias(slice)?;
        let scales = self.reader.floats(slice, TensorPart::Scales)?;
        gptq::check_scales(&format!("{name}.scales"), n, groups.start, &scales)?;
        let scales = scales
            .into_iter()
            .map(|scale| {
                let exact = f16::from_f32(scale);
                if exact.to_f32() == scale {
                    return Ok(exact);
                }
                let module = name.clone();
                Err(LoadError::Scale { module, scale })
            })
            .collect::<Result<Vec<f16>, LoadError>>()?;
        let zeros = if format.sym {
            self.reader.skip(slice, TensorPart::Qzeros)?;
            vec![u16::from(format.middle()); scales.len()]
        } else {
            let (words, covered) = self.reader.packed_columns(slice, TensorPart::Qzeros)?;
            let columns = slice.columns.start - covered.start..slice.columns.end - covered.start;
            let tensor = format!("{name}.qzeros");
            let zeros = gptq::unpack_zeros(&tensor, format, covered.len(), &words, columns)?;
            zeros.into_iter().map(u16::from).collect()
        };
        let shape = QuantShape {
            bits: format.bits,
            k,
            n,
            group_of_row: &group_of_row,
            scales: &scales,
            zeros: &zeros,
            bias: bias.as_deref(),
        };
        let reader = &mut self.reader;
        let bits = usize::from(format.bits);
        self.backend.quantised(shape, |sink| {
            reader.packed_rows(slice, bits, |window, words| {
                Ok(sink.write(window.first, window.skip, window.rows, words)?)
            })
        })
    }

    /// Unquantised weights, made into 8-bit ones.
    fn requantised(
        &mut self,
        slice: &ModuleSlice,
        format: &GptqFormat,
        dtype: DType,
    ) -> Result<B::Linear, LoadError> {
        let (k, n) = (slice.rows.len(), slice.columns.len());
        let bias = self.bias(slice)?;
        let mut made = Requantised::new(k, n, format.group_size.unwrap_or(k));
        self.reader.dense(slice, |first, data| {
            made.write(first, &gptq::floats(dtype, data));
            Ok(())
        })?;
        let shape = QuantShape {
            bits: format.bits,
            k,
            n,
            group_of_row: &made.group_of_row(),
            scales: &made.scales,
            zeros: &vec![u16::from(format.middle()); made.scales.len()],
            bias: bias.as_deref(),
        };
        self.backend
            .quantised(shape, |sink| Ok(sink.write(0, 0, k, &made.words)?))
    }

    /// (k) for each input row of this rank, its row among the groups that are read.
    fn group_of_row(
        &mut self,
        slice: &ModuleSlice,
        module: &LinearModule,
        format: &GptqFormat,
        groups: &std::ops::Range<usize>,
    ) -> Result<Vec<u32>, LoadError> {
        let all = self.reader.group_indices(slice, module, format)?;
        all[slice.rows.clone()]
            .iter()
            .enumerate()
            .map(|(row, &group)| {
                if groups.contains(&(group as usize)) {
                    return Ok(group - groups.start as u32);
                }
                Err(LoadError::Group {
                    module: slice.module.clone(),
                    row: slice.rows.start + row,
                    group,
                    first: groups.start,
                    end: groups.end,
                })
            })
            .collect()
    }

    fn bias(&mut self, slice: &ModuleSlice) -> Result<Option<Vec<f32>>, LoadError> {
        slice
            .bias
            .then(|| self.reader.floats(slice, TensorPart::Bias))
            .transpose()
    }

    fn note(&mut self, linear: &B::Linear) {
        self.choices.extend(self.backend.linear_choices(linear));
    }
}

fn in_module(module: &str, error: LoadError) -> LoadError {
    match error {
        LoadError::Kernel(_) => LoadError::Module {
            module: module.to_owned(),
            source: Box::new(error),
        },
        error => error,
    }
}

fn unplaced(slice: &ModuleSlice) -> LoadError {
    LoadError::Plan {
        what: format!("{} has no place in a decoder", slice.module),
    }
}

fn kernel_dtype(dtype: DType) -> secondwind_kernels::weights::Dtype {
    use secondwind_kernels::weights::Dtype;
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::Bf16,
    }
}
