//! vLLM's request to ours. What we cannot do is refused by its name there.

use std::time::Instant;

use secondwind_model::step::MAX_TOP_LOGPROBS;
use secondwind_proto::v1::generate_request::{Prompt, Shape};
use secondwind_proto::vllm::candidate_tokens::Select;
use secondwind_proto::vllm::decoding_parameters::StructuredOutput;
use secondwind_proto::{v1, vllm};

use super::super::choices::{MAX_CHOICES, choices};
use super::super::frontend::ServedModel;
use super::super::request::{CheckedRequest, check_generate};
use super::super::status::ApiError;
use super::response::Report;

/// Tokens of an answer whose request does not say; vLLM's.
const DEFAULT_MAX_TOKENS: u32 = 20;

/// Our fields and theirs, where they are called otherwise.
const NAMES: [(&str, &str); 18] = [
    ("max_tokens", "stopping.max_new_tokens"),
    ("min_tokens", "stopping.min_new_tokens"),
    ("stop", "stopping.stop_strings"),
    ("stop_token_ids", "stopping.stop_token_ids"),
    ("top_k", "sampling.top_k"),
    ("top_p", "sampling.top_p"),
    ("min_p", "sampling.min_p"),
    ("seed", "sampling.seed"),
    ("presence_penalty", "decoding.presence_penalty"),
    ("frequency_penalty", "decoding.frequency_penalty"),
    ("repetition_penalty", "decoding.repetition_penalty"),
    ("logit_bias", "decoding.logit_bias"),
    ("json_schema", "decoding.json"),
    ("json_object", "decoding.json_object"),
    ("regex", "decoding.regex"),
    ("choice", "decoding.choice"),
    ("grammar", "decoding.grammar"),
    ("cache_salt", "kv.cache_salt"),
];

/// A request that can be run.
#[derive(Debug)]
pub(super) struct Asked {
    /// One for each sequence.
    pub choices: Vec<CheckedRequest>,
    pub report: Report,
}

/// Reads and checks `request`; `streams` if its answer may have several sequences.
pub(super) fn read(
    request: vllm::GenerateRequest,
    streams: bool,
    model: &ServedModel,
    deadline: Option<Instant>,
) -> Result<Asked, ApiError> {
    if !request.model.is_empty() && request.model != model.name {
        return Err(ApiError::ModelNotFound {
            asked: request.model,
            served: model.name.clone(),
        });
    }
    refuse_unsupported(&request)?;
    let sampling = request.sampling.unwrap_or_default();
    let sequences = sequences(sampling.num_sequences, streams)?;
    let stopping = request.stopping.unwrap_or_default();
    let decoding = request.decoding.unwrap_or_default();
    let response = request.response.unwrap_or_default();
    let shape = decoding.structured_output.map(structured).transpose()?;
    let kv_salt = request.kv.map(|kv| kv.cache_salt);
    let kv_salt = kv_salt.filter(|salt| !salt.is_empty());
    let mut report = Report {
        text: response.output_text.unwrap_or(true),
        token_ids: response.output_token_ids,
        logprobs: response.output_logprobs,
        candidates: candidates(
            "response.output_candidates",
            response.output_candidates,
            response.output_logprobs,
        )?,
        prompt_token_ids: response.prompt_token_ids,
        prompt_logprobs: response.prompt_logprobs,
        prompt_candidates: candidates(
            "response.prompt_candidates",
            response.prompt_candidates,
            response.prompt_logprobs,
        )?,
        stop_token_ids: stopping.stop_token_ids.clone(),
        eos_token_ids: match stopping.ignore_eos {
            true => Vec::new(),
            false => model.eos_token_ids.clone(),
        },
        prompt: Vec::new(),
    };
    let ours = v1::GenerateRequest {
        prompt: request.prompt.map(|prompt| match prompt {
            vllm::generate_request::Prompt::Text(text) => Prompt::Text(text),
            vllm::generate_request::Prompt::TokenIds(ids) => {
                Prompt::TokenIds(v1::TokenIdsPrompt { ids: ids.ids })
            }
        }),
        max_tokens: Some(match stopping.max_new_tokens {
            0 => DEFAULT_MAX_TOKENS,
            tokens => tokens,
        }),
        min_tokens: Some(stopping.min_new_tokens),
        temperature: Some(request.temperature.unwrap_or(0.0)),
        top_k: Some(sampling.top_k).filter(|&top_k| top_k != 0),
        top_p: Some(sampling.top_p).filter(|&top_p| top_p != 0.0),
        min_p: Some(sampling.min_p).filter(|&min_p| min_p != 0.0),
        seed: sampling.seed.map(i64::cast_unsigned),
        presence_penalty: Some(decoding.presence_penalty),
        frequency_penalty: Some(decoding.frequency_penalty),
        repetition_penalty: Some(match decoding.repetition_penalty {
            0.0 => 1.0,
            penalty => penalty,
        }),
        logit_bias: decoding.logit_bias,
        stop: stopping
            .stop_strings
            .into_iter()
            .map(String::into_bytes)
            .collect(),
        stop_token_ids: stopping.stop_token_ids,
        ignore_eos: stopping.ignore_eos,
        // Ranks are places among the likeliest.
        logprobs: (response.output_logprobs || response.prompt_logprobs)
            .then_some(MAX_TOP_LOGPROBS as u32),
        prompt_logprobs: response.prompt_logprobs,
        priority: Some(request.priority),
        cache_salt: kv_salt,
        shape,
        ..v1::GenerateRequest::default()
    };
    let checked = check_generate(ours, model, deadline).map_err(|source| {
        match their_name(&source.field()) {
            Some(field) => ApiError::Named { field, source },
            None => source.into(),
        }
    })?;
    report.prompt.clone_from(&checked.sequence.prompt);
    Ok(Asked {
        choices: choices(&checked, sequences).collect(),
        report,
    })
}

/// What has no field of ours.
fn refuse_unsupported(request: &vllm::GenerateRequest) -> Result<(), ApiError> {
    let decoding = request.decoding.as_ref();
    let stopping = request.stopping.as_ref();
    let response = request.response.as_ref();
    let kv = request.kv.as_ref();
    let asked = [
        (
            "truncate_prompt_tokens",
            request.truncate_prompt_tokens != 0,
        ),
        ("media", !request.media.is_empty()),
        ("lora_name", !request.lora_name.is_empty()),
        (
            "decoding.allowed_token_ids",
            decoding.is_some_and(|it| !it.allowed_token_ids.is_empty()),
        ),
        (
            "stopping.include_stop_strings",
            stopping.is_some_and(|it| it.include_stop_strings),
        ),
        (
            "response.skip_special_tokens",
            response.is_some_and(|it| it.skip_special_tokens == Some(false)),
        ),
        (
            "kv.bypass_prefix_cache",
            kv.is_some_and(|it| it.bypass_prefix_cache),
        ),
        (
            "kv.kv_transfer_params",
            kv.is_some_and(|it| it.kv_transfer_params.is_some()),
        ),
        (
            "kv.ec_transfer_params",
            kv.is_some_and(|it| it.ec_transfer_params.is_some()),
        ),
    ];
    match asked.into_iter().find(|&(_, asked)| asked) {
        Some((field, _)) => Err(ApiError::unsupported(field)),
        None => Ok(()),
    }
}

/// The form that an answer must have.
fn structured(asked: StructuredOutput) -> Result<Shape, ApiError> {
    Ok(match asked {
        StructuredOutput::Json(schema) => Shape::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Shape::Regex(regex),
        StructuredOutput::Choice(asked) => Shape::Choice(v1::Choices {
            choices: asked.choices,
        }),
        StructuredOutput::Grammar(grammar) => Shape::Grammar(grammar),
        StructuredOutput::JsonObject(wanted) => Shape::JsonObject(wanted),
        StructuredOutput::StructuralTag(_) => {
            return Err(ApiError::unsupported("decoding.structural_tag"));
        }
    })
}

fn sequences(asked: u32, streams: bool) -> Result<usize, ApiError> {
    let wrong = |detail: String| Err(ApiError::value("sampling.num_sequences", detail));
    match asked.max(1) as usize {
        1 => Ok(1),
        _ if !streams => wrong(format!(
            "{asked} sequences have no place in one response; use GenerateStream"
        )),
        count if count > MAX_CHOICES => wrong(format!("{asked} is not at most {MAX_CHOICES}")),
        count => Ok(count),
    }
}

/// How many likely tokens are to be told of.
fn candidates(
    field: &str,
    asked: Option<vllm::CandidateTokens>,
    with_logprobs: bool,
) -> Result<usize, ApiError> {
    match asked.and_then(|asked| asked.select) {
        None | Some(Select::All(false)) => Ok(0),
        Some(_) if !with_logprobs => {
            let detail = "is only for requests with log-probabilities";
            Err(ApiError::value(field, detail))
        }
        Some(Select::TopN(count)) if count as usize <= MAX_TOP_LOGPROBS => Ok(count as usize),
        Some(Select::TopN(count)) => {
            let detail = format!("{count} is not at most {MAX_TOP_LOGPROBS}");
            Err(ApiError::value(format!("{field}.top_n"), detail))
        }
        Some(Select::TokenIds(_)) => Err(ApiError::unsupported(format!("{field}.token_ids"))),
        Some(Select::All(true)) => Err(ApiError::unsupported(format!("{field}.all"))),
    }
}

/// What they call a field of ours; its index, if it has one, stays.
fn their_name(field: &str) -> Option<String> {
    let end = field
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(field.len());
    let (name, rest) = field.split_at(end);
    let (_, theirs) = NAMES.into_iter().find(|&(ours, _)| ours == name)?;
    Some(format!("{theirs}{rest}"))
}
