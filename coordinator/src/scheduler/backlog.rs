//! When somebody who found the queue full may try again. The clock is the caller's.

use std::collections::VecDeque;
use std::time::Duration;

/// Time that [`Pace`] looks back.
const WINDOW: Duration = Duration::from_secs(30);

/// Least time between two observations that are kept.
const STRIDE: Duration = Duration::from_secs(1);

/// Hints are whole seconds within these.
const HINTS: (f64, f64) = (1.0, 60.0);

/// How fast the queue moves, from what was let in lately.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// (time, sum of tokens let in until then), the oldest first.
    seen: VecDeque<(Duration, u64)>,
}

impl Pace {
    /// Takes note of [`Counters::let_in_tokens`](super::Counters::let_in_tokens) at a time, which never
    /// goes back.
    pub fn observe(&mut self, now: Duration, let_in_tokens: u64) {
        let stale = |(at, _): &(Duration, u64)| now.saturating_sub(*at) > WINDOW;
        while self.seen.len() > 1 && self.seen.get(1).is_some_and(stale) {
            self.seen.pop_front();
        }
        let last = self.seen.back().map(|(at, _)| *at);
        if last.is_none_or(|last| now.saturating_sub(last) >= STRIDE) {
            self.seen.push_back((now, let_in_tokens));
        }
    }

    /// Tokens a second, once there was time to tell.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let (&(since, before), &(until, after)) = (self.seen.front()?, self.seen.back()?);
        let seconds = until.saturating_sub(since).as_secs_f64();
        (seconds > 0.0).then(|| after.saturating_sub(before) as f64 / seconds)
    }
}

/// Time until `tokens` have left the queue at this pace, in whole seconds from 1 to 60.
pub fn retry_after(tokens: usize, tokens_per_second: Option<f64>) -> Duration {
    let (least, most) = HINTS;
    let seconds = match tokens_per_second {
        None => least,
        Some(0.0) => most,
        Some(pace) => (tokens as f64 / pace).ceil().clamp(least, most),
    };
    Duration::from_secs(seconds as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_pace_is_that_of_the_last_half_minute() {
        let mut pace = Pace::default();
        assert_eq!(pace.tokens_per_second(), None);
        for second in 0..100 {
            // 10 tokens a second, then 100.
            pace.observe(
                seconds(second),
                second * 10 + second.saturating_sub(50) * 90,
            );
            pace.observe(seconds(second), 0);
        }
        assert_eq!(pace.tokens_per_second(), Some(100.0));
        assert!(pace.seen.len() < 35);
        pace.observe(seconds(1000), 99 * 10 + 49 * 90);
        assert_eq!(pace.tokens_per_second(), Some(0.0));
    }

    #[test]
    fn hints_are_whole_seconds_within_bounds() {
        assert_eq!(retry_after(1000, None), seconds(1));
        assert_eq!(retry_after(1000, Some(400.0)), seconds(3));
        assert_eq!(retry_after(0, Some(400.0)), seconds(1));
        assert_eq!(retry_after(1_000_000, Some(400.0)), seconds(60));
        assert_eq!(retry_after(1, Some(0.0)), seconds(60));
    }
}
