//! What an HTTP request asks, as plain data, and the way through the check that gRPC has too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;

use super::super::choices::choices as several;
use super::super::frontend::ServedModel;
use super::super::request::{CheckedRequest, RequestError, check_generate};
use super::super::shape::DEMAND;
use super::super::status::ApiError;
use super::sampling::Streaming;
use super::shape::Named;

/// The endpoint that was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// A request that was read and not checked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    pub kind: Kind,
    /// Absent: whatever is served.
    pub model: Option<String>,
    /// What all prompts share; without a prompt.
    pub request: v1::GenerateRequest,
    pub prompts: Vec<Prompt>,
    /// The prompt is not in a list of prompts.
    pub one_prompt: bool,
    /// Answers to each prompt.
    pub choices: usize,
    /// How long the client waits, from the request's beginning.
    pub timeout: Option<Duration>,
    /// None: the answer comes as a whole.
    pub streaming: Option<Streaming>,
    /// The answer begins with the prompt.
    pub echo: bool,
    /// What the answer must look like.
    pub shape: Option<Named>,
}

/// One answer to be made.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub checked: CheckedRequest,
    /// The prompt, where the answer begins with it; its choices share it.
    pub echo: Option<Arc<str>>,
}

impl Ask {
    /// Checks every prompt; renders and tokenizes them. Choices are in the order of their index.
    pub(super) fn check(
        self,
        model: &ServedModel,
        began: Instant,
    ) -> Result<Vec<Choice>, ApiError> {
        let deadline = self.timeout.and_then(|timeout| began.checked_add(timeout));
        check_model(self.model.as_deref(), model)?;
        let mut choices = Vec::with_capacity(self.prompts.len() * self.choices);
        for (index, prompt) in self.prompts.into_iter().enumerate() {
            let place = (!self.one_prompt).then_some(index);
            let text = match &prompt {
                Prompt::Text(text) if self.echo => Some(text.clone()),
                _ => None,
            };
            // A copy at a time: lists that are too long are refused before there is another.
            let request = v1::GenerateRequest {
                prompt: Some(prompt),
                shape: self.shape.as_ref().map(|named| named.shape.clone()),
                ..self.request.clone()
            };
            let checked = check_generate(request, model, deadline).map_err(|source| {
                let field = match (&source, &self.shape) {
                    (RequestError::Shape { field, .. }, Some(named)) if *field != DEMAND => {
                        named.field.clone()
                    }
                    _ => self.kind.field(&source, place),
                };
                ApiError::Named { field, source }
            })?;
            let echo = self.echo.then(|| {
                let decode = || {
                    model
                        .text
                        .tokenizer()
                        .decode(&checked.sequence.prompt, false)
                };
                Arc::<str>::from(text.unwrap_or_else(decode))
            });
            choices.extend(several(&checked, self.choices).map(|checked| Choice {
                checked,
                echo: echo.clone(),
            }));
        }
        Ok(choices)
    }
}

impl Kind {
    /// The field of an error, as this endpoint spells it. `prompt` is the prompt's place in their list.
    fn field(self, error: &RequestError, prompt: Option<usize>) -> String {
        let field = error.field();
        let at = prompt.map_or_else(String::new, |index| format!("[{index}]"));
        match self {
            Self::Chat => chat_field(&field),
            Self::Completions if field == "text" || field == "prompt" => format!("prompt{at}"),
            Self::Completions => match field.strip_prefix("token_ids.ids") {
                Some(rest) => format!("prompt{at}{rest}"),
                None => field,
            },
        }
    }
}

/// A field of a chat, as HTTP spells it.
pub(super) fn chat_field(field: &str) -> String {
    match field {
        "chat" | "prompt" => "messages".to_owned(),
        "logprobs" => "top_logprobs".to_owned(),
        "chat.template_variables_json" => "chat_template_kwargs".to_owned(),
        DEMAND => "tool_choice".to_owned(),
        _ => match field.strip_prefix("chat.") {
            Some(rest) => rest.trim_end_matches("_json").to_owned(),
            None => field.to_owned(),
        },
    }
}

/// `asked` is the model that is served, or nothing.
pub(super) fn check_model(asked: Option<&str>, model: &ServedModel) -> Result<(), ApiError> {
    match asked {
        Some(asked) if asked != model.name => Err(ApiError::ModelNotFound {
            asked: asked.to_owned(),
            served: model.name.clone(),
        }),
        _ => Ok(()),
    }
}
