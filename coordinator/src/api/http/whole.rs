//! An answer that comes when it is complete.

use secondwind_proto::v1;
use serde_json::Value as Json;
use tokio_stream::StreamExt;

use super::super::response::Responses;
use super::super::status::ApiError;
use super::render::{Head, Usage, Writer};

/// The answer's JSON. Dropped early it cancels all sequences.
pub(super) async fn answer(
    head: &Head,
    choices: Vec<(Writer, Responses)>,
    per_prompt: usize,
) -> Result<Json, ApiError> {
    let mut usage = Usage::default();
    let mut written = Vec::with_capacity(choices.len());
    // In turn: what the others say meanwhile waits for us.
    for (index, (mut writer, responses)) in choices.into_iter().enumerate() {
        let response = collect(responses).await?;
        if let Some(finish) = &response.finish {
            usage.add(finish, index % per_prompt == 0);
        }
        written.push(writer.whole(&response));
    }
    Ok(head.whole(written, usage))
}

/// All responses as one.
async fn collect(mut responses: Responses) -> Result<v1::GenerateResponse, ApiError> {
    let mut all = v1::GenerateResponse::default();
    while let Some(response) = responses.next().await {
        let response = response?;
        all.token_ids.extend(response.token_ids);
        all.text.push_str(&response.text);
        all.logprobs.extend(response.logprobs);
        all.prompt = all.prompt.or(response.prompt);
        all.finish = all.finish.or(response.finish);
    }
    Ok(all)
}
