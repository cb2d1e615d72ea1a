//! `secondwind bench schedule`: the scheduler alone on a trace of requests, with steps that take what a
//! cost model of two P40 says. It measures decisions, not a device.

mod trace;

use std::{collections::BTreeMap, fs, num::NonZeroUsize, path::PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use secondwind_coordinator::scheduler::{
    SchedulerSettings,
    replay::{Arrival, Replay, StepCost, replay},
};
use serde::Serialize;

use crate::{bench::percentiles::Percentiles, exit::UsageError, output};

/// The trace where none is named.
const OFFICE: &str = include_str!("schedule/office.trace");
const BLOCK_TOKENS: usize = 16;

/// Flags of `bench schedule`.
#[derive(Args, Debug)]
pub struct ScheduleFlags {
    /// Requests to replay: lines of `seconds tenant priority conversation shared_tokens prompt_tokens
    /// output_tokens`, or a CSV file of Azure's LLM inference traces [default: a small office]
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Requests come so many times as fast
    #[arg(long, value_name = "FACTOR", default_value = "1")]
    rate: f64,
    /// Sequences that may run at once
    #[arg(long, value_name = "N", default_value = "16")]
    max_sequences: NonZeroUsize,
    /// Tokens of one step
    #[arg(long, value_name = "N", default_value = "512")]
    max_step_tokens: NonZeroUsize,
    /// Tokens of a step, while others are answered, for each of up to four prompts not computed yet
    #[arg(long, value_name = "N", default_value = "24")]
    max_prefill_tokens: NonZeroUsize,
    /// Tokens that the KV cache holds
    #[arg(long, value_name = "N", default_value = "65536")]
    kv_tokens: NonZeroUsize,
    /// Requests that may wait
    #[arg(long, value_name = "N", default_value = "256")]
    max_waiting: usize,
    /// Keep and share the KV blocks of past requests: `on` or `off`
    #[arg(long, value_name = "WORD", default_value = "on", value_parser = ["on", "off"])]
    prefix_cache: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Percentiles are 0 where nothing came.
#[derive(Debug, Serialize)]
struct Report {
    requests: usize,
    refused: usize,
    seconds: f64,
    output_tokens_per_second: f64,
    /// Prompts included, cached or not.
    tokens_per_second: f64,
    cached_prompt_share: f64,
    preemptions: u64,
    evictions: u64,
    first_token_seconds: Percentiles,
    between_tokens_seconds: Percentiles,
    largest_gap_seconds: f64,
    tenants: Vec<Tenant>,
    /// Jain's index of the tenants' work while each of them waits; absent if they never do.
    fairness: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Tenant {
    tenant: u32,
    requests: usize,
    first_token_seconds: Percentiles,
    between_tokens_seconds: Percentiles,
    /// Prompt tokens computed and output tokens, these twice, while every tenant waits.
    work_while_all_wait: usize,
}

/// Runs the command.
pub fn run(flags: &ScheduleFlags) -> Result<()> {
    if !(flags.rate.is_finite() && flags.rate > 0.0) {
        return Err(UsageError::one(format!("--rate: {} is not above 0", flags.rate)).into());
    }
    let text = match &flags.trace {
        Some(path) => fs::read_to_string(path)
            .with_context(|| format!("--trace: cannot read {}", path.display()))?,
        None => OFFICE.to_owned(),
    };
    let arrivals = trace::parse(&text).map_err(|why| UsageError::one(format!("--trace: {why}")))?;
    let report = measure(flags, arrivals)?;
    if flags.json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print(&render(&report))
}

fn measure(flags: &ScheduleFlags, mut arrivals: Vec<Arrival>) -> Result<Report> {
    for arrival in &mut arrivals {
        arrival.at /= flags.rate;
    }
    let replay = replay(settings(flags, &arrivals), &StepCost::TWO_P40, &arrivals)?;
    Ok(report(&arrivals, &replay))
}

fn settings(flags: &ScheduleFlags, arrivals: &[Arrival]) -> SchedulerSettings {
    let lengths = arrivals
        .iter()
        .map(|it| it.prompt_tokens + it.output_tokens);
    let max_sequences = flags.max_sequences.get();
    SchedulerSettings {
        max_sequences,
        max_step_tokens: flags.max_step_tokens.get(),
        max_prefill_tokens: flags.max_prefill_tokens.get(),
        max_logit_rows: max_sequences.max(64),
        block_tokens: BLOCK_TOKENS,
        kv_blocks: flags.kv_tokens.get().div_ceil(BLOCK_TOKENS) + 1,
        max_context_tokens: lengths.max().unwrap_or(1),
        max_in_flight: 2,
        max_waiting: flags.max_waiting,
        max_waiting_tokens: usize::MAX,
        prefix_cache: flags.prefix_cache == "on",
        speculation: None,
    }
}

fn report(arrivals: &[Arrival], replay: &Replay) -> Report {
    let served = || arrivals.iter().zip(&replay.outcomes);
    let mut by_tenant = BTreeMap::<u32, (Vec<f64>, Vec<f64>)>::new();
    for (arrival, outcome) in served() {
        let (first, gaps) = by_tenant.entry(arrival.tenant).or_default();
        first.extend(outcome.tokens.first().map(|at| at - arrival.at));
        gaps.extend(outcome.gaps());
    }
    let first: Vec<f64> = by_tenant.values().flat_map(|it| it.0.clone()).collect();
    let gaps: Vec<f64> = by_tenant.values().flat_map(|it| it.1.clone()).collect();
    let work = work_while_all_wait(arrivals, replay);
    let counters = &replay.counters;
    let share = counters.prefix_hit_tokens as f64 / (counters.let_in_tokens as f64).max(1.0);
    let outputs = counters.sampled_tokens as f64;
    Report {
        requests: arrivals.len(),
        refused: served().filter(|(_, it)| it.refusal.is_some()).count(),
        seconds: replay.seconds,
        output_tokens_per_second: outputs / replay.seconds,
        tokens_per_second: (outputs + counters.let_in_tokens as f64) / replay.seconds,
        cached_prompt_share: share,
        preemptions: counters.preemptions,
        evictions: counters.prefix_evictions,
        largest_gap_seconds: gaps.iter().copied().fold(0.0, f64::max),
        first_token_seconds: Percentiles::of(first).unwrap_or_default(),
        between_tokens_seconds: Percentiles::of(gaps).unwrap_or_default(),
        fairness: jain(&work),
        tenants: by_tenant
            .into_iter()
            .map(|(tenant, (first, gaps))| Tenant {
                tenant,
                requests: arrivals.iter().filter(|it| it.tenant == tenant).count(),
                first_token_seconds: Percentiles::of(first).unwrap_or_default(),
                between_tokens_seconds: Percentiles::of(gaps).unwrap_or_default(),
                work_while_all_wait: work.get(&tenant).copied().unwrap_or(0),
            })
            .collect(),
    }
}

/// Work done for each tenant at times at which every tenant has a request without a token yet: the
/// tokens of a prompt that were not cached count when its first token is there, an output token twice, as the scheduler's policy counts.
fn work_while_all_wait(arrivals: &[Arrival], replay: &Replay) -> BTreeMap<u32, usize> {
    // (time, tenant, +1 or -1 that wait), and (time, tenant, work).
    let mut changes = Vec::new();
    let mut done = Vec::new();
    for (arrival, outcome) in arrivals.iter().zip(&replay.outcomes) {
        if let Some(&first) = outcome.tokens.first() {
            changes.extend([(arrival.at, arrival.tenant, 1), (first, arrival.tenant, -1)]);
            let cached = outcome.cached_tokens.unwrap_or(0);
            let computed = arrival.prompt_tokens.saturating_sub(cached);
            done.push((first, arrival.tenant, computed));
        }
        done.extend(outcome.tokens.iter().map(|&at| (at, arrival.tenant, 2)));
    }
    changes.sort_by(|a, b| a.0.total_cmp(&b.0));
    done.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut waiting: BTreeMap<u32, i64> = arrivals.iter().map(|it| (it.tenant, 0)).collect();
    let mut work: BTreeMap<u32, usize> = arrivals.iter().map(|it| (it.tenant, 0)).collect();
    let mut changes = changes.into_iter().peekable();
    for (at, tenant, amount) in done {
        // Whoever gets its first token now has waited until now.
        while let Some((_, tenant, change)) = changes.next_if(|change| change.0 < at) {
            *waiting.entry(tenant).or_default() += change;
        }
        if waiting.values().all(|&count| count > 0) {
            *work.entry(tenant).or_default() += amount;
        }
    }
    work
}

/// Jain, Chiu and Hawe's index (1984): 1 if all have the same, 1/n if one has all. None for one tenant,
/// or without work.
fn jain(work: &BTreeMap<u32, usize>) -> Option<f64> {
    let sum: f64 = work.values().map(|&it| it as f64).sum();
    let squares: f64 = work.values().map(|&it| (it as f64).powi(2)).sum();
    (work.len() > 1 && squares > 0.0).then(|| sum * sum / (work.len() as f64 * squares))
}

fn render(report: &Report) -> String {
    let seconds = |it: &Percentiles| {
        format!(
            "p50 {:.2} s, p90 {:.2} s, p99 {:.2} s",
            it.p50, it.p90, it.p99
        )
    };
    let between = &report.between_tokens_seconds;
    let rows: Vec<Vec<String>> = report
        .tenants
        .iter()
        .map(|it| {
            vec![
                it.tenant.to_string(),
                it.requests.to_string(),
                format!("{:.2}", it.first_token_seconds.p50),
                format!("{:.2}", it.first_token_seconds.p99),
                format!("{:.1}", 1e3 * it.between_tokens_seconds.p50),
                format!("{:.1}", 1e3 * it.between_tokens_seconds.p99),
                it.work_while_all_wait.to_string(),
            ]
        })
        .collect();
    let header = [
        "tenant",
        "requests",
        "first token p50 s",
        "p99 s",
        "between tokens p50 ms",
        "p99 ms",
        "work while all wait",
    ];
    let fairness = match report.fairness {
        Some(index) => format!("Jain's index {index:.3} of the work while every tenant waits"),
        None => "no time at which every tenant waits".to_owned(),
    };
    format!(
        "Qwen2.5-7B int4 over 2 x P40, by a cost model: decisions are measured, no device is.\n\n\
         {} requests in {:.1} s, {} refused, {} preempted, {} cached blocks evicted\n\
         throughput      {:.0} output tokens/s, {:.0} with prompts, of which {:.0} % were cached\n\
         first token     {}\n\
         between tokens  p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms, largest {:.1} ms\n\
         fairness        {fairness}\n\n{}\n",
        report.requests,
        report.seconds,
        report.refused,
        report.preemptions,
        report.evictions,
        report.output_tokens_per_second,
        report.tokens_per_second,
        100.0 * report.cached_prompt_share,
        seconds(&report.first_token_seconds),
        1e3 * between.p50,
        1e3 * between.p90,
        1e3 * between.p99,
        1e3 * report.largest_gap_seconds,
        output::table(&header, &rows, &[0, 1, 2, 3, 4, 5, 6]).trim_end(),
    )
}

#[cfg(test)]
mod tests;
