//! What ranks tell each other to draw tokens.

use std::collections::HashMap;

use prost::Message;
use secondwind_proto::v1;

use super::{Activations, ExecError, Place};
use crate::{
    backend::Backend,
    collective::{Collective, CollectiveError},
    shard::Shard,
};

/// One row's logits over the whole vocabulary, and what those were that rules changed.
#[derive(Default)]
pub(super) struct WholeRow {
    pub logits: Vec<f32>,
    pub changed: Vec<(u32, f32)>,
}

/// Whole logits of the asked rows on rank 0; nothing elsewhere. `originals` says what a row's changed logits
/// were on this rank.
pub(super) fn gather_whole<B: Backend>(
    backend: &mut B,
    shard: &Shard<B>,
    activations: &Activations<B>,
    rows: &[u32],
    originals: impl Fn(usize) -> HashMap<u32, f32>,
    collective: &mut dyn Collective,
) -> Result<Vec<WholeRow>, ExecError> {
    let op = "sample.whole";
    let mut mine = v1::WholeRows::default();
    for &row in rows {
        let logits = backend
            .row(&activations.logits, row as usize, shard.vocab.len())
            .map_err(|source| ExecError::Op {
                place: place(op),
                source,
            })?;
        let (changed_ids, changed_logits) = originals(row as usize).into_iter().unzip();
        mine.rows.push(v1::LogitRow {
            logits,
            changed_ids,
            changed_logits,
        });
    }
    let gathered = collective
        .gather_to_root(mine.encode_to_vec())
        .map_err(|source| failed(op, source))?;
    let ranks = decode_all::<v1::WholeRows>(op, &gathered)?;
    if collective.rank() != 0 {
        return Ok(Vec::new());
    }
    let mut whole: Vec<WholeRow> = rows.iter().map(|_| WholeRow::default()).collect();
    for (rank, part) in ranks.into_iter().enumerate() {
        let due = shard.vocab_lengths[rank];
        if part.rows.len() != rows.len() || part.rows.iter().any(|row| row.logits.len() != due) {
            return Err(protocol(
                op,
                format!("rank {rank} sent other rows than asked for"),
            ));
        }
        for (whole, row) in whole.iter_mut().zip(part.rows) {
            whole.logits.extend(row.logits);
            whole
                .changed
                .extend(row.changed_ids.into_iter().zip(row.changed_logits));
        }
    }
    Ok(whole)
}

/// Every rank reduced as many rows as this one, and of each row there is something to draw.
pub(super) fn check_shape(
    ranks: &[v1::RankLogits],
    samples: usize,
    targets: usize,
) -> Result<(), ExecError> {
    for (rank, part) in ranks.iter().enumerate() {
        let paired = part
            .samples
            .iter()
            .all(|row| row.ids.len() == row.logits.len());
        if part.samples.len() != samples || part.targets.len() != targets || !paired {
            let what = format!(
                "rank {rank} reduced {} and {} rows, {samples} and {targets} were due",
                part.samples.len(),
                part.targets.len()
            );
            return Err(protocol("sample.gather", what));
        }
    }
    let all_banned =
        (0..samples).find(|&row| ranks.iter().all(|rank| rank.samples[row].ids.is_empty()));
    if let Some(row) = all_banned {
        let what = format!("no token of sampling row {row} is left to draw");
        return Err(protocol("sample.gather", what));
    }
    Ok(())
}

/// Rank 0's decision, on every rank.
pub(super) fn tell(
    collective: &mut dyn Collective,
    decision: &v1::Decision,
) -> Result<v1::Decision, ExecError> {
    let op = "sample.broadcast";
    let bytes = collective
        .broadcast(decision.encode_to_vec())
        .map_err(|source| failed(op, source))?;
    v1::Decision::decode(bytes.as_slice()).map_err(|error| protocol(op, error.to_string()))
}

/// What every rank sent.
pub(super) fn decode_all<M: Message + Default>(
    op: &'static str,
    parts: &[Vec<u8>],
) -> Result<Vec<M>, ExecError> {
    parts
        .iter()
        .map(|part| M::decode(part.as_slice()).map_err(|error| protocol(op, error.to_string())))
        .collect()
}

pub(super) fn place(op: &'static str) -> Place {
    Place { layer: None, op }
}

pub(super) fn failed(op: &'static str, source: CollectiveError) -> ExecError {
    ExecError::Collective {
        place: place(op),
        source,
    }
}

pub(super) fn protocol(op: &'static str, what: String) -> ExecError {
    ExecError::Protocol {
        place: place(op),
        what,
    }
}
