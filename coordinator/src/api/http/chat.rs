//! `POST /v1/chat/completions`: what is asked.

use secondwind_proto::v1::generate_request::Prompt;

use super::super::status::ApiError;
use super::ask::{Ask, Kind};
use super::fields::{Fields, value_error};
use super::{extras, messages, sampling, shape};

/// Reads the body.
pub(super) fn read(mut body: Fields, strict: bool) -> Result<Ask, ApiError> {
    let fields = &mut body;
    let model = fields.text("model")?;
    let mut request = sampling::read(fields)?;
    let prompt = Prompt::Chat(messages::chat(fields, strict)?);
    let shape = shape::read(fields, strict)?;
    request.max_tokens = max_tokens(fields)?;
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top_logprobs = sampling::token_count(fields, "top_logprobs")?;
    if top_logprobs.is_some() && !logprobs {
        let name = fields.name("top_logprobs");
        return Err(value_error(name, "is only for requests with logprobs"));
    }
    request.logprobs = logprobs.then(|| top_logprobs.unwrap_or(0));
    let choices = sampling::choices(fields)?;
    let timeout = sampling::timeout(fields)?;
    let streaming = sampling::streaming(fields, strict)?;
    body.finish(&extras::REQUEST, strict)?;
    Ok(Ask {
        kind: Kind::Chat,
        model,
        request,
        prompts: vec![prompt],
        one_prompt: true,
        choices,
        timeout,
        streaming,
        echo: false,
        shape,
    })
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let newer = sampling::token_count(fields, "max_completion_tokens")?;
    let older = sampling::token_count(fields, "max_tokens")?;
    match (newer, older) {
        (Some(newer), Some(older)) if newer != older => {
            let detail = "differs from max_completion_tokens; give one of them";
            Err(value_error(fields.name("max_tokens"), detail))
        }
        _ => Ok(newer.or(older)),
    }
}
