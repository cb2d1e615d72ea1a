//! An answer that comes when it is complete.

use serde_json::Value as Json;

use super::super::response::{self, Responses};
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
        let response = response::whole(responses).await?;
        if let Some(finish) = &response.finish {
            usage.add(finish, index % per_prompt == 0);
        }
        written.push(writer.whole(&response));
    }
    Ok(head.whole(written, usage))
}
