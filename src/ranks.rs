//! Ranks in this process, without a coordinator: what `bench model` and `profile` measure.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use secondwind_kernels::{cuda, select::Instruction};
use secondwind_model::{
    capabilities::Capabilities,
    checkpoint::Checkpoint,
    error::CheckpointError,
    plan::{self, KvDType, LmHead, ModelShape, PlanSettings, Precision, ShardPlan, wanted_blocks},
    synthetic::SyntheticModel,
};
use secondwind_worker::{
    Device,
    backend::{Backend, CpuBackend, CudaBackend},
    bench::BenchRank,
    collective::{Collective, Solo, local, nccl::Nccl},
    loader, measure_cpu, measure_cuda,
};

use crate::{bench::CardFlags, exit::UsageError, plan::told};

/// How long ranks wait for each other.
const DEADLINE: Duration = Duration::from_secs(120);

/// Which model, and on what.
#[derive(Args, Debug)]
pub struct RankFlags {
    /// Folder of a checkpoint, or `builtin`
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<String>,
    /// Instead of a checkpoint random weights, on cards: `qwen2.5-0.5b`, `-1.5b`, `-3b`, `-7b`, `-14b`, `-32b`
    /// or `-72b`
    #[arg(long, value_name = "SHAPE")]
    shape: Option<String>,
    /// Devices, such as `cuda:0`, `cuda:0,cuda:1` or `cpu`; one rank on each
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "cuda:0"
    )]
    device: Vec<String>,
    /// `fast` or `exact`
    #[arg(long, value_name = "WORD", default_value = "fast")]
    pub precision: String,
    /// `fp16` or `int8`
    #[arg(long, value_name = "WORD", default_value = "fp16")]
    lm_head: String,
    /// `f32`, `f16` or `int8`
    #[arg(long, value_name = "WORD", default_value = "f16")]
    pub kv_dtype: String,
    #[command(flatten)]
    card: CardFlags,
}

/// What steps a group is planned for.
pub struct Load {
    /// Sequences that decode together.
    pub sequences: usize,
    /// Tokens of the longest.
    pub context_tokens: usize,
    /// Tokens of the largest step.
    pub step_tokens: usize,
}

/// Devices that are open, and the model that is meant for them.
pub struct Group {
    /// As it was named.
    pub model: String,
    /// What the planner knows of it.
    pub shape: Arc<ModelShape>,
    /// Of each rank.
    pub capabilities: Vec<Capabilities>,
    devices: Vec<Open>,
    nccl: Option<Arc<Nccl>>,
    precision: Precision,
    lm_head: LmHead,
    kv_dtype: KvDType,
}

/// A device that is ready to take a rank, and the checkpoint that it takes it from; cards can do without.
enum Open {
    Cpu(usize, Arc<Checkpoint>),
    Cuda(cuda::Device, Option<Arc<Checkpoint>>),
}

/// What is done with each rank, on its own thread, whatever its device.
pub trait Work: Clone + Send + 'static {
    /// What it finds.
    type Found: Send + 'static;

    /// Works on one rank.
    fn on<B: Backend>(&self, rank: BenchRank<B>) -> Result<Self::Found>;
}

impl RankFlags {
    /// Opens the model, or the shape of this name where none is asked for, and the devices.
    pub fn open(&self, default_shape: Option<&str>) -> Result<Group> {
        let (precision, lm_head) = (self.precision()?, self.lm_head()?);
        let kv_dtype = self.kv_dtype.parse();
        let kv_dtype: KvDType =
            kv_dtype.map_err(|why| UsageError::one(format!("--kv-dtype: {why}")))?;
        let devices = self.devices()?;
        let (model, checkpoint, shape) = self.named(default_shape)?;
        let shape = Arc::new(shape.with_lm_head(lm_head));
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let open = |device| {
            match device {
            Device::Cuda(ordinal) => Ok(Open::Cuda(self.card.open(ordinal)?, checkpoint.clone())),
            Device::Cpu => match &checkpoint {
                Some(checkpoint) => Ok(Open::Cpu(threads, checkpoint.clone())),
                None => Err(UsageError::one(format!(
                    "--shape {model}: random weights are made on cards only; give --model DIR for a CPU"
                ))
                .into()),
            },
        }
        };
        let devices = devices.into_iter().map(open).collect::<Result<Vec<_>>>()?;
        let cards = |device: &Open| matches!(device, Open::Cuda(..));
        let nccl = match devices.len() > 1 && devices.iter().all(cards) {
            true => Some(Arc::new(Nccl::open(None)?)),
            false => None,
        };
        let measure = |device: &Open| match device {
            Open::Cpu(threads, _) => measure_cpu(&shape, *threads, None),
            Open::Cuda(card, _) => measure_cuda(&shape, card, None, nccl.is_some()),
        };
        let capabilities = devices.iter().map(measure).collect::<Result<_, _>>()?;
        Ok(Group {
            model,
            shape,
            capabilities,
            devices,
            nccl,
            precision,
            lm_head,
            kv_dtype,
        })
    }

    fn named(
        &self,
        default_shape: Option<&str>,
    ) -> Result<(String, Option<Arc<Checkpoint>>, ModelShape)> {
        if let Some(name) = &self.model {
            let checkpoint = Checkpoint::open_named(name).map_err(|error| match error {
                CheckpointError::HubName { .. }
                | CheckpointError::NotFound { .. }
                | CheckpointError::NotAFolder { .. } => {
                    UsageError::one(format!("--model: {error}")).into()
                }
                other => anyhow::Error::from(other),
            })?;
            let shape = checkpoint.shape()?;
            return Ok((name.clone(), Some(Arc::new(checkpoint)), shape));
        }
        let name = self.shape.as_deref().or(default_shape).ok_or_else(|| {
            UsageError::one(
                "which model? give --model DIR, --model builtin, or --shape for random weights on a card",
            )
        })?;
        let model = name
            .strip_prefix("qwen2.5-")
            .and_then(SyntheticModel::qwen2_5)
            .ok_or_else(|| {
                UsageError::one(format!(
                    "--shape {name}: known are qwen2.5-0.5b to qwen2.5-72b"
                ))
            })?;
        let shape = model.shape().context("the shape cannot be made")?;
        Ok((name.to_owned(), None, shape))
    }

    fn devices(&self) -> Result<Vec<Device>> {
        let device = |name: &String| name.trim().parse::<Device>();
        let devices = self.device.iter().map(device).collect::<Result<_, _>>();
        devices.map_err(|why| UsageError::one(format!("--device: {why}")).into())
    }

    fn lm_head(&self) -> Result<LmHead> {
        match self.lm_head.as_str() {
            "fp16" => Ok(LmHead::Fp16),
            "int8" => Ok(LmHead::Int8),
            other => {
                let message = format!("--lm-head {other}: known are fp16 and int8");
                Err(UsageError::one(message).into())
            }
        }
    }

    fn precision(&self) -> Result<Precision> {
        match self.precision.as_str() {
            "fast" => Ok(Precision::Fast),
            "exact" => Ok(Precision::Exact),
            other => {
                let message = format!("--precision {other}: known are fast and exact");
                Err(UsageError::one(message).into())
            }
        }
    }
}

impl Group {
    /// What each kind of instruction reaches alone on rank 0's card; nothing for a processor.
    pub fn peaks(&self) -> Result<Vec<(Instruction, f64)>> {
        match self.devices.first() {
            Some(Open::Cuda(card, _)) => Ok(cuda::bench::instruction_peaks(card)?),
            Some(Open::Cpu(..)) | None => Ok(Vec::new()),
        }
    }

    /// Plans the model over the devices; all of `load` has room in the KV cache.
    pub fn plan(&self, load: &Load) -> Result<ShardPlan> {
        let settings = PlanSettings {
            max_context_tokens: load.context_tokens,
            max_sequences: load.sequences,
            max_step_tokens: load.step_tokens,
            max_logit_rows: load.sequences,
            block_tokens: 16,
            kv_dtype: self.kv_dtype,
            precision: self.precision,
            lm_head: self.lm_head,
            memory_reserve_bytes: 0,
            forced_split: None,
        };
        let plan = plan::plan(&self.shape, &settings, &self.capabilities).map_err(told)?;
        if plan.kv_blocks < wanted_blocks(&settings) {
            bail!(
                "{} sequences of {} tokens do not fit beside the weights: {} blocks of {} tokens do; ask for \
                 fewer or shorter ones, or give more devices",
                load.sequences,
                load.context_tokens,
                plan.kv_blocks,
                settings.block_tokens
            );
        }
        Ok(plan)
    }

    /// Makes the ranks of `plan` and works on each; what each found, by rank.
    pub fn run<W: Work>(self, plan: &ShardPlan, work: &W) -> Result<Vec<W::Found>> {
        let world = self.devices.len();
        let hosts: Vec<Box<dyn Collective>> = match world {
            1 => vec![Box::new(Solo)],
            _ => local::meshes(world, DEADLINE)
                .into_iter()
                .map(|mesh| Box::new(mesh) as Box<dyn Collective>)
                .collect(),
        };
        let mut ranks = Vec::new();
        for (rank, (device, host)) in self.devices.into_iter().zip(hosts).enumerate() {
            let (shape, plan) = (self.shape.clone(), plan.clone());
            let (nccl, work) = (self.nccl.clone(), work.clone());
            ranks.push(thread::spawn(move || -> Result<W::Found> {
                let sums = nccl.is_some();
                match device {
                    Open::Cpu(threads, checkpoint) => {
                        let load = |backend: &mut CpuBackend| {
                            loader::load(backend, &checkpoint, &plan, rank, |_, _| true)
                        };
                        let backend = CpuBackend::new(threads, None, None)?;
                        work.on(BenchRank::new(backend, &shape, &plan, load, host, sums)?)
                    }
                    Open::Cuda(card, checkpoint) => {
                        let load = |backend: &mut CudaBackend| match &checkpoint {
                            Some(checkpoint) => {
                                loader::load(backend, checkpoint, &plan, rank, |_, _| true)
                            }
                            None => loader::random(backend, &shape, &plan, rank),
                        };
                        let backend = CudaBackend::new(card, None, None, nccl)?;
                        work.on(BenchRank::new(backend, &shape, &plan, load, host, sums)?)
                    }
                }
            }));
        }
        let ended: Vec<Result<W::Found>> = ranks
            .into_iter()
            .map(|rank| rank.join().map_err(|_| anyhow!("it panicked"))?)
            .collect();
        let failures: Vec<String> = (0..)
            .zip(&ended)
            .filter_map(|(rank, ended)| Some(format!("rank {rank}: {:#}", ended.as_ref().err()?)))
            .collect();
        match failures.is_empty() {
            true => ended.into_iter().collect(),
            false => bail!("{}", failures.join("; ")),
        }
    }
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
