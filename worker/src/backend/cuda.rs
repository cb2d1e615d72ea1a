//! An NVIDIA card as a device: every operation is a launch, and nothing waits before the step's end.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
};

use secondwind_kernels::{
    KernelError,
    cuda::{
        self, Activations, Attention, AttentionLimits, AttentionScratch, DenseStaging,
        DenseWeights, Device, Graph, Guard, KvPages, Linear, LinearCall, Memory, QuantStaging,
        Recording, SampleScratch, Table, Weights,
    },
    kv::{KvDtype, KvShape},
    logits::{Adjustment, RowMasks},
    select::{AttentionPath, LinearPath, Phase, Precision},
    weights::{Dtype, QuantSpec},
};
use secondwind_model::plan::KvDType;

use super::{
    AttentionShape, Backend, Check, DenseSink, HeadNorms, LinearJob, LinearUse, NonFinite,
    QuantShape, QuantSink, ReducedRow, RowRequest, StepLimits, largest_group,
};
use crate::{
    batch::Batch,
    collective::{Collective, CollectiveError, nccl::Nccl},
    timeline::{Mark, Span},
};

mod one_shot;
mod paths;
mod random;
mod step;
mod sums;
mod timeline;

use paths::Paths;
use step::{StepArrays, StepMemory};
use sums::Sums;
use timeline::Timeline;

/// Most tokens of a row for which a step still counts as decoding: each reads the whole cache.
const DECODE_TOKENS: usize = 4;

/// Tokens of recorded decoding steps; others are padded to the next. Few rows cost what their kernels'
/// next size costs. Steps past the last keep the card busy for longer than launching takes.
pub(crate) const RECORDING_SIZES: [usize; 12] = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64];

/// One card.
pub struct CudaBackend {
    device: Device,
    paths: Paths,
    sums: Sums,
    guard: Guard,
    /// Widest of the loaded linears.
    superblocks: usize,
    /// By content: layers share them.
    kv_heads: HashMap<Vec<u32>, (Memory<u32>, usize)>,
    rotary: Option<(Memory<f32>, Memory<f32>)>,
    step: Option<StepMemory>,
    /// By tokens: decoding steps.
    recordings: BTreeMap<usize, Graph>,
    recording: Option<Recording>,
    timeline: Timeline,
}

impl CudaBackend {
    /// Computes on `device`; paths may be forced.
    ///
    /// # Errors
    /// The card's.
    pub fn new(
        device: Device,
        linear_path: Option<LinearPath>,
        attention_path: Option<AttentionPath>,
        nccl: Option<Arc<Nccl>>,
    ) -> Result<Self, KernelError> {
        let paths = Paths::new(device.arch(), linear_path, attention_path)?;
        let guard = Guard::new(&device)?;
        Ok(Self {
            device,
            paths,
            sums: Sums::new(nccl),
            guard,
            superblocks: 0,
            kv_heads: HashMap::new(),
            rotary: None,
            step: None,
            recordings: BTreeMap::new(),
            recording: None,
            timeline: Timeline::default(),
        })
    }

    fn step(&self) -> Result<&StepMemory, KernelError> {
        self.step.as_ref().ok_or_else(unprepared)
    }

    fn layer(&self, shape: &AttentionShape<'_>) -> Result<Attention<'_>, KernelError> {
        let known = self.kv_heads.get(shape.kv_head_of_query_head);
        let (kv_head_of_query_head, largest_group) = known.ok_or_else(unprepared)?;
        Ok(Attention {
            query_heads: shape.query_heads,
            kv_head_of_query_head,
            largest_group: *largest_group,
        })
    }

    /// Where each query head's KV head is written down on the card.
    fn kv_heads(&mut self, of: &[u32]) -> Result<(), KernelError> {
        if !self.kv_heads.contains_key(of) {
            let memory = self.device.upload(of, "the map of KV heads")?;
            self.kv_heads
                .insert(of.to_vec(), (memory, largest_group(of)));
        }
        Ok(())
    }
}

impl CudaBackend {
    /// The card.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

fn kernel_kv(dtype: KvDType) -> KvDtype {
    match dtype {
        KvDType::F32 => KvDtype::F32,
        KvDType::F16 => KvDtype::F16,
        KvDType::Int8 => KvDtype::Int8,
    }
}

fn unprepared() -> KernelError {
    KernelError::Shape {
        op: "step",
        tensor: "buffers",
        problem: "are not made yet".into(),
    }
}

impl QuantSink for QuantStaging {
    fn write(
        &mut self,
        first: usize,
        skip: usize,
        rows: usize,
        words: &[u32],
    ) -> Result<(), KernelError> {
        self.write_words(first, skip, rows, words)
    }
}

impl DenseSink for DenseStaging<'_> {
    fn write(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError> {
        self.write_rows(first, data)
    }
}

impl Backend for CudaBackend {
    type Buffer = Memory<f32>;
    type Linear = Linear;
    type Embedding = Table;
    type KvCache = KvPages;

    fn linear_choices(&self, linear: &Linear) -> Vec<String> {
        self.paths.linear_lines(linear)
    }

    fn linear_use(&self, linear: &Linear, rows: usize) -> Result<LinearUse, KernelError> {
        Ok(LinearUse {
            path: self.paths.linear(linear, rows)?.path,
            rows,
            read_bytes: linear.read_bytes(),
            multiply_adds: (rows * linear.k * linear.n) as u64,
        })
    }

    fn attention_choice(&self, head_dim: usize, kv: KvDType) -> String {
        self.paths.attention_line(head_dim, kernel_kv(kv))
    }

    fn used_bytes(&self) -> Option<u64> {
        let (free, total) = self.device.memory().ok()?;
        Some(total.saturating_sub(free))
    }

    fn sums_choice(&self) -> Option<&str> {
        self.sums.choice()
    }

    fn buffer(&mut self, elements: usize) -> Result<Memory<f32>, KernelError> {
        Ok(self.device.zeros(elements, "activations")?)
    }

    fn upload(&mut self, values: &[f32]) -> Result<Memory<f32>, KernelError> {
        Ok(self.device.upload(values, "a norm")?)
    }

    fn quantised<E: From<KernelError>>(
        &mut self,
        shape: QuantShape<'_>,
        fill: impl FnOnce(&mut dyn QuantSink) -> Result<(), E>,
    ) -> Result<Linear, E> {
        let mut staging = QuantStaging::new(QuantSpec {
            bits: shape.bits,
            k: shape.k,
            n: shape.n,
            group_of_row: shape.group_of_row,
            scales: shape.scales,
            zeros: shape.zeros,
            bias: shape.bias,
        })?;
        fill(&mut staging)?;
        let (weights, bias) = staging.finish(&self.device)?;
        self.superblocks = self.superblocks.max(weights.superblocks);
        let weights = Weights::Quantised(weights);
        Ok(Linear {
            k: shape.k,
            n: shape.n,
            weights,
            bias,
        })
    }

    fn dense<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        k: usize,
        n: usize,
        bias: Option<&[f32]>,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Linear, E> {
        let mut staging = DenseStaging::new(&self.device, n, k * dtype.bytes())?;
        fill(&mut staging)?;
        let weights = DenseWeights {
            dtype,
            bytes: Arc::new(staging.finish()?),
        };
        let bias = bias.map(|bias| self.device.upload(bias, "a bias"));
        let bias = bias.transpose().map_err(KernelError::from)?;
        Ok(Linear {
            k,
            n,
            weights: Weights::Dense(weights),
            bias,
        })
    }

    fn embedding<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        rows: usize,
        width: usize,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Table, E> {
        let mut staging = DenseStaging::new(&self.device, rows, width * dtype.bytes())?;
        fill(&mut staging)?;
        Ok(Table {
            dtype,
            rows,
            width,
            bytes: Arc::new(staging.finish()?),
        })
    }

    fn tied_embedding(&mut self, lm_head: &Linear) -> Result<Table, KernelError> {
        let Weights::Dense(weights) = &lm_head.weights else {
            return Err(KernelError::Shape {
                op: "tied_embedding",
                tensor: "lm_head",
                problem: "is quantised, so it holds no embedding rows".into(),
            });
        };
        let DenseWeights { dtype, bytes } = weights;
        let (rows, width) = (lm_head.n, lm_head.k);
        Ok(Table {
            dtype: *dtype,
            rows,
            width,
            bytes: bytes.clone(),
        })
    }

    fn kv_cache(
        &mut self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDType,
    ) -> Result<KvPages, KernelError> {
        let dtype = kernel_kv(dtype);
        let shape = KvShape {
            blocks,
            block_tokens,
            kv_heads,
            head_dim,
            dtype,
        };
        Ok(KvPages::new(&self.device, shape)?)
    }

    fn set_rotary(&mut self, cos: Vec<f32>, sin: Vec<f32>) -> Result<(), KernelError> {
        let table = |values: &[f32]| self.device.upload(values, "the rotary table");
        self.rotary = Some((table(&cos)?, table(&sin)?));
        Ok(())
    }

    fn set_precision(&mut self, precision: Precision) {
        self.paths.precision = precision;
    }

    fn prepare(&mut self, limits: &StepLimits) -> Result<(), KernelError> {
        let device = &self.device;
        let attention = AttentionLimits {
            tokens: limits.tokens,
            decode_tokens: limits.tokens.min(DECODE_TOKENS * limits.rows),
            rows: limits.rows,
            query_heads: limits.query_heads,
            kv_heads: limits.kv_heads,
            largest_group: limits.largest_group,
            head_dim: limits.head_dim,
            max_context: limits.context,
        };
        self.step = Some(StepMemory {
            limits: *limits,
            arrays: StepArrays::new(device, limits)?,
            activations: Activations::new(device, limits.tokens, self.superblocks)?,
            attention: AttentionScratch::new(device, &attention)?,
            sample: SampleScratch::new(device, limits.logit_rows, limits.vocab)?,
            host: device.pinned(limits.tokens * limits.hidden)?,
            tokens: 0..0,
            logit_rows: 0,
            phase: Phase::Decode,
        });
        Ok(())
    }

    fn begin(&mut self, batch: &Batch, parts: &[Range<usize>]) -> Result<(), KernelError> {
        self.device.bind()?;
        self.guard.clear(&self.device)?;
        let step = self.step.as_mut().ok_or_else(unprepared)?;
        step.arrays.write(&self.device, batch)?;
        step.tokens = 0..batch.tokens.len();
        step.logit_rows = batch.logit_tokens.len();
        let rows = batch.table_offsets.len().saturating_sub(1).max(1);
        step.phase = match step.tokens.len() <= DECODE_TOKENS * rows {
            true => Phase::Decode,
            false => Phase::Prefill,
        };
        step.activations.forget();
        if step.phase == Phase::Prefill {
            step.attention
                .write_tiles(&self.device, batch.extents(), parts)?;
        }
        Ok(())
    }

    fn sums_aside(&self, collective: &dyn Collective) -> bool {
        collective.takes_device()
    }

    fn select(&mut self, tokens: Range<usize>) {
        if let Some(step) = &mut self.step {
            step.tokens = tokens;
            // Held in other forms are the rows of other tokens.
            step.activations.forget();
        }
    }

    fn start_sum(
        &mut self,
        buffer: &mut Memory<f32>,
        width: usize,
        part: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        let step = self.step.as_ref().ok_or_else(|| CollectiveError::Device {
            rank: collective.rank(),
            op: "start_sum",
            what: unprepared().to_string(),
        })?;
        let rows = step.rows(buffer, width);
        self.sums.start(&self.device, &rows, part, collective)
    }

    fn await_sum(&mut self, part: usize) -> Result<(), KernelError> {
        Ok(self.sums.wait(&self.device, part)?)
    }

    fn recording_sizes(&self) -> &'static [usize] {
        &RECORDING_SIZES
    }

    fn recorded(&self, tokens: usize) -> Option<usize> {
        if self.timeline.is_on() {
            return None;
        }
        let (size, _) = self.recordings.range(tokens..).next()?;
        Some(*size)
    }

    fn start_recording(&mut self) -> Result<(), KernelError> {
        self.recording = Some(self.device.start_recording()?);
        Ok(())
    }

    fn finish_recording(&mut self, tokens: usize) -> Result<(), KernelError> {
        if let Some(recording) = self.recording.take() {
            self.recordings.insert(tokens, recording.finish()?);
        }
        Ok(())
    }

    fn replay(&mut self, tokens: usize) -> Result<(), KernelError> {
        let graph = self.recordings.get(&tokens).ok_or_else(unprepared)?;
        Ok(self.device.replay(graph)?)
    }

    fn forget_recordings(&mut self) {
        // They keep the communicator that they sum with from ending, and use the small sums.
        self.recordings.clear();
        self.sums.end_epoch();
    }

    fn start_timeline(&mut self) -> Result<(), KernelError> {
        self.timeline.start(&self.device)
    }

    fn mark(&mut self, mark: Mark) -> Result<(), KernelError> {
        self.timeline.mark(&self.device, mark)
    }

    fn finish_timeline(&mut self) -> Result<Vec<Span>, KernelError> {
        self.timeline.finish(&self.device)
    }

    fn embed(
        &mut self,
        table: &Table,
        first_id: u32,
        out: &mut Memory<f32>,
    ) -> Result<(), KernelError> {
        let step = self.step()?;
        Ok(cuda::embed(
            &self.device,
            table,
            first_id,
            &step.arrays.tokens,
            step.tokens.len(),
            out,
        )?)
    }

    fn add_norm(
        &mut self,
        residual: &mut Memory<f32>,
        delta: Option<&Memory<f32>>,
        weight: &Memory<f32>,
        width: usize,
        eps: f32,
        out: &mut Memory<f32>,
        readers: &[&Linear],
        check: Check,
    ) -> Result<(), KernelError> {
        let tokens = self.step()?.tokens.len();
        let fused = self.paths.want_a8(readers, tokens)?;
        let step = self.step.as_mut().ok_or_else(unprepared)?;
        let out = step.rows(out, width);
        let left = cuda::Destination {
            f32: (!fused).then_some(&out),
            a8: fused.then_some(&step.activations.a8),
        };
        cuda::add_rms_norm(
            &self.device,
            &step.rows(residual, width),
            delta.map(|delta| step.rows(delta, width)).as_ref(),
            weight,
            tokens,
            width,
            eps,
            left,
            &self.guard,
            check,
        )?;
        if fused {
            step.activations.quantised_by(&out, width);
        }
        Ok(())
    }

    fn linears(
        &mut self,
        x: &Memory<f32>,
        rows: usize,
        jobs: &mut [LinearJob<'_, Self>],
    ) -> Result<(), KernelError> {
        let paths = self.paths;
        let path_of = |linear: &Linear| Ok(paths.linear(linear, rows)?.path);
        let step = self.step.as_mut().ok_or_else(unprepared)?;
        // Rows of logits are as many as their tokens, which are all selected.
        let first = step.tokens.start;
        let outs: Vec<Memory<f32>> = jobs
            .iter()
            .map(|job| job.out.part(first * job.weights.n, rows * job.weights.n))
            .collect();
        let calls: Vec<LinearCall<'_>> = jobs
            .iter()
            .zip(&outs)
            .map(|(job, out)| LinearCall {
                weights: job.weights,
                out,
                check: job.check,
            })
            .collect();
        let k = jobs.first().map_or(0, |job| job.weights.k);
        cuda::linear(
            &self.device,
            path_of,
            &x.part(first * k, rows * k),
            rows,
            &calls,
            &mut step.activations,
            &self.guard,
        )?;
        // Whatever was kept of x in other forms is only x until x is written again.
        step.activations.forget();
        Ok(())
    }

    fn rotate_and_cache(
        &mut self,
        query: &mut Memory<f32>,
        key: &mut Memory<f32>,
        value: &Memory<f32>,
        norms: Option<HeadNorms<'_, Self>>,
        shape: &AttentionShape<'_>,
        cache: &mut KvPages,
    ) -> Result<(), KernelError> {
        self.kv_heads(shape.kv_head_of_query_head)?;
        let (cos, sin) = self.rotary.as_ref().ok_or_else(unprepared)?;
        let norms = norms.map(|norms| cuda::HeadNorms {
            query: norms.query,
            key: norms.key,
            eps: norms.eps,
        });
        let layer = self.layer(shape)?;
        let batch = self.step()?.batch();
        Ok(cuda::rope_kv(
            &self.device,
            query,
            key,
            value,
            norms.as_ref(),
            (cos, sin),
            &batch,
            layer,
            cache,
        )?)
    }

    fn attention(
        &mut self,
        query: &Memory<f32>,
        cache: &KvPages,
        shape: &AttentionShape<'_>,
        out: &mut Memory<f32>,
        check: Check,
    ) -> Result<(), KernelError> {
        self.kv_heads(shape.kv_head_of_query_head)?;
        let layer = self.layer(shape)?;
        let step = self.step()?;
        let path = self
            .paths
            .attention(step.phase, shape.head_dim, cache.shape.dtype)?
            .path;
        cuda::attention(
            &self.device,
            path,
            query,
            cache,
            &step.batch(),
            layer,
            &step.attention,
            out,
            &self.guard,
            check,
        )
    }

    fn silu_mul(
        &mut self,
        gate: &mut Memory<f32>,
        up: &Memory<f32>,
        width: usize,
        reader: &Linear,
        check: Check,
    ) -> Result<(), KernelError> {
        let tokens = self.step()?.tokens.len();
        let fused = self.paths.want_a8(&[reader], tokens)?;
        let step = self.step.as_mut().ok_or_else(unprepared)?;
        let (gate, up) = (step.rows(gate, width), step.rows(up, width));
        let left = cuda::Destination {
            f32: None,
            a8: fused.then_some(&step.activations.a8),
        };
        cuda::silu_mul(
            &self.device,
            &gate,
            &up,
            tokens,
            width,
            left,
            &self.guard,
            check,
        )?;
        if fused {
            step.activations.quantised_by(&gate, width);
        }
        Ok(())
    }

    fn all_reduce_sum(
        &mut self,
        buffer: &mut Memory<f32>,
        elements: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        if collective.world_size() == 1 {
            return Ok(());
        }
        let rank = collective.rank();
        let step = self.step.as_mut().ok_or_else(|| CollectiveError::Device {
            rank,
            op: "all_reduce_sum",
            what: unprepared().to_string(),
        })?;
        self.sums
            .sum(&self.device, buffer, elements, &mut step.host, collective)
    }

    fn join_nccl(
        &mut self,
        host: Box<dyn Collective>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        self.forget_recordings();
        Ok(Box::new(self.sums.join(&self.device, host, cancelled)?))
    }

    fn take_logit_tokens(
        &mut self,
        x: &Memory<f32>,
        width: usize,
        out: &mut Memory<f32>,
    ) -> Result<(), KernelError> {
        let step = self.step()?;
        let count = step.logit_rows;
        Ok(cuda::take_rows(
            &self.device,
            x,
            &step.arrays.logit_tokens,
            count,
            width,
            out,
        )?)
    }

    fn adjust_logits(
        &mut self,
        logits: &mut Memory<f32>,
        changes: &[Adjustment],
        originals: Option<&mut [f32]>,
    ) -> Result<(), KernelError> {
        let scratch = &self.step()?.sample;
        Ok(cuda::adjust_logits(
            &self.device,
            logits,
            changes,
            originals,
            scratch,
        )?)
    }

    fn mask_logits(
        &mut self,
        logits: &mut Memory<f32>,
        width: usize,
        masks: &RowMasks,
    ) -> Result<(), KernelError> {
        let scratch = &self.step()?.sample;
        Ok(cuda::mask_logits(
            &self.device,
            logits,
            width,
            masks,
            scratch,
        )?)
    }

    fn reduce_rows(
        &mut self,
        logits: &Memory<f32>,
        width: usize,
        first_id: u32,
        requests: &[RowRequest],
    ) -> Result<Vec<ReducedRow>, KernelError> {
        let requests: Vec<_> = requests
            .iter()
            .map(|request| match *request {
                RowRequest::Sample { temperature } => cuda::RowRequest {
                    temperature,
                    target: None,
                },
                RowRequest::Target { token } => cuda::RowRequest {
                    temperature: 0.0,
                    target: Some(token),
                },
            })
            .collect();
        let scratch = &self.step()?.sample;
        Ok(cuda::reduce_rows(
            &self.device,
            logits,
            width,
            first_id,
            &requests,
            scratch,
        )?)
    }

    fn row(
        &mut self,
        logits: &Memory<f32>,
        row: usize,
        width: usize,
    ) -> Result<Vec<f32>, KernelError> {
        let mut values = vec![0.0; width];
        self.device.read(logits, row * width, &mut values)?;
        Ok(values)
    }

    fn non_finite(&mut self, wait: bool) -> Result<Option<NonFinite>, KernelError> {
        if !wait {
            return Ok(None);
        }
        let found = self.guard.read(&self.device)?;
        Ok(found.map(|(check, element)| NonFinite { check, element }))
    }
}
