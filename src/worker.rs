//! `secondwind worker`: the daemon that owns one device and its shard.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use secondwind_kernels::{KernelError, cuda::PackSource};
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
        | WorkerError::Nccl(_)
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
        device: config
            .text("worker.device")
            .and_then(|device| device.parse().ok())
            .unwrap_or(Device::Cpu),
        kernels: kernels(config),
        arch_override: config
            .text("worker.arch_override")
            .map(|name| name.parse().map_err(KernelError::Cuda))
            .transpose()?,
        nccl_library: config.text("worker.nccl_library").map(PathBuf::from),
        nccl_interface: config.text("worker.nccl_interface"),
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

/// Where a card's kernels come from.
pub fn kernels(config: &Config) -> PackSource {
    PackSource {
        pack: config.text("worker.kernel_pack").map(PathBuf::from),
        nvrtc: config.text("worker.nvrtc_library").map(PathBuf::from),
        cache: config
            .text("worker.cache_directory")
            .map(PathBuf::from)
            .or_else(cache_directory),
    }
}

/// systemd names one by itself; a person's is where such things are kept.
pub fn cache_directory() -> Option<PathBuf> {
    let folder = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    folder("CACHE_DIRECTORY").or_else(|| {
        let own = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
        Some(own?.join("secondwind"))
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
