//! A request's body, limited before any of it is parsed.

use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE, EXPECT};
use tokio::time::timeout;
use tokio_stream::StreamExt;

use super::super::server::MAX_REQUEST_BYTES;
use super::HttpError;

/// How long a body may take to arrive.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the body of a request that is refused unread may take.
const DISCARD_PATIENCE: Duration = Duration::from_secs(5);

/// How much of a body that is too large is read and dropped. A client that still sends does not listen, and
/// would see a broken connection instead of the answer.
const DROPPED_BYTES: usize = 64 << 20;

/// The body of a JSON request.
pub(super) async fn read(request: Request) -> Result<Bytes, HttpError> {
    if let Err(error) = check_headers(request.headers()) {
        if !request.headers().contains_key(EXPECT) {
            // A client that still sends does not listen.
            let _ = timeout(PATIENCE, collect(request.into_body())).await;
        }
        return Err(error);
    }
    let limit_bytes = MAX_REQUEST_BYTES;
    if request.headers().contains_key(EXPECT) && declared_bytes(&request) > limit_bytes as u64 {
        // The client waits for a word before it sends.
        return Err(HttpError::TooLarge { limit_bytes });
    }
    let seconds = PATIENCE.as_secs();
    timeout(PATIENCE, collect(request.into_body()))
        .await
        .unwrap_or(Err(HttpError::SlowBody { seconds }))
}

/// Reads and drops what is still sent of a request that is refused unread, up to as much as one may have. A client
/// that still sends does not listen; one that waits for a word before it sends is not asked to.
pub(in crate::api) async fn discard(request: Request) {
    if request.headers().contains_key(EXPECT) {
        return;
    }
    let mut stream = request.into_body().into_data_stream();
    let rest = async {
        let mut length = 0;
        while let Some(Ok(piece)) = stream.next().await {
            length += piece.len();
            if length > MAX_REQUEST_BYTES {
                break;
            }
        }
    };
    // Whoever is slower than that goes without.
    let _ = timeout(DISCARD_PATIENCE, rest).await;
}

async fn collect(body: Body) -> Result<Bytes, HttpError> {
    let mut stream = body.into_data_stream();
    let mut all = Vec::new();
    let mut length = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|_| HttpError::BrokenBody)?;
        length += piece.len();
        if length > DROPPED_BYTES {
            break;
        }
        if length <= MAX_REQUEST_BYTES {
            all.extend_from_slice(&piece);
        } else {
            all = Vec::new();
        }
    }
    if length > MAX_REQUEST_BYTES {
        let limit_bytes = MAX_REQUEST_BYTES;
        return Err(HttpError::TooLarge { limit_bytes });
    }
    Ok(all.into())
}

fn declared_bytes(request: &Request) -> u64 {
    request.body().size_hint().lower()
}

fn check_headers(headers: &HeaderMap) -> Result<(), HttpError> {
    let text = |name| {
        let value = headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let found = text(CONTENT_TYPE).unwrap_or_default();
    let essence = found.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(HttpError::MediaType { found });
    }
    match text(CONTENT_ENCODING) {
        Some(found) if !found.eq_ignore_ascii_case("identity") => {
            Err(HttpError::Encoding { found })
        }
        _ => Ok(()),
    }
}
