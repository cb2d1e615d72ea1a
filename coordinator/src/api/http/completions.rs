//! `POST /v1/completions`: what is asked.

use secondwind_proto::v1::TokenIdsPrompt;
use secondwind_proto::v1::generate_request::Prompt;
use serde_json::Value as Json;

use super::super::status::ApiError;
use super::ask::{Ask, Kind};
use super::fields::{Fields, value_error, wrong_kind};
use super::{extras, sampling, shape};

/// Tokens of an answer whose request does not say; OpenAI's.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// What a prompt may be.
const PROMPTS: &str = "a string, a list of strings, token ids, or a list of lists of them";

/// Reads the body.
pub(super) fn read(mut body: Fields, strict: bool) -> Result<Ask, ApiError> {
    let fields = &mut body;
    let model = fields.text("model")?;
    let (prompts, one_prompt) = prompts(fields)?;
    let mut request = sampling::read(fields)?;
    let max_tokens = sampling::token_count(fields, "max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS);
    let echo = fields.boolean("echo")?.unwrap_or(false);
    if max_tokens == 0 && !echo {
        let name = fields.name("max_tokens");
        return Err(value_error(name, "0 is only for requests with echo"));
    }
    request.max_tokens = Some(max_tokens);
    request.logprobs = sampling::token_count(fields, "logprobs")?;
    // With nothing to generate the prompt is all there is to do.
    request.prompt_logprobs = echo && (request.logprobs.is_some() || max_tokens == 0);
    let shape = shape::read(fields, strict)?;
    let choices = sampling::choices(fields)?;
    let sequences = prompts.len() * choices;
    if sequences > sampling::MAX_CHOICES {
        let detail = format!(
            "{} prompts with n = {choices} are {sequences} answers; at most {} are given at once",
            prompts.len(),
            sampling::MAX_CHOICES
        );
        return Err(value_error(fields.name("prompt"), detail));
    }
    let timeout = sampling::timeout(fields)?;
    let streaming = sampling::streaming(fields, strict)?;
    body.finish(&extras::REQUEST, strict)?;
    Ok(Ask {
        kind: Kind::Completions,
        model,
        request,
        prompts,
        one_prompt,
        choices,
        timeout,
        streaming,
        echo,
        shape,
    })
}

/// The prompts, and whether it is one that does not stand in a list of prompts.
fn prompts(fields: &mut Fields) -> Result<(Vec<Prompt>, bool), ApiError> {
    let name = fields.name("prompt");
    let list = match fields.any("prompt") {
        Some(Json::String(text)) => return Ok((vec![Prompt::Text(text)], true)),
        Some(Json::Array(list)) => list,
        Some(other) => return Err(wrong_kind(&name, &other, PROMPTS)),
        None => return Err(value_error(name, "is missing")),
    };
    match list.first() {
        None => Err(value_error(name, "is empty")),
        Some(Json::Number(_)) => {
            let ids = sampling::token_ids(&name, Json::Array(list))?;
            Ok((vec![Prompt::TokenIds(TokenIdsPrompt { ids })], true))
        }
        Some(first) => {
            let texts = first.is_string();
            let prompts = list.into_iter().enumerate().map(|(index, json)| {
                let name = format!("{name}[{index}]");
                match json {
                    Json::String(text) if texts => Ok(Prompt::Text(text)),
                    json @ Json::Array(_) if !texts => {
                        let ids = sampling::token_ids(&name, json)?;
                        Ok(Prompt::TokenIds(TokenIdsPrompt { ids }))
                    }
                    other if texts => Err(wrong_kind(&name, &other, "a string like the first")),
                    other => Err(wrong_kind(&name, &other, "a list of token ids")),
                }
            });
            Ok((prompts.collect::<Result<_, _>>()?, false))
        }
    }
}
