//! The two endpoints that generate text.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::super::account::Account;
use super::super::status::ApiError;
use super::ask::Ask;
use super::fields::Fields;
use super::render::{Head, Writer};
use super::{
    Api, Server, body, chat as chats, completions as texts, error, stream, unix_seconds, whole,
};
use crate::request::Engine;

pub(super) async fn chat<E: Engine>(
    State(server): Api<E>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(&server, request, chats::read).await
}

pub(super) async fn completions<E: Engine>(
    State(server): Api<E>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(&server, request, texts::read).await
}

async fn generate<E: Engine>(
    server: &Server<E>,
    request: Request,
    read: fn(Fields, bool) -> Result<Ask, ApiError>,
) -> Result<Response, ApiError> {
    let account = Account::of(request.extensions())?;
    let began = account.began();
    let body = body::read(request).await?;
    let strict = server.settings.strict;
    let (ask, choices) = server
        .frontend
        .blocking(None, move |model| {
            let ask = read(Fields::parse(&body)?, strict)?;
            let (kind, per_prompt, streaming) = (ask.kind, ask.choices, ask.streaming);
            Ok(((kind, per_prompt, streaming), ask.check(model, began)?))
        })
        .await?;
    let (kind, per_prompt, streaming) = ask;
    let model = server.frontend.model();
    let head = Head::new(kind, account.request_id(), unix_seconds(), model);
    // If one is not taken, those before it are dropped, which cancels them.
    let mut choices = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| {
            let tokenizer = Arc::clone(model.text.tokenizer());
            let writer = Writer::new(kind, index, &choice, tokenizer);
            Ok((writer, server.frontend.submit(choice.checked, &account)?))
        })
        .collect::<Result<Vec<_>, ApiError>>()?;
    // The last moment for a status: a full queue is no stream that fails.
    for (_, responses) in &mut choices {
        responses.queued().await?;
    }
    match streaming {
        Some(streaming) => Ok(stream::answer(head, choices, per_prompt, streaming)),
        None => {
            let answer = whole::answer(&head, choices, per_prompt).await?;
            Ok(error::json_response(StatusCode::OK, &answer))
        }
    }
}
