//! A decoder's forward pass over one rank's shard.

use secondwind_kernels::KernelError;

use crate::{
    backend::{AttentionShape, Backend, HeadNorms},
    batch::Batch,
    collective::{Collective, CollectiveError},
    shard::{AttentionShard, LayerShard, MlpShard, Shard},
};

mod logits;

pub use logits::{Outcome, sample};

/// Buffers of one step, made at load for the largest step of the plan.
pub struct Activations<B: Backend> {
    /// (tokens, hidden) the residual stream.
    pub residual: B::Buffer,
    /// (tokens, hidden) normalised input of a block.
    pub normed: B::Buffer,
    /// (tokens, hidden) a block's output, this rank's part and then the sum; last, the logit tokens.
    pub partial_sum: B::Buffer,
    /// (tokens, query heads of this rank * head_dim).
    pub query: B::Buffer,
    /// (tokens, KV heads of this rank * head_dim).
    pub key: B::Buffer,
    /// Like `key`.
    pub value: B::Buffer,
    /// Like `query`.
    pub attention: B::Buffer,
    /// (tokens, ffn channels of this rank).
    pub gate: B::Buffer,
    /// Like `gate`.
    pub up: B::Buffer,
    /// (logit rows, vocabulary of this rank).
    pub logits: B::Buffer,
}

/// A step that failed on this rank.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// A value is not a number or not finite: the step's results are void.
    #[error("{place}: element {index} of row {row} is not finite")]
    NonFinite {
        /// Layer and operation.
        place: Place,
        /// Token of the step, or logit row.
        row: usize,
        /// Column.
        index: usize,
    },
    /// An operation failed.
    #[error("{place}: {source}")]
    Op {
        /// Layer and operation.
        place: Place,
        /// The device's or kernel's word.
        source: KernelError,
    },
    /// The ranks fell apart.
    #[error("{place}: {source}")]
    Collective {
        /// Layer and operation.
        place: Place,
        /// Who and why.
        source: CollectiveError,
    },
    /// A peer sent what this rank cannot read.
    #[error("{place}: {what}")]
    Protocol {
        /// Layer and operation.
        place: Place,
        /// What is wrong with it.
        what: String,
    },
}

impl ExecError {
    /// The token of the step whose values are the cause, where that is known.
    pub fn token(&self, batch: &Batch) -> Option<usize> {
        match self {
            Self::NonFinite { place, row, .. } if place.op == LM_HEAD => {
                batch.logit_tokens.get(*row).map(|&token| token as usize)
            }
            Self::NonFinite { row, .. } => Some(*row),
            _ => None,
        }
    }
}

/// The operation whose rows are logit rows.
const LM_HEAD: &str = "lm_head";

/// Where in the model something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Absent before the first and after the last layer.
    pub layer: Option<usize>,
    /// The operation.
    pub op: &'static str,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layer {layer}, {}", self.op),
            None => f.write_str(self.op),
        }
    }
}

/// Runs one step's tokens through the shard; logits are left in `activations`.
///
/// # Errors
/// Names layer and operation.
pub fn forward<B: Backend>(
    backend: &mut B,
    shard: &mut Shard<B>,
    activations: &mut Activations<B>,
    batch: &Batch,
    collective: &mut dyn Collective,
) -> Result<(), ExecError> {
    let tokens = batch.tokens.len();
    if tokens == 0 {
        return Ok(());
    }
    let mut pass = Pass {
        backend,
        collective,
        tokens,
        hidden: shard.hidden_size,
        eps: shard.rms_norm_eps,
        layer: None,
    };
    pass.run("begin", |backend| backend.begin(batch))?;
    let first_id = shard.vocab.start as u32;
    pass.run("embed", |backend| {
        backend.embed(&shard.embedding, first_id, &mut activations.residual)
    })?;
    pass.all_reduce("embed", &mut activations.residual)?;
    for (index, layer) in shard.layers.iter_mut().enumerate() {
        pass.layer = Some(index);
        pass.layer(layer, activations)?;
    }
    pass.layer = None;
    if batch.logit_tokens.is_empty() {
        return Ok(());
    }
    let a = activations;
    pass.norm("final_norm", &a.residual, &shard.final_norm, &mut a.normed)?;
    let rows = batch.logit_tokens.len();
    pass.run("take_logit_tokens", |backend| {
        backend.take_logit_tokens(&a.normed, shard.hidden_size, &mut a.partial_sum)
    })?;
    pass.run(LM_HEAD, |backend| {
        backend.linear(&shard.lm_head, &a.partial_sum, rows, &mut a.logits)
    })?;
    pass.finite(LM_HEAD, &a.logits, rows, shard.vocab.len())
}

struct Pass<'a, B: Backend> {
    backend: &'a mut B,
    collective: &'a mut dyn Collective,
    tokens: usize,
    hidden: usize,
    eps: f32,
    layer: Option<usize>,
}

impl<B: Backend> Pass<'_, B> {
    fn layer(
        &mut self,
        layer: &mut LayerShard<B>,
        a: &mut Activations<B>,
    ) -> Result<(), ExecError> {
        self.norm("input_norm", &a.residual, &layer.input_norm, &mut a.normed)?;
        self.attention(&mut layer.attention, a)?;
        self.all_reduce("attention.output", &mut a.partial_sum)?;
        self.add_delta("attention.add", a)?;
        self.norm(
            "post_attention_norm",
            &a.residual,
            &layer.post_attention_norm,
            &mut a.normed,
        )?;
        self.mlp(&layer.mlp, a)?;
        self.all_reduce("mlp.down", &mut a.partial_sum)?;
        self.add_delta("mlp.add", a)
    }

    fn attention(
        &mut self,
        attention: &mut AttentionShard<B>,
        a: &mut Activations<B>,
    ) -> Result<(), ExecError> {
        let head_dim = attention.head_dim;
        let (queries, keys) = (
            attention.query_heads * head_dim,
            attention.kv_heads * head_dim,
        );
        self.linear(
            "attention.query",
            &attention.query,
            &a.normed,
            &mut a.query,
            queries,
        )?;
        self.linear("attention.key", &attention.key, &a.normed, &mut a.key, keys)?;
        self.linear(
            "attention.value",
            &attention.value,
            &a.normed,
            &mut a.value,
            keys,
        )?;
        let shape = AttentionShape {
            query_heads: attention.query_heads,
            kv_heads: attention.kv_heads,
            head_dim,
            kv_head_of_query_head: &attention.kv_head_of_query_head,
        };
        let norms = attention.head_norms.as_ref().map(|(query, key)| HeadNorms {
            query,
            key,
            eps: self.eps,
        });
        let cache = &mut attention.kv_cache;
        self.run("attention.rotate", |backend| {
            backend.rotate_and_cache(&mut a.query, &mut a.key, &a.value, norms, &shape, cache)
        })?;
        self.run("attention.softmax", |backend| {
            backend.attention(&a.query, cache, &shape, &mut a.attention)
        })?;
        self.finite("attention.softmax", &a.attention, self.tokens, queries)?;
        self.linear(
            "attention.output",
            &attention.output,
            &a.attention,
            &mut a.partial_sum,
            self.hidden,
        )
    }

    fn mlp(&mut self, mlp: &MlpShard<B>, a: &mut Activations<B>) -> Result<(), ExecError> {
        self.linear("mlp.gate", &mlp.gate, &a.normed, &mut a.gate, mlp.width)?;
        self.linear("mlp.up", &mlp.up, &a.normed, &mut a.up, mlp.width)?;
        self.run("mlp.silu", |backend| {
            backend.silu_mul(&mut a.gate, &a.up, mlp.width)
        })?;
        self.finite("mlp.silu", &a.gate, self.tokens, mlp.width)?;
        self.linear(
            "mlp.down",
            &mlp.down,
            &a.gate,
            &mut a.partial_sum,
            self.hidden,
        )
    }

    fn linear(
        &mut self,
        op: &'static str,
        weights: &B::Linear,
        x: &B::Buffer,
        out: &mut B::Buffer,
        width: usize,
    ) -> Result<(), ExecError> {
        let tokens = self.tokens;
        self.run(op, |backend| backend.linear(weights, x, tokens, out))?;
        self.finite(op, out, tokens, width)
    }

    fn norm(
        &mut self,
        op: &'static str,
        x: &B::Buffer,
        weight: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ExecError> {
        let (hidden, eps) = (self.hidden, self.eps);
        self.run(op, |backend| backend.rms_norm(x, weight, hidden, eps, out))
    }

    fn add_delta(&mut self, op: &'static str, a: &mut Activations<B>) -> Result<(), ExecError> {
        let hidden = self.hidden;
        self.run(op, |backend| {
            backend.add(&mut a.residual, &a.partial_sum, hidden)
        })?;
        self.finite(op, &a.residual, self.tokens, hidden)
    }

    fn all_reduce(&mut self, op: &'static str, buffer: &mut B::Buffer) -> Result<(), ExecError> {
        let place = self.place(op);
        self.backend
            .all_reduce_sum(buffer, self.tokens * self.hidden, self.collective)
            .map_err(|source| ExecError::Collective { place, source })
    }

    fn finite(
        &mut self,
        op: &'static str,
        buffer: &B::Buffer,
        rows: usize,
        width: usize,
    ) -> Result<(), ExecError> {
        let found = self.run(op, |backend| backend.first_non_finite(buffer, rows * width))?;
        match found {
            None => Ok(()),
            Some(at) => Err(ExecError::NonFinite {
                place: self.place(op),
                row: at / width,
                index: at % width,
            }),
        }
    }

    fn run<T>(
        &mut self,
        op: &'static str,
        run: impl FnOnce(&mut B) -> Result<T, KernelError>,
    ) -> Result<T, ExecError> {
        let place = self.place(op);
        run(self.backend).map_err(|source| ExecError::Op { place, source })
    }

    fn place(&self, op: &'static str) -> Place {
        Place {
            layer: self.layer,
            op,
        }
    }
}
