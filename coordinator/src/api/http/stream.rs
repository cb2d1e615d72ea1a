//! An answer in server-sent events, as it comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use secondwind_proto::v1;
use serde_json::Value as Json;
use tokio_stream::{Stream, StreamMap};

use super::super::pace::{PATIENCE, Paced, paced};
use super::super::response::Responses;
use super::super::status::ApiError;
use super::error;
use super::render::{Head, Usage, Writer};
use super::sampling::Streaming;

/// Keeps proxies from collecting events.
const NO_BUFFERING: (HeaderName, HeaderValue) = (
    HeaderName::from_static("x-accel-buffering"),
    HeaderValue::from_static("no"),
);

/// The response whose body is the answer. Dropped early it cancels all sequences.
pub(super) fn answer(
    head: Head,
    choices: Vec<(Writer, Responses)>,
    per_prompt: usize,
    streaming: Streaming,
) -> Response {
    let mut source = StreamMap::with_capacity(choices.len());
    let mut writers = Vec::with_capacity(choices.len());
    for (index, (writer, responses)) in choices.into_iter().enumerate() {
        source.insert(index, responses);
        writers.push(writer);
    }
    let mut events = Events {
        head,
        source: Some(paced(source, PATIENCE)),
        writers,
        per_prompt,
        streaming,
        usage: Usage::default(),
        queue: VecDeque::new(),
    };
    for index in 0..events.writers.len() {
        let opening = events.writers[index].opening();
        events.say(opening);
    }
    (
        [NO_BUFFERING],
        Sse::new(events).keep_alive(KeepAlive::new()),
    )
        .into_response()
}

type Item = (usize, Result<v1::GenerateResponse, ApiError>);

struct Events {
    head: Head,
    /// None once nothing more is awaited.
    source: Option<Paced<Item>>,
    writers: Vec<Writer>,
    /// Choices of a prompt.
    per_prompt: usize,
    streaming: Streaming,
    usage: Usage,
    queue: VecDeque<Event>,
}

impl Events {
    /// Queues a chunk with this choice.
    fn say(&mut self, choice: Option<Json>) {
        if let Some(choice) = choice {
            let mut chunk = self.head.chunk(vec![choice], None);
            if self.streaming.include_usage {
                // Clients that asked for it look for it in every chunk.
                chunk["usage"] = Json::Null;
            }
            self.queue.push_back(event(&chunk));
        }
    }

    fn take(&mut self, index: usize, response: &v1::GenerateResponse) {
        if let Some(finish) = &response.finish {
            let first = index.is_multiple_of(self.per_prompt);
            self.usage.add(finish, first);
        }
        let choice = self.writers[index].chunk(response);
        self.say(choice);
    }

    /// The status is sent already, so that the error is an event; what comes after it would look whole.
    fn fail(&mut self, error: &ApiError) {
        error.log();
        self.source = None;
        self.queue.push_back(event(&error::object(error)));
    }

    fn end(&mut self) {
        self.source = None;
        if self.streaming.include_usage {
            let chunk = self.head.chunk(Vec::new(), Some(self.usage));
            self.queue.push_back(event(&chunk));
        }
        self.queue.push_back(Event::default().data("[DONE]"));
    }
}

fn event(json: &Json) -> Event {
    Event::default().data(json.to_string())
}

impl Stream for Events {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(event) = this.queue.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(source) = &mut this.source else {
                return Poll::Ready(None);
            };
            match ready!(Pin::new(source).poll_next(cx)) {
                Some(Ok((index, Ok(response)))) => this.take(index, &response),
                Some(Ok((_, Err(error))) | Err(error)) => this.fail(&error),
                None => this.end(),
            }
        }
    }
}
