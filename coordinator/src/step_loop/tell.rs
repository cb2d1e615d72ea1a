//! What the loop tells those who look at the rack or scrape its metrics.

use super::StepLoop;
use crate::{
    cluster::StepTime,
    rack::{self, FinishedStep},
};

impl StepLoop {
    /// Tells those who look how the scheduler stands.
    pub(super) fn follow(&mut self) {
        let Some(scheduler) = &self.scheduler else {
            return;
        };
        let counters = scheduler.counters();
        self.metrics.follow(&self.counted, &counters);
        self.counted = counters;
        self.live.send_modify(|live| live.counters = counters);
    }

    /// Counts a step that is over, for those who look.
    pub(super) fn account(&self, prompt_tokens: usize, output_tokens: usize, times: &[StepTime]) {
        let parts = rack::divide(times);
        self.metrics.rank_times(times, parts.as_deref());
        let step = FinishedStep {
            prompt_tokens,
            output_tokens,
            times,
            parts: parts.as_deref(),
        };
        let now = self.began.elapsed();
        self.live.send_modify(|live| live.window.add(now, &step));
    }
}
