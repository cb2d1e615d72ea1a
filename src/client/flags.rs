//! The flags that `demo` and `generate` share, and the request that they stand for.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;
use secondwind_proto::v1::{
    ChatMessage, ChatPrompt, Choices, GenerateRequest, TokenIdsPrompt,
    generate_request::{Prompt, Shape},
};

use crate::exit::UsageError;

/// What to generate, and how.
#[derive(Args, Clone, Debug, Default)]
pub struct GenerationFlags {
    /// Text to answer. Sent as one chat message of the user when the model has a chat template, else
    /// as it is
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Token ids to continue, separated by commas; no template, no tokenizer
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        num_args = 1,
        conflicts_with = "prompt"
    )]
    pub token_ids: Option<Vec<u32>>,
    /// Send the prompt as it is, without the chat template
    #[arg(long, conflicts_with = "token_ids")]
    pub raw: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "token_ids"], allow_hyphen_values = true)]
    pub system: Option<String>,
    /// How the next token is chosen, and when to stop.
    #[command(flatten)]
    pub sampling: SamplingFlags,
    /// Report this many of the most likely tokens beside each output token, and log-probabilities
    #[arg(long, value_name = "N")]
    pub logprobs: Option<u32>,
    /// Report the log-probability of each prompt token
    #[arg(long)]
    pub prompt_logprobs: bool,
    /// Print exactly one JSON object on standard output; all else goes to standard error
    #[arg(long)]
    pub json: bool,
}

/// How the next token is chosen, and when to stop; `chat` takes these too.
#[derive(Args, Clone, Debug, Default)]
pub struct SamplingFlags {
    /// Tokens to generate at the most [default: up to the end of the context]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_tokens: Option<u32>,
    /// Sampling temperature; 0 is greedy [default: the checkpoint's own]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the K most likely tokens; 0 is off [default: the checkpoint's own]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Sample from the most likely tokens that hold this much probability [default: the checkpoint's own]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one [default: the checkpoint's own]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Sample from the tokens whose surprisal is nearest to the entropy, which hold this much probability; 1 is
    /// off [default: the checkpoint's own]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub typical_p: Option<f32>,
    /// Divide positive logits of tokens that prompt or answer have by this, multiply others [default: the
    /// checkpoint's own]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Take this from the logits of tokens that the answer has
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Take this from the logit of a token once for each time that the answer has it
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Add to the logit of a token; may be given several times
    #[arg(long, value_name = "ID=X", value_parser = logit_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Draw no stop token, and look for no stop text, before there are as many tokens
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub min_tokens: Option<u32>,
    /// Seed of the random numbers [default: drawn by the coordinator]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<OsString>,
    /// Stop at these token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1)]
    pub stop_token_ids: Vec<u32>,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    pub ignore_eos: bool,
    /// What the answer must look like.
    #[command(flatten)]
    pub shape: ShapeFlags,
}

/// What the answer must look like.
#[derive(Args, Clone, Debug, Default)]
#[group(multiple = false)]
pub struct ShapeFlags {
    /// Answer with JSON that is valid under this JSON schema
    #[arg(long, value_name = "JSON")]
    pub json_schema: Option<String>,
    /// Answer with a JSON object
    #[arg(long)]
    pub json_object: bool,
    /// Answer with what this regular expression matches as a whole
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub regex: Option<String>,
    /// Answer with this or another choice; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub choice: Vec<String>,
    /// Answer with what this grammar derives, in the syntax of Lark
    #[arg(long, value_name = "LARK")]
    pub grammar: Option<String>,
}

impl ShapeFlags {
    fn shape(&self) -> Option<Shape> {
        let choices = || Choices {
            choices: self.choice.clone(),
        };
        let text = |text: &Option<String>, shape: fn(String) -> Shape| text.clone().map(shape);
        text(&self.json_schema, Shape::JsonSchema)
            .or_else(|| text(&self.regex, Shape::Regex))
            .or_else(|| text(&self.grammar, Shape::Grammar))
            .or_else(|| self.json_object.then_some(Shape::JsonObject(true)))
            .or_else(|| (!self.choice.is_empty()).then(|| Shape::Choice(choices())))
    }
}

impl GenerationFlags {
    /// The request for a model with or without a chat template.
    pub fn request(&self, has_chat_template: bool) -> Result<GenerateRequest> {
        if self.prompt.as_deref() == Some("") {
            return Err(UsageError::one("--prompt is empty").into());
        }
        if self.system.is_some() && !has_chat_template {
            return Err(
                UsageError::one("--system needs a chat template, and this model has none").into(),
            );
        }
        let text = || self.prompt.clone().unwrap_or_default();
        let prompt = match &self.token_ids {
            Some(ids) => Prompt::TokenIds(TokenIdsPrompt { ids: ids.clone() }),
            None if self.raw || !has_chat_template => Prompt::Text(text()),
            None => {
                let system = self
                    .system
                    .as_ref()
                    .map(|system| message("system", system.clone()));
                let messages = system
                    .into_iter()
                    .chain([message("user", text())])
                    .collect();
                Prompt::Chat(ChatPrompt {
                    messages,
                    ..ChatPrompt::default()
                })
            }
        };
        Ok(GenerateRequest {
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            ..self.sampling.request(prompt)
        })
    }
}

impl SamplingFlags {
    /// The request that continues `prompt`.
    pub fn request(&self, prompt: Prompt) -> GenerateRequest {
        GenerateRequest {
            prompt: Some(prompt),
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().copied().collect(),
            min_tokens: self.min_tokens,
            seed: self.seed,
            stop: self
                .stop
                .iter()
                .map(|stop| stop.clone().into_encoded_bytes())
                .collect(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: None,
            prompt_logprobs: false,
            n: None,
            best_of: None,
            shape: self.shape.shape(),
            priority: None,
            cache_salt: None,
        }
    }
}

/// Reads `ID=X`.
fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let (token, bias) = text.split_once('=').ok_or("is not ID=X")?;
    let token = token
        .parse()
        .map_err(|error| format!("{token:?} is no token id: {error}"))?;
    let bias = bias
        .parse()
        .map_err(|error| format!("{bias:?} is no number: {error}"))?;
    Ok((token, bias))
}

/// A chat message.
pub fn message(role: &str, content: String) -> ChatMessage {
    ChatMessage {
        role: role.into(),
        content,
        ..ChatMessage::default()
    }
}
