//! The host's processor as a device.

use std::sync::Arc;

use secondwind_kernels::{
    KernelError,
    cpu::{self, AttentionScratch, LinearScratch},
    embedding::{EmbeddingBuilder, EmbeddingSource, EmbeddingTable},
    heads::{AttentionRows, HeadRows},
    kv::{KvCache, KvDtype, KvShape},
    logits,
    pool::ThreadPool,
    select::{
        AttentionPath, Choice, DeviceFacts, LinearPath, LinearShape, Precision, select_attention,
        select_linear,
    },
    weights::{DenseBuilder, Dtype, LinearWeights, QuantBuilder, QuantSpec},
};
use secondwind_model::{plan::KvDType, step::Sampling};

use super::{AttentionShape, Backend, DenseSink, HeadNorms, QuantShape, QuantSink};
use crate::{
    batch::Batch,
    collective::{Collective, CollectiveBuffer, CollectiveError},
    sampler::Row,
};

/// Best logits of a row that a rank keeps for sampling.
const CANDIDATES: usize = 256;

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
            attention: select_attention(device, attention_path)?,
            linear_scratch: LinearScratch::new(),
            attention_scratch: AttentionScratch::new(),
            rotary: Default::default(),
            batch_rotary: Default::default(),
            batch: Batch::default(),
        })
    }

    fn tokens(&self) -> usize {
        self.batch.tokens.len()
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

    fn attention_choice(&self) -> String {
        format!(
            "attention: {} ({})",
            self.attention.path, self.attention.reason
        )
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
            },
        })
    }

    fn set_rotary(&mut self, cos: Vec<f32>, sin: Vec<f32>) -> Result<(), KernelError> {
        self.rotary = (cos, sin);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), KernelError> {
        self.batch.clone_from(batch);
        Ok(())
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

    fn rms_norm(
        &mut self,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        width: usize,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        let elements = self.tokens() * width;
        cpu::rms_norm(&x[..elements], weight, eps, &mut out[..elements])
    }

    fn add(
        &mut self,
        residual: &mut Vec<f32>,
        delta: &Vec<f32>,
        width: usize,
    ) -> Result<(), KernelError> {
        let elements = self.tokens() * width;
        cpu::add(&mut residual[..elements], &delta[..elements])
    }

    fn linear(
        &mut self,
        weights: &Self::Linear,
        x: &Vec<f32>,
        rows: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        let path = self.path(weights, rows)?.path;
        let (x, out) = (&x[..rows * weights.k()], &mut out[..rows * weights.n()]);
        cpu::linear(weights, path, x, out, &mut self.linear_scratch, &self.pool)
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
        )
    }

    fn silu_mul(
        &mut self,
        gate: &mut Vec<f32>,
        up: &Vec<f32>,
        width: usize,
    ) -> Result<(), KernelError> {
        let elements = self.tokens() * width;
        cpu::silu_mul(&mut gate[..elements], &up[..elements])
    }

    fn all_reduce_sum(
        &mut self,
        buffer: &mut Vec<f32>,
        elements: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        collective.all_reduce_sum(CollectiveBuffer::Host(&mut buffer[..elements]))
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

    fn summarise(
        &mut self,
        logits: &Vec<f32>,
        row: usize,
        width: usize,
        first_id: u32,
        sampling: &Sampling,
    ) -> Result<Row, KernelError> {
        let logits = &logits[row * width..][..width];
        let summary = cpu::reduce_row(logits, sampling.temperature, first_id, CANDIDATES);
        Ok(Row {
            max: summary.max,
            sum_exp: summary.sum_exp,
            sum_exp_at_temperature: summary.sum_exp_t,
            candidates: summary.candidates,
        })
    }

    fn target_logit(
        &mut self,
        logits: &Vec<f32>,
        row: usize,
        width: usize,
        target: Option<usize>,
    ) -> Result<(f32, f64, Option<f32>), KernelError> {
        let logits = &logits[row * width..][..width];
        let summary = cpu::reduce_row(logits, 0.0, 0, 0);
        let target = target.and_then(|target| logits.get(target).copied());
        Ok((summary.max, summary.sum_exp, target))
    }

    fn row(
        &mut self,
        logits: &Vec<f32>,
        row: usize,
        width: usize,
    ) -> Result<Vec<f32>, KernelError> {
        Ok(logits[row * width..][..width].to_vec())
    }

    fn first_non_finite(
        &mut self,
        buffer: &Vec<f32>,
        elements: usize,
    ) -> Result<Option<usize>, KernelError> {
        Ok(logits::first_non_finite(&buffer[..elements]))
    }
}
