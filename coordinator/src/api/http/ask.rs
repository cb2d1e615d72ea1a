//! What an HTTP request asks, as plain data, and the way through the check that gRPC has too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;

use super::super::frontend::ServedModel;
use super::super::request::{CheckedRequest, RequestError, check_generate};
use super::super::status::ApiError;
use super::sampling::Streaming;

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
}

/// One answer to be made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    pub checked: CheckedRequest,
    /// The prompt, where the answer begins with it; its choices share it.
    pub echo: Option<Arc<str>>,
    /// The model was told of tools, and may call them.
    pub may_call: bool,
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
            let may_call = matches!(&prompt, Prompt::Chat(chat) if !chat.tools_json.is_empty());
            let text = match &prompt {
                Prompt::Text(text) if self.echo => Some(text.clone()),
                _ => None,
            };
            // A copy at a time: lists that are too long are refused before there is another.
            let request = v1::GenerateRequest {
                prompt: Some(prompt),
                ..self.request.clone()
            };
            let checked =
                check_generate(request, model, deadline).map_err(|source| ApiError::Named {
                    field: self.kind.field(&source, place),
                    source,
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
            for choice in 0..self.choices {
                let mut checked = checked.clone();
                let seed = &mut checked.sequence.sampling.seed;
                *seed = derived_seed(*seed, choice as u64);
                let echo = echo.clone();
                choices.push(Choice {
                    checked,
                    echo,
                    may_call,
                });
            }
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

/// The seed of a choice: the first has the request's own, so that it is what a request for one gets. The
/// others are of the SplitMix64 sequence (Steele, Lea and Flood, 2014) that begins there.
fn derived_seed(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_choices_differ_and_the_first_is_the_requests_own() {
        let seeds: std::collections::BTreeSet<u64> = (0..128)
            .flat_map(|choice| [derived_seed(7, choice), derived_seed(8, choice)])
            .collect();
        assert_eq!(seeds.len(), 256);
        assert_eq!(derived_seed(7, 0), 7);
        // The first value of the sequence that begins at 0.
        assert_eq!(derived_seed(0, 1), 0xe220_a839_7b1d_cdaf);
    }
}
