//! A step between its sending and its last rank's end.

use std::time::{Duration, Instant};

use secondwind_model::step::{SequenceId, StepResult};

use super::end::{Blame, EpochEnd};
use crate::cluster::StepTime;

/// A step that was sent.
pub(super) struct Sent {
    pub number: u64,
    pub sequences: Vec<SequenceId>,
    pub since: Instant,
    /// By rank, once it is done.
    pub done: Vec<Option<StepTime>>,
    /// Of prompts, computed by it.
    pub prompt_tokens: usize,
    pub result: Option<StepResult>,
}

impl Sent {
    /// Every rank is done.
    pub fn is_complete(&self) -> bool {
        self.done.iter().all(Option::is_some)
    }

    /// How its epoch ends if it is over its deadline.
    pub fn late(&self, deadline: Duration) -> EpochEnd {
        let missing: Vec<usize> = (0..self.done.len())
            .filter(|&rank| self.done[rank].is_none())
            .collect();
        EpochEnd::Lost {
            reason: format!(
                "step {} is not finished after {} s on rank(s) {missing:?}",
                self.number,
                deadline.as_secs()
            ),
            // If one rank alone is late it hangs; several may wait for each other.
            expel: (missing.len() == 1).then(|| missing[0]),
            blame: Blame::Step,
        }
    }
}
