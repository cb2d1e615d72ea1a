//! Log-probabilities in the two shapes that OpenAI has for them.

use secondwind_proto::v1;
use serde_json::{Map, Value as Json, json};

use crate::text::tokenizer::Tokenizer;

/// Chat's: a list of tokens, each with its bytes and the most likely ones in its place.
pub(super) fn chat(response: &v1::GenerateResponse, tokenizer: &Tokenizer) -> Json {
    let token = |id: u32, logprob: f32| json!({"token": tokenizer.token_text(id), "logprob": logprob, "bytes": tokenizer.decode_token(id)});
    let entries = response.token_ids.iter().zip(&response.logprobs);
    let content: Vec<Json> = entries
        .map(|(&id, output)| {
            let mut entry = token(id, output.logprob);
            let top = output.top.iter();
            entry["top_logprobs"] = top
                .map(|candidate| token(candidate.token_id, candidate.logprob))
                .collect();
            entry
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// Completions': lists side by side, over the prompt too where it is echoed.
#[derive(Debug, Default)]
pub(super) struct Columns {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    /// None where nothing is known, or was asked for.
    top_logprobs: Vec<Option<Map<String, Json>>>,
    text_offset: Vec<usize>,
}

impl Columns {
    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds the prompt's tokens. `offset` counts characters, as Python does.
    pub(super) fn add_prompt(
        &mut self,
        prompt: &v1::PromptInfo,
        tokenizer: &Tokenizer,
        offset: &mut usize,
    ) {
        // Nothing comes before the first token that it could follow from.
        let logprobs = [None].into_iter().chain(prompt.logprobs.iter().map(Some));
        let tops = [None].into_iter().chain(prompt.top.iter().map(Some));
        let tops = tops.chain(std::iter::repeat(None));
        for ((&id, logprob), likely) in prompt.token_ids.iter().zip(logprobs).zip(tops) {
            let text = tokenizer.token_text(id);
            let top = logprob.zip(likely).and_then(|(&logprob, likely)| {
                let ids = likely.token_ids.iter().zip(&likely.logprobs);
                let rivals = ids.map(|(&id, &logprob)| (tokenizer.token_text(id), logprob));
                top(rivals, (&text, logprob))
            });
            let characters = begun(tokenizer.decode_token(id));
            self.add((text, characters), logprob.copied(), top, offset);
        }
    }

    /// Adds the tokens of `response`.
    pub(super) fn add_output(
        &mut self,
        response: &v1::GenerateResponse,
        tokenizer: &Tokenizer,
        offset: &mut usize,
    ) {
        for (&id, output) in response.token_ids.iter().zip(&response.logprobs) {
            let text = tokenizer.token_text(id);
            let rivals = output.top.iter().map(|top| (top.text.clone(), top.logprob));
            let top = top(rivals, (&text, output.logprob));
            // A special token is no part of the text.
            let characters = match tokenizer.is_special(id) {
                true => 0,
                false => begun(tokenizer.decode_token(id)),
            };
            self.add((text, characters), Some(output.logprob), top, offset);
        }
    }

    /// `characters` of the text begin in the token.
    fn add(
        &mut self,
        (text, characters): (String, usize),
        logprob: Option<f32>,
        top: Option<Map<String, Json>>,
        offset: &mut usize,
    ) {
        self.text_offset.push(*offset);
        *offset += characters;
        self.tokens.push(text);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    /// The JSON object.
    pub(super) fn json(self) -> Json {
        let any_top = self.top_logprobs.iter().any(Option::is_some);
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": any_top.then_some(self.top_logprobs),
            "text_offset": self.text_offset,
        })
    }
}

/// Characters that begin in these bytes of UTF-8; a token may end within one.
fn begun(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
}

/// Text and log-probability of the most likely tokens, and of the one that stands there if it is none of
/// them. Two tokens may have one text: the likelier counts.
fn top(
    rivals: impl Iterator<Item = (String, f32)>,
    (own, logprob): (&str, f32),
) -> Option<Map<String, Json>> {
    let mut map = Map::new();
    for (text, logprob) in rivals {
        map.entry(text).or_insert_with(|| logprob.into());
    }
    if map.is_empty() {
        return None;
    }
    map.entry(own).or_insert_with(|| logprob.into());
    Some(map)
}

#[cfg(test)]
mod tests {
    use super::begun;

    #[test]
    fn a_character_counts_where_it_begins() {
        let bytes = "aé€😀".as_bytes();
        assert_eq!(begun(bytes), 4);
        for at in 0..bytes.len() {
            assert_eq!(begun(&bytes[..at]) + begun(&bytes[at..]), 4);
        }
        assert_eq!(begun(&bytes[2..3]), 0);
    }
}
