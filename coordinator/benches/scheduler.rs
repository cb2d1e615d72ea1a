//! Microseconds that one `next_step` and one `commit` take, with the pipeline full.
//!
//! `cargo bench -p secondwind-coordinator --bench scheduler`

use std::hint::black_box;
use std::time::Instant;

use secondwind_coordinator::scheduler::{NewSequence, Scheduler, SchedulerSettings};
use secondwind_model::step::{RowResult, Sampling, Step, StepResult, TokenLogprobs};

const STEPS: usize = 20_000;
const OUTPUT_TOKENS: usize = 512;

fn main() {
    println!("sequences  kv blocks  us per step  us per token  preemptions");
    for (sequences, kv_blocks) in [(1, 4096), (8, 4096), (64, 4096), (64, 1024), (256, 16384)] {
        measure(sequences, kv_blocks);
    }
}

/// Keeps `sequences` running, each new one with a prompt of 300 tokens.
fn measure(sequences: usize, kv_blocks: usize) {
    let mut scheduler = Scheduler::new(SchedulerSettings {
        max_sequences: sequences,
        max_step_tokens: 512.max(2 * sequences),
        max_prefill_tokens: 24,
        max_logit_rows: sequences,
        block_tokens: 16,
        kv_blocks,
        max_context_tokens: 4096,
        max_in_flight: 2,
        max_waiting: sequences,
        max_waiting_tokens: usize::MAX,
        prefix_cache: true,
        speculation: None,
    })
    .expect("settings are valid");
    let mut answered = None;
    let (mut busy, mut tokens) = (std::time::Duration::ZERO, 0);
    for _ in 0..STEPS {
        while scheduler.counters().running + scheduler.counters().waiting < sequences {
            scheduler.submit(request(tokens)).expect("there is a place");
        }
        let start = Instant::now();
        let step = scheduler.next_step();
        busy += start.elapsed();
        let sent = step.as_ref().map(answer);
        if let Some(result) = std::mem::replace(&mut answered, sent) {
            let start = Instant::now();
            tokens += black_box(
                scheduler
                    .commit(result)
                    .expect("the result answers the step"),
            )
            .len();
            busy += start.elapsed();
        }
        black_box(step);
    }
    let us = busy.as_secs_f64() * 1e6;
    let preemptions = scheduler.counters().preemptions;
    let (per_step, per_token) = (us / STEPS as f64, us / tokens as f64);
    println!("{sequences:9}  {kv_blocks:9}  {per_step:11.2}  {per_token:12.3}  {preemptions:11}");
}

/// Lengths differ, so that sequences come and go one by one.
fn request(salt: usize) -> NewSequence {
    NewSequence {
        prompt: vec![1; 300],
        max_tokens: OUTPUT_TOKENS + salt * 7919 % OUTPUT_TOKENS,
        stop_tokens: vec![151_643, 151_645],
        sampling: Sampling {
            temperature: 0.7,
            top_k: 20,
            top_p: 0.8,
            seed: 1,
            ..Sampling::default()
        },
        prompt_logprobs: false,
        mask: None,
        tenant: 0,
        priority: 0,
        cache_salt: None,
    }
}

fn answer(step: &Step) -> StepResult {
    let rows = step
        .rows
        .iter()
        .enumerate()
        .filter(|(_, row)| row.sample.is_some());
    let rows = rows.map(|(row, _)| RowResult {
        row,
        tokens: vec![TokenLogprobs {
            token: 5,
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
