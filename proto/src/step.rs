//! [`Step`] and [`StepResult`] on the wire.

use secondwind_model::step::{
    LogitRules, PromptLogprob, RowInput, RowResult, Sampling, Step, StepResult, StepRow,
    TokenLogprobs, TokenSet,
};

use crate::{WireError, index, v1};

/// A step for the ranks of `epoch`.
pub fn step_to_wire(epoch: u64, step: &Step) -> v1::Step {
    v1::Step {
        epoch,
        number: step.number,
        rows: step.rows.iter().map(Into::into).collect(),
        ended: step.ended.clone(),
    }
}

/// A step as a worker executes it; its epoch stays with the caller.
///
/// # Errors
/// Names a row that carries no input.
pub fn step_from_wire(from: v1::Step) -> Result<Step, WireError> {
    Ok(Step {
        number: from.number,
        rows: from
            .rows
            .into_iter()
            .map(TryInto::try_into)
            .collect::<Result<_, _>>()?,
        ended: from.ended,
    })
}

impl From<&StepRow> for v1::StepRow {
    fn from(from: &StepRow) -> Self {
        let input = match &from.input {
            RowInput::Tokens(ids) => v1::step_row::Input::Tokens(v1::TokenIds { ids: ids.clone() }),
            RowInput::Sampled { step, row } => v1::step_row::Input::Sampled(v1::SampledToken {
                step: *step,
                row: *row as u64,
            }),
        };
        Self {
            sequence: from.sequence,
            position: from.position as u64,
            input: Some(input),
            new_blocks: from.new_blocks.clone(),
            sample: from.sample.as_ref().map(Into::into),
            prompt_targets: from.prompt_targets.clone(),
            mask: from.mask.as_ref().map(Into::into),
            drafts: u32::try_from(from.drafts).unwrap_or(u32::MAX),
        }
    }
}

impl TryFrom<v1::StepRow> for StepRow {
    type Error = WireError;

    fn try_from(from: v1::StepRow) -> Result<Self, WireError> {
        let message = "StepRow";
        let input = match from.input {
            Some(v1::step_row::Input::Tokens(tokens)) if !tokens.ids.is_empty() => {
                RowInput::Tokens(tokens.ids)
            }
            Some(v1::step_row::Input::Sampled(sampled)) => RowInput::Sampled {
                step: sampled.step,
                row: index(sampled.row, message, "sampled.row")?,
            },
            _ => {
                return Err(WireError::Missing {
                    message,
                    field: "input",
                });
            }
        };
        Ok(Self {
            sequence: from.sequence,
            position: index(from.position, message, "position")?,
            input,
            new_blocks: from.new_blocks,
            sample: from.sample.map(TryInto::try_into).transpose()?,
            prompt_targets: from.prompt_targets,
            mask: from.mask.map(TryInto::try_into).transpose()?,
            drafts: from.drafts as usize,
        })
    }
}

impl From<&Sampling> for v1::Sampling {
    fn from(from: &Sampling) -> Self {
        Self {
            temperature: from.temperature,
            top_k: from.top_k,
            top_p: from.top_p,
            min_p: from.min_p,
            typical_p: from.typical_p,
            seed: from.seed,
            logprobs: from.logprobs,
            rules: from.rules.as_deref().map(Into::into),
        }
    }
}

impl TryFrom<v1::Sampling> for Sampling {
    type Error = WireError;

    fn try_from(from: v1::Sampling) -> Result<Self, WireError> {
        let rules: Option<LogitRules> = from.rules.map(TryInto::try_into).transpose()?;
        Ok(Self {
            temperature: from.temperature,
            top_k: from.top_k,
            top_p: from.top_p,
            min_p: from.min_p,
            typical_p: from.typical_p,
            seed: from.seed,
            logprobs: from.logprobs,
            rules: rules.map(Box::new),
        })
    }
}

impl From<&LogitRules> for v1::LogitRules {
    fn from(from: &LogitRules) -> Self {
        let bias = |&(token, bias)| v1::TokenBias { token, bias };
        Self {
            repetition_penalty: from.repetition_penalty,
            presence_penalty: from.presence_penalty,
            frequency_penalty: from.frequency_penalty,
            logit_bias: from.logit_bias.iter().map(bias).collect(),
            min_tokens: from.min_tokens,
            stop_tokens: from.stop_tokens.clone(),
            prompt_tokens: from.prompt_tokens as u64,
            history: from.history.clone(),
        }
    }
}

impl TryFrom<v1::LogitRules> for LogitRules {
    type Error = WireError;

    fn try_from(from: v1::LogitRules) -> Result<Self, WireError> {
        Ok(Self {
            repetition_penalty: from.repetition_penalty,
            presence_penalty: from.presence_penalty,
            frequency_penalty: from.frequency_penalty,
            logit_bias: from
                .logit_bias
                .iter()
                .map(|bias| (bias.token, bias.bias))
                .collect(),
            min_tokens: from.min_tokens,
            stop_tokens: from.stop_tokens,
            prompt_tokens: index(from.prompt_tokens, "LogitRules", "prompt_tokens")?,
            history: from.history,
        })
    }
}

/// Bytes of a token id in a list, at the most, as far as vocabularies go.
const ID_BYTES: usize = 3;
/// No vocabulary has as many tokens; a set of more is not made room for.
const MAX_VOCAB: u32 = 1 << 24;

impl From<&TokenSet> for v1::TokenSet {
    fn from(from: &TokenSet) -> Self {
        use v1::token_set::Form;
        let (vocab_size, tokens) = (from.vocab_size(), from.len());
        let ids = |set: &TokenSet| v1::TokenIds {
            ids: set.iter().collect(),
        };
        let fewer = tokens.min(vocab_size - tokens);
        let form = if fewer * ID_BYTES > vocab_size.div_ceil(8) {
            let bytes = from.words().iter().flat_map(|word| word.to_le_bytes());
            Form::Bits(bytes.collect())
        } else if fewer == tokens {
            Form::Only(ids(from))
        } else {
            Form::AllBut(ids(&from.complement()))
        };
        Self {
            vocab_size: u32::try_from(vocab_size).unwrap_or(u32::MAX),
            form: Some(form),
        }
    }
}

impl TryFrom<v1::TokenSet> for TokenSet {
    type Error = WireError;

    fn try_from(from: v1::TokenSet) -> Result<Self, WireError> {
        use v1::token_set::Form;
        let message = "TokenSet";
        let invalid = |field, value: String| WireError::Invalid {
            message,
            field,
            value,
        };
        if from.vocab_size > MAX_VOCAB {
            return Err(invalid("vocab_size", from.vocab_size.to_string()));
        }
        let vocab_size = from.vocab_size as usize;
        let listed =
            |field, ids: v1::TokenIds| match ids.ids.iter().find(|&&id| id >= from.vocab_size) {
                Some(id) => Err(invalid(field, format!("token {id} of {vocab_size}"))),
                None => Ok(TokenSet::from_tokens(ids.ids, vocab_size)),
            };
        match from.form {
            Some(Form::Only(ids)) => listed("only", ids),
            Some(Form::AllBut(ids)) => Ok(listed("all_but", ids)?.complement()),
            Some(Form::Bits(bytes)) if bytes.len() == 4 * vocab_size.div_ceil(32) => {
                let words = bytes.chunks_exact(4);
                let words: Vec<u32> = words
                    .map(|word| {
                        word.iter()
                            .rev()
                            .fold(0, |word, &byte| word << 8 | u32::from(byte))
                    })
                    .collect();
                Ok(TokenSet::from_words(&words, vocab_size))
            }
            Some(Form::Bits(bytes)) => {
                let value = format!("{} bytes for {vocab_size} tokens", bytes.len());
                Err(invalid("bits", value))
            }
            None => Err(WireError::Missing {
                message,
                field: "form",
            }),
        }
    }
}

/// A finished step, without timings.
pub fn step_result_to_wire(epoch: u64, result: StepResult) -> v1::StepResult {
    v1::StepResult {
        epoch,
        number: result.number,
        rows: result
            .rows
            .into_iter()
            .map(|row| v1::RowResult {
                row: row.row as u64,
                tokens: row.tokens.into_iter().map(token_to_wire).collect(),
                prompt_logprobs: row
                    .prompt_logprobs
                    .into_iter()
                    .map(prompt_logprob_to_wire)
                    .collect(),
            })
            .collect(),
        gathered_rows: result.gathered_rows,
        took_us: 0,
        collectives: None,
    }
}

fn token_to_wire(from: TokenLogprobs) -> v1::TokenLogprobs {
    let top = from.top.into_iter();
    v1::TokenLogprobs {
        token: from.token,
        logprob: from.logprob,
        top: top
            .map(|(token, logprob)| v1::TopLogprob { token, logprob })
            .collect(),
    }
}

fn token_from_wire(from: v1::TokenLogprobs) -> TokenLogprobs {
    let top = from.top.into_iter();
    TokenLogprobs {
        token: from.token,
        logprob: from.logprob,
        top: top.map(|top| (top.token, top.logprob)).collect(),
    }
}

fn prompt_logprob_to_wire(from: PromptLogprob) -> v1::PromptLogprob {
    let (top_ids, top_logprobs) = from.top.into_iter().unzip();
    v1::PromptLogprob {
        logprob: from.logprob,
        top_ids,
        top_logprobs,
    }
}

fn prompt_logprob_from_wire(from: v1::PromptLogprob) -> Result<PromptLogprob, WireError> {
    let (ids, logprobs) = (from.top_ids.len(), from.top_logprobs.len());
    if ids != logprobs {
        return Err(WireError::Invalid {
            message: "PromptLogprob",
            field: "top_logprobs",
            value: format!("{logprobs} entries for {ids} tokens"),
        });
    }
    Ok(PromptLogprob {
        logprob: from.logprob,
        top: from.top_ids.into_iter().zip(from.top_logprobs).collect(),
    })
}

/// A finished step as the scheduler commits it.
///
/// # Errors
/// Names a row index that no machine can hold, or lists that should be as long as each other.
pub fn step_result_from_wire(from: v1::StepResult) -> Result<StepResult, WireError> {
    Ok(StepResult {
        number: from.number,
        rows: from
            .rows
            .into_iter()
            .map(|row| {
                Ok(RowResult {
                    row: index(row.row, "RowResult", "row")?,
                    tokens: row.tokens.into_iter().map(token_from_wire).collect(),
                    prompt_logprobs: row
                        .prompt_logprobs
                        .into_iter()
                        .map(prompt_logprob_from_wire)
                        .collect::<Result<_, _>>()?,
                })
            })
            .collect::<Result<_, WireError>>()?,
        gathered_rows: from.gathered_rows,
    })
}
