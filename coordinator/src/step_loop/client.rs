//! The loop's two sides towards the API: the handle that takes sequences, and what it keeps of each client.

use std::{sync::Arc, time::Instant};

use secondwind_model::step::PromptLogprob;
use secondwind_proto::v1;
use tokio::sync::{
    mpsc::{self, UnboundedSender},
    watch,
};

use crate::{
    cluster::State,
    metrics::Metrics,
    rack::{Live, Rack},
    request::{Engine, EventStream, NewSequence, SequenceEvent, SequenceTimings, SubmitError},
    text::grammar::Grammar,
};

/// The loop as the API sees it.
pub struct EngineHandle {
    pub(super) submissions: UnboundedSender<Submission>,
    pub(super) state: watch::Receiver<State>,
    /// The loop's own view of whether it can take sequences.
    pub(super) open: watch::Receiver<bool>,
    pub(super) live: watch::Receiver<Live>,
    /// When the loop's clock began.
    pub(super) began: Instant,
    pub(super) metrics: Arc<Metrics>,
}

pub(super) struct Submission {
    pub sequence: NewSequence,
    pub events: UnboundedSender<SequenceEvent>,
}

/// One client's sequence.
pub(super) struct Client {
    pub events: UnboundedSender<SequenceEvent>,
    pub submitted: Instant,
    pub started: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
    pub prompt_tokens: usize,
    pub prompt_logprobs: Vec<PromptLogprob>,
    /// While no token of the sequence is being taken into it.
    pub grammar: Option<Grammar>,
    pub strikes: u32,
    /// Of its request, for the log.
    pub request_id: Arc<str>,
}

impl Client {
    pub fn tell(&self, event: SequenceEvent) {
        // A client that is gone is cancelled by the task that watches it.
        let _ = self.events.send(event);
    }

    pub fn timings(&self, now: Instant) -> SequenceTimings {
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        SequenceTimings {
            queue: started - self.submitted,
            prefill: first_token.saturating_duration_since(started),
            decode: now.saturating_duration_since(first_token),
        }
    }
}

impl Engine for EngineHandle {
    fn submit(&self, sequence: NewSequence) -> Result<EventStream, SubmitError> {
        let taken = match &*self.state.borrow() {
            // The loop has the group, or takes it up before any sequence.
            State::Serving(_) => true,
            State::NoPlan { .. } => false,
            _ => *self.open.borrow(),
        };
        if !taken {
            return Err(SubmitError::NoGroup {
                detail: self.state.borrow().to_string(),
            });
        }
        let (events, stream) = mpsc::unbounded_channel();
        self.submissions
            .send(Submission { sequence, events })
            .map_err(|_| SubmitError::Draining)?;
        Ok(stream)
    }

    fn group(&self) -> Option<v1::Group> {
        match &*self.state.borrow() {
            State::Serving(group) => Some(group.clone()),
            _ => None,
        }
    }

    fn rack(&self) -> Rack {
        let live = self.live.borrow();
        Rack {
            state: self.state.borrow().clone(),
            counters: live.counters,
            load: live.window.load(self.began.elapsed()),
        }
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}
