//! What Prometheus is told, in the OpenMetrics text format. Names, units and buckets are those of vLLM where it
//! has the figure, under a prefix of our own.
//!
//! A registry belongs to one coordinator, not to the process: tests run many.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::cluster::StepTime;
use crate::rack::{self, Parts};
use crate::request::{FinishReason, SequenceTimings, SubmitError};
use crate::scheduler::Counters;

/// Of what [`Metrics::render`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper ends in seconds; vLLM's, of its module for Prometheus.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];

/// One label.
type Label = [(&'static str, &'static str); 1];
/// A rank's label.
type RankLabel = [(&'static str, usize); 1];
/// A rank's, and a part's of its time.
type RankPart = (RankLabel, Label);

/// The name of a tenant; see [`is_key_name`](crate::api::is_key_name), which leaves nothing to escape.
type TenantLabel = [(&'static str, String); 1];

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge<f64, AtomicU64>,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prefix_evictions: Counter,
    preemptions: Counter,
    guessing_rows: Counter,
    guessed_tokens: Counter,
    right_guesses: Counter,
    computed_tokens: Counter,
    recomputed_tokens: Counter,
    generation_tokens: Counter,
    prompt_tokens: Counter,
    lost_epochs: Counter,
    step: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    success: Family<Label, Counter>,
    failure: Family<Label, Counter>,
    tenant_requests: Family<TenantLabel, Counter>,
    tenant_prompt_tokens: Family<TenantLabel, Counter>,
    tenant_generation_tokens: Family<TenantLabel, Counter>,
    request: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    rank_step: Family<RankPart, Counter<f64, AtomicU64>>,
    straggler_steps: Family<RankLabel, Counter>,
}

impl Metrics {
    /// Nothing counted yet, for the model of this name.
    pub fn new(model: &str) -> Arc<Self> {
        let mut registry = Registry::with_prefix("secondwind");
        let info = [("version", env!("CARGO_PKG_VERSION")), ("model", model)];
        // The library writes values as they are.
        let info = info.map(|(name, value)| (name, escaped(value)));
        registry.register("server", "What serves", Info::new(info.to_vec()));
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let running = gauge(
            "num_requests_running",
            "Sequences with a place on the workers",
        );
        let waiting = gauge(
            "num_requests_waiting",
            "Accepted sequences that hold no place",
        );
        let kv_usage = Gauge::default();
        registry.register(
            "kv_cache_usage_perc",
            "Share of the KV blocks that sequences own, from 0 to 1",
            kv_usage.clone(),
        );
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let prefix_queries = counter(
            "prefix_cache_queries",
            "Tokens of sequences for which the prefix cache was asked",
        );
        let prefix_hits = counter("prefix_cache_hits", "Those of them that it had");
        let prefix_evictions = counter(
            "prefix_cache_evictions",
            "Cached KV blocks that were taken for something else",
        );
        let preemptions = counter(
            "num_preemptions",
            "Sequences sent back to wait because KV blocks ran out",
        );
        let guessing_rows = counter(
            "spec_decode_num_drafts",
            "Rows of steps with guessed tokens",
        );
        let guessed_tokens = counter("spec_decode_num_draft_tokens", "Tokens guessed");
        let right_guesses = counter("spec_decode_num_accepted_tokens", "Those that were right");
        let computed_tokens = counter("computed_tokens", "Tokens of committed steps");
        let recomputed_tokens = counter(
            "recomputed_tokens",
            "Those of them that had been computed before",
        );
        let generation_tokens = counter("generation_tokens", "Tokens of answers");
        let prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were begun");
        let lost_epochs = counter(
            "lost_epochs",
            "Groups that were lost; their sequences are kept",
        );
        let mut seconds = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::new(buckets.iter().copied());
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        let step = seconds(
            "step_time",
            "From sending a step to its last rank's end",
            &TOKEN,
        );
        let first_token = seconds(
            "time_to_first_token",
            "From a request to its first token",
            &FIRST_TOKEN,
        );
        let inter_token = seconds(
            "inter_token_latency",
            "Between two tokens of an answer",
            &TOKEN,
        );
        let request = seconds(
            "e2e_request_latency",
            "From a request to the end of its answer",
            &REQUEST,
        );
        let queue = seconds(
            "request_queue_time",
            "From a request to its first step",
            &REQUEST,
        );
        let prefill = seconds(
            "request_prefill_time",
            "From its first step to its first token",
            &REQUEST,
        );
        let decode = seconds(
            "request_decode_time",
            "From its first token to its last",
            &REQUEST,
        );
        let mut family = |name: &str, help: &str| {
            let family = Family::default();
            registry.register(name, help, family.clone());
            family
        };
        let success = family("request_success", "Answers that came to their end");
        let failure = family("request_failure", "Requests that did not");
        let rank_step = Family::default();
        registry.register_with_unit(
            "rank_step",
            "Time of ranks at steps: compute, exchange and wait for slower ranks, or undivided where it is not known",
            Unit::Seconds,
            rank_step.clone(),
        );
        let straggler_steps = Family::default();
        registry.register(
            "rank_straggler_steps",
            "Steps in which the other ranks waited for this one",
            straggler_steps.clone(),
        );
        let mut of_tenant = |name: &str, help: &str| {
            let family = Family::default();
            registry.register(name, help, family.clone());
            family
        };
        let tenant_requests = of_tenant("tenant_requests", "Requests of an API key, all of them");
        let tenant_prompt_tokens = of_tenant("tenant_prompt_tokens", "Prompts of an API key");
        let tenant_generation_tokens =
            of_tenant("tenant_generation_tokens", "Answers to an API key");
        Arc::new(Self {
            tenant_requests,
            tenant_prompt_tokens,
            tenant_generation_tokens,
            running,
            waiting,
            kv_usage,
            prefix_queries,
            prefix_hits,
            prefix_evictions,
            preemptions,
            guessing_rows,
            guessed_tokens,
            right_guesses,
            computed_tokens,
            recomputed_tokens,
            generation_tokens,
            prompt_tokens,
            lost_epochs,
            step,
            first_token,
            inter_token,
            success,
            failure,
            request,
            queue,
            prefill,
            decode,
            rank_step,
            straggler_steps,
            registry,
        })
    }

    /// Everything, as text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Takes over how the scheduler stands now, and what its sums grew by.
    pub(crate) fn follow(&self, before: &Counters, now: &Counters) {
        self.running.set(count(now.running));
        self.waiting.set(count(now.waiting));
        self.kv_usage
            .set(now.blocks_used as f64 / now.blocks_total.max(1) as f64);
        for (counter, before, now) in [
            (
                &self.prefix_queries,
                before.prefix_queried_tokens,
                now.prefix_queried_tokens,
            ),
            (
                &self.prefix_hits,
                before.prefix_hit_tokens,
                now.prefix_hit_tokens,
            ),
            (
                &self.prefix_evictions,
                before.prefix_evictions,
                now.prefix_evictions,
            ),
            (&self.preemptions, before.preemptions, now.preemptions),
            (&self.guessing_rows, before.guessing_rows, now.guessing_rows),
            (
                &self.guessed_tokens,
                before.guessed_tokens,
                now.guessed_tokens,
            ),
            (&self.right_guesses, before.right_guesses, now.right_guesses),
            (
                &self.computed_tokens,
                before.computed_tokens,
                now.computed_tokens,
            ),
            (
                &self.recomputed_tokens,
                before.recomputed_tokens,
                now.recomputed_tokens,
            ),
            (
                &self.generation_tokens,
                before.sampled_tokens,
                now.sampled_tokens,
            ),
        ] {
            counter.inc_by(now.saturating_sub(before));
        }
    }

    /// A sequence got its first step.
    pub(crate) fn started(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
    }

    /// Every rank has finished a step.
    pub(crate) fn stepped(&self, took: Duration) {
        self.step.observe(took.as_secs_f64());
    }

    /// What each rank did in a step; `parts` are those of [`rack::divide`].
    pub(crate) fn rank_times(&self, times: &[StepTime], parts: Option<&[Parts]>) {
        let add = |rank: usize, part, time: Duration| {
            let seconds = self
                .rank_step
                .get_or_create(&([("rank", rank)], [("part", part)]));
            seconds.inc_by(time.as_secs_f64());
        };
        let Some(parts) = parts else {
            for (rank, time) in times.iter().enumerate() {
                add(rank, "undivided", time.took);
            }
            return;
        };
        for (rank, it) in parts.iter().enumerate() {
            add(rank, "compute", it.compute);
            add(rank, "exchange", it.exchange);
            add(rank, "wait", it.wait);
        }
        if let Some(rank) = rack::straggler(parts) {
            self.straggler_steps.get_or_create(&[("rank", rank)]).inc();
        }
    }

    /// A group is gone.
    pub(crate) fn lost_epoch(&self) {
        self.lost_epochs.inc();
    }

    /// A sequence's first token came so long after it was submitted.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// A later token came so long after the one before.
    pub(crate) fn next_token(&self, after: Duration) {
        self.inter_token.observe(after.as_secs_f64());
    }

    /// An answer came to its end.
    pub(crate) fn finished(&self, reason: FinishReason, took: Duration, timings: &SequenceTimings) {
        self.success
            .get_or_create(&[("finished_reason", reason.name())])
            .inc();
        for (histogram, duration) in [
            (&self.request, took),
            (&self.queue, timings.queue),
            (&self.prefill, timings.prefill),
            (&self.decode, timings.decode),
        ] {
            histogram.observe(duration.as_secs_f64());
        }
    }

    /// A request got no answer, or none that ends; without an error its client went away.
    pub(crate) fn failed(&self, error: Option<&SubmitError>) {
        let reason = error.map_or("abort", SubmitError::reason);
        self.failure.get_or_create(&[("reason", reason)]).inc();
    }

    /// A request of this tenant is over. There are as many tenants as the configuration has keys.
    pub(crate) fn served(&self, tenant: &str, prompt_tokens: u64, completion_tokens: u64) {
        let label = [("tenant", tenant.to_owned())];
        for (family, count) in [
            (&self.tenant_requests, 1),
            (&self.tenant_prompt_tokens, prompt_tokens),
            (&self.tenant_generation_tokens, completion_tokens),
        ] {
            family.get_or_create(&label).inc_by(count);
        }
    }
}

/// As the format has it within quotes.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
}

fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_follow_the_scheduler_and_gauges_say_how_it_stands() {
        let metrics = Metrics::new("a \"model\"");
        let first = Counters {
            running: 3,
            waiting: 2,
            blocks_used: 5,
            blocks_total: 20,
            sampled_tokens: 7,
            prefix_hit_tokens: 32,
            ..Counters::default()
        };
        metrics.follow(&Counters::default(), &first);
        let second = Counters {
            running: 1,
            sampled_tokens: 10,
            // A sum that began anew.
            prefix_hit_tokens: 16,
            ..first
        };
        metrics.follow(&first, &second);
        let text = metrics.render();
        for line in [
            "secondwind_num_requests_running 1",
            "secondwind_num_requests_waiting 2",
            "secondwind_kv_cache_usage_perc 0.25",
            "secondwind_generation_tokens_total 10",
            "secondwind_prefix_cache_hits_total 32",
            "# UNIT secondwind_time_to_first_token_seconds seconds",
            "# EOF",
        ] {
            assert!(text.lines().any(|it| it == line), "no {line:?} in\n{text}");
        }
        assert!(text.contains("model=\"a \\\"model\\\"\""), "{text}");
    }

    #[test]
    fn time_of_ranks_is_counted_by_its_parts() {
        let metrics = Metrics::new("m");
        let time = |took, collective| StepTime {
            took: Duration::from_millis(took),
            collectives: Some(vec![Duration::from_millis(collective)]),
        };
        let times = [time(1000, 250), time(1000, 750)];
        metrics.rank_times(&times, rack::divide(&times).as_deref());
        metrics.rank_times(&times, None);
        let text = metrics.render();
        for line in [
            "# UNIT secondwind_rank_step_seconds seconds",
            "secondwind_rank_step_seconds_total{rank=\"0\",part=\"compute\"} 0.75",
            "secondwind_rank_step_seconds_total{rank=\"1\",part=\"exchange\"} 0.25",
            "secondwind_rank_step_seconds_total{rank=\"1\",part=\"wait\"} 0.5",
            "secondwind_rank_step_seconds_total{rank=\"1\",part=\"undivided\"} 1.0",
            "secondwind_rank_straggler_steps_total{rank=\"0\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn ends_are_counted_by_their_reason() {
        let metrics = Metrics::new("m");
        let timings = SequenceTimings {
            queue: Duration::from_millis(400),
            ..SequenceTimings::default()
        };
        for reason in [FinishReason::Stop, FinishReason::Length, FinishReason::Stop] {
            metrics.finished(reason, Duration::from_secs(3), &timings);
        }
        metrics.failed(None);
        metrics.failed(Some(&SubmitError::Draining));
        metrics.first_token(Duration::from_millis(7));
        let text = metrics.render();
        for line in [
            "secondwind_request_success_total{finished_reason=\"stop\"} 2",
            "secondwind_request_success_total{finished_reason=\"length\"} 1",
            "secondwind_request_failure_total{reason=\"abort\"} 1",
            "secondwind_request_failure_total{reason=\"refused\"} 1",
            "secondwind_e2e_request_latency_seconds_bucket{le=\"2.5\"} 0",
            "secondwind_e2e_request_latency_seconds_bucket{le=\"5.0\"} 3",
            "secondwind_request_queue_time_seconds_bucket{le=\"0.5\"} 3",
            "secondwind_time_to_first_token_seconds_bucket{le=\"0.005\"} 0",
            "secondwind_time_to_first_token_seconds_bucket{le=\"0.01\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "no {line:?} in\n{text}");
        }
    }
}
