//! `secondwind bench serve`: requests to a server that runs, or to one of its own, and what they get.
//!
//! [`load`] says which requests, by [`length`] and [`random`]; [`mod@drive`] makes them over [`openai`] or [`grpc`]
//! and notes a [`record`] of each; [`report`] makes figures of those and [`picture`] draws them.

mod drive;
mod grpc;
mod length;
mod load;
mod openai;
mod picture;
mod random;
mod record;
mod report;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use hyper::{Uri, header::HeaderValue};

use self::{
    drive::{Level, Pace, Server, Until, drive},
    grpc::Grpc,
    length::Length,
    load::Load,
    openai::OpenAi,
    report::{LevelReport, Report, Slo},
};
use crate::{
    cli::Common,
    config::{KEY_VARIABLE, Layer, Origin, Section},
    coordinator,
    demo::{self, ClusterFlags},
    exit::UsageError,
    logging, output,
};

/// Sequences that a server of our own runs at once, at the most, where nobody says how many.
const MOST_SEQUENCES: u32 = 64;
/// What a sweep goes through where nobody says.
const CONCURRENCIES: [u32; 6] = [1, 2, 4, 8, 16, 32];
/// Connections are made for as many calls where requests come at a rate.
const CALLS_AT_A_RATE: usize = 1024;

/// Flags of `bench serve`.
#[derive(Args, Debug)]
pub struct ServeFlags {
    /// `openai` over HTTP, or `grpc`
    #[arg(long, value_name = "API", default_value = "openai")]
    api: Api,
    /// Server to ask, http://HOST:PORT [default: one of its own, in this process, over --model]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Closed loop: requests at a time; several values are levels of a sweep [default: 1,2,4,8,16,32]
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "rate",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    concurrency: Vec<u32>,
    /// Open loop: requests per second, as a Poisson process; several values are levels of a sweep
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Requests of a level [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "duration",
          value_parser = clap::value_parser!(u32).range(1..))]
    requests: Option<u32>,
    /// Instead, seconds in which requests of a level begin
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Requests that are made first and not counted
    #[arg(long, value_name = "N", default_value = "4")]
    warm_up: u32,
    /// Lengths of prompts: fixed:N, uniform:A..B, exponential:MEAN or exponential:MEAN..MOST
    #[arg(long, value_name = "LENGTH", default_value = "uniform:32..128")]
    prompt_tokens: Length,
    /// Lengths of answers, likewise; answers do not end earlier
    #[arg(long, value_name = "LENGTH", default_value = "uniform:16..64")]
    output_tokens: Length,
    /// Tokens that stand before every prompt and are the same in all
    #[arg(long, value_name = "TOKENS", default_value = "0")]
    shared_prefix: usize,
    /// Share of the requests that are given up before their end, from 0 to 1
    #[arg(long, value_name = "FRACTION", default_value = "0")]
    cancel: f64,
    /// Goodput counts answers whose first token takes no longer
    #[arg(long, value_name = "MS")]
    slo_ttft_ms: Option<f64>,
    /// Goodput counts answers whose tokens take no longer, in the mean of each
    #[arg(long, value_name = "MS")]
    slo_itl_ms: Option<f64>,
    /// A request that takes longer fails
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    timeout: f64,
    /// Prompts are random token ids below this
    #[arg(long, value_name = "N", default_value = "1000",
          value_parser = clap::value_parser!(u32).range(1..))]
    vocab: u32,
    /// Seed of prompts, lengths and arrivals; a server has cached what it was asked with the same one before
    /// [default: of the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Also draw latency over throughput into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Api {
    #[value(name = "openai")]
    OpenAi,
    Grpc,
}

/// What is to be measured.
struct Sweep {
    load: Load,
    paces: Vec<Pace>,
    until: Until,
    patience: Duration,
    slo: Slo,
}

/// Runs the command.
pub async fn run(flags: ServeFlags, common: Common) -> Result<()> {
    let sweep = flags.sweep()?;
    let authorization = flags.authorization()?;
    let (svg, json) = (flags.svg.clone(), flags.json);
    let (api, warm_up) = (flags.api, flags.warm_up);
    let report = match &flags.url {
        Some(url) => {
            if !flags.cluster.is_empty() {
                let message = "--url: --workers, --threads, --model and what else a server is started with are for a \
                               server of one's own; leave one or the other out";
                return Err(UsageError::one(message).into());
            }
            let url = address(url)?;
            common.start_logging()?;
            sweep.measure(api, &url, authorization, warm_up).await?
        }
        None => {
            let mut defaults = demo::defaults(&flags.cluster);
            sweep.defaults(&mut defaults);
            let typed = flags.cluster.layer(None);
            let config = common.load_quiet(&[Section::Coordinator], defaults, typed)?;
            logging::start(&config)?;
            let mut cluster = demo::start(&config, false).await?;
            let measured = async {
                cluster.until_serving().await?;
                let url: Uri = cluster.endpoint().parse()?;
                let measuring = sweep.measure(api, &url, authorization, warm_up);
                cluster.during(measuring).await
            };
            let measured: Result<Report> = measured.await;
            let stopped = cluster
                .stop(coordinator::grace(&config, "coordinator.stop_timeout"))
                .await;
            // The first failure is the cause of what follows it.
            let report = measured?;
            stopped?;
            report
        }
    };
    if let Some(path) = svg {
        let setting = match report.levels.iter().any(|level| level.rate.is_some()) {
            true => "requests per second",
            false => "requests at a time",
        };
        let title = format!(
            "{}: points are {setting}, answers have {} tokens",
            report.model, report.output_tokens
        );
        std::fs::write(&path, picture::svg(&title, &report.levels))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match json {
        true => output::print_line(&serde_json::to_string(&report)?),
        false => output::print_line(&report.render()),
    }
}

impl ServeFlags {
    /// What the flags ask for, if they can be meant.
    fn sweep(&self) -> Result<Sweep> {
        let mut mistakes = Vec::new();
        let mut positive = |flag: &str, value: f64| {
            if !(value.is_finite() && value > 0.0) {
                mistakes.push(format!("{flag}: {value} is not above 0"));
            }
        };
        for rate in &self.rate {
            positive("--rate", *rate);
        }
        positive("--timeout", self.timeout);
        for (flag, value) in [
            ("--duration", self.duration),
            ("--slo-ttft-ms", self.slo_ttft_ms),
            ("--slo-itl-ms", self.slo_itl_ms),
        ] {
            if let Some(value) = value {
                positive(flag, value);
            }
        }
        if !(0.0..=1.0).contains(&self.cancel) {
            mistakes.push(format!("--cancel: {} is not from 0 to 1", self.cancel));
        }
        let patience = Duration::try_from_secs_f64(self.timeout).unwrap_or_default();
        if !mistakes.is_empty() {
            return Err(UsageError::new(mistakes).into());
        }
        let concurrencies = match self.concurrency.is_empty() {
            true => &CONCURRENCIES[..],
            false => &self.concurrency,
        };
        let closed = |&concurrency: &u32| Pace::Closed { concurrency };
        let of_clock = || {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            // JSON's readers keep 53 bits.
            since.map_or(0, |since| since.as_micros() as u64 & ((1 << 53) - 1))
        };
        Ok(Sweep {
            load: Load {
                seed: self.seed.unwrap_or_else(of_clock),
                prompt: self.prompt_tokens,
                output: self.output_tokens,
                shared_prefix: self.shared_prefix,
                cancel: self.cancel,
                vocab: self.vocab,
            },
            paces: match self.rate.is_empty() {
                true => concurrencies.iter().map(closed).collect(),
                false => self.rate.iter().map(|&rate| Pace::Open { rate }).collect(),
            },
            until: match self.duration {
                Some(seconds) => Until::Seconds(seconds),
                None => Until::Requests(self.requests.unwrap_or(64)),
            },
            patience,
            slo: Slo {
                ttft_ms: self.slo_ttft_ms,
                itl_ms: self.slo_itl_ms,
            },
        })
    }

    fn authorization(&self) -> Result<Option<HeaderValue>> {
        let header = |key: &String| {
            let header = HeaderValue::try_from(format!("Bearer {key}"));
            let mut header =
                header.map_err(|_| UsageError::one("--api-key: not the characters of a header"))?;
            header.set_sensitive(true);
            Ok(header)
        };
        let variable = || std::env::var(KEY_VARIABLE).ok();
        self.api_key
            .clone()
            .or_else(variable)
            .as_ref()
            .map(header)
            .transpose()
    }
}

impl Sweep {
    /// How a server of our own is started where nobody says otherwise: so that requests are answered, and not
    /// refused.
    fn defaults(&self, layer: &mut Layer) {
        let at_a_time = |pace: &Pace| match pace {
            Pace::Closed { concurrency } => *concurrency,
            Pace::Open { .. } => MOST_SEQUENCES,
        };
        let most = self.paces.iter().map(at_a_time).max().unwrap_or(1);
        for (key, value) in [
            ("max_sequences", most.min(MOST_SEQUENCES)),
            ("max_waiting", 1 << 16),
            ("max_waiting_tokens", 1 << 30),
        ] {
            layer.set("coordinator", key, value.to_string(), Origin::Default);
        }
    }

    async fn measure(
        &self,
        api: Api,
        url: &Uri,
        authorization: Option<HeaderValue>,
        warm_up: u32,
    ) -> Result<Report> {
        let (server, name) = match api {
            Api::OpenAi => (
                Server::OpenAi(Box::new(OpenAi::find(url.clone(), authorization).await?)),
                "openai",
            ),
            Api::Grpc => {
                let calls = |pace: &Pace| match pace {
                    Pace::Closed { concurrency } => *concurrency as usize,
                    Pace::Open { .. } => CALLS_AT_A_RATE,
                };
                let calls = self.paces.iter().map(calls).max().unwrap_or(1);
                let found = Grpc::find(url, authorization, calls).await?;
                (Server::Grpc(found), "grpc")
            }
        };
        let model = match &server {
            Server::OpenAi(server) => server.model.clone(),
            Server::Grpc(server) => server.model.clone(),
        };
        let server = Arc::new(server);
        self.warm_up(&server, warm_up).await?;
        let mut levels = Vec::new();
        for (number, &pace) in (1..).zip(&self.paces) {
            let level = Level {
                number,
                pace,
                until: self.until,
                patience: self.patience,
            };
            let records = drive(&server, &self.load, level).await?;
            let mut report = LevelReport::of(&records, &self.slo);
            match pace {
                Pace::Closed { concurrency } => report.concurrency = Some(concurrency),
                Pace::Open { rate } => report.rate = Some(rate),
            }
            levels.push(report);
        }
        Ok(Report {
            api: name,
            url: url.to_string(),
            model,
            seed: self.load.seed,
            prompt_tokens: self.load.prompt.to_string(),
            shared_prefix_tokens: self.load.shared_prefix,
            output_tokens: self.load.output.to_string(),
            cancel: self.load.cancel,
            slo: self.slo,
            levels,
        })
    }

    /// Ends the command where a server answers none of the first requests.
    async fn warm_up(&self, server: &Arc<Server>, requests: u32) -> Result<()> {
        let level = Level {
            number: 0,
            pace: Pace::Closed {
                concurrency: requests.clamp(1, 8),
            },
            until: Until::Requests(requests),
            patience: self.patience,
        };
        let load = Load {
            cancel: 0.0,
            ..self.load.clone()
        };
        let records = drive(server, &load, level).await?;
        let warm = LevelReport::of(&records, &Slo::default());
        if warm.done == 0 && warm.failed > 0 {
            let kinds: Vec<&str> = warm.errors.keys().map(String::as_str).collect();
            bail!(
                "none of the first {requests} requests was answered: {}; prompts have up to {} tokens and answers {}, \
                 which may be more than the context, see --prompt-tokens and --output-tokens",
                kinds.join(", "),
                self.load.shared_prefix + self.load.prompt.most() as usize,
                self.load.output.most(),
            );
        }
        Ok(())
    }
}

/// `--url`, checked.
fn address(text: &str) -> Result<Uri> {
    if text.starts_with("https://") {
        return Err(
            UsageError::one(format!("--url {text}: TLS is not built yet; use http://")).into(),
        );
    }
    let text = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let uri = text.parse::<Uri>().ok();
    let uri = uri.filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some());
    uri.ok_or_else(|| {
        UsageError::one(format!("--url {text} is not of the form http://HOST:PORT")).into()
    })
}

#[cfg(test)]
mod tests;
