//! Records of a level to figures.

use std::collections::BTreeMap;

use serde::Serialize;

use super::record::{Outcome, Record, Usage};
use crate::{bench::percentiles::Percentiles, output};

/// What a served request may take. Goodput counts those that do not take longer.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Slo {
    /// To the first token.
    pub ttft_ms: Option<f64>,
    /// Mean between tokens.
    pub itl_ms: Option<f64>,
}

/// All levels, and what they have in common.
#[derive(Debug, Serialize)]
pub struct Report {
    pub api: &'static str,
    pub url: String,
    pub model: String,
    pub seed: u64,
    pub prompt_tokens: String,
    pub shared_prefix_tokens: usize,
    pub output_tokens: String,
    pub cancel: f64,
    pub slo: Slo,
    pub levels: Vec<LevelReport>,
}

/// One level. Percentiles are absent where nothing was measured.
#[derive(Debug, Default, Serialize)]
pub struct LevelReport {
    /// Closed loop.
    pub concurrency: Option<u32>,
    /// Open loop.
    pub rate: Option<f64>,
    /// To the end of the last request.
    pub seconds: f64,
    pub done: usize,
    pub cancelled: usize,
    pub failed: usize,
    pub errors: BTreeMap<String, usize>,
    /// Of requests that came to their end, as are usage's tokens.
    pub requests_per_second: f64,
    pub output_tokens_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub cached_prompt_share: f64,
    /// Share of the requests, cancelled ones aside, that are done within the SLO, and how many a second they are;
    /// absent without an SLO.
    pub within_slo: Option<f64>,
    pub goodput_requests_per_second: Option<f64>,
    pub ttft_ms: Option<Percentiles>,
    /// Between tokens, one value a token; over HTTP between events, which may bring several.
    pub itl_ms: Option<Percentiles>,
    /// A request's mean between its tokens, by usage.
    pub tpot_ms: Option<Percentiles>,
    pub e2e_ms: Option<Percentiles>,
}

impl LevelReport {
    /// What `records` come to; where they came from is still to be filled in.
    pub fn of(records: &[Record], slo: &Slo) -> Self {
        let mut report = Self {
            seconds: records.iter().map(|record| record.end).fold(0.0, f64::max),
            ..Self::default()
        };
        let (mut first, mut between, mut means, mut whole) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut usage = Usage::default();
        let mut good = 0;
        for record in records {
            first.extend(record.first_ms());
            between.extend(record.between_ms());
            match &record.outcome {
                Outcome::Done(own) => {
                    report.done += 1;
                    usage.prompt_tokens += own.prompt_tokens;
                    usage.cached_prompt_tokens += own.cached_prompt_tokens;
                    usage.completion_tokens += own.completion_tokens;
                    let mean = record.mean_ms(own);
                    means.extend(mean);
                    whole.push(1e3 * (record.end - record.start));
                    good += usize::from(slo.holds(record.first_ms(), mean));
                }
                Outcome::Cancelled => report.cancelled += 1,
                Outcome::Failed(kind) => {
                    report.failed += 1;
                    *report.errors.entry(kind.clone()).or_default() += 1;
                }
            }
        }
        let per_second = |count: f64| match report.seconds > 0.0 {
            true => count / report.seconds,
            false => 0.0,
        };
        report.requests_per_second = per_second(report.done as f64);
        report.output_tokens_per_second = per_second(usage.completion_tokens as f64);
        report.prompt_tokens_per_second = per_second(usage.prompt_tokens as f64);
        report.cached_prompt_share =
            usage.cached_prompt_tokens as f64 / (usage.prompt_tokens as f64).max(1.0);
        if slo.is_some() {
            let counted = (report.done + report.failed).max(1);
            report.within_slo = Some(good as f64 / counted as f64);
            report.goodput_requests_per_second = Some(per_second(good as f64));
        }
        report.ttft_ms = Percentiles::of(first);
        report.itl_ms = Percentiles::of(between);
        report.tpot_ms = Percentiles::of(means);
        report.e2e_ms = Percentiles::of(whole);
        report
    }

    /// The setting, in short.
    pub fn setting(&self) -> String {
        match (self.concurrency, self.rate) {
            (Some(concurrency), _) => concurrency.to_string(),
            (None, Some(rate)) => format!("{rate}/s"),
            (None, None) => String::new(),
        }
    }
}

impl Slo {
    fn is_some(&self) -> bool {
        self.ttft_ms.is_some() || self.itl_ms.is_some()
    }

    /// An answer of one token has no time between tokens, and keeps any limit on it.
    fn holds(&self, first_ms: Option<f64>, mean_ms: Option<f64>) -> bool {
        let within = |limit: Option<f64>, value: Option<f64>| match (limit, value) {
            (Some(limit), Some(value)) => value <= limit,
            _ => true,
        };
        within(self.ttft_ms, first_ms) && within(self.itl_ms, mean_ms)
    }
}

impl Record {
    fn first_ms(&self) -> Option<f64> {
        self.pieces
            .first()
            .map(|piece| 1e3 * (piece.at - self.start))
    }

    /// One value for each token after the first piece; a piece of several tokens shares its gap among them.
    fn between_ms(&self) -> impl Iterator<Item = f64> + '_ {
        self.pieces.windows(2).flat_map(|pair| {
            let tokens = pair[1].tokens.unwrap_or(1).max(1);
            let gap = 1e3 * (pair[1].at - pair[0].at) / f64::from(tokens);
            std::iter::repeat_n(gap, tokens as usize)
        })
    }

    /// Over the tokens after the first piece, as far as that is known to be one.
    fn mean_ms(&self, usage: &Usage) -> Option<f64> {
        let (first, last) = (self.pieces.first()?, self.pieces.last()?);
        let known = u64::from(first.tokens.unwrap_or(1));
        let later = usage.completion_tokens.saturating_sub(known);
        (later > 0).then(|| 1e3 * (last.at - first.at) / later as f64)
    }
}

impl Report {
    /// For people.
    pub fn render(&self) -> String {
        let head = format!(
            "{} at {} over {}, prompts of {} tokens{}, answers of {}, seed {}\n\n",
            self.model,
            self.url,
            self.api,
            self.prompt_tokens,
            match self.shared_prefix_tokens {
                0 => String::new(),
                tokens => format!(" after {tokens} that all share"),
            },
            self.output_tokens,
            self.seed,
        );
        let closed = self.levels.iter().any(|level| level.concurrency.is_some());
        let setting = if closed { "at a time" } else { "rate" };
        let mut header = vec![
            setting, "done", "failed", "req/s", "tokens/s", "TTFT p50", "p90", "p99 ms", "ITL p50",
            "p90", "p99 ms", "E2E p50", "p90", "p99 ms",
        ];
        let with_slo = self.slo.is_some();
        if with_slo {
            header.extend(["goodput/s", "in SLO"]);
        }
        let rows: Vec<Vec<String>> = self
            .levels
            .iter()
            .map(|level| {
                let mut row = vec![
                    level.setting(),
                    level.done.to_string(),
                    level.failed.to_string(),
                    format!("{:.2}", level.requests_per_second),
                    format!("{:.0}", level.output_tokens_per_second),
                ];
                for percentiles in [level.ttft_ms, level.itl_ms, level.e2e_ms] {
                    row.extend(cells(percentiles));
                }
                if let (Some(goodput), Some(share)) =
                    (level.goodput_requests_per_second, level.within_slo)
                {
                    row.extend([format!("{goodput:.2}"), format!("{:.0} %", 100.0 * share)]);
                }
                row
            })
            .collect();
        let all: Vec<usize> = (0..header.len()).collect();
        let mut text = head + &output::table(&header, &rows, &all);
        for level in &self.levels {
            if level.cancelled > 0 {
                text += &format!("\n{}: {} cancelled", level.setting(), level.cancelled);
            }
            for (kind, count) in &level.errors {
                text += &format!("\n{}: {count} x {kind}", level.setting());
            }
        }
        text
    }
}

fn cells(percentiles: Option<Percentiles>) -> [String; 3] {
    let cell = |value: f64| match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    match percentiles {
        Some(it) => [it.p50, it.p90, it.p99].map(cell),
        None => ["-", "-", "-"].map(str::to_owned),
    }
}
