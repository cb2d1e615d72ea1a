//! One step's way through the shard: which operation follows which, and where its sums are waited for.

use std::ops::Range;

use secondwind_kernels::KernelError;

use super::{
    Activations, ExecError,
    parts::{MOST_PARTS, parts},
    place::{LM_HEAD, Place},
};
use crate::{
    backend::{AttentionShape, Backend, Check, HeadNorms, LinearJob, NonFinite},
    batch::Batch,
    collective::Collective,
    shard::{AttentionShard, LayerShard, MlpShard, Shard},
    timeline::{Mark, Part},
};

/// Why a pass ended early.
pub(super) enum Stop {
    Failed(ExecError),
    NonFinite(NonFinite),
}

impl From<ExecError> for Stop {
    fn from(error: ExecError) -> Self {
        Self::Failed(error)
    }
}

/// A step's way through the shard.
pub(super) struct Pass<'a, B: Backend> {
    backend: &'a mut B,
    collective: &'a mut dyn Collective,
    /// Of the step's tokens.
    pub(super) parts: Vec<Range<usize>>,
    /// The one that is worked on, and its tokens; outside the layers 0 and all of them.
    part: usize,
    tokens: usize,
    hidden: usize,
    eps: f32,
    layers: usize,
    layer: Option<usize>,
}

impl<'a, B: Backend> Pass<'a, B> {
    pub(super) fn new(
        backend: &'a mut B,
        shard: &Shard<B>,
        batch: &Batch,
        collective: &'a mut dyn Collective,
    ) -> Self {
        let tokens = batch.tokens.len();
        let sums_aside = !batch.is_decoding() && backend.sums_aside(collective);
        Self {
            parts: parts(tokens, sums_aside),
            part: 0,
            tokens,
            backend,
            collective,
            hidden: shard.hidden_size,
            eps: shard.rms_norm_eps,
            layers: shard.layers.len(),
            layer: None,
        }
    }

    pub(super) fn step(
        &mut self,
        shard: &mut Shard<B>,
        a: &mut Activations<B>,
        batch: &Batch,
    ) -> Result<(), Stop> {
        let recorded = match batch.is_decoding() {
            true => self.backend.recorded(self.tokens),
            false => None,
        };
        if let Some(size) = recorded {
            let padded = batch.padded(size);
            let all = 0..padded.tokens.len();
            self.run("begin", |backend| backend.begin(&padded, &[all]))?;
            let place = self.place("replay");
            self.collective
                .expect_device_sums()
                .map_err(|source| ExecError::Collective { place, source })?;
            self.run("replay", |backend| backend.replay(size))?;
            return self.settle(true);
        }
        let parts = self.parts.clone();
        self.run("begin", |backend| backend.begin(batch, &parts))?;
        self.mark(Part::Begin)?;
        self.give(shard, a, batch)?;
        self.settle(true)?;
        Ok(self.mark(Part::Check)?)
    }

    /// Gives the device everything between the batch's arrays and the logits.
    pub(super) fn give(
        &mut self,
        shard: &mut Shard<B>,
        a: &mut Activations<B>,
        batch: &Batch,
    ) -> Result<(), Stop> {
        let first_id = shard.vocab.start as u32;
        self.run("embed", |backend| {
            backend.embed(&shard.embedding, first_id, &mut a.residual)
        })?;
        self.mark(Part::Embed)?;
        self.all_reduce("embed", Part::EmbedSum, &mut a.residual)?;
        for (index, layer) in shard.layers.iter_mut().enumerate() {
            self.layer = Some(index);
            for part in 0..self.parts.len() {
                self.take(part);
                self.attention_block(layer, a)?;
            }
            for part in 0..self.parts.len() {
                self.take(part);
                self.mlp_block(layer, a)?;
            }
        }
        for part in 0..self.parts.len() {
            self.take(part);
            self.end_sum(Part::MlpSum)?;
        }
        self.take_all();
        // Rows are taken before lm_head reads them, so it is no reader of what this leaves.
        self.add_norm("mlp.add", true, &shard.final_norm, a, &[])?;
        self.layer = None;
        let rows = batch.logit_tokens.len();
        if rows > 0 {
            self.run("take_logit_tokens", |backend| {
                backend.take_logit_tokens(&a.normed, shard.hidden_size, &mut a.partial_sum)
            })?;
            self.mark(Part::FinalNorm)?;
            let check = self.check(LM_HEAD);
            let job = LinearJob {
                weights: &shard.lm_head,
                out: &mut a.logits,
                check,
            };
            self.run(LM_HEAD, |backend| {
                backend.linears(&a.partial_sum, rows, &mut [job])
            })?;
            self.mark(Part::LmHead)?;
        }
        Ok(())
    }

    /// Has what follows work on a part of the step.
    fn take(&mut self, part: usize) {
        let tokens = self.parts[part].clone();
        (self.part, self.tokens) = (part, tokens.len());
        self.backend.select(tokens);
    }

    /// Has what follows work on the whole step.
    fn take_all(&mut self) {
        let tokens = 0..self.parts.last().map_or(0, |part| part.end);
        (self.part, self.tokens) = (0, tokens.len());
        self.backend.select(tokens);
    }

    fn attention_block(
        &mut self,
        layer: &mut LayerShard<B>,
        a: &mut Activations<B>,
    ) -> Result<(), Stop> {
        let attention = &mut layer.attention;
        // The residual takes in the layer before only now, with the norm that reads it.
        let before = self.layer.and_then(|layer| layer.checked_sub(1));
        let this = std::mem::replace(&mut self.layer, before);
        if before.is_some() {
            self.end_sum(Part::MlpSum)?;
        }
        let readers = [&attention.query, &attention.key, &attention.value];
        self.add_norm("mlp.add", before.is_some(), &layer.input_norm, a, &readers)?;
        self.layer = this;
        self.mark(Part::AttentionNorm)?;
        self.attention(attention, a)?;
        self.mark(Part::Output)?;
        Ok(self.start_sum("attention.output", Part::AttentionSum, &mut a.partial_sum)?)
    }

    fn mlp_block(&mut self, layer: &LayerShard<B>, a: &mut Activations<B>) -> Result<(), Stop> {
        self.end_sum(Part::AttentionSum)?;
        let readers = [&layer.mlp.gate, &layer.mlp.up];
        self.add_norm(
            "attention.add",
            true,
            &layer.post_attention_norm,
            a,
            &readers,
        )?;
        self.mark(Part::MlpNorm)?;
        self.mlp(&layer.mlp, a)?;
        self.mark(Part::Down)?;
        Ok(self.start_sum("mlp.down", Part::MlpSum, &mut a.partial_sum)?)
    }

    fn attention(
        &mut self,
        attention: &mut AttentionShard<B>,
        a: &mut Activations<B>,
    ) -> Result<(), Stop> {
        self.linears(
            &a.normed,
            [
                ("attention.query", &attention.query, &mut a.query),
                ("attention.key", &attention.key, &mut a.key),
                ("attention.value", &attention.value, &mut a.value),
            ],
        )?;
        self.mark(Part::Qkv)?;
        let shape = AttentionShape {
            query_heads: attention.query_heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
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
        self.mark(Part::Rotate)?;
        let check = self.check("attention.softmax");
        self.run("attention.softmax", |backend| {
            backend.attention(&a.query, cache, &shape, &mut a.attention, check)
        })?;
        self.mark(Part::Attention)?;
        self.settle(false)?;
        self.linears(
            &a.attention,
            [("attention.output", &attention.output, &mut a.partial_sum)],
        )
    }

    fn mlp(&mut self, mlp: &MlpShard<B>, a: &mut Activations<B>) -> Result<(), Stop> {
        self.linears(
            &a.normed,
            [
                ("mlp.gate", &mlp.gate, &mut a.gate),
                ("mlp.up", &mlp.up, &mut a.up),
            ],
        )?;
        self.mark(Part::GateUp)?;
        let check = self.check("mlp.silu");
        self.run("mlp.silu", |backend| {
            backend.silu_mul(&mut a.gate, &a.up, mlp.width, &mlp.down, check)
        })?;
        self.mark(Part::Silu)?;
        self.settle(false)?;
        self.linears(&a.gate, [("mlp.down", &mlp.down, &mut a.partial_sum)])
    }

    /// Products of one x: (operation, weights, output).
    fn linears<const N: usize>(
        &mut self,
        x: &B::Buffer,
        products: [(&'static str, &B::Linear, &mut B::Buffer); N],
    ) -> Result<(), Stop> {
        let (tokens, first) = (self.tokens, products[0].0);
        let mut jobs = products.map(|(op, weights, out)| LinearJob {
            weights,
            out,
            check: self.check(op),
        });
        self.run(first, |backend| backend.linears(x, tokens, &mut jobs))?;
        self.settle(false)
    }

    fn add_norm(
        &mut self,
        op: &'static str,
        add: bool,
        weight: &B::Buffer,
        a: &mut Activations<B>,
        readers: &[&B::Linear],
    ) -> Result<(), Stop> {
        let (hidden, eps) = (self.hidden, self.eps);
        let check = self.check(op);
        self.run(op, |backend| {
            let delta = add.then_some(&a.partial_sum);
            let (residual, out) = (&mut a.residual, &mut a.normed);
            backend.add_norm(residual, delta, weight, hidden, eps, out, readers, check)
        })?;
        self.settle(false)
    }

    fn all_reduce(
        &mut self,
        op: &'static str,
        part: Part,
        buffer: &mut B::Buffer,
    ) -> Result<(), ExecError> {
        let place = self.place(op);
        self.backend
            .all_reduce_sum(buffer, self.tokens * self.hidden, self.collective)
            .map_err(|source| ExecError::Collective { place, source })?;
        match self.collective.world_size() {
            1 => Ok(()),
            _ => self.mark(part),
        }
    }

    /// Sums the part's rows over the ranks: at once if it is the only part, beside the other's products if not.
    fn start_sum(
        &mut self,
        op: &'static str,
        sum: Part,
        buffer: &mut B::Buffer,
    ) -> Result<(), ExecError> {
        if self.parts.len() == 1 {
            return self.all_reduce(op, sum, buffer);
        }
        let place = self.place(op);
        self.backend
            .start_sum(buffer, self.hidden, self.part, self.collective)
            .map_err(|source| ExecError::Collective { place, source })
    }

    /// What follows reads the part's sum.
    fn end_sum(&mut self, sum: Part) -> Result<(), ExecError> {
        if self.parts.len() == 1 {
            return Ok(());
        }
        let part = self.part;
        self.run("await_sum", |backend| backend.await_sum(part))?;
        self.mark(sum)
    }

    fn mark(&mut self, part: Part) -> Result<(), ExecError> {
        let layer = self.layer;
        self.run("mark", |backend| backend.mark(Mark { layer, part }))
    }

    /// Stops if something is known not to be finite; `wait` until all is known.
    fn settle(&mut self, wait: bool) -> Result<(), Stop> {
        let found = self.run("check", |backend| backend.non_finite(wait))?;
        if wait {
            // What a broken sum left behind is garbage, and says nothing about the model.
            let place = self.place("all_reduce");
            self.collective
                .settle()
                .map_err(|source| ExecError::Collective { place, source })?;
        }
        match found {
            None => Ok(()),
            Some(found) => Err(Stop::NonFinite(found)),
        }
    }

    pub(super) fn run<T>(
        &mut self,
        op: &'static str,
        run: impl FnOnce(&mut B) -> Result<T, KernelError>,
    ) -> Result<T, ExecError> {
        let place = self.place(op);
        run(self.backend).map_err(|source| ExecError::Op { place, source })
    }

    fn check(&self, op: &'static str) -> Check {
        self.place(op).check(self.layers) * MOST_PARTS as Check + self.part as Check
    }

    fn place(&self, op: &'static str) -> Place {
        Place {
            layer: self.layer,
            op,
        }
    }
}
