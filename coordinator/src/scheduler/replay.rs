//! The scheduler alone against requests that arrive on a clock of its own, with steps that take what a
//! cost model says. For tests and `bench schedule`: it answers what a setting does to waiting times
//! without a device and without waiting.

use std::collections::{BTreeMap, VecDeque};

use secondwind_model::step::{RowResult, Sampling, SequenceId, Step, StepResult, TokenLogprobs};

use super::{Counters, Event, NewSequence, Refusal, Scheduler, SchedulerSettings, SettingsError};

/// Seconds that a step takes on a group, linear in what the step carries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    /// Launches, and the latency of sums: whatever the step carries.
    pub fixed: f64,
    /// Reading the weights once.
    pub weights: f64,
    /// Arithmetic of one token; hides behind the reading of the weights while it is shorter.
    pub token: f64,
    /// Moving one token's partial sums between ranks.
    pub exchange: f64,
    /// Reading the KV of one earlier token for one row.
    pub context: f64,
    /// Attention arithmetic of one token of a chunk with one token before it.
    pub pair: f64,
}

impl StepCost {
    /// Qwen2.5-7B int4 over two P40, from published figures as the planner takes them (347 GB/s at
    /// 65 %, 47 T int8 and 11.8 T fp32 operations per second at 35 %, 3 us a launch, 20 us a sum) and
    /// 6 GB/s between the cards. Not measured.
    pub const TWO_P40: Self = Self {
        // 28 layers of 14 launches and 2 sums, and what is around them.
        fixed: 396.0 * 3e-6 + 57.0 * 20e-6,
        // 3.37 GB of int4 layers and 1.09 GB of fp16 lm_head, half of them each.
        weights: 2.23e9 / (0.65 * 347e9),
        // 6.53 G weights in layers, two operations each, halved.
        token: 6.53e9 / (0.35 * 47e12),
        // 56 sums of 3584 floats.
        exchange: 56.0 * 3584.0 * 4.0 / 6e9,
        // 2 KV heads a card of 128 floats, keys and values, 28 layers.
        context: 28.0 * 2.0 * 2.0 * 128.0 * 4.0 / (0.65 * 347e9),
        // Scores and values over 14 heads a card of 128 channels, 28 layers.
        pair: 28.0 * 2.0 * 2.0 * 14.0 * 128.0 / (0.35 * 11.8e12),
    };

    /// Seconds of one step.
    pub fn seconds(&self, step: &Step) -> f64 {
        let (mut tokens, mut contexts, mut pairs) = (0.0, 0.0, 0.0);
        for row in &step.rows {
            let (before, count) = (row.position as f64, row.input.len() as f64);
            tokens += count;
            contexts += before;
            pairs += count * (before + count / 2.0);
        }
        self.fixed
            + self.weights.max(tokens * self.token)
            + tokens * self.exchange
            + contexts * self.context
            + pairs * self.pair
    }
}

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// Seconds since the start.
    pub at: f64,
    /// Whose it is.
    pub tenant: u32,
    /// Among those of its tenant.
    pub priority: i8,
    /// Tokens of its prompt, at least 1.
    pub prompt_tokens: usize,
    /// Tokens that it samples, at least 1.
    pub output_tokens: usize,
    /// Its text is that of this conversation ...
    pub conversation: u64,
    /// ... for so many tokens, and its own after them.
    pub shared_tokens: usize,
}

impl Arrival {
    /// The token at a position of request `index`.
    fn token(&self, index: usize, position: usize) -> u32 {
        let source = if position < self.shared_tokens {
            self.conversation
        } else {
            (1 << 32) + index as u64
        };
        let mut mixed = source.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ position as u64;
        mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 32)) % 100_000) as u32
    }
}

/// What became of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Seconds at which its tokens were there; empty if it was refused.
    pub tokens: Vec<f64>,
    /// Tokens of its prompt that were cached when it was let in first.
    pub cached_tokens: Option<usize>,
    /// Why it was not taken.
    pub refusal: Option<Refusal>,
}

impl Outcome {
    /// Seconds between its tokens.
    pub fn gaps(&self) -> impl Iterator<Item = f64> {
        self.tokens.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// A whole trace, replayed.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Of each arrival, in their order.
    pub outcomes: Vec<Outcome>,
    /// Seconds until the last step was done.
    pub seconds: f64,
    /// The scheduler's, at the end.
    pub counters: Counters,
}

/// A step on the way.
struct Sent {
    done_at: f64,
    result: StepResult,
}

/// Replays arrivals, which are in order of time, until all are answered. Steps run one after the other;
/// a step that was prepared in time begins when the one before it ends.
///
/// # Errors
/// Of the settings.
pub fn replay(
    settings: SchedulerSettings,
    cost: &StepCost,
    arrivals: &[Arrival],
) -> Result<Replay, SettingsError> {
    let mut scheduler = Scheduler::new(settings)?;
    let mut outcomes = vec![
        Outcome {
            tokens: Vec::new(),
            cached_tokens: None,
            refusal: None,
        };
        arrivals.len()
    ];
    let mut owners = BTreeMap::<SequenceId, usize>::new();
    let mut in_flight = VecDeque::<Sent>::new();
    let (mut now, mut free_at, mut next) = (0.0_f64, 0.0_f64, 0);
    loop {
        while let Some(step) = scheduler.next_step() {
            free_at = now.max(free_at) + cost.seconds(&step);
            for row in &step.rows {
                let outcome = &mut outcomes[owners[&row.sequence]];
                outcome.cached_tokens.get_or_insert(row.position);
            }
            in_flight.push_back(Sent {
                done_at: free_at,
                result: answer(&step, |id, position| {
                    let index = owners[&id];
                    arrivals[index].token(index, position)
                }),
            });
        }
        let arrival = arrivals.get(next);
        match (in_flight.front(), arrival) {
            (Some(sent), arrival) if arrival.is_none_or(|it| sent.done_at <= it.at) => {
                now = sent.done_at;
                let result = in_flight.pop_front().map(|sent| sent.result);
                // The result was made from the step itself.
                let events = scheduler.commit(result.unwrap_or_default());
                for event in events.unwrap_or_default() {
                    if let Event::Token { sequence, .. } = event {
                        outcomes[owners[&sequence]].tokens.push(now);
                    }
                }
            }
            (_, Some(arrival)) => {
                now = now.max(arrival.at);
                match scheduler.submit(request(arrival, next)) {
                    Ok(id) => {
                        owners.insert(id, next);
                    }
                    Err(refusal) => outcomes[next].refusal = Some(refusal),
                }
                next += 1;
            }
            (None, None) => break,
            (Some(_), None) => unreachable!("nothing arrives any more"),
        }
    }
    Ok(Replay {
        outcomes,
        seconds: free_at,
        counters: scheduler.counters(),
    })
}

fn request(arrival: &Arrival, index: usize) -> NewSequence {
    let positions = 0..arrival.prompt_tokens;
    NewSequence {
        prompt: positions.map(|at| arrival.token(index, at)).collect(),
        max_tokens: arrival.output_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling::default(),
        prompt_logprobs: false,
        mask: None,
        tenant: arrival.tenant,
        priority: arrival.priority,
        cache_salt: None,
    }
}

fn answer(step: &Step, token: impl Fn(SequenceId, usize) -> u32) -> StepResult {
    let rows = step.rows.iter().enumerate();
    let rows = rows.filter(|(_, row)| row.sample.is_some());
    let rows = rows.map(|(index, row)| RowResult {
        row: index,
        tokens: vec![TokenLogprobs {
            token: token(row.sequence, row.position + row.input.len()),
            logprob: None,
            top: Vec::new(),
        }],
        prompt_logprobs: Vec::new(),
    });
    StepResult {
        number: step.number,
        rows: rows.collect(),
        gathered_rows: 0,
    }
}

#[cfg(test)]
mod tests;
