//! How an epoch ends, and whom to blame.

use std::time::{Duration, Instant};

use secondwind_model::step::SequenceId;
use tokio::time::timeout;

use crate::cluster::{Group, RankEvent};

/// Strikes at which a sequence is given up: two failed steps of its own, or eight lost ranks.
pub(super) const STRIKES_ALLOWED: u32 = 8;

/// Why an epoch's steps end.
pub(super) enum EpochEnd {
    /// The coordinator stops.
    Shutdown,
    /// The group is lost or given up.
    Lost {
        reason: String,
        /// The rank to be expelled, when it still believes in the epoch.
        expel: Option<usize>,
        /// What of that which ran may be the cause.
        blame: Blame,
    },
}

/// Who is struck when an epoch is lost.
#[derive(Clone, Copy, Debug)]
pub(super) enum Blame {
    /// A step failed because of this sequence's values.
    Sequence(SequenceId),
    /// A step failed; any sequence in flight may be the cause.
    Step,
    /// A rank went away; a sequence that is there every time may be the cause.
    Loss,
}

impl Blame {
    pub fn strikes(self) -> u32 {
        match self {
            Self::Sequence(_) | Self::Step => STRIKES_ALLOWED / 2,
            Self::Loss => 1,
        }
    }
}

impl EpochEnd {
    pub fn lost(reason: String) -> Self {
        Self::Lost {
            reason,
            expel: None,
            blame: Blame::Loss,
        }
    }
}

/// A rank's word that it could not execute a step.
pub(super) struct Failure {
    pub rank: usize,
    pub message: String,
    pub peer_lost: bool,
    pub sequence: Option<SequenceId>,
}

/// When one rank fails a step the others lose their links to it and fail too, perhaps sooner heard:
/// waits a moment for a cause that is not another's loss.
pub(super) async fn first_cause(group: &mut Group, number: u64, heard: Failure) -> EpochEnd {
    let mut failures = vec![heard];
    let grace = Instant::now() + Duration::from_millis(200);
    while failures.len() < group.links.len() {
        let left = grace.saturating_duration_since(Instant::now());
        match timeout(left, group.events.recv()).await {
            Ok(Some(RankEvent::StepFailed {
                rank,
                message,
                peer_lost,
                sequence,
                ..
            })) => failures.push(Failure {
                rank,
                message,
                peer_lost,
                sequence,
            }),
            Ok(Some(RankEvent::Lost { rank, reason })) => failures.push(Failure {
                rank,
                message: reason,
                peer_lost: true,
                sequence: None,
            }),
            Ok(Some(RankEvent::StepDone { .. })) => {}
            Ok(None) | Err(_) => break,
        }
    }
    let own = failures.iter().any(|failure| !failure.peer_lost);
    let reasons: Vec<String> = failures
        .iter()
        .filter(|failure| !own || !failure.peer_lost)
        .map(|failure| format!("rank {}: {}", failure.rank, failure.message))
        .collect();
    let blame = match failures.iter().find_map(|failure| failure.sequence) {
        Some(sequence) => Blame::Sequence(sequence),
        None if own => Blame::Step,
        None => Blame::Loss,
    };
    EpochEnd::Lost {
        reason: format!("step {number} failed: {}", reasons.join("; ")),
        expel: None,
        blame,
    }
}
