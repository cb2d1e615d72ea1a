//! A sequence's events to the responses of `Generate`, which are what both APIs answer with.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use secondwind_model::step::{PromptLogprob, TokenLogprobs};
use secondwind_proto::v1;
use tokio::time::Sleep;
use tokio_stream::{Stream, StreamExt};

use super::account::{Account, SequenceEnd};
use super::request::CheckedRequest;
use super::status::ApiError;
use crate::metrics::Metrics;
use crate::request::{EventStream, FinishReason, SequenceEvent, SequenceTimings, SubmitError};
use crate::text::answer::{AnswerSplitter, Parts};
use crate::text::decode::{StreamDecoder, TextPiece};
use crate::text::tokenizer::Tokenizer;

/// Tokens put into one response when a client reads slower than they come.
const MAX_RESPONSE_TOKENS: usize = 128;

/// The responses of one `Generate` call. Dropping it cancels the sequence.
pub(super) struct Responses {
    /// None once nothing more is awaited.
    events: Option<EventStream>,
    /// The first event, if it was awaited before it was wanted.
    first: Option<SequenceEvent>,
    deadline: Option<Pin<Box<Sleep>>>,
    tokenizer: Arc<Tokenizer>,
    decoder: StreamDecoder,
    splitter: AnswerSplitter,
    stop_token_ids: Vec<u32>,
    with_logprobs: bool,
    /// Most likely tokens to report.
    top_logprobs: usize,
    /// What the first response says of the prompt, until it is sent.
    prompt: Option<v1::PromptInfo>,
    awaits_prompt_logprobs: bool,
    prompt_tokens: u32,
    cached_prompt_tokens: u32,
    completion_tokens: u32,
    last_token: Option<u32>,
    clock: Clock,
    metrics: Arc<Metrics>,
    account: Arc<Account>,
    /// Its end was counted.
    counted: bool,
    /// Sent after the response that was being filled.
    error: Option<ApiError>,
}

impl Responses {
    pub(super) fn new(
        request: &CheckedRequest,
        prompt_token_ids: Vec<u32>,
        events: EventStream,
        tokenizer: Arc<Tokenizer>,
        splitter: AnswerSplitter,
        metrics: Arc<Metrics>,
        account: Arc<Account>,
    ) -> Self {
        let sequence = &request.sequence;
        let prompt_tokens = u32::try_from(prompt_token_ids.len()).unwrap_or(u32::MAX);
        let rules = sequence.sampling.rules.as_deref();
        let min_tokens = rules.map_or(0, |rules| rules.min_tokens);
        let tell_prompt = sequence.prompt_logprobs || !request.prompt_was_ids;
        Self {
            events: Some(events),
            first: None,
            deadline: sequence
                .deadline
                .map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into()))),
            decoder: StreamDecoder::new(Arc::clone(&tokenizer), request.stops.clone())
                .not_before(min_tokens),
            splitter,
            tokenizer,
            stop_token_ids: sequence.stop_token_ids.clone(),
            with_logprobs: sequence.sampling.logprobs.is_some(),
            top_logprobs: sequence.sampling.logprobs.unwrap_or(0) as usize,
            prompt: tell_prompt.then(|| v1::PromptInfo {
                token_ids: prompt_token_ids,
                logprobs: Vec::new(),
                top: Vec::new(),
            }),
            awaits_prompt_logprobs: sequence.prompt_logprobs,
            prompt_tokens,
            cached_prompt_tokens: 0,
            completion_tokens: 0,
            last_token: None,
            clock: Clock::new(),
            metrics,
            account,
            counted: false,
            error: None,
        }
    }

    /// Returns once the step loop has taken the sequence.
    ///
    /// # Errors
    /// Why it did not.
    pub(super) async fn queued(&mut self) -> Result<(), ApiError> {
        if let Some(events) = &mut self.events {
            match events.recv().await {
                Some(SequenceEvent::Failed(error)) => {
                    self.events = None;
                    self.count_failure(Some(&error));
                    return Err(error.into());
                }
                None => {
                    self.events = None;
                    let detail = "the step loop let go of the sequence".to_owned();
                    let error = SubmitError::Internal { detail };
                    self.count_failure(Some(&error));
                    return Err(error.into());
                }
                first => self.first = first,
            }
        }
        Ok(())
    }

    /// Ends the call; the sequence is cancelled if it still runs.
    fn fail(&mut self, error: SubmitError) {
        self.events = None;
        self.count_failure(Some(&error));
        self.error = Some(ApiError::Submit(error));
    }

    /// Counts the request's end, unless it was counted.
    fn count_failure(&mut self, error: Option<&SubmitError>) {
        if !std::mem::replace(&mut self.counted, true) {
            self.metrics.failed(error);
            let reason = error.map_or("abort", SubmitError::reason);
            self.account.ended(&self.end(reason, None));
        }
    }

    fn end(&self, finish: &'static str, timings: Option<SequenceTimings>) -> SequenceEnd {
        SequenceEnd {
            prompt_tokens: self.prompt_tokens,
            cached_prompt_tokens: self.cached_prompt_tokens,
            completion_tokens: self.completion_tokens,
            finish,
            timings,
        }
    }

    /// Takes one event into `response`.
    fn take(&mut self, event: SequenceEvent, response: &mut v1::GenerateResponse) {
        match event {
            SequenceEvent::Queued { sequence } => self.account.queued(sequence),
            SequenceEvent::Started {
                cached_prompt_tokens,
            } => {
                self.clock.started = Some(Instant::now());
                self.cached_prompt_tokens = u32::try_from(cached_prompt_tokens).unwrap_or(u32::MAX);
            }
            SequenceEvent::PromptLogprobs(logprobs) => {
                self.awaits_prompt_logprobs = false;
                if let Some(mut prompt) = self.prompt.take() {
                    if self.top_logprobs > 0 {
                        let top = logprobs.iter().map(|of| likely(of, self.top_logprobs));
                        prompt.top = top.collect();
                    }
                    prompt.logprobs = logprobs.into_iter().map(|of| of.logprob).collect();
                    response.prompt = Some(prompt);
                }
            }
            SequenceEvent::Token(token) => self.take_token(token, response),
            SequenceEvent::Finished { reason, timings } => {
                let piece = self.decoder.finish();
                self.add_text(piece, response);
                if response.finish.is_none() {
                    let stop = match reason {
                        FinishReason::Stop => self.last_token,
                        FinishReason::Length | FinishReason::Complete => None,
                    };
                    let stop = stop.map(|token| self.tokenizer.token_text(token));
                    self.finish(reason, stop, timings, response);
                }
            }
            SequenceEvent::Failed(error) => self.fail(error),
        }
    }

    fn take_token(&mut self, token: TokenLogprobs, response: &mut v1::GenerateResponse) {
        if self.awaits_prompt_logprobs {
            let detail = "a token came before the log-probabilities of the prompt".to_owned();
            return self.fail(SubmitError::Internal { detail });
        }
        if self.with_logprobs {
            let Some(logprob) = token.logprob else {
                let detail = "a token came without its log-probability".to_owned();
                return self.fail(SubmitError::Internal { detail });
            };
            response.logprobs.push(self.wire_logprob(logprob, &token));
        }
        self.clock.token();
        self.account.first_token();
        self.completion_tokens += 1;
        self.last_token = Some(token.token);
        response.token_ids.push(token.token);
        // A stop token is reported, but is no part of the text.
        if self.stop_token_ids.binary_search(&token.token).is_err() {
            let piece = self.decoder.push(token.token);
            self.add_text(piece, response);
        }
    }

    fn wire_logprob(&self, logprob: f32, token: &TokenLogprobs) -> v1::OutputLogprob {
        let top = token.top.iter().map(|&(id, logprob)| v1::CandidateLogprob {
            token_id: id,
            logprob,
            text: self.tokenizer.token_text(id),
        });
        v1::OutputLogprob {
            logprob,
            top: top.collect(),
        }
    }

    /// Adds text; a stop string in it ends the sequence.
    fn add_text(&mut self, piece: TextPiece, response: &mut v1::GenerateResponse) {
        let parts = self.splitter.push(&piece.text);
        add_parts(parts, response);
        if piece.stop.is_some() {
            let timings = self.clock.timings();
            self.finish(FinishReason::Stop, piece.stop, timings, response);
        }
    }

    fn finish(
        &mut self,
        reason: FinishReason,
        stop: Option<String>,
        timings: SequenceTimings,
        response: &mut v1::GenerateResponse,
    ) {
        self.events = None;
        add_parts(self.splitter.finish(), response);
        if !std::mem::replace(&mut self.counted, true) {
            let took = self.clock.submitted.elapsed();
            self.metrics.finished(reason, took, &timings);
            self.account.ended(&self.end(reason.name(), Some(timings)));
        }
        let reason = match reason {
            FinishReason::Stop | FinishReason::Complete => v1::FinishReason::Stop,
            FinishReason::Length => v1::FinishReason::Length,
        };
        response.finish = Some(v1::Finish {
            reason: reason.into(),
            stop: stop.unwrap_or_default(),
            usage: Some(v1::Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.completion_tokens,
                cached_prompt_tokens: self.cached_prompt_tokens,
            }),
            timings: Some(v1::Timings {
                queue_ms: milliseconds(timings.queue),
                prefill_ms: milliseconds(timings.prefill),
                decode_ms: milliseconds(timings.decode),
            }),
        });
    }

    fn deadline_passed(&mut self, cx: &mut Context<'_>) -> bool {
        self.deadline
            .as_mut()
            .is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready())
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.count_failure(None);
    }
}

impl Stream for Responses {
    type Item = Result<v1::GenerateResponse, ApiError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut response = v1::GenerateResponse::default();
        if !this.awaits_prompt_logprobs {
            response.prompt = this.prompt.take();
        }
        if this.events.is_some() && this.deadline_passed(cx) {
            this.fail(SubmitError::DeadlineExceeded);
        }
        if let Some(first) = this.first.take() {
            this.take(first, &mut response);
        }
        while response.token_ids.len() < MAX_RESPONSE_TOKENS {
            let Some(events) = &mut this.events else {
                break;
            };
            match events.poll_recv(cx) {
                Poll::Ready(Some(event)) => this.take(event, &mut response),
                Poll::Ready(None) => {
                    let detail = "the step loop let go of the sequence".to_owned();
                    this.fail(SubmitError::Internal { detail });
                }
                Poll::Pending if response == v1::GenerateResponse::default() => {
                    return Poll::Pending;
                }
                Poll::Pending => break,
            }
        }
        if response != v1::GenerateResponse::default() {
            return Poll::Ready(Some(Ok(response)));
        }
        Poll::Ready(this.error.take().map(Err))
    }
}

/// All responses as one.
pub(super) async fn whole<S>(mut responses: S) -> Result<v1::GenerateResponse, ApiError>
where
    S: Stream<Item = Result<v1::GenerateResponse, ApiError>> + Unpin,
{
    let mut all = v1::GenerateResponse::default();
    while let Some(response) = responses.next().await {
        let response = response?;
        all.token_ids.extend(response.token_ids);
        all.text.push_str(&response.text);
        all.reasoning.push_str(&response.reasoning);
        all.tool_calls.extend(response.tool_calls);
        all.logprobs.extend(response.logprobs);
        all.prompt = all.prompt.or(response.prompt);
        all.finish = all.finish.or(response.finish);
    }
    Ok(all)
}

fn add_parts(parts: Parts, response: &mut v1::GenerateResponse) {
    response.reasoning.push_str(&parts.reasoning);
    response.text.push_str(&parts.content);
    let calls = parts.calls.into_iter().map(|call| v1::ToolCall {
        name: call.name,
        arguments_json: call.arguments,
    });
    response.tool_calls.extend(calls);
}

fn likely(of: &PromptLogprob, count: usize) -> v1::LikelyTokens {
    let (token_ids, logprobs) = of.top.iter().copied().take(count).unzip();
    v1::LikelyTokens {
        token_ids,
        logprobs,
    }
}

/// Times as the API sees them, for a sequence that a stop string ends.
struct Clock {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Clock {
    fn new() -> Self {
        Self {
            submitted: Instant::now(),
            started: None,
            first_token: None,
            last_token: None,
        }
    }

    fn token(&mut self) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    fn timings(&self) -> SequenceTimings {
        let started = self.started.unwrap_or(self.submitted);
        let first = self.first_token.unwrap_or(started);
        let last = self.last_token.unwrap_or(first);
        SequenceTimings {
            queue: started.saturating_duration_since(self.submitted),
            prefill: first.saturating_duration_since(started),
            decode: last.saturating_duration_since(first),
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
