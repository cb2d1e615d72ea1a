//! `secondwind demo`: a whole cluster in one process, and one answer of it.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use clap::Args;
use secondwind_model::checkpoint::Checkpoint;

use crate::{
    cli::Common,
    client::{Client, flags::GenerationFlags},
    config::{
        Config, Layer, Origin, Section,
        flags::{KeyFlags, PlanningKeys},
    },
    coordinator,
    generate::{self, Notes},
    local_cluster::LocalCluster,
    logging,
    signals::Stop,
    worker,
};

/// Shows what the embedded model knows.
const DEFAULT_PROMPT: &str = "What is secondwind?";

/// A cluster in this process. Without `--model` it serves the embedded model.
#[derive(Args, Debug)]
pub struct ClusterFlags {
    /// Workers to start [default: 2, or as many as --split has shares]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    workers: Option<String>,
    /// CPU threads of each worker [default: an even share of the cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    threads: Option<String>,
    #[command(flatten)]
    planning: KeyFlags<PlanningKeys>,
}

/// Flags of `demo`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(flatten)]
    cluster: ClusterFlags,
    /// Stay up after the answer, for clients at --listen
    #[arg(long)]
    serve: bool,
    /// Address for clients [default: 127.0.0.1:7700]
    #[arg(long, value_name = "ADDRESS", requires = "serve")]
    listen: Option<String>,
    #[command(flatten)]
    generation: GenerationFlags,
}

/// Runs the command.
pub async fn run(flags: Flags, common: Common) -> Result<()> {
    let Flags {
        cluster,
        serve,
        listen,
        mut generation,
    } = flags;
    let defaults = defaults(&cluster);
    let typed = cluster.layer(listen);
    let config = common.load_quiet(&[Section::Coordinator], defaults, typed)?;
    let traces = logging::start_with_traces(&config)?;
    let notes = if generation.json {
        Notes::Stderr
    } else {
        Notes::Stdout
    };
    if generation.prompt.is_none() && generation.token_ids.is_none() {
        generation.prompt = Some(DEFAULT_PROMPT.into());
    }
    let mut cluster = start(&config, serve).await?;
    let shown = async {
        cluster.until_serving().await?;
        let endpoint = cluster.endpoint().to_owned();
        let answering = show(&endpoint, &generation, notes);
        cluster.during(answering).await?;
        if serve {
            let stop = Stop::on_signal()?;
            notes.say(&format!("serving at {endpoint}; Ctrl-C stops"))?;
            let asked = async {
                stop.asked().await;
                Ok(())
            };
            cluster.during(asked).await?;
        }
        Ok(())
    };
    let shown: Result<()> = shown.await;
    let stopped = cluster
        .stop(coordinator::grace(&config, "coordinator.stop_timeout"))
        .await;
    traces.end().await;
    // The first failure is the cause of what follows it.
    shown.and(stopped)
}

/// One answer, through the same client as `generate`.
async fn show(endpoint: &str, generation: &GenerationFlags, notes: Notes) -> Result<()> {
    let mut client = Client::connect(endpoint).await?;
    let served = generate::plan(&mut client).await?;
    if let Some(plan) = &served.plan {
        notes.say(&format!("{}\n", plan.table()))?;
    }
    if let Some(prompt) = &generation.prompt {
        notes.say(&format!("> {prompt}"))?;
    }
    generate::answer(&mut client, generation, served, notes).await
}

/// Starts the cluster. Clients are heard at `coordinator.listen` with `serve`, and else at any port of loopback.
pub async fn start(config: &Config, serve: bool) -> Result<LocalCluster> {
    let mut coordinator = coordinator::meant(config)?;
    coordinator.exit_without_plan = true;
    if !serve {
        // Nobody else is let in.
        coordinator.clients.keys.clear();
    }
    let mut worker = worker::meant(config)?;
    worker.model.clone_from(&coordinator.model);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = worker
        .threads
        .unwrap_or((cores / coordinator.world_size).max(1));
    worker.threads = Some(threads);
    // The workers are alike: one measures for all, undisturbed by the others.
    let (model, path) = (worker.model.clone(), worker.linear_path);
    let measured = tokio::task::spawn_blocking(move || -> Result<_> {
        Ok(secondwind_worker::measure_cpu(
            &Checkpoint::open_named(&model)?.shape()?,
            threads,
            path,
        )?)
    });
    let mut capabilities = measured.await.context("measuring this machine failed")??;
    // They share this machine's memory.
    capabilities.usable_bytes /= coordinator.world_size as u64;
    worker.capabilities = Some(capabilities);
    // Without --serve nobody else is to find it, and any port will do.
    let listen = match config.address("coordinator.listen").filter(|_| serve) {
        Some(listen) => listen,
        None => (Ipv4Addr::LOCALHOST, 0).into(),
    };
    LocalCluster::start(coordinator, &worker, listen).await
}

/// What `demo` does when nobody says otherwise.
pub fn defaults(flags: &ClusterFlags) -> Layer {
    let mut layer = Layer::new("command");
    let shares = flags
        .planning
        .layer
        .text("coordinator", "split")
        .map_or(2, |split| split.split(':').count());
    layer.set("coordinator", "model", "builtin", Origin::Default);
    layer.set(
        "coordinator",
        "world_size",
        shares.to_string(),
        Origin::Default,
    );
    layer.set("worker", "model", "builtin", Origin::Default);
    layer
}

impl ClusterFlags {
    /// Nobody typed one.
    pub fn is_empty(&self) -> bool {
        self.workers.is_none() && self.threads.is_none() && self.planning.layer.is_empty()
    }

    /// The keys that they set, and the address for clients.
    pub fn layer(self, listen: Option<String>) -> Layer {
        let mut layer = self.planning.layer;
        for (section, key, flag, value) in [
            ("coordinator", "listen", "--listen", listen),
            ("coordinator", "world_size", "--workers", self.workers),
            ("worker", "threads", "--threads", self.threads),
        ] {
            if let Some(value) = value {
                layer.set(section, key, value, Origin::Flag(flag.into()));
            }
        }
        layer
    }
}
