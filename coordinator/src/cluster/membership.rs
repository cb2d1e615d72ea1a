//! Gathers workers into a group, epoch by epoch: who is attached, and when an epoch ends.

mod formation;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use secondwind_model::{
    capabilities::Capabilities,
    plan::{ModelShape, PlanSettings},
};
use secondwind_proto::{
    step_result_from_wire,
    v1::{self, worker_event},
};
use tokio::{
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        watch,
    },
    time::{MissedTickBehavior, interval},
};
use tonic::Status;

use super::{
    EndEpoch, Group, MemberId, RankEvent, State, StepTime,
    epoch::{Commands, Epoch, Member},
    send,
};

/// A rank that is not ready and tells of no progress for this long is given up.
const LOAD_STALL: Duration = Duration::from_secs(300);

/// What reaches the membership.
pub enum Message {
    /// A checked worker attached.
    Joined {
        /// Its name here.
        member: MemberId,
        /// What it said, without capabilities.
        join: v1::Join,
        /// What it can do.
        capabilities: Capabilities,
        /// Its stream.
        commands: Commands,
    },
    /// A worker said something.
    Said {
        /// Who.
        member: MemberId,
        /// What.
        event: worker_event::Event,
    },
    /// A worker's stream ended.
    Left {
        /// Who.
        member: MemberId,
        /// Why.
        reason: String,
    },
}

/// How ranks exchange activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// In memory within one process, else over NCCL if every rank has the same, else over gRPC.
    Auto,
    /// Over NCCL, or not at all.
    Nccl,
    /// Over gRPC, also within one process.
    Grpc,
}

/// What a group must be.
#[derive(Clone, Debug)]
pub struct MembershipSettings {
    /// Ranks of the group.
    pub world_size: usize,
    /// Settings of its plan.
    pub plan: PlanSettings,
    /// Model and checkpoint in the plan's digest.
    pub checkpoint_digest: String,
    /// A member that says nothing for this long is gone.
    pub silence: Duration,
    /// What was asked for.
    pub collective: Collective,
}

/// The actor that owns members and the current epoch.
pub struct Membership {
    settings: MembershipSettings,
    shape: ModelShape,
    messages: UnboundedReceiver<Message>,
    ends: (UnboundedSender<EndEpoch>, UnboundedReceiver<EndEpoch>),
    groups: UnboundedSender<Group>,
    state: watch::Sender<State>,
    members: BTreeMap<MemberId, Member>,
    epoch: Option<Epoch>,
    last_epoch: u64,
    /// Members that no group could be made of; they are not tried again.
    unusable: Vec<MemberId>,
}

impl Membership {
    /// The actor, and where its service sends messages. Formed groups go to `groups`.
    pub fn new(
        settings: MembershipSettings,
        shape: ModelShape,
        groups: UnboundedSender<Group>,
    ) -> (Self, UnboundedSender<Message>, watch::Receiver<State>) {
        let (sender, messages) = mpsc::unbounded_channel();
        let (state, watch) = watch::channel(State::Gathering {
            attached: 0,
            needed: settings.world_size,
        });
        let membership = Self {
            settings,
            shape,
            messages,
            ends: mpsc::unbounded_channel(),
            groups,
            state,
            members: BTreeMap::new(),
            epoch: None,
            last_epoch: 0,
            unusable: Vec::new(),
        };
        (membership, sender, watch)
    }

    /// Runs until `shutdown`, which tells every worker that the epoch is over.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let mut silence = interval(self.settings.silence / 4);
        silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                message = self.messages.recv() => match message {
                    Some(message) => self.hear(message),
                    None => break,
                },
                Some(end) = self.ends.1.recv() => self.end(end),
                _ = silence.tick() => {
                    self.drop_silent();
                    self.drop_stalled();
                }
            }
            self.form_if_possible();
            self.publish();
        }
        self.disband("the coordinator is shutting down");
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Joined {
                member,
                join,
                capabilities,
                commands,
            } => {
                // The same worker over a new stream: the old one is dead, though not yet silent enough.
                let same = |known: &Member| {
                    known.join.worker == join.worker
                        && known.join.peer_address == join.peer_address
                        && known.join.local_hub == join.local_hub
                };
                let former = self
                    .members
                    .iter()
                    .find(|(_, known)| same(known))
                    .map(|(&id, _)| id);
                if let Some(former) = former {
                    let refusal = Status::aborted("the same worker attached anew");
                    self.remove(former, "the same worker attached anew", Some(refusal));
                }
                tracing::info!(
                    member,
                    worker = join.worker,
                    device = capabilities.device,
                    "worker attached"
                );
                self.members.insert(
                    member,
                    Member {
                        join,
                        capabilities,
                        commands,
                        last_heard: Instant::now(),
                    },
                );
            }
            Message::Said { member, event } => {
                if let Some(known) = self.members.get_mut(&member) {
                    known.last_heard = Instant::now();
                    self.said(member, event);
                }
            }
            Message::Left { member, reason } => self.remove(member, &reason, None),
        }
    }

    fn said(&mut self, member: MemberId, event: worker_event::Event) {
        let Some(epoch) = &mut self.epoch else { return };
        let Some(rank) = epoch.members.iter().position(|&of| of == member) else {
            return;
        };
        match event {
            worker_event::Event::LoadProgress(progress) if progress.epoch == epoch.number => {
                epoch.progress[rank] = (progress.loaded_bytes, progress.total_bytes);
                epoch.progressed[rank] = Instant::now();
            }
            worker_event::Event::Ready(ready) if ready.epoch == epoch.number => {
                if ready.plan_digest != epoch.plan_digest {
                    let reason = "it is ready for another plan than the group's";
                    let refusal = Status::failed_precondition(reason);
                    self.remove(member, reason, Some(refusal));
                    return;
                }
                epoch.ready[rank] = Some(ready);
                if epoch.events.is_none() && epoch.ready.iter().all(Option::is_some) {
                    self.serve();
                }
            }
            worker_event::Event::LoadFailed(failed) if failed.epoch == epoch.number => {
                let reason = format!("rank {rank} could not load: {}", failed.message);
                let refusal = match failed.peer_lost {
                    true => Status::unavailable(reason.clone()),
                    false => Status::failed_precondition(reason.clone()),
                };
                self.remove(member, &reason, Some(refusal));
            }
            worker_event::Event::StepResult(result) if result.epoch == epoch.number => {
                let time = step_time(&result);
                let event = match step_result_from_wire(result) {
                    Ok(result) => RankEvent::StepDone { rank, result, time },
                    Err(error) => RankEvent::Lost {
                        rank,
                        reason: error.to_string(),
                    },
                };
                epoch.tell(event);
            }
            worker_event::Event::StepFailed(failed) if failed.epoch == epoch.number => {
                epoch.tell(RankEvent::StepFailed {
                    rank,
                    number: failed.number,
                    message: failed.message,
                    peer_lost: failed.peer_lost,
                    sequence: failed.sequence,
                });
            }
            // Heartbeats have done their work; the rest speaks of a former epoch.
            _ => {}
        }
    }

    /// Drops a member; if it is a rank, its epoch is over.
    fn remove(&mut self, member: MemberId, reason: &str, refusal: Option<Status>) {
        let Some(gone) = self.members.remove(&member) else {
            return;
        };
        tracing::warn!(member, worker = gone.join.worker, reason, "worker left");
        if let Some(refusal) = refusal {
            let _ = gone.commands.send(Err(refusal));
        }
        let Some(epoch) = &mut self.epoch else { return };
        let Some(rank) = epoch.members.iter().position(|&of| of == member) else {
            return;
        };
        let worker = &gone.join.worker;
        let reason = format!("rank {rank} ({worker}) is gone: {reason}");
        epoch.tell(RankEvent::Lost {
            rank,
            reason: reason.clone(),
        });
        self.disband(&reason);
    }

    fn end(&mut self, end: EndEpoch) {
        let Some(epoch) = &self.epoch else { return };
        if epoch.number != end.epoch {
            return;
        }
        let expelled = end.expel.and_then(|rank| epoch.members.get(rank).copied());
        self.disband(&end.reason);
        if let Some(member) = expelled {
            let refusal = Status::unavailable(end.reason.clone());
            self.remove(member, &end.reason, Some(refusal));
        }
    }

    fn disband(&mut self, reason: &str) {
        let Some(epoch) = self.epoch.take() else {
            return;
        };
        tracing::info!(epoch = epoch.number, reason, "epoch ended");
        for member in &epoch.members {
            if let Some(member) = self.members.get(member) {
                send(
                    &member.commands,
                    v1::command::Command::Disband(v1::Disband {
                        epoch: epoch.number,
                        reason: reason.to_owned(),
                    }),
                );
            }
        }
    }

    fn drop_silent(&mut self) {
        let silence = self.settings.silence;
        let silent: Vec<MemberId> = self
            .members
            .iter()
            .filter(|(_, member)| member.last_heard.elapsed() > silence)
            .map(|(&id, _)| id)
            .collect();
        for member in silent {
            let reason = format!("it said nothing for {} s", silence.as_secs());
            let refusal = Status::unavailable(reason.clone());
            self.remove(member, &reason, Some(refusal));
        }
    }

    /// Drops a rank whose load has stood still: its heartbeats go on, but it will never be ready.
    fn drop_stalled(&mut self) {
        let Some(epoch) = self.epoch.as_ref().filter(|epoch| epoch.events.is_none()) else {
            return;
        };
        let stalled = (0..epoch.members.len()).find(|&rank| {
            epoch.ready[rank].is_none() && epoch.progressed[rank].elapsed() > LOAD_STALL
        });
        if let Some(member) = stalled.map(|rank| epoch.members[rank]) {
            let reason = format!("its load stood still for {} s", LOAD_STALL.as_secs());
            let refusal = Status::unavailable(reason.clone());
            self.remove(member, &reason, Some(refusal));
        }
    }

    /// Publishes how far the group is, where forming has not.
    fn publish(&self) {
        let state = match &self.epoch {
            None if self.members.len() < self.settings.world_size => State::Gathering {
                attached: self.members.len(),
                needed: self.settings.world_size,
            },
            Some(epoch) if epoch.events.is_none() => State::Loading {
                epoch: epoch.number,
                loaded_bytes: epoch.progress.iter().map(|progress| progress.0).sum(),
                total_bytes: epoch.progress.iter().map(|progress| progress.1).sum(),
            },
            _ => return,
        };
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            *current = state;
            changed
        });
    }
}

fn step_time(result: &v1::StepResult) -> StepTime {
    let each = |times: &v1::CollectiveTimes| {
        let us = times.us.iter().map(|&us| Duration::from_micros(us.into()));
        us.collect()
    };
    StepTime {
        took: Duration::from_micros(result.took_us),
        collectives: result.collectives.as_ref().map(each),
    }
}
