//! From logits to tokens: each rank changes and reduces its vocabulary range, rank 0 merges, draws and tells all.

use prost::Message;
use secondwind_kernels::logits::CANDIDATES;
use secondwind_model::step::{
    MAX_TOP_LOGPROBS, PromptLogprob, RowResult, Sampling, Step, StepResult,
};
use secondwind_proto::v1;

use super::{
    Activations, ExecError,
    changes::Changes,
    exchange::{check_shape, decode_all, failed, gather_whole, place, protocol, tell},
};
use crate::{
    backend::{Backend, RowRequest},
    batch::Batch,
    collective::Collective,
    rules::Adjustments,
    sampler::{self, Covered, Draw, OwnRow, Row},
    shard::Shard,
    timeline::{Mark, Part},
};

/// What a step gave.
#[derive(Debug, Default)]
pub struct Outcome {
    /// On every rank: (row of the step, sampled token).
    pub sampled: Vec<(usize, u32)>,
    /// On rank 0 everything the coordinator is told; elsewhere only the step's number.
    pub result: StepResult,
}

/// Samples the rows of `step` whose logits [`super::forward`] left in `activations`, after `adjustments`
/// changed them in place.
///
/// # Errors
/// Names the operation.
pub fn sample<B: Backend>(
    backend: &mut B,
    shard: &Shard<B>,
    activations: &mut Activations<B>,
    step: &Step,
    batch: &Batch,
    adjustments: &Adjustments,
    collective: &mut dyn Collective,
) -> Result<Outcome, ExecError> {
    let mut outcome = Outcome {
        result: StepResult {
            number: step.number,
            ..StepResult::default()
        },
        ..Outcome::default()
    };
    if batch.logit_tokens.is_empty() {
        return Ok(outcome);
    }
    let samplings: Vec<&Sampling> = batch
        .sample_rows
        .iter()
        .filter_map(|&row| step.rows[row].sample.as_ref())
        .collect();
    let changes = Changes::of(adjustments, &samplings, shard);
    let (mine, originals) = reduce(backend, shard, activations, batch, &samplings, &changes)?;
    mark(backend, Part::Reduce)?;
    let gathered = collective
        .gather_to_root(mine.encode_to_vec())
        .map_err(|source| failed("sample.gather", source))?;
    let ranks = decode_all::<v1::RankLogits>("sample.gather", &gathered)?;
    let root = collective.rank() == 0;

    let mut rows = Vec::new();
    let mut decision = v1::Decision::default();
    if root {
        check_shape(&ranks, samplings.len(), batch.targets.len())?;
        rows = merge_rows(&ranks, &samplings);
        for (index, (merged, sampling)) in rows.iter().zip(&samplings).enumerate() {
            let row = &step.rows[batch.sample_rows[index]];
            let position = row.position + row.input.len();
            let draw = sampler::draw(
                &merged.row,
                sampler::covered(&merged.parts, &shard.vocab_lengths, CANDIDATES, &merged.row),
                shard.vocab_size,
                sampling,
                position,
            );
            match draw {
                Draw::Token(token) => {
                    decision.tokens.push(token.token);
                    outcome.result.rows.push(RowResult {
                        row: batch.sample_rows[index],
                        token: Some(token),
                        prompt_logprobs: Vec::new(),
                    });
                }
                Draw::NeedsWholeRow => decision.whole_rows.push(index as u32),
            }
        }
    }
    let announced = tell(collective, &decision)?;
    if !announced.whole_rows.is_empty() {
        let whole = gather_whole(
            backend,
            shard,
            activations,
            &announced.whole_rows,
            |row| changes.originals(row, &originals),
            collective,
        )?;
        if root {
            outcome.result.gathered_rows = announced.whole_rows.len() as u32;
            for (&index, whole) in announced.whole_rows.iter().zip(whole) {
                let index = index as usize;
                let step_row = batch.sample_rows[index];
                let row = &step.rows[step_row];
                let mut candidates: Vec<(u32, f32)> = (0..).zip(whole.logits).collect();
                candidates.retain(|&(_, logit)| logit > f32::NEG_INFINITY);
                sampler::sort_candidates(&mut candidates);
                let own = rows[index].row.own.clone().map(|own| OwnRow {
                    changed: whole.changed,
                    ..own
                });
                let merged = Row {
                    candidates,
                    own,
                    ..rows[index].row.clone()
                };
                let position = row.position + row.input.len();
                let covered = Covered {
                    count: merged.candidates.len(),
                    whole: true,
                };
                let vocab = shard.vocab_size;
                let Draw::Token(token) =
                    sampler::draw(&merged, covered, vocab, samplings[index], position)
                else {
                    return Err(protocol("sample.whole", "a whole row lacks logits".into()));
                };
                outcome.result.rows.push(RowResult {
                    row: step_row,
                    token: Some(token),
                    prompt_logprobs: Vec::new(),
                });
            }
            outcome.result.rows.sort_by_key(|row| row.row);
            decision = v1::Decision {
                whole_rows: Vec::new(),
                tokens: outcome
                    .result
                    .rows
                    .iter()
                    .filter_map(|row| Some(row.token.as_ref()?.token))
                    .collect(),
            };
        }
        decision = tell(collective, &decision)?;
    } else {
        decision = announced;
    }
    if decision.tokens.len() != batch.sample_rows.len() {
        let what = format!(
            "rank 0 named {} tokens for {} rows",
            decision.tokens.len(),
            batch.sample_rows.len()
        );
        return Err(protocol("sample.broadcast", what));
    }
    outcome.sampled = batch
        .sample_rows
        .iter()
        .copied()
        .zip(decision.tokens)
        .collect();
    if root {
        add_prompt_logprobs(&ranks, batch, &mut outcome.result)?;
    }
    mark(backend, Part::Draw)?;
    Ok(outcome)
}

fn mark<B: Backend>(backend: &mut B, part: Part) -> Result<(), ExecError> {
    let place = place("mark");
    let marked = backend.mark(Mark::of(part));
    marked.map_err(|source| ExecError::Op { place, source })
}

/// This rank's part of every logit row after their changes, and what the changed logits were if that matters.
fn reduce<B: Backend>(
    backend: &mut B,
    shard: &Shard<B>,
    activations: &mut Activations<B>,
    batch: &Batch,
    samplings: &[&Sampling],
    changes: &Changes<'_>,
) -> Result<(v1::RankLogits, Vec<f32>), ExecError> {
    let samples = samplings.iter().map(|sampling| RowRequest::Sample {
        temperature: sampling.temperature,
    });
    let targets = batch
        .targets
        .iter()
        .map(|&(_, token)| RowRequest::Target { token });
    let requests: Vec<RowRequest> = samples.chain(targets).collect();
    let first_id = shard.vocab.start as u32;
    let op = |op: &'static str| {
        move |source| ExecError::Op {
            place: place(op),
            source,
        }
    };
    let logits = &mut activations.logits;
    let kept = &requests[..changes.rows_to_keep()];
    let before = backend
        .reduce_rows(logits, shard.vocab.len(), first_id, kept)
        .map_err(op("sample.reduce"))?;
    let list = changes.all();
    let mut originals = vec![0.0; if kept.is_empty() { 0 } else { list.len() }];
    if !list.is_empty() {
        let wanted = (!kept.is_empty()).then_some(originals.as_mut_slice());
        backend
            .adjust_logits(logits, list, wanted)
            .map_err(op("sample.rules"))?;
    }
    backend
        .mask_logits(logits, shard.vocab.len(), changes.masks())
        .map_err(op("sample.mask"))?;
    let reduced = backend
        .reduce_rows(logits, shard.vocab.len(), first_id, &requests)
        .map_err(op("sample.reduce"))?;
    let mut before = before.into_iter();
    let mut mine = v1::RankLogits::default();
    for (index, (request, (row, target_logit))) in requests.iter().zip(reduced).enumerate() {
        match request {
            RowRequest::Sample { .. } => {
                let before = before.next();
                let own = changes.reported(index).zip(before).map(|(top, (own, _))| {
                    let were = changes.originals(index, &originals);
                    let best = own.candidates.into_iter().take(top as usize);
                    let (ids, logits) = best.unzip();
                    let candidates = row.candidates.iter();
                    let changed = candidates.filter_map(|(id, _)| Some((*id, *were.get(id)?)));
                    let (changed_ids, changed_logits) = changed.unzip();
                    v1::OwnRow {
                        max: own.max,
                        sum_exp: own.sum_exp,
                        ids,
                        logits,
                        changed_ids,
                        changed_logits,
                    }
                });
                let (ids, logits) = row.candidates.into_iter().unzip();
                mine.samples.push(v1::RowSummary {
                    max: row.max,
                    sum_exp: row.sum_exp,
                    sum_exp_at_temperature: row.sum_exp_t,
                    sum_x_exp_at_temperature: row.sum_x_exp_t,
                    ids,
                    logits,
                    own,
                });
            }
            RowRequest::Target { .. } => {
                let best = row.candidates.into_iter().take(MAX_TOP_LOGPROBS);
                let (ids, logits) = best.unzip();
                mine.targets.push(v1::TargetSummary {
                    max: row.max,
                    sum_exp: row.sum_exp,
                    target_logit,
                    ids,
                    logits,
                });
            }
        }
    }
    Ok((mine, originals))
}

struct Merged {
    parts: Vec<Row>,
    row: Row,
}

fn merge_rows(ranks: &[v1::RankLogits], samplings: &[&Sampling]) -> Vec<Merged> {
    let pairs = |ids: &[u32], logits: &[f32]| -> Vec<(u32, f32)> {
        ids.iter().copied().zip(logits.iter().copied()).collect()
    };
    let part = |part: &v1::RowSummary| Row {
        max: part.max,
        sum_exp: part.sum_exp,
        sum_exp_at_temperature: part.sum_exp_at_temperature,
        sum_x_exp_at_temperature: part.sum_x_exp_at_temperature,
        candidates: pairs(&part.ids, &part.logits),
        own: part.own.as_ref().map(|own| OwnRow {
            max: own.max,
            sum_exp: own.sum_exp,
            best: pairs(&own.ids, &own.logits),
            changed: pairs(&own.changed_ids, &own.changed_logits),
        }),
    };
    samplings
        .iter()
        .enumerate()
        .map(|(index, sampling)| {
            let parts = ranks.iter().map(|rank| part(&rank.samples[index]));
            let parts: Vec<Row> = parts.collect();
            let row = sampler::merge(&parts, sampling.temperature);
            Merged { parts, row }
        })
        .collect()
}

fn add_prompt_logprobs(
    ranks: &[v1::RankLogits],
    batch: &Batch,
    result: &mut StepResult,
) -> Result<(), ExecError> {
    for (index, &(step_row, target)) in batch.targets.iter().enumerate() {
        let parts = || ranks.iter().map(|rank| &rank.targets[index]);
        let max = parts()
            .map(|part| part.max)
            .fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = parts()
            .map(|part| part.sum_exp * (f64::from(part.max) - f64::from(max)).exp())
            .sum();
        let logit = parts().find_map(|part| part.target_logit).ok_or_else(|| {
            protocol(
                "sample.gather",
                format!("no rank holds the logit of token {target}"),
            )
        })?;
        let logprob = |logit: f32| (f64::from(logit) - f64::from(max) - sum.ln()) as f32;
        let mut top: Vec<(u32, f32)> = parts()
            .flat_map(|part| part.ids.iter().copied().zip(part.logits.iter().copied()))
            .collect();
        sampler::sort_candidates(&mut top);
        top.truncate(MAX_TOP_LOGPROBS);
        for (_, logit) in &mut top {
            *logit = logprob(*logit);
        }
        let logprob = PromptLogprob {
            logprob: logprob(logit),
            top,
        };
        match result.rows.iter_mut().find(|row| row.row == step_row) {
            Some(row) => row.prompt_logprobs.push(logprob),
            None => result.rows.push(RowResult {
                row: step_row,
                token: None,
                prompt_logprobs: vec![logprob],
            }),
        }
    }
    result.rows.sort_by_key(|row| row.row);
    Ok(())
}
