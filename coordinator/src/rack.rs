//! How the rack does at the moment: its state, the scheduler's figures, and where the time of the last seconds'
//! steps went, by rank. Pure but for the state that it is told; the step loop brings the clock.

use std::collections::VecDeque;
use std::time::Duration;

use crate::cluster::{State, StepTime};
use crate::scheduler::Counters;

/// Whole seconds over which rates and shares are taken.
pub const WINDOW_SECONDS: u64 = 10;

/// Of its steps' time another rank must wait at least this share more than a straggler does: somebody always waits
/// least.
const STRAGGLER_SHARE: f64 = 0.05;

/// Everything that is shown.
#[derive(Clone, Debug)]
pub struct Rack {
    /// How far the group is.
    pub state: State,
    /// The scheduler's figures.
    pub counters: Counters,
    /// What the last seconds gave.
    pub load: Load,
}

/// What the step loop keeps up to date for whoever looks.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// The scheduler's figures.
    pub counters: Counters,
    /// The steps of the last seconds, on the loop's clock.
    pub window: Window,
}

/// Where a rank's time in one step or several went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Outside collectives.
    pub compute: Duration,
    /// In collectives, each as long as the rank that waited least was in it.
    pub exchange: Duration,
    /// In collectives beyond that, for ranks that came later.
    pub wait: Duration,
}

impl Parts {
    fn add(&mut self, other: Self) {
        self.compute = self.compute.saturating_add(other.compute);
        self.exchange = self.exchange.saturating_add(other.exchange);
        self.wait = self.wait.saturating_add(other.wait);
    }

    /// Their sum.
    pub fn total(&self) -> Duration {
        let sum = self.compute.saturating_add(self.exchange);
        sum.saturating_add(self.wait)
    }
}

/// Divides the times of one step, by rank; `None` unless every rank's time in each collective is known.
pub fn divide(times: &[StepTime]) -> Option<Vec<Parts>> {
    let collectives: Vec<&[Duration]> = times
        .iter()
        .map(|time| time.collectives.as_deref())
        .collect::<Option<_>>()?;
    let count = collectives.first()?.len();
    if collectives.iter().any(|each| each.len() != count) {
        return None;
    }
    let shortest = (0..count).filter_map(|index| collectives.iter().map(|each| each[index]).min());
    let exchange = sum(shortest);
    let parts = times.iter().zip(collectives).map(|(time, each)| {
        let inside = sum(each.iter().copied());
        Parts {
            // What is part of a whole is not longer, whatever a worker says.
            compute: time.took.saturating_sub(inside),
            exchange,
            wait: inside.saturating_sub(exchange),
        }
    });
    Some(parts.collect())
}

fn sum(times: impl Iterator<Item = Duration>) -> Duration {
    times.fold(Duration::ZERO, Duration::saturating_add)
}

/// The rank that the others of a step, or of several, wait for: the one that waits least.
pub fn straggler(parts: &[Parts]) -> Option<usize> {
    let (rank, least) = parts.iter().enumerate().min_by_key(|(_, it)| it.wait)?;
    let held_up = |it: &Parts| {
        let more = it.wait - least.wait;
        !more.is_zero() && more.as_secs_f64() >= STRAGGLER_SHARE * it.total().as_secs_f64()
    };
    parts.iter().any(held_up).then_some(rank)
}

/// What the last seconds gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Steps that every rank finished.
    pub steps_per_second: f64,
    /// Tokens of prompts computed in them, those computed again included.
    pub prompt_tokens_per_second: f64,
    /// Tokens that they gave.
    pub output_tokens_per_second: f64,
    /// By rank; empty while there were no steps.
    pub ranks: Vec<RankLoad>,
    /// The rank that the others waited for, where that is worth mentioning.
    pub straggler: Option<usize>,
}

/// A rank's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankLoad {
    /// Share of the window in which it was at a step.
    pub busy: f64,
    /// Where the time at steps went, where that is known.
    pub parts: Option<Parts>,
}

/// The steps of the last seconds.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// The oldest first, none of them twice.
    seconds: VecDeque<Second>,
}

/// The steps that ended in one second.
#[derive(Clone, Debug, Default)]
struct Second {
    /// Since the clock's beginning.
    at: u64,
    steps: u64,
    prompt_tokens: usize,
    output_tokens: usize,
    took: Vec<Duration>,
    /// Empty unless every step's times could be divided.
    parts: Vec<Parts>,
}

/// A step that every rank has finished.
#[derive(Clone, Copy, Debug)]
pub struct FinishedStep<'a> {
    /// Of prompts, computed.
    pub prompt_tokens: usize,
    /// Given to clients.
    pub output_tokens: usize,
    /// By rank.
    pub times: &'a [StepTime],
    /// What [`divide`] makes of them.
    pub parts: Option<&'a [Parts]>,
}

impl Window {
    /// Takes in a step that ended at `now`, which never goes back.
    pub fn add(&mut self, now: Duration, step: &FinishedStep) {
        let at = now.as_secs();
        self.forget(at);
        if self.seconds.back().is_none_or(|second| second.at != at) {
            self.seconds.push_back(Second {
                at,
                took: vec![Duration::ZERO; step.times.len()],
                parts: vec![Parts::default(); step.times.len()],
                ..Second::default()
            });
        }
        let Some(second) = self.seconds.back_mut() else {
            return;
        };
        second.steps += 1;
        second.prompt_tokens += step.prompt_tokens;
        second.output_tokens += step.output_tokens;
        for (sum, time) in second.took.iter_mut().zip(step.times) {
            *sum = sum.saturating_add(time.took);
        }
        match step.parts {
            Some(parts) => {
                for (sum, &parts) in second.parts.iter_mut().zip(parts) {
                    sum.add(parts);
                }
            }
            None => second.parts.clear(),
        }
    }

    /// Forgets everything: another group's ranks are others.
    pub fn clear(&mut self) {
        self.seconds.clear();
    }

    /// What the whole seconds before `now` gave, up to [`WINDOW_SECONDS`] of them.
    pub fn load(&self, now: Duration) -> Load {
        let end = now.as_secs();
        let begin = end.saturating_sub(WINDOW_SECONDS);
        let length = (end - begin).max(1) as f64;
        let seconds = || {
            let within = begin..end;
            self.seconds
                .iter()
                .filter(move |second| within.contains(&second.at))
        };
        let rate = |count: fn(&Second) -> u64| seconds().map(count).sum::<u64>() as f64 / length;
        let ranks = seconds().map(|second| second.took.len()).max().unwrap_or(0);
        let divided = seconds().all(|second| second.parts.len() == ranks);
        let mut took = vec![Duration::ZERO; ranks];
        let mut parts = vec![Parts::default(); ranks];
        for second in seconds() {
            for (sum, &more) in took.iter_mut().zip(&second.took) {
                *sum = sum.saturating_add(more);
            }
            for (sum, &more) in parts.iter_mut().zip(&second.parts) {
                sum.add(more);
            }
        }
        Load {
            steps_per_second: rate(|second| second.steps),
            prompt_tokens_per_second: rate(|second| second.prompt_tokens as u64),
            output_tokens_per_second: rate(|second| second.output_tokens as u64),
            straggler: divided.then(|| straggler(&parts)).flatten(),
            ranks: took
                .into_iter()
                .zip(parts)
                .map(|(took, parts)| RankLoad {
                    // A step that began before the window counts whole.
                    busy: (took.as_secs_f64() / length).min(1.0),
                    parts: divided.then_some(parts),
                })
                .collect(),
        }
    }

    /// Drops what no window that ends after `at` has.
    fn forget(&mut self, at: u64) {
        while let Some(second) = self.seconds.front()
            && second.at + WINDOW_SECONDS < at
        {
            self.seconds.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn time(took: u64, collective: u64) -> StepTime {
        StepTime {
            took: ms(took),
            collectives: Some(vec![ms(collective)]),
        }
    }

    fn parts(compute: u64, exchange: u64, wait: u64) -> Parts {
        Parts {
            compute: ms(compute),
            exchange: ms(exchange),
            wait: ms(wait),
        }
    }

    #[test]
    fn the_rank_that_waits_least_is_waited_for() {
        let divided = divide(&[time(100, 30), time(100, 5), time(100, 65)]).unwrap();
        let expected = [parts(70, 5, 25), parts(95, 5, 0), parts(35, 5, 60)];
        assert_eq!(divided, expected);
        assert_eq!(straggler(&divided), Some(1));
    }

    #[test]
    fn ranks_that_wait_for_each_other_in_turn_wait() {
        let time = |collectives: &[u64]| StepTime {
            took: ms(100),
            collectives: Some(collectives.iter().copied().map(ms).collect()),
        };
        let divided = divide(&[time(&[31, 1]), time(&[1, 21])]).unwrap();
        assert_eq!(divided, [parts(68, 2, 30), parts(78, 2, 20)]);
        assert_eq!(divide(&[time(&[1, 1]), time(&[1])]), None);
        assert_eq!(divide(&[time(&[])]).unwrap(), [parts(100, 0, 0)]);
    }

    #[test]
    fn nobody_is_waited_for_where_all_wait_alike_or_alone() {
        for times in [
            vec![time(100, 10); 3],
            vec![time(100, 0)],
            vec![time(0, 0); 2],
        ] {
            assert_eq!(straggler(&divide(&times).unwrap()), None);
        }
        let hardly = [parts(900, 0, 100), parts(860, 0, 140)];
        assert_eq!(straggler(&hardly), None);
        assert_eq!(straggler(&[]), None);
        assert_eq!(divide(&[]), None);
    }

    #[test]
    fn what_one_rank_did_not_measure_is_told_of_none() {
        let unseen = StepTime {
            took: ms(100),
            collectives: None,
        };
        assert_eq!(divide(&[time(100, 10), unseen]), None);
    }

    #[test]
    fn a_part_is_not_longer_than_its_whole() {
        assert_eq!(divide(&[time(3, 7)]).unwrap(), [parts(0, 7, 0)]);
    }

    #[test]
    fn rates_are_of_the_whole_seconds_before() {
        let mut window = Window::default();
        let times = [time(200, 20), time(200, 120)];
        let divided = divide(&times).unwrap();
        let step = FinishedStep {
            prompt_tokens: 30,
            output_tokens: 3,
            times: &times,
            parts: Some(&divided),
        };
        for second in 0..20 {
            window.add(ms(1000 * second + 100), &step);
            window.add(ms(1000 * second + 900), &step);
        }
        assert_eq!(window.seconds.len() as u64, WINDOW_SECONDS + 1);
        let load = window.load(ms(19_950));
        assert_eq!(load.steps_per_second, 2.0);
        assert_eq!(load.prompt_tokens_per_second, 60.0);
        assert_eq!(load.output_tokens_per_second, 6.0);
        assert_eq!(load.straggler, Some(0));
        assert_eq!(load.ranks[1].busy, 0.4);
        assert_eq!(load.ranks[1].parts, Some(parts(1600, 400, 2000)));
        // Nothing happens for five seconds, then for ever.
        assert_eq!(window.load(ms(25_000)).steps_per_second, 1.0);
        assert_eq!(window.load(ms(60_000)), Load::default());
    }

    #[test]
    fn the_first_seconds_are_not_taken_for_ten() {
        let mut window = Window::default();
        let step = FinishedStep {
            prompt_tokens: 0,
            output_tokens: 1,
            times: &[time(1, 0)],
            parts: None,
        };
        window.add(ms(500), &step);
        assert_eq!(window.load(ms(700)).ranks, []);
        let load = window.load(ms(2000));
        assert_eq!(load.output_tokens_per_second, 0.5);
        assert_eq!(load.ranks[0].parts, None);
        window.clear();
        assert_eq!(window.load(ms(2000)), Load::default());
    }

    #[test]
    fn one_step_that_cannot_be_divided_leaves_the_seconds_undivided() {
        let mut window = Window::default();
        let times = [time(10, 1)];
        let divided = divide(&times).unwrap();
        for parts in [Some(&divided[..]), None, Some(&divided[..])] {
            let step = FinishedStep {
                prompt_tokens: 0,
                output_tokens: 0,
                times: &times,
                parts,
            };
            window.add(ms(100), &step);
        }
        let load = window.load(ms(1000));
        assert_eq!((load.ranks.len(), load.ranks[0].parts), (1, None));
        assert_eq!(load.straggler, None);
    }
}
