//! `GenerateRequest` to a checked, plain request. Every mistake is named with its field.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use secondwind_model::step::{LogitRules, MAX_TOP_LOGPROBS, Sampling};
use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;

use super::defaults::{MAX_TEMPERATURE, is_min_p, is_temperature, is_top_p, is_typical_p};
use super::frontend::ServedModel;
use super::origin::origin;
use super::prompt::prompt_ids;
use super::rules::logit_rules;
use super::shape;
use crate::request::NewSequence;
use crate::text::template::TemplateError;
use crate::text::tokenizer::{Tokenizer, TokenizerError};

/// Most likely tokens that may be reported beside each token.
const MAX_LOGPROBS: u32 = MAX_TOP_LOGPROBS as u32;
/// Stop strings in a request.
const MAX_STOPS: usize = 16;
/// Length of a stop string.
const MAX_STOP_BYTES: usize = 1024;
/// Stop tokens in a request.
const MAX_STOP_TOKENS: usize = 256;
/// Below it, dividing by the temperature leaves the float range; the draw is greedy long before.
const GREEDY_BELOW: f32 = 1e-4;

/// Why a request is refused. Each names the field it is about.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("prompt: one of text, chat, token_ids must be set")]
    NoPrompt,
    /// Nothing to continue, though set.
    #[error("{field}: the prompt is empty")]
    EmptyPrompt {
        /// The prompt's field.
        field: &'static str,
    },
    /// The prompt leaves no room for an answer.
    #[error(
        "{field}: the prompt has {tokens} tokens, but the context of {max_context_tokens} tokens must also hold at least one token of output"
    )]
    PromptTooLong {
        /// The prompt's field.
        field: &'static str,
        /// Its length; "more than N" when it was not worth counting.
        tokens: String,
        /// The context.
        max_context_tokens: usize,
    },
    /// The model has no such token.
    #[error("{field}[{index}]: token id {id} is not below the vocabulary size {vocab_size}")]
    TokenId {
        /// The list's field.
        field: &'static str,
        /// Where in it.
        index: usize,
        /// The id.
        id: u32,
        /// Logits of the model.
        vocab_size: usize,
    },
    /// A number is out of range.
    #[error("{field}: {value} is not {range}")]
    OutOfRange {
        /// The number's field.
        field: &'static str,
        /// The number.
        value: String,
        /// What is legal.
        range: String,
    },
    /// A list is too long.
    #[error("{field}: {count} entries; at most {limit} are taken")]
    TooMany {
        /// The list's field.
        field: &'static str,
        /// Its length.
        count: usize,
        /// What is legal.
        limit: usize,
    },
    /// A stop string is not text.
    #[error("stop[{index}]: not UTF-8 from byte {valid_up_to} on")]
    StopNotUtf8 {
        /// Which one.
        index: usize,
        /// Bytes that are.
        valid_up_to: usize,
    },
    /// A stop string would end every answer.
    #[error("stop[{index}]: the stop string is empty")]
    StopEmpty {
        /// Which one.
        index: usize,
    },
    /// A stop string is too long.
    #[error("stop[{index}]: {bytes} bytes; at most {MAX_STOP_BYTES} are taken")]
    StopTooLong {
        /// Which one.
        index: usize,
        /// Its length.
        bytes: usize,
    },
    /// JSON inside a field is not what it should be.
    #[error("{field}: {detail}")]
    Json {
        /// The field, with the index where there are several.
        field: String,
        /// What is wrong.
        detail: String,
    },
    /// A chat without messages, or a message without a role.
    #[error("{field}: is empty")]
    Empty {
        /// The field, with the index where there are several.
        field: String,
    },
    /// A template variable that the coordinator sets itself.
    #[error("chat.template_variables_json: {name:?} cannot be set; {instead}")]
    ReservedVariable {
        /// Its name.
        name: String,
        /// What to do.
        instead: &'static str,
    },
    /// The checkpoint cannot chat.
    #[error("chat: the model {model} has no chat template; send a text or token ids")]
    NoChatTemplate {
        /// Its name.
        model: String,
    },
    /// The chat template would leave the tools out without a word.
    #[error("chat.tools_json: the model's chat template writes no tools; leave them out")]
    NoTools,
    /// The chat template did not give a prompt.
    #[error("chat: {0}")]
    Template(TemplateError),
    /// The answer cannot have the shape that is asked.
    #[error("{field}: {detail}")]
    Shape {
        /// The field that asks for it.
        field: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The text could not be tokenized.
    #[error("{field}: {source}")]
    Tokenize {
        /// The text's field.
        field: &'static str,
        /// The tokenizer's words.
        source: TokenizerError,
    },
}

impl RequestError {
    /// The field that it is about, by its name in `inference.proto`. An API that spells it otherwise puts
    /// its own name before [`Self::detail`].
    pub fn field(&self) -> String {
        match self {
            Self::NoPrompt => "prompt".to_owned(),
            Self::EmptyPrompt { field }
            | Self::PromptTooLong { field, .. }
            | Self::OutOfRange { field, .. }
            | Self::TooMany { field, .. }
            | Self::Shape { field, .. }
            | Self::Tokenize { field, .. } => (*field).to_owned(),
            Self::TokenId { field, index, .. } => format!("{field}[{index}]"),
            Self::StopNotUtf8 { index, .. }
            | Self::StopEmpty { index }
            | Self::StopTooLong { index, .. } => format!("stop[{index}]"),
            Self::Json { field, .. } | Self::Empty { field } => field.clone(),
            Self::ReservedVariable { .. } => "chat.template_variables_json".to_owned(),
            Self::NoChatTemplate { .. } | Self::Template(_) => "chat".to_owned(),
            Self::NoTools => "chat.tools_json".to_owned(),
        }
    }

    /// What is wrong, without the field.
    pub fn detail(&self) -> String {
        let text = self.to_string();
        match text.strip_prefix(&format!("{}: ", self.field())) {
            Some(detail) => detail.to_owned(),
            None => text,
        }
    }
}

/// How the text of an answer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// As it is.
    Text,
    /// With reasoning, and with calls if the model was told of tools.
    Chat {
        /// It was.
        may_call: bool,
    },
}

impl AnswerKind {
    fn of(prompt: Option<&Prompt>) -> Self {
        match prompt {
            Some(Prompt::Chat(chat)) => Self::Chat {
                may_call: !chat.tools_json.is_empty(),
            },
            _ => Self::Text,
        }
    }
}

/// A request that can be run.
#[derive(Clone, Debug)]
pub struct CheckedRequest {
    /// For the step loop.
    pub sequence: NewSequence,
    /// The client sent ids and knows them already.
    pub prompt_was_ids: bool,
    /// Strings that end the text.
    pub stops: Vec<String>,
    /// How the text is read.
    pub kind: AnswerKind,
}

/// Checks `request`; renders and tokenizes its prompt. Takes a while for long prompts.
pub fn check_generate(
    request: v1::GenerateRequest,
    model: &ServedModel,
    deadline: Option<Instant>,
) -> Result<CheckedRequest, RequestError> {
    // What is cheap to check comes first: a chat is not rendered for a request that is wrong anyway.
    one_answer(&request)?;
    let origin = origin(&request)?;
    let mut sampling = sampling(&request, model)?;
    let (stops, mut stop_token_ids) = stops(&request.stop, model.text.tokenizer())?;
    within(
        "stop_token_ids",
        request.stop_token_ids.len(),
        MAX_STOP_TOKENS,
    )?;
    check_ids("stop_token_ids", &request.stop_token_ids, model.vocab_size)?;
    stop_token_ids.extend(&request.stop_token_ids);
    if !request.ignore_eos {
        stop_token_ids.extend(&model.eos_token_ids);
    }
    if request.max_tokens == Some(0) && !request.prompt_logprobs {
        let range = "at least 1, which only prompt_logprobs can do without";
        return Err(out_of_range("max_tokens", 0, range));
    }
    let rules = logit_rules(&request, model, stop_token_ids.iter().copied())?;

    let shape = shape::asked(&request)?;

    let prompt_was_ids = matches!(request.prompt, Some(Prompt::TokenIds(_)));
    let kind = AnswerKind::of(request.prompt.as_ref());
    let prompt = prompt_ids(request.prompt, model)?;
    let prompt_tokens = prompt.len();
    sampling.rules = (!rules.change_nothing()).then(|| {
        Box::new(LogitRules {
            prompt_tokens,
            ..rules
        })
    });
    // The answer ends with the context, whatever max_tokens says.
    let room = model.max_context_tokens - prompt.len();
    let max_tokens = request
        .max_tokens
        .map_or(room, |asked| room.min(asked as usize));
    let min_tokens = request.min_tokens.unwrap_or(0);
    if min_tokens as usize > room {
        let range = format!("at most {room}, for which the context has room after the prompt");
        return Err(out_of_range("min_tokens", min_tokens, &range));
    }
    let grammar = match shape {
        Some(asked) if max_tokens > 0 => Some(asked.grammar(&prompt, model)?),
        _ => None,
    };
    Ok(CheckedRequest {
        sequence: NewSequence {
            prompt,
            sampling,
            max_tokens,
            stop_token_ids: stop_token_ids.into_iter().collect(),
            prompt_logprobs: request.prompt_logprobs,
            grammar,
            deadline,
            origin,
        },
        prompt_was_ids,
        stops,
        kind,
    })
}

/// A stream carries one answer.
fn one_answer(request: &v1::GenerateRequest) -> Result<(), RequestError> {
    let asked = [
        (
            "n",
            request.n,
            "1; send a request for each answer that is wanted",
        ),
        (
            "best_of",
            request.best_of,
            "1; no answers are drawn to be thrown away",
        ),
    ];
    match asked
        .into_iter()
        .find(|(_, asked, _)| asked.is_some_and(|asked| asked != 1))
    {
        Some((field, asked, range)) => Err(out_of_range(field, asked.unwrap_or(0), range)),
        None => Ok(()),
    }
}

fn sampling(request: &v1::GenerateRequest, model: &ServedModel) -> Result<Sampling, RequestError> {
    let defaults = &model.sampling;
    let temperature = request.temperature.unwrap_or(defaults.temperature);
    if !is_temperature(temperature) {
        let range = format!("between 0 and {MAX_TEMPERATURE}");
        return Err(out_of_range("temperature", temperature, &range));
    }
    let top_p = request.top_p.unwrap_or(defaults.top_p);
    if !is_top_p(top_p) {
        return Err(out_of_range("top_p", top_p, "above 0 and at most 1"));
    }
    let min_p = request.min_p.unwrap_or(defaults.min_p);
    if !is_min_p(min_p) {
        return Err(out_of_range("min_p", min_p, "between 0 and 1"));
    }
    let typical_p = request.typical_p.unwrap_or(defaults.typical_p);
    if !is_typical_p(typical_p) {
        return Err(out_of_range(
            "typical_p",
            typical_p,
            "above 0 and at most 1",
        ));
    }
    if let Some(logprobs) = request.logprobs.filter(|&count| count > MAX_LOGPROBS) {
        let range = format!("at most {MAX_LOGPROBS}");
        return Err(out_of_range("logprobs", logprobs, &range));
    }
    Ok(Sampling {
        temperature: if temperature < GREEDY_BELOW {
            0.0
        } else {
            temperature
        },
        top_k: request.top_k.unwrap_or(defaults.top_k),
        top_p,
        min_p,
        typical_p,
        seed: request.seed.unwrap_or_else(draw_seed),
        logprobs: request.logprobs,
        rules: None,
    })
}

/// Stop strings, and the special tokens among them: those have no text to be found in.
fn stops(
    stops: &[Vec<u8>],
    tokenizer: &Tokenizer,
) -> Result<(Vec<String>, BTreeSet<u32>), RequestError> {
    within("stop", stops.len(), MAX_STOPS)?;
    let mut strings = Vec::new();
    let mut tokens = BTreeSet::new();
    for (index, bytes) in stops.iter().enumerate() {
        if bytes.is_empty() {
            return Err(RequestError::StopEmpty { index });
        }
        if bytes.len() > MAX_STOP_BYTES {
            let bytes = bytes.len();
            return Err(RequestError::StopTooLong { index, bytes });
        }
        let text = str::from_utf8(bytes).map_err(|error| RequestError::StopNotUtf8 {
            index,
            valid_up_to: error.valid_up_to(),
        })?;
        tokens.extend(tokenizer.special_token(text));
        strings.push(text.to_owned());
    }
    Ok((strings, tokens))
}

pub(super) fn check_ids(
    field: &'static str,
    ids: &[u32],
    vocab_size: usize,
) -> Result<(), RequestError> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(index) => Err(RequestError::TokenId {
            field,
            index,
            id: ids[index],
            vocab_size,
        }),
        None => Ok(()),
    }
}

pub(super) fn within(field: &'static str, count: usize, limit: usize) -> Result<(), RequestError> {
    if count > limit {
        return Err(RequestError::TooMany {
            field,
            count,
            limit,
        });
    }
    Ok(())
}

pub(super) fn out_of_range(field: &'static str, value: impl ToString, range: &str) -> RequestError {
    RequestError::OutOfRange {
        field,
        value: value.to_string(),
        range: range.to_owned(),
    }
}

/// A seed for a request without one. The standard library's hash keys come from the system's random numbers.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}
