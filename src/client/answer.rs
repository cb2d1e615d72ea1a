//! A generation as it arrives, and as `--json` prints it.

use anyhow::{Result, bail};
use secondwind_proto::v1::{
    FinishReason, GenerateRequest, GenerateResponse, OutputLogprob, Timings as WireTimings,
    generate_request::Prompt,
};
use serde::Serialize;
use tonic::Streaming;

use super::{error::RequestError, group::Plan};

/// Everything about one generation. The fields stand in the order in which `--json` prints them.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// The prompt as the model saw it.
    pub prompt_token_ids: Vec<u32>,
    /// Natural logarithms, the first null; null as a whole when nobody asked.
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
    /// The answer's tokens.
    pub token_ids: Vec<u32>,
    /// One per token; null when nobody asked.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// What the model thought before it answered, where the coordinator puts it apart.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The answer.
    pub text: String,
    /// Tools that the model wants called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Call>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Token counts.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// The group that computed it.
    pub plan: Option<Plan>,
}

/// A tool that the model wants called.
#[derive(Debug, PartialEq, Serialize)]
pub struct Call {
    name: String,
    /// A JSON object, as text.
    arguments: String,
}

/// An output token's natural log-probability and the most likely tokens in its place.
#[derive(Debug, Serialize)]
pub struct TokenLogprob {
    token_id: u32,
    logprob: f32,
    top: Vec<Candidate>,
}

/// One of the most likely tokens.
#[derive(Debug, Serialize)]
struct Candidate {
    token_id: u32,
    logprob: f32,
    text: String,
}

/// Token counts.
#[derive(Debug, Default, Serialize)]
pub struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    cached_prompt_tokens: u32,
    total_tokens: u32,
}

/// Milliseconds by phase, and the decoding rate.
#[derive(Debug, Default, Serialize)]
pub struct Timings {
    queue_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
    tokens_per_second: Option<f64>,
}

impl Answer {
    /// Nothing has come yet.
    fn new(request: &GenerateRequest, plan: Option<Plan>) -> Self {
        Self {
            prompt_token_ids: match &request.prompt {
                Some(Prompt::TokenIds(prompt)) => prompt.ids.clone(),
                _ => Vec::new(),
            },
            prompt_logprobs: None,
            token_ids: Vec::new(),
            logprobs: request.logprobs.map(|_| Vec::new()),
            reasoning: String::new(),
            text: String::new(),
            tool_calls: Vec::new(),
            finish_reason: "",
            usage: Usage::default(),
            timings: Timings::default(),
            plan,
        }
    }

    /// Receives a whole stream; `on_piece` sees each piece as it comes.
    pub async fn receive(
        mut stream: Streaming<GenerateResponse>,
        request: &GenerateRequest,
        plan: Option<Plan>,
        mut on_piece: impl FnMut(&GenerateResponse) -> Result<()>,
    ) -> Result<Self> {
        let mut answer = Self::new(request, plan);
        while let Some(piece) = stream.message().await.map_err(RequestError::from)? {
            on_piece(&piece)?;
            answer.add(piece, request.prompt_logprobs);
        }
        if answer.finish_reason.is_empty() {
            bail!("the answer broke off: the coordinator ended the stream without a finish reason");
        }
        Ok(answer)
    }

    fn add(&mut self, piece: GenerateResponse, prompt_logprobs: bool) {
        if let Some(prompt) = piece.prompt {
            if !prompt.token_ids.is_empty() {
                self.prompt_token_ids = prompt.token_ids;
            }
            if prompt_logprobs {
                let known = prompt.logprobs.into_iter().map(Some);
                self.prompt_logprobs = Some([None].into_iter().chain(known).collect());
            }
        }
        if let Some(logprobs) = &mut self.logprobs {
            logprobs.extend(
                piece
                    .token_ids
                    .iter()
                    .zip(piece.logprobs)
                    .map(|(token, entry)| logprob(*token, entry)),
            );
        }
        self.token_ids.extend(piece.token_ids);
        self.reasoning += &piece.reasoning;
        self.text += &piece.text;
        let calls = piece.tool_calls.into_iter().map(|call| Call {
            name: call.name,
            arguments: call.arguments_json,
        });
        self.tool_calls.extend(calls);
        if let Some(finish) = piece.finish {
            self.finish_reason = match finish.reason() {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Unspecified => "unknown",
            };
            let usage = finish.usage.unwrap_or_default();
            self.usage = Usage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
                cached_prompt_tokens: usage.cached_prompt_tokens,
                total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            };
            self.timings = timings(finish.timings.unwrap_or_default(), usage.completion_tokens);
        }
    }

    /// The calls of tools, for people.
    pub fn call_lines(&self) -> impl Iterator<Item = String> {
        let calls = self.tool_calls.iter();
        calls.map(|call| format!("calls {} {}", call.name, call.arguments))
    }

    /// One line about speed.
    pub fn summary(&self) -> String {
        let Usage {
            prompt_tokens,
            completion_tokens,
            cached_prompt_tokens,
            ..
        } = self.usage;
        let cached = match cached_prompt_tokens {
            0 => String::new(),
            tokens => format!(", {tokens} of them cached"),
        };
        let rate = self
            .timings
            .tokens_per_second
            .map_or(String::new(), |rate| {
                format!(", {rate:.1} tokens per second")
            });
        format!(
            "{completion_tokens} tokens after a prompt of {prompt_tokens}{cached} (prefill {:.0} ms, decode {:.0} ms{rate})",
            self.timings.prefill_ms, self.timings.decode_ms
        )
    }

    /// The log-probabilities that were asked for, for people.
    pub fn logprob_lines(&self) -> Vec<String> {
        let prompt = self
            .prompt_logprobs
            .iter()
            .flatten()
            .zip(&self.prompt_token_ids)
            .map(|(logprob, token)| {
                let logprob = logprob.map_or("-".to_owned(), |logprob| format!("{logprob:.4}"));
                format!("prompt token {token}: {logprob}")
            });
        let output = self.logprobs.iter().flatten().map(|entry| {
            let top = entry
                .top
                .iter()
                .map(|other| format!("  {:?} {:.4}", other.text, other.logprob));
            format!(
                "token {}: {:.4}{}",
                entry.token_id,
                entry.logprob,
                top.collect::<String>()
            )
        });
        prompt.chain(output).collect()
    }
}

fn logprob(token_id: u32, entry: OutputLogprob) -> TokenLogprob {
    let top = entry.top.into_iter().map(|candidate| Candidate {
        token_id: candidate.token_id,
        logprob: candidate.logprob,
        text: candidate.text,
    });
    TokenLogprob {
        token_id,
        logprob: entry.logprob,
        top: top.collect(),
    }
}

/// The first token comes out of the prefill, so decoding took one token less.
fn timings(wire: WireTimings, completion_tokens: u32) -> Timings {
    let decoded = f64::from(completion_tokens.saturating_sub(1));
    let rate = 1e3 * decoded / wire.decode_ms;
    Timings {
        queue_ms: wire.queue_ms,
        prefill_ms: wire.prefill_ms,
        decode_ms: wire.decode_ms,
        tokens_per_second: Some(rate).filter(|rate| rate.is_finite() && *rate > 0.0),
    }
}

#[cfg(test)]
mod tests {
    use secondwind_proto::v1::ToolCall;
    use serde_json::json;

    use super::*;

    #[test]
    fn reasoning_and_calls_are_told_where_there_are_any() {
        let mut answer = Answer::new(&GenerateRequest::default(), None);
        let fields = |answer: &Answer| serde_json::to_value(answer).unwrap();
        let plain = fields(&answer);
        assert!(plain.get("reasoning").is_none() && plain.get("tool_calls").is_none());
        for reasoning in ["h", "m"] {
            let piece = GenerateResponse {
                reasoning: reasoning.to_owned(),
                ..GenerateResponse::default()
            };
            answer.add(piece, false);
        }
        let call = ToolCall {
            name: "add".to_owned(),
            arguments_json: "{}".to_owned(),
        };
        let piece = GenerateResponse {
            text: "I see.".to_owned(),
            tool_calls: vec![call],
            ..GenerateResponse::default()
        };
        answer.add(piece, false);
        let told = fields(&answer);
        assert_eq!(
            (&told["reasoning"], &told["text"]),
            (&json!("hm"), &json!("I see."))
        );
        assert_eq!(
            told["tool_calls"],
            json!([{"name": "add", "arguments": "{}"}])
        );
        assert_eq!(answer.call_lines().collect::<Vec<_>>(), ["calls add {}"]);
    }
}
