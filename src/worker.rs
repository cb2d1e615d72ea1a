//! `secondwind worker`: the daemon that owns one device and its shard.

use anyhow::{Context, Result};
use clap::Args;
use secondwind_kernels::KernelError;
use secondwind_worker::{Device, WorkerConfig, WorkerError};

use crate::{
    cli::Common,
    config::{
        Config, Section,
        flags::{KeyFlags, WorkerKeys},
    },
    coordinator::grace,
    exit::UsageError,
    logging, output,
    signals::Stop,
};

/// Flags of `worker`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(flatten)]
    section: KeyFlags<WorkerKeys>,
}

/// Runs the command.
pub async fn run(flags: Flags, common: Common) -> Result<()> {
    let config = common.load_daemon(&[Section::Worker], flags.section.layer)?;
    logging::start(&config)?;
    let stop = Stop::on_signal()?;
    let meant = meant(&config)?;
    output::print_line(&format!(
        "joining coordinator={} name={}",
        meant.coordinator, meant.name
    ))?;
    let working = secondwind_worker::run(meant, stop.asked());
    stop.within(grace(&config, "worker.stop_timeout"), working)
        .await?
        .map_err(told)
}

/// Tells what the operator asked for and cannot have from what failed.
fn told(error: WorkerError) -> anyhow::Error {
    match error {
        WorkerError::Kernel(KernelError::PathRefused { .. })
        | WorkerError::PeerUnspecified { .. }
        | WorkerError::CoordinatorAddress { .. } => UsageError::one(error.to_string()).into(),
        other => other.into(),
    }
}

/// What `[worker]` means to the worker.
pub fn meant(config: &Config) -> Result<WorkerConfig> {
    let coordinator = config
        .text("worker.coordinator")
        .context("worker.coordinator is not set")?;
    Ok(WorkerConfig {
        coordinator: format!("http://{coordinator}"),
        model: config
            .text("worker.model")
            .context("worker.model is not set")?,
        device: Device::Cpu,
        threads: config.integer("worker.threads"),
        memory_bytes: config.bytes("worker.memory"),
        peer_listen: config
            .address("worker.peer_listen")
            .context("worker.peer_listen is not set")?,
        name: config.text("worker.name").unwrap_or_else(host_and_process),
        linear_path: config
            .text("worker.linear_path")
            .map(|name| name.parse())
            .transpose()?,
        attention_path: config
            .text("worker.attention_path")
            .map(|name| name.parse())
            .transpose()?,
        local_hub: None,
        capabilities: None,
        progress: true,
    })
}

/// A name that tells two workers of a rack apart.
fn host_and_process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    format!(
        "{}-{}",
        if host.is_empty() { "worker" } else { host },
        std::process::id()
    )
}
