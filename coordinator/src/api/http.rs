//! The OpenAI-compatible HTTP API: JSON to the request that gRPC takes, and its responses to JSON.
//!
//! A request passes [`body`] (limits before parsing), [`fields`] (types),
//! [`chat`] or [`completions`] (what is asked), [`ask`] (the check that gRPC has too), and is answered by
//! [`whole`] or [`stream`] through [`render`]. [`extras`] has the fields that are refused or only hints.
//! [`page`] is for people: a chat, and what [`rack`] tells.

mod ask;
mod body;
mod chat;
mod completions;
mod error;
mod extras;
mod fields;
mod generate;
mod logprobs;
mod messages;
mod models;
mod one;
mod page;
mod rack;
mod render;
mod sampling;
mod shape;
mod stream;
mod tokens;
mod whole;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method};
use axum::middleware::map_request;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tonic::Status;

pub(super) use body::discard;
pub use error::HttpError;
pub(super) use one::{Completion, completion};

use super::access::is_grpc;
use super::frontend::Frontend;
use super::server::MAX_HEADER_LIST_BYTES;
use super::status::ApiError;
use crate::request::Engine;

/// How the HTTP API behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct HttpSettings {
    /// Refuse fields that nobody knows.
    pub strict: bool,
}

/// What every handler has.
struct Server<E> {
    frontend: Arc<Frontend<E>>,
    settings: HttpSettings,
    /// When the server started, in seconds since 1970.
    started: u64,
}

type Api<E> = State<Arc<Server<E>>>;

/// Everything under HTTP paths. A path that gRPC does not serve ends here too.
pub(super) fn router<E: Engine>(frontend: Arc<Frontend<E>>, settings: HttpSettings) -> Router {
    let server = Server {
        frontend,
        settings,
        started: unix_seconds(),
    };
    Router::new()
        .route("/v1/chat/completions", post(generate::chat::<E>))
        .route("/v1/completions", post(generate::completions::<E>))
        .route("/v1/embeddings", post(models::embeddings))
        .route("/v1/models", get(models::list::<E>))
        .route("/v1/models/{*id}", get(models::one::<E>))
        .route("/tokenize", post(tokens::tokenize::<E>))
        .route("/detokenize", post(tokens::detokenize::<E>))
        .route("/health", get(models::health))
        .route("/ready", get(models::ready::<E>))
        .route("/metrics", get(models::metrics::<E>))
        .route("/rack", get(rack::show::<E>))
        .merge(page::routes())
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::new(server))
        .layer(map_request(limit_headers))
}

async fn no_such_path(method: Method, headers: HeaderMap, request: Request) -> Response {
    if is_grpc(&headers) {
        let path = request.uri().path();
        return Status::unimplemented(format!("there is no method {path}")).into_http();
    }
    let path = request.uri().path().to_owned();
    ApiError::from(HttpError::NoSuchPath { method, path }).into_response()
}

async fn wrong_method(method: Method, request: Request) -> ApiError {
    let path = request.uri().path().to_owned();
    HttpError::Method { method, path }.into()
}

/// HTTP/2 has this limit in its frames already.
async fn limit_headers<B>(
    request: axum::http::Request<B>,
) -> Result<axum::http::Request<B>, ApiError> {
    let limit_bytes = MAX_HEADER_LIST_BYTES as usize;
    let bytes: usize = request
        .headers()
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum();
    if bytes + request.uri().path().len() > limit_bytes {
        return Err(HttpError::Headers { limit_bytes }.into());
    }
    Ok(request)
}

fn unix_seconds() -> u64 {
    // A clock before 1970 is none.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
