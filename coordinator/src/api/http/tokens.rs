//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use secondwind_proto::v1;
use serde_json::{Value as Json, json};

use super::super::frontend::ServedModel;
use super::super::prompt::render;
use super::super::request::check_ids;
use super::super::status::ApiError;
use super::ask::{chat_field, check_model};
use super::fields::{Fields, value_error};
use super::{Api, Server, body, error, extras, messages, sampling};
use crate::request::Engine;

/// What is tokenized.
enum Source {
    Text(String),
    Chat(v1::ChatPrompt),
}

pub(super) async fn tokenize<E: Engine>(
    State(server): Api<E>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&server, request, tokens).await
}

pub(super) async fn detokenize<E: Engine>(
    State(server): Api<E>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&server, request, text).await
}

/// Answers with what `work` makes of the body, which takes time.
async fn answer<E: Engine>(
    server: &Server<E>,
    request: Request,
    work: fn(Fields, bool, &ServedModel) -> Result<Json, ApiError>,
) -> Result<Response, ApiError> {
    let body = body::read(request).await?;
    let strict = server.settings.strict;
    let answer = server
        .frontend
        .blocking(None, move |model| {
            work(Fields::parse(&body)?, strict, model)
        })
        .await?;
    Ok(error::json_response(StatusCode::OK, &answer))
}

fn tokens(mut fields: Fields, strict: bool, model: &ServedModel) -> Result<Json, ApiError> {
    let asked = fields.text("model")?;
    let source = match fields.text("prompt")? {
        Some(text) => Source::Text(text),
        None => Source::Chat(messages::chat(&mut fields, strict)?),
    };
    // A template writes the special tokens of a chat itself.
    let plain = matches!(source, Source::Text(_));
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(plain);
    let with_strings = fields.boolean("return_token_strs")?.unwrap_or(false);
    fields.finish(&extras::REQUEST, strict)?;
    check_model(asked.as_deref(), model)?;
    let (field, text) = match source {
        Source::Text(text) => ("prompt", text),
        Source::Chat(chat) => {
            let rendered = render(chat, model).map_err(|source| ApiError::Named {
                field: chat_field(&source.field()),
                source,
            })?;
            ("messages", rendered)
        }
    };
    let tokenizer = model.text.tokenizer();
    let ids = tokenizer
        .encode(&text, add_special_tokens)
        .map_err(|error| value_error(field.to_owned(), error.to_string()))?;
    let strings = with_strings.then(|| {
        let texts = ids.iter().map(|&id| tokenizer.token_text(id));
        texts.collect::<Vec<String>>()
    });
    Ok(json!({
        "count": ids.len(),
        "max_model_len": model.max_context_tokens,
        "tokens": ids,
        "token_strs": strings,
    }))
}

fn text(mut fields: Fields, strict: bool, model: &ServedModel) -> Result<Json, ApiError> {
    let asked = fields.text("model")?;
    let json = fields.any("tokens");
    let json = json.ok_or_else(|| value_error(fields.name("tokens"), "is missing"))?;
    let ids = sampling::token_ids("tokens", json)?;
    fields.finish(&extras::REQUEST, strict)?;
    check_model(asked.as_deref(), model)?;
    check_ids("tokens", &ids, model.vocab_size)?;
    Ok(json!({"prompt": model.text.tokenizer().decode(&ids, false)}))
}
