//! Workers: who is attached, which of them form the group, and a rank as the step loop sees it.
//!
//! `service` turns gRPC streams into `membership`'s plain messages. `membership` gathers workers,
//! plans, forms an epoch and hands it over as a [`Group`]; when a rank is lost it ends the epoch on the
//! others and starts again. Nothing here knows what a sequence is.

mod epoch;
mod membership;
mod service;
mod state;

use std::{sync::Arc, time::Duration};

use secondwind_model::{
    plan::ShardPlan,
    step::{SequenceId, Step, StepResult},
};
use secondwind_proto::{step_to_wire, v1};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tonic::Status;

pub use membership::{Collective, Membership, MembershipSettings};
pub use service::{ClusterService, Identity};
pub use state::State;

/// Names an attached worker for as long as its stream lasts.
pub type MemberId = u64;

/// A rank as the step loop sees it.
pub trait WorkerLink: Send {
    /// Sends a step; never waits. A link that is gone is reported through the group's events.
    fn step(&mut self, step: &Step);
}

/// One formed epoch, ready for steps.
pub struct Group {
    /// Counts formations of the group.
    pub epoch: u64,
    /// Who holds what.
    pub plan: Arc<ShardPlan>,
    /// The group for clients to read.
    pub info: v1::Group,
    /// By rank.
    pub links: Vec<Box<dyn WorkerLink>>,
    /// What the ranks say.
    pub events: UnboundedReceiver<RankEvent>,
    /// Ends the epoch, saying why; a rank may be named as the cause.
    pub end: UnboundedSender<EndEpoch>,
}

/// How long a rank was at a step, as its host saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// From begin to end.
    pub took: Duration,
    /// Of that in each collective, in order, waiting for other ranks included; `None` where a device sums by itself.
    pub collectives: Option<Vec<Duration>>,
}

/// What a rank of a serving group says.
#[derive(Clone, Debug, PartialEq)]
pub enum RankEvent {
    /// It finished a step; only rank 0's result has rows.
    StepDone {
        /// Who.
        rank: usize,
        /// What it gave.
        result: StepResult,
        /// How long it took.
        time: StepTime,
    },
    /// It could not execute a step; the epoch is over for it.
    StepFailed {
        /// Who.
        rank: usize,
        /// Which step.
        number: u64,
        /// Layer, operation and cause.
        message: String,
        /// The cause lies with another rank.
        peer_lost: bool,
        /// The sequence whose values are the cause, where that is known.
        sequence: Option<SequenceId>,
    },
    /// It is gone.
    Lost {
        /// Who.
        rank: usize,
        /// Why.
        reason: String,
    },
}

/// The step loop's word that an epoch is over.
#[derive(Clone, Debug)]
pub struct EndEpoch {
    /// Which.
    pub epoch: u64,
    /// Why, for the log and for the workers.
    pub reason: String,
    /// The rank that must attach anew before it is used again.
    pub expel: Option<usize>,
}

/// A rank at the other end of a gRPC stream.
struct GrpcLink {
    epoch: u64,
    commands: UnboundedSender<Result<v1::Command, Status>>,
}

impl WorkerLink for GrpcLink {
    fn step(&mut self, step: &Step) {
        let command = v1::command::Command::Step(step_to_wire(self.epoch, step));
        send(&self.commands, command);
    }
}

/// Sends a command to a worker. A closed stream shows as the member's end, through its events.
fn send(commands: &UnboundedSender<Result<v1::Command, Status>>, command: v1::command::Command) {
    let _ = commands.send(Ok(v1::Command {
        command: Some(command),
    }));
}
