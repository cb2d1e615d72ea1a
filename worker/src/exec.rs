//! A decoder's forward pass over one rank's shard.

use secondwind_model::plan::recorded_sizes;

use crate::{
    backend::{Backend, Check},
    batch::Batch,
    collective::Collective,
    shard::Shard,
};

mod changes;
mod exchange;
mod logits;
mod parts;
mod pass;
mod place;

pub use logits::{Outcome, sample};
use parts::MOST_PARTS;
use pass::{Pass, Stop};
pub use place::{ExecError, Place};

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
    if batch.tokens.is_empty() {
        return Ok(());
    }
    let mut pass = Pass::new(backend, shard, batch, collective);
    match pass.step(shard, activations, batch) {
        Ok(()) => Ok(()),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::NonFinite(found)) => {
            let (check, part) = (
                found.check / MOST_PARTS as Check,
                found.check as usize % MOST_PARTS,
            );
            let place = Place::of_check(check, shard.layers.len());
            let width = width_of(shard, place);
            Err(ExecError::NonFinite {
                place,
                row: pass.parts[part].start + found.element / width,
                index: found.element % width,
            })
        }
    }
}

/// Runs every size of decoding step that the device wants once, records it and replays it, so that nothing is left to be
/// made or loaded when the first real step comes. All ranks do so in the same order; those of an epoch before are
/// forgotten by then.
///
/// # Errors
/// Names layer and operation.
pub fn record<B: Backend>(
    backend: &mut B,
    shard: &mut Shard<B>,
    activations: &mut Activations<B>,
    max_tokens: usize,
    collective: &mut dyn Collective,
) -> Result<(), ExecError> {
    if collective.world_size() > 1 && !collective.takes_device() {
        // A sum over the host cannot be recorded.
        return Ok(());
    }
    for tokens in recorded_sizes(backend.recording_sizes(), max_tokens) {
        let batch = Batch::blank(tokens);
        forward(backend, shard, activations, &batch, collective)?;
        let mut pass = Pass::new(backend, shard, &batch, collective);
        pass.run("record", B::start_recording)?;
        let given = pass.give(shard, activations, &batch);
        pass.run("record", |backend| backend.finish_recording(tokens))?;
        if let Err(Stop::Failed(error)) = given {
            return Err(error);
        }
        forward(backend, shard, activations, &batch, collective)?;
    }
    Ok(())
}

/// Columns of a checked operation's output.
fn width_of<B: Backend>(shard: &Shard<B>, place: Place) -> usize {
    let Some(layer) = place.layer.and_then(|layer| shard.layers.get(layer)) else {
        return shard.vocab.len();
    };
    let attention = &layer.attention;
    match place.op {
        "attention.query" | "attention.softmax" => attention.query_heads * attention.head_dim,
        "attention.key" | "attention.value" => attention.kv_heads * attention.head_dim,
        "mlp.gate" | "mlp.up" | "mlp.silu" => layer.mlp.width,
        _ => shard.hidden_size,
    }
}
