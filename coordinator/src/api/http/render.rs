//! Responses of a sequence to choices of an answer, whole or in chunks.

use std::sync::Arc;

use secondwind_proto::v1;
use serde_json::{Value as Json, json};

use super::super::access::drawn;
use super::super::frontend::ServedModel;
use super::ask::{Choice, Kind};
use super::logprobs::{self, Columns};
use crate::text::tokenizer::Tokenizer;

/// What every object of an answer carries.
#[derive(Clone, Debug)]
pub(super) struct Head {
    kind: Kind,
    id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    pub(super) fn new(kind: Kind, request_id: &str, created: u64, model: &ServedModel) -> Self {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completions => "cmpl",
        };
        let digest: String = model.checkpoint_digest.chars().take(12).collect();
        Self {
            kind,
            id: format!("{prefix}-{request_id}"),
            created,
            model: model.name.clone(),
            fingerprint: format!("secondwind-{}-{digest}", env!("CARGO_PKG_VERSION")),
        }
    }

    /// The whole answer.
    pub(super) fn whole(&self, choices: Vec<Json>, usage: Usage) -> Json {
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completions => "text_completion",
        };
        let mut json = self.object(object, choices);
        json["usage"] = usage.json();
        json
    }

    /// A chunk of a streamed answer; with `usage` the last one.
    pub(super) fn chunk(&self, choices: Vec<Json>, usage: Option<Usage>) -> Json {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completions => "text_completion",
        };
        let mut json = self.object(object, choices);
        if let Some(usage) = usage {
            json["usage"] = usage.json();
        }
        json
    }

    fn object(&self, object: &str, choices: Vec<Json>) -> Json {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }
}

/// Tokens that an answer took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    prompt_tokens: u64,
    cached_prompt_tokens: u64,
    completion_tokens: u64,
}

impl Usage {
    /// Adds a choice. A prompt counts once, with its first choice.
    pub(super) fn add(&mut self, finish: &v1::Finish, first_of_prompt: bool) {
        let Some(usage) = &finish.usage else {
            return;
        };
        if first_of_prompt {
            self.prompt_tokens += u64::from(usage.prompt_tokens);
            self.cached_prompt_tokens += u64::from(usage.cached_prompt_tokens);
        }
        self.completion_tokens += u64::from(usage.completion_tokens);
    }

    fn json(self) -> Json {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_prompt_tokens},
        })
    }
}

/// Writes one choice.
#[derive(Debug)]
pub(super) struct Writer {
    kind: Kind,
    index: usize,
    tokenizer: Arc<Tokenizer>,
    with_logprobs: bool,
    echoes: bool,
    /// The prompt, until it is written.
    echo: Option<Arc<str>>,
    /// Characters written, for the offsets of tokens.
    offset: usize,
    /// Calls written.
    calls: usize,
}

/// What of a choice's text goes where.
#[derive(Debug, Default, PartialEq)]
struct Written {
    reasoning: String,
    content: String,
    tool_calls: Vec<Json>,
}

impl Writer {
    pub(super) fn new(
        kind: Kind,
        index: usize,
        choice: &Choice,
        tokenizer: Arc<Tokenizer>,
    ) -> Self {
        Self {
            kind,
            index,
            calls: 0,
            tokenizer,
            with_logprobs: choice.checked.sequence.sampling.logprobs.is_some(),
            echoes: choice.echo.is_some(),
            echo: choice.echo.clone(),
            offset: 0,
        }
    }

    /// All of the choice, from all that was said of it.
    pub(super) fn whole(&mut self, response: &v1::GenerateResponse) -> Json {
        let logprobs = self.logprobs(response).unwrap_or(Json::Null);
        let text = self.text(response);
        let finish_reason = self.finish_reason(response);
        match self.kind {
            Kind::Chat => {
                let content = match text.content.is_empty() && !text.tool_calls.is_empty() {
                    true => Json::Null,
                    false => text.content.into(),
                };
                let mut message = json!({"role": "assistant", "content": content, "refusal": null});
                if !text.tool_calls.is_empty() {
                    message["tool_calls"] = text.tool_calls.into();
                }
                if !text.reasoning.is_empty() {
                    message["reasoning_content"] = text.reasoning.into();
                }
                json!({
                    "index": self.index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": finish_reason,
                })
            }
            Kind::Completions => json!({
                "index": self.index,
                "text": text.content,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }),
        }
    }

    /// The chunk that comes before any text; none where text is all there is.
    pub(super) fn opening(&self) -> Option<Json> {
        let delta = json!({"role": "assistant", "content": ""});
        (self.kind == Kind::Chat).then(|| self.delta(delta, Json::Null, Json::Null))
    }

    /// What `response` adds; none if that is nothing yet.
    pub(super) fn chunk(&mut self, response: &v1::GenerateResponse) -> Option<Json> {
        let logprobs = self.logprobs(response);
        let text = self.text(response);
        if text == Written::default() && logprobs.is_none() && response.finish.is_none() {
            return None;
        }
        let logprobs = logprobs.unwrap_or(Json::Null);
        let finish_reason = self.finish_reason(response);
        Some(match self.kind {
            Kind::Chat => {
                let mut delta = json!({});
                for (name, text) in [
                    ("reasoning_content", text.reasoning),
                    ("content", text.content),
                ] {
                    if !text.is_empty() {
                        delta[name] = text.into();
                    }
                }
                if !text.tool_calls.is_empty() {
                    delta["tool_calls"] = text.tool_calls.into();
                }
                self.delta(delta, logprobs, finish_reason)
            }
            Kind::Completions => json!({
                "index": self.index,
                "text": text.content,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }),
        })
    }

    fn delta(&self, delta: Json, logprobs: Json, finish_reason: Json) -> Json {
        json!({"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})
    }

    fn text(&mut self, response: &v1::GenerateResponse) -> Written {
        let echo = self.echo.take();
        let calls = response.tool_calls.iter().map(|call| {
            let index = self.calls;
            self.calls += 1;
            json!({
                "index": index,
                "id": format!("call_{}", drawn()),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            })
        });
        Written {
            tool_calls: calls.collect(),
            reasoning: response.reasoning.clone(),
            content: echo.as_deref().unwrap_or_default().to_owned() + &response.text,
        }
    }

    fn finish_reason(&self, response: &v1::GenerateResponse) -> Json {
        match response.finish.as_ref().map(v1::Finish::reason) {
            Some(v1::FinishReason::Stop) if self.calls > 0 => "tool_calls".into(),
            Some(v1::FinishReason::Stop) => "stop".into(),
            Some(v1::FinishReason::Length) => "length".into(),
            Some(v1::FinishReason::Unspecified) | None => Json::Null,
        }
    }

    /// None if none were asked for, or no token came.
    fn logprobs(&mut self, response: &v1::GenerateResponse) -> Option<Json> {
        if !self.with_logprobs {
            return None;
        }
        match self.kind {
            Kind::Chat if response.token_ids.is_empty() => None,
            Kind::Chat => Some(logprobs::chat(response, &self.tokenizer)),
            Kind::Completions => {
                let mut columns = Columns::default();
                if let Some(prompt) = response.prompt.as_ref().filter(|_| self.echoes) {
                    columns.add_prompt(prompt, &self.tokenizer, &mut self.offset);
                }
                columns.add_output(response, &self.tokenizer, &mut self.offset);
                (!columns.is_empty()).then(|| columns.json())
            }
        }
    }
}
