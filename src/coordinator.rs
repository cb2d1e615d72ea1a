//! `secondwind coordinator`: the daemon that owns requests, tokens, scheduling and the plan.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use secondwind_coordinator::{
    ClientSettings, Collective, ConnectionLimits, Coordinator, CoordinatorConfig, HttpSettings,
    Reasoning, Settings,
};
use secondwind_model::plan::{KvDType, LmHead, Precision};
use tokio::net::TcpListener;

use crate::{
    cli::Common,
    config::{
        Config, Section,
        flags::{CoordinatorKeys, KeyFlags},
    },
    logging, open_files, output,
    signals::Stop,
};

/// Flags of `coordinator`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(flatten)]
    section: KeyFlags<CoordinatorKeys>,
}

/// Runs the command.
pub async fn run(flags: Flags, common: Common) -> Result<()> {
    let config = common.load_daemon(&[Section::Coordinator], flags.section.layer)?;
    let traces = logging::start_with_traces(&config)?;
    let stop = Stop::on_signal()?;
    let coordinator = Coordinator::prepare(meant(&config)?)?;
    let client = bind(&config, "coordinator.listen").await?;
    let cluster = bind(&config, "coordinator.cluster_listen").await?;
    let (client_address, cluster_address) = (client.local_addr()?, cluster.local_addr()?);
    output::print_line(&format!(
        "listening client={client_address} cluster={cluster_address}"
    ))?;
    let serving = coordinator.run(client, cluster, stop.asked());
    let served = stop
        .within(grace(&config, "coordinator.stop_timeout"), serving)
        .await;
    traces.end().await;
    served??;
    Ok(())
}

/// What `[coordinator]` means to the coordinator.
pub fn meant(config: &Config) -> Result<CoordinatorConfig> {
    let integer = |key: &str| {
        config
            .integer(key)
            .with_context(|| format!("{key} is not set"))
    };
    Ok(CoordinatorConfig {
        model: config
            .text("coordinator.model")
            .context("coordinator.model is not set")?,
        served_name: config.text("coordinator.served_name"),
        world_size: integer("coordinator.world_size")?,
        settings: Settings {
            max_context_tokens: config.integer("coordinator.max_context_tokens"),
            max_sequences: integer("coordinator.max_sequences")?,
            max_step_tokens: integer("coordinator.max_step_tokens")?,
            kv_dtype: match config.text("coordinator.kv_dtype").as_deref() {
                Some("f16") => KvDType::F16,
                Some("int8") => KvDType::Int8,
                _ => KvDType::F32,
            },
            precision: match config.text("coordinator.precision").as_deref() {
                Some("exact") => Precision::Exact,
                _ => Precision::Fast,
            },
            lm_head: match config.text("coordinator.lm_head").as_deref() {
                Some("int8") => LmHead::Int8,
                _ => LmHead::Fp16,
            },
            memory_reserve_bytes: config.bytes("coordinator.memory_reserve").unwrap_or(0),
            split: config.shares("coordinator.split"),
        },
        max_waiting: integer("coordinator.max_waiting")?,
        max_waiting_tokens: integer("coordinator.max_waiting_tokens")?,
        max_prefill_tokens: integer("coordinator.max_prefill_tokens")?,
        prefix_cache: config.text("coordinator.prefix_cache").as_deref() != Some("off"),
        max_drafts: integer("coordinator.max_drafts")?,
        draft_cost_percent: config
            .integer("coordinator.draft_cost")
            .and_then(|percent| u32::try_from(percent).ok()),
        collective: match config.text("coordinator.collective").as_deref() {
            Some("grpc") => Collective::Grpc,
            Some("nccl") => Collective::Nccl,
            _ => Collective::Auto,
        },
        step_deadline: config
            .duration("coordinator.step_timeout")
            .context("coordinator.step_timeout is not set")?,
        reasoning: match config.text("coordinator.reasoning").as_deref() {
            Some("keep") => Reasoning::Keep,
            _ => Reasoning::Split,
        },
        http: HttpSettings {
            strict: config.boolean("coordinator.strict"),
        },
        clients: ClientSettings {
            keys: config.api_keys().to_vec(),
            connections: ConnectionLimits {
                max_connections: open_files::room_for(integer("coordinator.max_connections")?),
                idle: config
                    .duration("coordinator.idle_timeout")
                    .context("coordinator.idle_timeout is not set")?,
            },
            log_prompts: config.boolean("coordinator.log_prompts"),
        },
        exit_without_plan: false,
    })
}

/// The time that a daemon may take to stop.
pub fn grace(config: &Config, key: &str) -> Duration {
    config.duration(key).unwrap_or(Duration::from_secs(30))
}

async fn bind(config: &Config, key: &str) -> Result<TcpListener> {
    let address: SocketAddr = config
        .address(key)
        .with_context(|| format!("{key} is not set"))?;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("{key}: cannot listen on {address}"))
}
