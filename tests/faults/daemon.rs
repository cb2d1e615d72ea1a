//! The binary as a daemon: started on a host, signalled, looked at.

use std::{
    fs::{self, OpenOptions},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{network::Host, proxy::Proxy};

/// A step that takes longer ends the epoch.
const STEP_TIMEOUT: &str = "2s";
/// Without a line for each question of the harness.
const LOG_LEVEL: &str = "info,secondwind_coordinator::api=warn";
pub const COORDINATOR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// Where workers compute, and how they sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Three CPU workers over gRPC.
    Grpc,
    /// Two cards over NCCL.
    Nccl,
}

impl Kind {
    pub fn world(self) -> usize {
        match self {
            Self::Grpc => 3,
            Self::Nccl => 2,
        }
    }
}

/// A running daemon. Its id is the process's own: what starts it becomes it.
pub struct Daemon(Child);

impl Daemon {
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = i32::try_from(self.0.id())?;
        let id = Pid::from_raw(id).context("no process has id 0")?;
        Ok(kill_process(id, signal)?)
    }

    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// It has not ended by itself.
    pub fn runs(&mut self) -> Result<()> {
        let ended = self.0.try_wait()?;
        ensure!(ended.is_none(), "a daemon ended by itself: {ended:?}");
        Ok(())
    }

    /// What it holds.
    pub fn held(&self) -> Result<Held> {
        let folder = PathBuf::from(format!("/proc/{}", self.0.id()));
        let status = fs::read_to_string(folder.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(Held {
            descriptors: fs::read_dir(folder.join("fd"))?.count(),
            resident_bytes: kib.context("no VmRSS")?.trim().parse::<u64>()? << 10,
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kill();
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub descriptors: usize,
    pub resident_bytes: u64,
}

pub fn start_coordinator(kind: Kind, host: &Host, disk: &Path) -> Result<Daemon> {
    let (world, split, collective) = match kind {
        Kind::Grpc => ("3", "2:1:1", "grpc"),
        Kind::Nccl => ("2", "1:1", "nccl"),
    };
    let clients = format!("{COORDINATOR}:7700");
    let cluster = format!("{COORDINATOR}:7701");
    let arguments = [
        "coordinator",
        "--model",
        "builtin",
        "--world-size",
        world,
        "--split",
        split,
        "--collective",
        collective,
        "--listen",
        &clients,
        "--cluster-listen",
        &cluster,
        "--max-step-tokens",
        "64",
        "--step-timeout",
        STEP_TIMEOUT,
        "--insecure",
    ];
    start(host, false, &arguments, &disk.join("coordinator.log"))
}

pub fn start_worker(
    kind: Kind,
    rank: usize,
    host: &Host,
    proxy: &Proxy,
    disk: &Path,
    other_clock: bool,
) -> Result<Daemon> {
    let name = format!("worker-{rank}");
    let device = match kind {
        Kind::Grpc => "cpu".to_owned(),
        Kind::Nccl => format!("cuda:{rank}"),
    };
    let coordinator = proxy.address.to_string();
    let peers = format!("{}:0", host.address);
    let arguments = [
        "worker",
        "--model",
        "builtin",
        "--coordinator",
        &coordinator,
        "--name",
        &name,
        "--device",
        &device,
        "--threads",
        "1",
        "--memory",
        "1GiB",
        "--peer-listen",
        &peers,
        "--insecure",
    ];
    start(
        host,
        other_clock,
        &arguments,
        &disk.join(&name).with_extension("log"),
    )
}

/// Starts the binary on a host, away from this machine's configuration.
fn start(host: &Host, other_clock: bool, arguments: &[&str], log: &Path) -> Result<Daemon> {
    let mut command = match other_clock {
        true => {
            let mut command = Command::new("unshare");
            command.args(["--time", "--monotonic", "864000", "nsenter"]);
            command
        }
        false => Command::new("nsenter"),
    };
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SECONDWIND_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let child = command
        .arg(format!("--net={}", host.namespace().display()))
        .arg(env!("CARGO_BIN_EXE_secondwind"))
        .args(arguments)
        .args(["--log-level", LOG_LEVEL])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    Ok(Daemon(child))
}
