//! Our responses to vLLM's.

use secondwind_proto::vllm::candidate_token_info::TokenInfo;
use secondwind_proto::vllm::finish_info::{FinishReason, StopReason};
use secondwind_proto::{v1, vllm};

/// What an answer tells.
#[derive(Debug)]
pub(super) struct Report {
    pub text: bool,
    pub token_ids: bool,
    pub logprobs: bool,
    /// Likely tokens beside each.
    pub candidates: usize,
    pub prompt_token_ids: bool,
    pub prompt_logprobs: bool,
    pub prompt_candidates: usize,
    /// The request's own.
    pub stop_token_ids: Vec<u32>,
    /// The model's; none if they end nothing.
    pub eos_token_ids: Vec<u32>,
    pub prompt: Vec<u32>,
}

impl Report {
    /// Of the prompt, from the first response of any of its sequences.
    pub(super) fn prompt(&self, first: Option<&v1::PromptInfo>) -> vllm::PromptInfo {
        let mut info = vllm::PromptInfo {
            num_prompt_tokens: self.prompt.len() as u32,
            ..vllm::PromptInfo::default()
        };
        if self.prompt_token_ids {
            info.token_ids.clone_from(&self.prompt);
        }
        let Some(known) = first.filter(|_| self.prompt_logprobs) else {
            return info;
        };
        info.logprobs.push(0.0);
        info.ranks.push(0);
        info.candidate_tokens
            .push(vllm::CandidateTokenInfo::default());
        let tokens = self.prompt.iter().skip(1);
        for ((&token, &logprob), top) in tokens.zip(&known.logprobs).zip(&known.top) {
            let likely = top.token_ids.iter().copied();
            let likely: Vec<(u32, f32)> = likely.zip(top.logprobs.iter().copied()).collect();
            info.logprobs.push(logprob);
            info.ranks.push(rank(token, &likely));
            info.candidate_tokens
                .push(candidates(token, &likely, self.prompt_candidates));
        }
        info
    }

    /// Of a sequence.
    pub(super) fn output(
        &self,
        index: u32,
        response: v1::GenerateResponse,
        last: Option<u32>,
    ) -> vllm::SequenceOutput {
        let finish = response.finish.map(|finish| {
            let reason = match finish.reason() {
                v1::FinishReason::Stop => FinishReason::Stop,
                v1::FinishReason::Length | v1::FinishReason::Unspecified => FinishReason::Length,
            };
            vllm::FinishInfo {
                num_output_tokens: finish.usage.map_or(0, |usage| usage.completion_tokens),
                finish_reason: reason.into(),
                stop_reason: match reason {
                    FinishReason::Stop => self.stop_reason(last, finish.stop),
                    _ => None,
                },
                ..vllm::FinishInfo::default()
            }
        });
        let mut output = vllm::SequenceOutput {
            index,
            num_tokens: response.token_ids.len() as u32,
            finish_info: finish,
            ..vllm::SequenceOutput::default()
        };
        if self.logprobs {
            for (&token, known) in response.token_ids.iter().zip(&response.logprobs) {
                let top = known.top.iter();
                let likely: Vec<(u32, f32)> = top.map(|of| (of.token_id, of.logprob)).collect();
                output.logprobs.push(known.logprob);
                output.ranks.push(rank(token, &likely));
                output
                    .candidate_tokens
                    .push(candidates(token, &likely, self.candidates));
            }
        }
        if self.text {
            output.text = response.text;
        }
        if self.token_ids {
            output.token_ids = response.token_ids;
        }
        output
    }

    /// Nothing but the answer itself may have ended it.
    fn stop_reason(&self, last: Option<u32>, stop: String) -> Option<StopReason> {
        Some(match last {
            Some(token) if self.eos_token_ids.contains(&token) => StopReason::EosTokenId(token),
            Some(token) if self.stop_token_ids.contains(&token) => StopReason::StopTokenId(token),
            _ if stop.is_empty() => return None,
            _ => StopReason::StopString(stop),
        })
    }
}

/// The last of a sequence that was aborted after so many tokens.
pub(super) fn aborted(index: u32, tokens: u32) -> vllm::SequenceOutput {
    vllm::SequenceOutput {
        index,
        finish_info: Some(vllm::FinishInfo {
            num_output_tokens: tokens,
            finish_reason: FinishReason::Aborted.into(),
            ..vllm::FinishInfo::default()
        }),
        ..vllm::SequenceOutput::default()
    }
}

/// Adds what came later.
pub(super) fn append(all: &mut vllm::GenerateResponse, next: vllm::GenerateResponse) {
    all.prompt_info = all.prompt_info.take().or(next.prompt_info);
    let Some(next) = next.outputs else { return };
    let output = all.outputs.get_or_insert_default();
    output.text += &next.text;
    output.num_tokens += next.num_tokens;
    output.token_ids.extend(next.token_ids);
    output.logprobs.extend(next.logprobs);
    output.ranks.extend(next.ranks);
    output.candidate_tokens.extend(next.candidate_tokens);
    output.finish_info = output.finish_info.take().or(next.finish_info);
}

/// Place of `token` among the likely ones, from 1; 0 if it is not there.
fn rank(token: u32, likely: &[(u32, f32)]) -> u32 {
    let place = likely.iter().position(|&(id, _)| id == token);
    place.map_or(0, |place| place as u32 + 1)
}

fn candidates(token: u32, likely: &[(u32, f32)], count: usize) -> vllm::CandidateTokenInfo {
    let ranked = likely.iter().zip(1..).take(count);
    let others = ranked.filter(|&(&(id, _), _)| id != token);
    vllm::CandidateTokenInfo {
        tokens: others
            .map(|(&(id, logprob), rank)| TokenInfo { id, logprob, rank })
            .collect(),
    }
}
