//! What the loop does for single sequences: takes them in, tells their clients, gives them up.

use std::{collections::BTreeSet, time::Instant};

use secondwind_model::step::SequenceId;
use tokio::{sync::mpsc::UnboundedSender, task::spawn_blocking, time::timeout};

use super::{
    StepLoop,
    client::{Client, Submission},
    end::{Blame, STRIKES_ALLOWED},
};
use crate::{
    request::{FinishReason, SequenceEvent, SubmitError},
    scheduler::{
        self, Event, Refusal,
        backlog::{Pace, retry_after},
    },
    text::grammar::{Grammar, Next},
};

impl StepLoop {
    /// Hands a sequence to the scheduler, and watches its client and its deadline.
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission { sequence, events } = submission;
        let Some(scheduler) = &mut self.scheduler else {
            let detail = "workers are still missing or loading".into();
            let _ = events.send(SequenceEvent::Failed(SubmitError::NoGroup { detail }));
            return;
        };
        let prompt_tokens = sequence.prompt.len();
        let wants_prompt_logprobs = sequence.prompt_logprobs;
        let origin = sequence.origin;
        let accepted = scheduler.submit(scheduler::NewSequence {
            prompt: sequence.prompt,
            max_tokens: sequence.max_tokens,
            stop_tokens: sequence.stop_token_ids,
            sampling: sequence.sampling,
            prompt_logprobs: wants_prompt_logprobs,
            mask: sequence
                .grammar
                .as_ref()
                .map(|grammar| grammar.mask().clone()),
            tenant: origin.tenant,
            priority: origin.priority,
            cache_salt: origin.cache_salt,
        });
        let id = match accepted {
            Ok(id) => id,
            Err(refusal) => {
                let refused = refused(refusal, self.block_tokens, &self.pace);
                let _ = events.send(SequenceEvent::Failed(refused));
                return;
            }
        };
        // A client that is gone is cancelled by the task that watches it.
        let _ = events.send(SequenceEvent::Queued { sequence: id });
        tracing::debug!(sequence = id, request_id = %origin.request_id, "queued");
        if wants_prompt_logprobs && prompt_tokens == 1 {
            let _ = events.send(SequenceEvent::PromptLogprobs(Vec::new()));
        }
        self.clients.insert(
            id,
            Client {
                events: events.clone(),
                submitted: Instant::now(),
                started: None,
                first_token: None,
                last_token: None,
                prompt_tokens,
                prompt_logprobs: Vec::new(),
                grammar: sequence.grammar,
                strikes: 0,
                request_id: origin.request_id,
            },
        );
        let cancelled = self.cancelled.0.clone();
        let deadline = sequence.deadline;
        tokio::spawn(async move {
            let gone = events.closed();
            match deadline {
                None => gone.await,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if timeout(left, gone).await.is_err() {
                        let _ = events.send(SequenceEvent::Failed(SubmitError::DeadlineExceeded));
                    }
                }
            }
            let _ = cancelled.send(id);
        });
    }

    /// A client went away, or its time is over. Also called once after a sequence finished.
    pub(super) fn cancel(&mut self, id: SequenceId) {
        if self.clients.remove(&id).is_some()
            && let Some(scheduler) = &mut self.scheduler
        {
            scheduler.cancel(id);
        }
    }

    /// Tells clients what a committed step means for them.
    pub(super) fn deliver(&mut self, events: Vec<Event>) {
        let now = Instant::now();
        for event in events {
            match event {
                Event::Token { sequence, token } => {
                    if let Some(client) = self.clients.get_mut(&sequence) {
                        match client.last_token.replace(now) {
                            Some(last) => self.metrics.next_token(now - last),
                            None => self.metrics.first_token(now - client.submitted),
                        }
                        client.first_token.get_or_insert(now);
                        if let Some(grammar) = client.grammar.take() {
                            accept(self.accepted.0.clone(), sequence, grammar, token.token);
                        }
                        client.tell(SequenceEvent::Token(token));
                    }
                }
                Event::PromptLogprobs {
                    sequence, logprobs, ..
                } => {
                    if let Some(client) = self.clients.get_mut(&sequence) {
                        client.prompt_logprobs.extend(logprobs);
                        if client.prompt_logprobs.len() + 1 == client.prompt_tokens {
                            let all = std::mem::take(&mut client.prompt_logprobs);
                            client.tell(SequenceEvent::PromptLogprobs(all));
                        }
                    }
                }
                Event::Finished { sequence, reason } => {
                    if let Some(client) = self.clients.remove(&sequence) {
                        let reason = match reason {
                            scheduler::FinishReason::StopToken => FinishReason::Stop,
                            scheduler::FinishReason::Length => FinishReason::Length,
                        };
                        let timings = client.timings(now);
                        client.tell(SequenceEvent::Finished { reason, timings });
                    }
                }
            }
        }
    }

    /// A token was taken into its sequence's grammar, beside the loop.
    pub(super) fn accepted(&mut self, accepted: Accepted) {
        let Accepted { id, grammar, next } = accepted;
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        match next {
            Ok(Next::Tokens(mask)) => {
                client.grammar = Some(grammar);
                if let Some(scheduler) = &mut self.scheduler {
                    scheduler.allow(id, mask);
                }
                return;
            }
            Ok(Next::End) => {
                let (reason, timings) = (FinishReason::Complete, client.timings(Instant::now()));
                client.tell(SequenceEvent::Finished { reason, timings });
            }
            Err(detail) => {
                client.tell(SequenceEvent::Failed(SubmitError::Grammar { detail }));
            }
        }
        self.cancel(id);
    }

    /// Strikes the sequences to blame; one that has too many strikes is given up.
    pub(super) fn strike(&mut self, blame: Blame, reason: &str) {
        // Two steps in flight may carry the same sequence.
        let ids: BTreeSet<SequenceId> = match blame {
            Blame::Sequence(id) => [id].into(),
            Blame::Step | Blame::Loss => self
                .in_flight
                .iter()
                .flat_map(|sent| sent.sequences.iter().copied())
                .collect(),
        };
        for id in ids {
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            client.strikes += blame.strikes();
            let (request_id, strikes) = (&*client.request_id, client.strikes);
            tracing::warn!(sequence = id, request_id, strikes, "its step was lost");
            if client.strikes < STRIKES_ALLOWED {
                continue;
            }
            client.tell(SequenceEvent::Failed(SubmitError::Internal {
                detail: reason.to_owned(),
            }));
            self.cancel(id);
        }
    }
}

/// A grammar that took in a token.
pub(super) struct Accepted {
    id: SequenceId,
    grammar: Grammar,
    next: Result<Next, String>,
}

/// Takes `token` into `grammar` where it holds up nobody: that may take milliseconds.
fn accept(accepted: UnboundedSender<Accepted>, id: SequenceId, mut grammar: Grammar, token: u32) {
    spawn_blocking(move || {
        let next = grammar.accept(token);
        // Only a loop that is over does not listen.
        let _ = accepted.send(Accepted { id, grammar, next });
    });
}

/// A refusal in the words of the API.
pub(super) fn refused(refusal: Refusal, block_tokens: usize, pace: &Pace) -> SubmitError {
    match refusal {
        Refusal::QueueFull {
            waiting,
            tokens_ahead,
        } => SubmitError::QueueFull {
            limit: waiting,
            retry_after: retry_after(tokens_ahead, pace.tokens_per_second()),
        },
        Refusal::TooFewBlocks { needed, kv_blocks } => SubmitError::KvCacheTooSmall {
            needed_tokens: needed * block_tokens,
            capacity_tokens: kv_blocks * block_tokens,
        },
        // The API has checked these against the same limits.
        refusal @ (Refusal::EmptyPrompt | Refusal::NothingToDo | Refusal::PromptTooLong { .. }) => {
            SubmitError::Internal {
                detail: refusal.to_string(),
            }
        }
    }
}
