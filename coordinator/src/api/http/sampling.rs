//! The fields that chat and completions share.

use std::collections::HashMap;
use std::time::Duration;

use secondwind_proto::v1;
use serde_json::Value as Json;

pub(super) use super::super::choices::MAX_CHOICES;
use super::super::status::ApiError;
use super::extras;
use super::fields::{Fields, value_error, wrong_kind};

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Streaming {
    /// A last chunk says what was used.
    pub include_usage: bool,
}

/// How every token is drawn and where an answer ends. What the numbers may be, `check_generate` knows.
pub(super) fn read(fields: &mut Fields) -> Result<v1::GenerateRequest, ApiError> {
    Ok(v1::GenerateRequest {
        temperature: fields.number("temperature")?,
        // -1 is how some clients write off.
        top_k: fields
            .integer("top_k", -1..=i64::from(u32::MAX))?
            .map(|top_k| u32::try_from(top_k).unwrap_or(0)),
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        typical_p: fields.number("typical_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias: logit_bias(fields)?,
        min_tokens: token_count(fields, "min_tokens")?,
        // Seeds are names: a negative one is as good as any.
        seed: fields
            .integer("seed", i64::MIN..=i64::MAX)?
            .map(i64::cast_unsigned),
        stop: stops(fields)?,
        stop_token_ids: match fields.any("stop_token_ids") {
            Some(json) => token_ids(&fields.name("stop_token_ids"), json)?,
            None => Vec::new(),
        },
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        priority: fields
            .integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?
            .and_then(|priority| i32::try_from(priority).ok()),
        cache_salt: fields.text("cache_salt")?,
        ..v1::GenerateRequest::default()
    })
}

/// A count of tokens.
pub(super) fn token_count(fields: &mut Fields, field: &str) -> Result<Option<u32>, ApiError> {
    let count = fields.integer(field, 0..=i64::from(u32::MAX))?;
    Ok(count.and_then(|count| u32::try_from(count).ok()))
}

/// How many answers each prompt gets.
pub(super) fn choices(fields: &mut Fields) -> Result<usize, ApiError> {
    let n = fields.integer("n", 1..=MAX_CHOICES as i64)?;
    Ok(n.and_then(|n| usize::try_from(n).ok()).unwrap_or(1))
}

/// How many seconds the client waits for all of its answer.
pub(super) fn timeout(fields: &mut Fields) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = fields.number("timeout")? else {
        return Ok(None);
    };
    match Duration::try_from_secs_f32(seconds) {
        Ok(timeout) if !timeout.is_zero() => Ok(Some(timeout)),
        _ => {
            let detail = format!("{seconds} is not a number of seconds above 0");
            Err(value_error(fields.name("timeout"), detail))
        }
    }
}

/// Whether and how the answer is streamed.
pub(super) fn streaming(fields: &mut Fields, strict: bool) -> Result<Option<Streaming>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let mut include_usage = false;
    if let Some(json) = fields.any("stream_options") {
        let name = fields.name("stream_options");
        if !stream {
            return Err(value_error(name, "is only for requests with stream"));
        }
        let mut options = Fields::of(&name, json)?;
        include_usage = options.boolean("include_usage")?.unwrap_or(false);
        options.finish(&extras::STREAM_OPTIONS, strict)?;
    }
    Ok(stream.then_some(Streaming { include_usage }))
}

/// An object of numbers by token id.
fn logit_bias(fields: &mut Fields) -> Result<HashMap<u32, f32>, ApiError> {
    let name = fields.name("logit_bias");
    let biases = match fields.any("logit_bias") {
        None => return Ok(HashMap::new()),
        Some(Json::Object(biases)) => biases,
        Some(other) => return Err(wrong_kind(&name, &other, "an object")),
    };
    biases
        .iter()
        .map(|(token, bias)| {
            let name = format!("{name}.{token}");
            let id = token
                .parse()
                .map_err(|_| value_error(name.clone(), "is not named by a token id"))?;
            let bias = bias
                .as_f64()
                .ok_or_else(|| wrong_kind(&name, bias, "a number"))?;
            Ok((id, bias as f32))
        })
        .collect()
}

/// A string or a list of strings.
fn stops(fields: &mut Fields) -> Result<Vec<Vec<u8>>, ApiError> {
    let name = fields.name("stop");
    match fields.any("stop") {
        None => Ok(Vec::new()),
        Some(Json::String(stop)) => Ok(vec![stop.into_bytes()]),
        Some(Json::Array(list)) => list
            .into_iter()
            .enumerate()
            .map(|(index, stop)| match stop {
                Json::String(stop) => Ok(stop.into_bytes()),
                other => Err(wrong_kind(&format!("{name}[{index}]"), &other, "a string")),
            })
            .collect(),
        Some(other) => Err(wrong_kind(&name, &other, "a string or a list of strings")),
    }
}

/// A list of token ids; whether the model has them is checked later.
pub(super) fn token_ids(name: &str, json: Json) -> Result<Vec<u32>, ApiError> {
    let Json::Array(list) = json else {
        return Err(wrong_kind(name, &json, "a list of token ids"));
    };
    list.iter()
        .enumerate()
        .map(|(index, json)| {
            json.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| {
                    let name = format!("{name}[{index}]");
                    match json.is_number() {
                        true => value_error(name, format!("{json} is not a token id")),
                        false => wrong_kind(&name, json, "a token id"),
                    }
                })
        })
        .collect()
}
