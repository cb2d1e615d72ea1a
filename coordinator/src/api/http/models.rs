//! What is served, and whether it is.

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value as Json, json};

use super::super::status::ApiError;
use super::ask::check_model;
use super::{Api, HttpError, Server, error};
use crate::metrics::CONTENT_TYPE;
use crate::request::{Engine, SubmitError};

pub(super) async fn list<E: Engine>(State(server): Api<E>) -> Response {
    let list = json!({"object": "list", "data": [model(&server)]});
    error::json_response(StatusCode::OK, &list)
}

pub(super) async fn one<E: Engine>(
    State(server): Api<E>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    // What is no text is no model's name.
    let id = id.map_or_else(|_| "\u{fffd}".to_owned(), |Path(id)| id);
    let served = server.frontend.model();
    // The name of a checkpoint's folder may begin with a slash, which the path already has.
    if served.name.strip_prefix('/') != Some(&id) {
        check_model(Some(&id), served)?;
    }
    Ok(error::json_response(StatusCode::OK, &model(&server)))
}

fn model<E: Engine>(server: &Server<E>) -> Json {
    let model = server.frontend.model();
    json!({
        "id": model.name,
        "object": "model",
        "created": server.started,
        "owned_by": "secondwind",
        "max_model_len": model.max_context_tokens,
    })
}

pub(super) async fn embeddings() -> ApiError {
    HttpError::NotOffered { what: "embeddings" }.into()
}

/// The process lives.
pub(super) async fn health() -> Response {
    error::json_response(StatusCode::OK, &json!({"status": "ok"}))
}

/// What Prometheus scrapes.
pub(super) async fn metrics<E: Engine>(State(server): Api<E>) -> Response {
    let mut response = Response::new(Body::from(server.frontend.metrics().render()));
    let kind = HeaderValue::from_static(CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// A group serves.
pub(super) async fn ready<E: Engine>(State(server): Api<E>) -> Result<Response, ApiError> {
    match server.frontend.group() {
        Some(_) => Ok(error::json_response(
            StatusCode::OK,
            &json!({"status": "ready"}),
        )),
        None => Err(ApiError::Submit(SubmitError::NoGroup {
            detail: "workers are missing or still loading".to_owned(),
        })),
    }
}
