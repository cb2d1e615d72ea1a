//! The loop: the only place where scheduler and cluster meet. It owns the clock.
//!
//! It takes sequences from the API, asks the scheduler for steps while fewer than two are in flight,
//! sends each to every rank, and commits a step when every rank has finished it. When the group is
//! lost the scheduler keeps every token, and the next group goes on from there.

mod client;
mod end;
mod sent;
mod sequences;
mod tell;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use secondwind_model::step::{SequenceId, StepResult};
use tokio::{
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        watch,
    },
    time::sleep_until,
};

pub use client::EngineHandle;
use client::{Client, Submission};
use end::{Blame, EpochEnd, Failure, first_cause};
use sent::Sent;
use sequences::{Accepted, refused};

use crate::{
    cluster::{EndEpoch, Group, RankEvent, State, StepTime},
    metrics::Metrics,
    rack::Live,
    request::{SequenceEvent, SubmitError},
    scheduler::{Counters, Event, Scheduler, SchedulerSettings, Speculation, backlog::Pace},
};

/// Limits that are not the plan's.
#[derive(Clone, Copy, Debug)]
pub struct LoopSettings {
    /// Sequences that may wait.
    pub max_waiting: usize,
    /// Tokens that they may have, all together.
    pub max_waiting_tokens: usize,
    /// Tokens of a step, while others decode, for each of up to four prompts that are not computed yet.
    pub max_prefill_tokens: usize,
    /// A step that takes longer ends the epoch.
    pub step_deadline: Duration,
    /// Sequences share the KV of prompts that begin alike.
    pub prefix_cache: bool,
    /// Tokens that a step guesses of a sequence that repeats itself, at the most.
    pub max_drafts: usize,
    /// What each of them costs, in percent of a step of one row; as the plan measured it if absent.
    pub draft_cost_percent: Option<u32>,
}

/// Everything the loop owns.
pub struct StepLoop {
    settings: LoopSettings,
    submissions: UnboundedReceiver<Submission>,
    groups: UnboundedReceiver<Group>,
    cancelled: (UnboundedSender<SequenceId>, UnboundedReceiver<SequenceId>),
    accepted: (UnboundedSender<Accepted>, UnboundedReceiver<Accepted>),
    open: watch::Sender<bool>,
    /// From the first group on.
    scheduler: Option<Scheduler>,
    /// Of the plan that the scheduler follows.
    block_tokens: usize,
    clients: HashMap<SequenceId, Client>,
    in_flight: VecDeque<Sent>,
    began: Instant,
    /// Of the queue, since `began`.
    pace: Pace,
    metrics: Arc<Metrics>,
    /// What the metrics have of the scheduler.
    counted: Counters,
    live: watch::Sender<Live>,
}

impl StepLoop {
    /// A loop over `groups`, and the handle for the API.
    pub fn new(
        settings: LoopSettings,
        groups: UnboundedReceiver<Group>,
        state: watch::Receiver<State>,
        metrics: Arc<Metrics>,
    ) -> (Self, Arc<EngineHandle>) {
        let (sender, submissions) = mpsc::unbounded_channel();
        let (open, opened) = watch::channel(false);
        let (live, shown) = watch::channel(Live::default());
        let began = Instant::now();
        let handle = Arc::new(EngineHandle {
            submissions: sender,
            state,
            open: opened,
            live: shown,
            began,
            metrics: Arc::clone(&metrics),
        });
        let step_loop = Self {
            settings,
            submissions,
            groups,
            cancelled: mpsc::unbounded_channel(),
            accepted: mpsc::unbounded_channel(),
            open,
            scheduler: None,
            block_tokens: 0,
            clients: HashMap::new(),
            in_flight: VecDeque::new(),
            began,
            pace: Pace::default(),
            metrics,
            counted: Counters::default(),
            live,
        };
        (step_loop, handle)
    }

    /// Runs until `shutdown`; then every unfinished sequence is told.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            let group = tokio::select! {
                // A group before the sequences that were sent because of it.
                biased;
                () = &mut shutdown => break,
                group = self.groups.recv() => group,
                Some(submission) = self.submissions.recv() => {
                    self.submit(submission);
                    self.follow();
                    continue;
                }
                Some(id) = self.cancelled.1.recv() => {
                    self.cancel(id);
                    self.follow();
                    continue;
                }
                Some(accepted) = self.accepted.1.recv() => {
                    self.accepted(accepted);
                    continue;
                }
            };
            let Some(mut group) = group else { break };
            if let Err(reason) = self.adopt(&group) {
                tracing::error!(epoch = group.epoch, reason, "the plan cannot be scheduled");
                continue;
            }
            match self.epoch(&mut group, &mut shutdown).await {
                EpochEnd::Shutdown => break,
                EpochEnd::Lost {
                    reason,
                    expel,
                    blame,
                } => {
                    tracing::warn!(
                        epoch = group.epoch,
                        reason,
                        "epoch lost; sequences are kept"
                    );
                    self.metrics.lost_epoch();
                    self.strike(blame, &reason);
                    self.in_flight.clear();
                    if let Some(scheduler) = &mut self.scheduler {
                        scheduler.abort_epoch();
                    }
                    self.follow();
                    // Membership may have ended it already.
                    let _ = group.end.send(EndEpoch {
                        epoch: group.epoch,
                        reason,
                        expel,
                    });
                }
            }
        }
        self.open.send_replace(false);
        for (_, client) in self.clients.drain() {
            client.tell(SequenceEvent::Failed(SubmitError::Draining));
        }
        self.submissions.close();
        while let Ok(submission) = self.submissions.try_recv() {
            let _ = submission
                .events
                .send(SequenceEvent::Failed(SubmitError::Draining));
        }
    }

    /// Makes the scheduler fit the group's plan.
    fn adopt(&mut self, group: &Group) -> Result<(), String> {
        let plan = &group.plan;
        self.block_tokens = plan.settings.block_tokens;
        let cost = self.settings.draft_cost_percent;
        let speculation = (self.settings.max_drafts > 0).then_some(Speculation {
            max_drafts: self.settings.max_drafts,
            row_cost_percent: cost.unwrap_or((100.0 * plan.row_cost()).ceil() as u32),
        });
        match &mut self.scheduler {
            Some(scheduler) => {
                for (id, refusal) in scheduler.replan(plan.kv_blocks, speculation) {
                    if let Some(client) = self.clients.remove(&id) {
                        client.tell(SequenceEvent::Failed(refused(
                            refusal,
                            plan.settings.block_tokens,
                            &self.pace,
                        )));
                    }
                }
            }
            None => {
                let settings = SchedulerSettings {
                    max_sequences: plan.settings.max_sequences,
                    max_step_tokens: plan.settings.max_step_tokens,
                    max_prefill_tokens: self.settings.max_prefill_tokens,
                    max_logit_rows: plan.settings.max_logit_rows,
                    block_tokens: plan.settings.block_tokens,
                    kv_blocks: plan.kv_blocks,
                    max_context_tokens: plan.settings.max_context_tokens,
                    max_in_flight: 2,
                    max_waiting: self.settings.max_waiting,
                    max_waiting_tokens: self.settings.max_waiting_tokens,
                    prefix_cache: self.settings.prefix_cache,
                    speculation,
                };
                let scheduler = Scheduler::new(settings).map_err(|error| error.to_string())?;
                self.scheduler = Some(scheduler);
            }
        }
        self.live.send_modify(|live| live.window.clear());
        self.open.send_replace(true);
        Ok(())
    }

    /// Steps of one epoch, until it ends.
    async fn epoch(
        &mut self,
        group: &mut Group,
        shutdown: &mut (impl Future<Output = ()> + Unpin),
    ) -> EpochEnd {
        loop {
            self.send_steps(group);
            let deadline = self
                .in_flight
                .front()
                .map(|sent| sent.since + self.settings.step_deadline);
            let late = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = &mut *shutdown => return EpochEnd::Shutdown,
                Some(id) = self.cancelled.1.recv() => self.cancel(id),
                Some(accepted) = self.accepted.1.recv() => self.accepted(accepted),
                Some(submission) = self.submissions.recv() => self.submit(submission),
                event = group.events.recv() => {
                    let Some(event) = event else {
                        return EpochEnd::lost("the group was disbanded".into());
                    };
                    if let Err(end) = self.hear(group, event).await {
                        return end;
                    }
                }
                () = late => return self.late(),
            }
        }
    }

    fn send_steps(&mut self, group: &mut Group) {
        let Some(scheduler) = &mut self.scheduler else {
            return;
        };
        while let Some(step) = scheduler.next_step() {
            for link in &mut group.links {
                link.step(&step);
            }
            let now = Instant::now();
            let mut prompt_tokens = 0;
            for row in &step.rows {
                let Some(client) = self.clients.get_mut(&row.sequence) else {
                    continue;
                };
                let end = client.prompt_tokens.min(row.position + row.input.len());
                prompt_tokens += end.saturating_sub(row.position);
                if client.started.is_none() {
                    client.started = Some(now);
                    self.metrics.started(client.prompt_tokens);
                    // A first row begins after what is cached.
                    client.tell(SequenceEvent::Started {
                        cached_prompt_tokens: row.position,
                    });
                }
            }
            let sequences: Vec<SequenceId> = step.rows.iter().map(|row| row.sequence).collect();
            self.in_flight.push_back(Sent {
                number: step.number,
                sequences,
                since: now,
                done: vec![None; group.links.len()],
                prompt_tokens,
                result: None,
            });
        }
        self.follow();
        self.pace
            .observe(self.began.elapsed(), self.counted.let_in_tokens);
    }

    async fn hear(&mut self, group: &mut Group, event: RankEvent) -> Result<(), EpochEnd> {
        match event {
            RankEvent::Lost { reason, .. } => Err(EpochEnd::lost(reason)),
            RankEvent::StepFailed {
                rank,
                number,
                message,
                peer_lost,
                sequence,
            } => {
                let failure = Failure {
                    rank,
                    message,
                    peer_lost,
                    sequence,
                };
                Err(first_cause(group, number, failure).await)
            }
            RankEvent::StepDone { rank, result, time } => self.done(rank, result, time),
        }
    }

    /// A rank finished a step; once all have, its result counts.
    fn done(&mut self, rank: usize, result: StepResult, time: StepTime) -> Result<(), EpochEnd> {
        let number = result.number;
        let sent = self.in_flight.iter_mut().find(|sent| sent.number == number);
        let Some(done) = sent.as_ref().and_then(|sent| sent.done.get(rank)) else {
            return Err(EpochEnd::Lost {
                reason: format!("rank {rank} finished step {number}, which is not in flight"),
                expel: Some(rank),
                blame: Blame::Loss,
            });
        };
        let twice = done.is_some();
        if let Some(sent) = sent {
            sent.done[rank] = Some(time);
            if rank == 0 && !twice {
                sent.result = Some(result);
            }
        }
        // Steps end in order on every rank, so only the oldest can be complete.
        while let Some(sent) = self.in_flight.front()
            && sent.is_complete()
        {
            let Some(sent) = self.in_flight.pop_front() else {
                break;
            };
            let now = Instant::now();
            self.metrics.stepped(now - sent.since);
            if let Some(next) = self.in_flight.front_mut() {
                // It has waited for the one before it until now.
                next.since = now;
            }
            self.commit(sent)?;
        }
        Ok(())
    }

    fn commit(&mut self, sent: Sent) -> Result<(), EpochEnd> {
        let Some(scheduler) = &mut self.scheduler else {
            return Ok(());
        };
        let result = sent.result.unwrap_or_default();
        let events = scheduler.commit(result).map_err(|error| EpochEnd::Lost {
            reason: format!("rank 0's result does not fit its step: {error}"),
            expel: Some(0),
            blame: Blame::Step,
        })?;
        let is_token = |event: &&Event| matches!(event, Event::Token { .. });
        let output_tokens = events.iter().filter(is_token).count();
        self.deliver(events);
        let times: Vec<StepTime> = sent.done.into_iter().flatten().collect();
        self.account(sent.prompt_tokens, output_tokens, &times);
        Ok(())
    }

    /// The oldest step is over its deadline.
    fn late(&self) -> EpochEnd {
        match self.in_flight.front() {
            Some(sent) => sent.late(self.settings.step_deadline),
            None => EpochEnd::lost("a step was late".into()),
        }
    }
}

#[cfg(test)]
mod tests;
