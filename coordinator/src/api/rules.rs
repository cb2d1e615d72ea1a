//! What a request says of its logits: penalties, biases, and a least length. Every mistake is named with its
//! field.

use secondwind_model::step::LogitRules;
use secondwind_proto::v1;

use super::defaults::{MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY, is_repetition_penalty};
use super::frontend::ServedModel;
use super::request::{RequestError, out_of_range, within};

/// Tokens whose logits a request may shift.
const MAX_LOGIT_BIASES: usize = 1024;
/// Largest shift, either way.
const MAX_LOGIT_BIAS: f32 = 100.0;
/// Largest presence and frequency penalty, either way.
const MAX_PENALTY: f32 = 2.0;

/// The rules of `request`, whose stop tokens are these, rising; how long its prompt is comes later.
pub(super) fn logit_rules(
    request: &v1::GenerateRequest,
    model: &ServedModel,
    stop_tokens: impl ExactSizeIterator<Item = u32>,
) -> Result<LogitRules, RequestError> {
    let repetition_penalty = request
        .repetition_penalty
        .unwrap_or(model.sampling.repetition_penalty);
    if !is_repetition_penalty(repetition_penalty) {
        let range = format!("between {MIN_REPETITION_PENALTY} and {MAX_REPETITION_PENALTY}");
        return Err(out_of_range(
            "repetition_penalty",
            repetition_penalty,
            &range,
        ));
    }
    let penalty = |field, value: Option<f32>| {
        let value = value.unwrap_or(0.0);
        let range = format!("between -{MAX_PENALTY} and {MAX_PENALTY}");
        let legal = (-MAX_PENALTY..=MAX_PENALTY).contains(&value);
        legal
            .then_some(value)
            .ok_or_else(|| out_of_range(field, value, &range))
    };
    let presence_penalty = penalty("presence_penalty", request.presence_penalty)?;
    let frequency_penalty = penalty("frequency_penalty", request.frequency_penalty)?;
    let min_tokens = request.min_tokens.unwrap_or(0);
    Ok(LogitRules {
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias(request, model.vocab_size)?,
        min_tokens,
        stop_tokens: stop_tokens_until(request, min_tokens, model.vocab_size, stop_tokens)?,
        ..LogitRules::default()
    })
}

fn logit_bias(
    request: &v1::GenerateRequest,
    vocab_size: usize,
) -> Result<Vec<(u32, f32)>, RequestError> {
    const FIELD: &str = "logit_bias";
    within(FIELD, request.logit_bias.len(), MAX_LOGIT_BIASES)?;
    let mut biases: Vec<(u32, f32)> = request
        .logit_bias
        .iter()
        .map(|(&id, &by)| (id, by))
        .collect();
    biases.sort_unstable_by_key(|(token, _)| *token);
    for &(id, bias) in &biases {
        if id as usize >= vocab_size {
            return Err(RequestError::TokenId {
                field: FIELD,
                index: id as usize,
                id,
                vocab_size,
            });
        }
        if !(-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&bias) {
            let range = format!("between -{MAX_LOGIT_BIAS} and {MAX_LOGIT_BIAS}");
            return Err(out_of_range(
                FIELD,
                format!("{bias} for token {id}"),
                &range,
            ));
        }
    }
    Ok(biases)
}

/// The stop tokens that `min_tokens` keeps away.
fn stop_tokens_until(
    request: &v1::GenerateRequest,
    min_tokens: u32,
    vocab_size: usize,
    stop_tokens: impl ExactSizeIterator<Item = u32>,
) -> Result<Vec<u32>, RequestError> {
    const FIELD: &str = "min_tokens";
    if let Some(most) = request.max_tokens.filter(|most| *most < min_tokens) {
        let range = format!("at most max_tokens, which is {most}");
        return Err(out_of_range(FIELD, min_tokens, &range));
    }
    if min_tokens == 0 {
        return Ok(Vec::new());
    }
    if stop_tokens.len() >= vocab_size {
        let range = "possible where every token of the vocabulary is a stop token";
        return Err(out_of_range(FIELD, min_tokens, range));
    }
    // What has no logit cannot be drawn; checkpoints with a cut vocabulary name such tokens.
    Ok(stop_tokens
        .filter(|&token| (token as usize) < vocab_size)
        .collect())
}
