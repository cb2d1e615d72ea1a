//! A text completion for an API that has one prompt and one answer: what `/v1/completions` would make of it.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value as Json};

use super::super::frontend::ServedModel;
use super::super::request::CheckedRequest;
use super::super::status::ApiError;
use super::completions;
use super::fields::Fields;

/// A request that can be run.
#[derive(Clone, Debug)]
pub(in super::super) struct Completion {
    pub checked: CheckedRequest,
    /// The prompt, where the answer begins with it.
    pub echo: Option<Arc<str>>,
    /// The answer is wanted as it comes.
    pub streams: bool,
}

/// Reads and checks the fields of `body`, which ask for one text.
pub(in super::super) fn completion(
    body: Map<String, Json>,
    strict: bool,
    model: &ServedModel,
) -> Result<Completion, ApiError> {
    let ask = completions::read(Fields::body(body), strict)?;
    if ask.request.logprobs.is_some() {
        return Err(ApiError::unsupported("logprobs"));
    }
    let streams = ask.streaming.is_some();
    let mut choices = ask.check(model, Instant::now())?.into_iter();
    match (choices.next(), choices.next()) {
        (Some(choice), None) => Ok(Completion {
            checked: choice.checked,
            echo: choice.echo,
            streams,
        }),
        _ => {
            let detail = "is not 1; send a request for each answer that is wanted";
            Err(ApiError::value("n", detail))
        }
    }
}
