//! The host's processor as a device.

use std::{
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use secondwind_kernels::{
    KernelError,
    cpu::{self, AttentionScratch, LinearScratch},
    embedding::{EmbeddingBuilder, EmbeddingSource, EmbeddingTable},
    heads::{AttentionRows, HeadRows},
    kv::{KvCache, KvDtype, KvShape},
    logits::{self, Adjustment, CANDIDATES, RowMasks},
    pool::ThreadPool,
    select::{
        AttentionPath, AttentionTask, Choice, DeviceFacts, LinearPath, LinearShape, Phase,
        Precision, select_attention, select_linear,
    },
    weights::{DenseBuilder, Dtype, LinearWeights, QuantBuilder, QuantSpec},
};
use secondwind_model::{plan::KvDType, step::MAX_TOP_LOGPROBS};

use super::{
    AttentionShape, Backend, Check, DenseSink, HeadNorms, LinearJob, LinearUse, NonFinite,
    QuantShape, QuantSink, ReducedRow, RowRequest, StepLimits,
};
use crate::{
    batch::Batch,
    collective::{Collective, CollectiveBuffer, CollectiveError},
    timeline::{Mark, Span},
};

/// One path serves every kind of attention here.
const ANY_TASK: AttentionTask = AttentionTask {
    phase: Phase::Decode,
    head_dim: 128,
    kv: KvDtype::F32,
    precision: Precision::Exact,
};

/// CPU kernels over a fixed pool of threads; every activation is f32.
pub struct CpuBackend {
    pool: ThreadPool,
    device: DeviceFacts,
    linear_path: Option<LinearPath>,
    attention: Choice<AttentionPath>,
    linear_scratch: LinearScratch,
    attention_scratch: AttentionScratch,
    /// Cosines and sines of every position, each (positions, head_dim / 2).
    rotary: (Vec<f32>, Vec<f32>),
    /// The same of the batch's tokens.
    batch_rotary: (Vec<f32>, Vec<f32>),
    batch: Batch,
    non_finite: Option<NonFinite>,
    /// While a step is timed: the last mark, and the parts so far.
    timeline: Option<(Instant, Vec<Span>)>,
}

/// Embedding rows, or a dense `lm_head` that has them as columns.
pub enum Embedding {
    /// A table of its own.
    Table(EmbeddingTable),
    /// Tied.
    Tied(Arc<LinearWeights>),
}

impl CpuBackend {
    /// Kernels over `threads` threads; paths may be forced.
    ///
    /// # Errors
    /// A forced path that this machine cannot run, or no threads.
    pub fn new(
        threads: usize,
        linear_path: Option<LinearPath>,
        attention_path: Option<AttentionPath>,
    ) -> Result<Self, KernelError> {
        let device = DeviceFacts::this_cpu();
        Ok(Self {
            pool: ThreadPool::new(threads)?,
            device,
            linear_path,
            attention: select_attention(device, ANY_TASK, attention_path)?,
            linear_scratch: LinearScratch::new(),
            attention_scratch: AttentionScratch::new(),
            rotary: Default::default(),
            batch_rotary: Default::default(),
            batch: Batch::default(),
            non_finite: None,
            timeline: None,
        })
    }

    fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    /// Notes the first value of an output that is not finite, unless one was before.
    fn check(&mut self, values: &[f32], check: Check) {
        if self.non_finite.is_none() {
            let element = logits::first_non_finite(values);
            self.non_finite = element.map(|element| NonFinite { check, element });
        }
    }

    fn path(
        &self,
        weights: &LinearWeights,
        rows: usize,
    ) -> Result<Choice<LinearPath>, KernelError> {
        let shape = LinearShape::of(weights, rows);
        select_linear(self.device, shape, Precision::Exact, self.linear_path)
    }
}

impl QuantSink for QuantBuilder {
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

impl DenseSink for DenseBuilder {
    fn write(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError> {
        self.write_columns(first, data)
    }
}

impl DenseSink for EmbeddingBuilder {
    fn write(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError> {
        self.write_rows(first, data)
    }
}

impl Backend for CpuBackend {
    type Buffer = Vec<f32>;
    type Linear = Arc<LinearWeights>;
    type Embedding = Embedding;
    type KvCache = KvCache;

    fn linear_choices(&self, linear: &Self::Linear) -> Vec<String> {
        let line = |rows| {
            let choice = self.path(linear, rows).ok()?;
            let format = linear.format();
            Some(format!(
                "{format}, {rows} rows: {} ({})",
                choice.path, choice.reason
            ))
        };
        [1, 64].into_iter().filter_map(line).collect()
    }

    fn linear_use(&self, linear: &Self::Linear, rows: usize) -> Result<LinearUse, KernelError> {
        Ok(LinearUse {
            path: self.path(linear, rows)?.path,
            rows,
            read_bytes: linear.read_bytes(),
            multiply_adds: (rows * linear.k() * linear.n()) as u64,
        })
    }

    fn attention_choice(&self, _: usize, _: KvDType) -> String {
        format!(
            "attention: {} ({})",
            self.attention.path, self.attention.reason
        )
    }

    fn used_bytes(&self) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }

    fn buffer(&mut self, elements: usize) -> Result<Vec<f32>, KernelError> {
        Ok(vec![0.0; elements])
    }

    fn upload(&mut self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn quantised<E: From<KernelError>>(
        &mut self,
        shape: QuantShape<'_>,
        fill: impl FnOnce(&mut dyn QuantSink) -> Result<(), E>,
    ) -> Result<Self::Linear, E> {
        let mut builder = QuantBuilder::new(QuantSpec {
            bits: shape.bits,
            k: shape.k,
            n: shape.n,
            group_of_row: shape.group_of_row,
            scales: shape.scales,
            zeros: shape.zeros,
            bias: shape.bias,
        })?;
        fill(&mut builder)?;
        Ok(Arc::new(builder.finish()?))
    }

    fn dense<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        k: usize,
        n: usize,
        bias: Option<&[f32]>,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Self::Linear, E> {
        let mut builder = DenseBuilder::new(dtype, k, n, bias)?;
        fill(&mut builder)?;
        Ok(Arc::new(builder.finish()?))
    }

    fn embedding<E: From<KernelError>>(
        &mut self,
        dtype: Dtype,
        rows: usize,
        width: usize,
        fill: impl FnOnce(&mut dyn DenseSink) -> Result<(), E>,
    ) -> Result<Embedding, E> {
        let mut builder = EmbeddingBuilder::new(dtype, rows, width)?;
        fill(&mut builder)?;
        Ok(Embedding::Table(builder.finish()?))
    }

    fn tied_embedding(&mut self, lm_head: &Self::Linear) -> Result<Embedding, KernelError> {
        Ok(Embedding::Tied(lm_head.clone()))
    }

    fn kv_cache(
        &mut self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDType,
    ) -> Result<KvCache, KernelError> {
        KvCache::new(KvShape {
            blocks,
            block_tokens,
            kv_heads,
            head_dim,
            dtype: match dtype {
                KvDType::F32 => KvDtype::F32,
                KvDType::F16 => KvDtype::F16,
                KvDType::Int8 => KvDtype::Int8,
            },
        })
    }

    fn set_rotary(&mut self, cos: Vec<f32>, sin: Vec<f32>) -> Result<(), KernelError> {
        self.rotary = (cos, sin);
        Ok(())
    }

    fn set_precision(&mut self, _: Precision) {}

    fn prepare(&mut self, _: &StepLimits) -> Result<(), KernelError> {
        Ok(())
    }

    fn begin(&mut self, batch: &Batch, _: &[Range<usize>]) -> Result<(), KernelError> {
        self.non_finite = None;
        self.batch.clone_from(batch);
        Ok(())
    }

    fn start_timeline(&mut self) -> Result<(), KernelError> {
        self.timeline = Some((Instant::now(), Vec::new()));
        Ok(())
    }

    fn mark(&mut self, mark: Mark) -> Result<(), KernelError> {
        if let Some((last, spans)) = &mut self.timeline {
            let now = Instant::now();
            spans.push(Span {
                mark,
                seconds: (now - *last).as_secs_f64(),
            });
            *last = now;
        }
        Ok(())
    }

    fn finish_timeline(&mut self) -> Result<Vec<Span>, KernelError> {
        let timeline = self.timeline.take();
        Ok(timeline.map_or_else(Vec::new, |(_, spans)| spans))
    }

    fn embed(
        &mut self,
        table: &Embedding,
        first_id: u32,
        out: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        let source = match table {
            Embedding::Table(table) => EmbeddingSource::Table(table),
            Embedding::Tied(linear) => EmbeddingSource::Tied(linear),
        };
        let elements = self.tokens() * source.hidden();
        cpu::embed(source, first_id, &self.batch.tokens, &mut out[..elements])
    }

    fn add_norm(
        &mut self,
        residual: &mut Vec<f32>,
        delta: Option<&Vec<f32>>,
        weight: &Vec<f32>,
        width: usize,
        eps: f32,
        out: &mut Vec<f32>,
        _: &[&Self::Linear],
        check: Check,
    ) -> Result<(), KernelError> {
        let elements = self.tokens() * width;
        if let Some(delta) = delta {
            cpu::add(&mut residual[..elements], &delta[..elements])?;
            self.check(&residual[..elements], check);
        }
        cpu::rms_norm(&residual[..elements], weight, eps, &mut out[..elements])
    }

    fn linears(
        &mut self,
        x: &Vec<f32>,
        rows: usize,
        jobs: &mut [LinearJob<'_, Self>],
    ) -> Result<(), KernelError> {
        for LinearJob {
            weights,
            out,
            check,
        } in jobs
        {
            let path = self.path(weights, rows)?.path;
            let (x, out) = (&x[..rows * weights.k()], &mut out[..rows * weights.n()]);
            cpu::linear(weights, path, x, out, &mut self.linear_scratch, &self.pool)?;
            self.check(out, *check);
        }
        Ok(())
    }

    fn rotate_and_cache(
        &mut self,
        query: &mut Vec<f32>,
        key: &mut Vec<f32>,
        value: &Vec<f32>,
        norms: Option<HeadNorms<'_, Self>>,
        shape: &AttentionShape<'_>,
        cache: &mut KvCache,
    ) -> Result<(), KernelError> {
        let tokens = self.tokens();
        let queries = HeadRows::packed(tokens, shape.query_heads, shape.head_dim);
        let keys = HeadRows::packed(tokens, shape.kv_heads, shape.head_dim);
        if let Some(norms) = norms {
            cpu::head_norm(query, queries, norms.query, norms.eps)?;
            cpu::head_norm(key, keys, norms.key, norms.eps)?;
        }
        let half = shape.head_dim / 2;
        let (cos, sin) = &mut self.batch_rotary;
        for (table, rows) in [(&self.rotary.0, &mut *cos), (&self.rotary.1, &mut *sin)] {
            rows.clear();
            for &position in &self.batch.positions {
                rows.extend_from_slice(&table[position as usize * half..][..half]);
            }
        }
        cpu::rope(query, queries, cos, sin)?;
        cpu::rope(key, keys, cos, sin)?;
        cpu::kv_write(cache, &self.batch.slots, key, value, keys)
    }

    fn attention(
        &mut self,
        query: &Vec<f32>,
        cache: &KvCache,
        shape: &AttentionShape<'_>,
        out: &mut Vec<f32>,
        check: Check,
    ) -> Result<(), KernelError> {
        let layout = HeadRows::packed(self.tokens(), shape.query_heads, shape.head_dim);
        let rows = AttentionRows {
            tables: &self.batch.block_tables,
            table_offsets: &self.batch.table_offsets,
            sequence_of_row: &self.batch.row_of_token,
            context_len: &self.batch.context_lengths,
        };
        let elements = layout.rows * layout.width();
        cpu::attention(
            cache,
            self.attention.path,
            &query[..elements],
            layout,
            &rows,
            shape.kv_head_of_query_head,
            1.0 / (shape.head_dim as f32).sqrt(),
            &mut out[..elements],
            &mut self.attention_scratch,
            &self.pool,
        )?;
        self.check(&out[..elements], check);
        Ok(())
    }

    fn silu_mul(
        &mut self,
        gate: &mut Vec<f32>,
        up: &Vec<f32>,
        width: usize,
        _: &Self::Linear,
        check: Check,
    ) -> Result<(), KernelError> {
        let elements = self.tokens() * width;
        cpu::silu_mul(&mut gate[..elements], &up[..elements])?;
        self.check(&gate[..elements], check);
        Ok(())
    }

    fn all_reduce_sum(
        &mut self,
        buffer: &mut Vec<f32>,
        elements: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        collective.all_reduce_sum(CollectiveBuffer::Host(&mut buffer[..elements]))
    }

    fn join_nccl(
        &mut self,
        host: Box<dyn Collective>,
        _: Arc<AtomicBool>,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        Err(CollectiveError::Device {
            rank: host.rank(),
            op: "nccl",
            what: "NCCL sums on cards, and this worker's device is cpu".into(),
        })
    }

    fn take_logit_tokens(
        &mut self,
        x: &Vec<f32>,
        width: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        for (row, &token) in out.chunks_mut(width).zip(&self.batch.logit_tokens) {
            row.copy_from_slice(&x[token as usize * width..][..width]);
        }
        Ok(())
    }

    fn adjust_logits(
        &mut self,
        logits: &mut Vec<f32>,
        changes: &[Adjustment],
        originals: Option<&mut [f32]>,
    ) -> Result<(), KernelError> {
        cpu::adjust_logits(logits, changes, originals)
    }

    fn mask_logits(
        &mut self,
        logits: &mut Vec<f32>,
        width: usize,
        masks: &RowMasks,
    ) -> Result<(), KernelError> {
        cpu::mask_logits(logits, width, masks)
    }

    fn reduce_rows(
        &mut self,
        logits: &Vec<f32>,
        width: usize,
        first_id: u32,
        requests: &[RowRequest],
    ) -> Result<Vec<ReducedRow>, KernelError> {
        let rows = logits.chunks(width).zip(requests);
        let reduced = rows.map(|(logits, request)| match *request {
            RowRequest::Sample { temperature } => (
                cpu::reduce_row(logits, temperature, first_id, CANDIDATES),
                None,
            ),
            RowRequest::Target { token } => {
                let target = logits::target_logit(logits, first_id, token);
                (
                    cpu::reduce_row(logits, 0.0, first_id, MAX_TOP_LOGPROBS),
                    target,
                )
            }
        });
        Ok(reduced.collect())
    }

    fn row(
        &mut self,
        logits: &Vec<f32>,
        row: usize,
        width: usize,
    ) -> Result<Vec<f32>, KernelError> {
        Ok(logits[row * width..][..width].to_vec())
    }

    fn non_finite(&mut self, _: bool) -> Result<Option<NonFinite>, KernelError> {
        Ok(self.non_finite)
    }
}
