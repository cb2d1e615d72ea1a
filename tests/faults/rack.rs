//! Processes of the binary on hosts of their own, and the group that they form.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use secondwind_proto::v1::{self, inference_client::InferenceClient};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    daemon::{COORDINATOR, Daemon, Held, Kind, start_coordinator, start_worker},
    network::{self, Host},
    proxy::Proxy,
};

/// Anything takes less than this, or hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The disk of all logs.
const DISK: &str = "size=8m";

struct Worker {
    host: Host,
    proxy: Proxy,
    daemon: Daemon,
}

/// A coordinator and its workers.
pub struct Rack {
    pub kind: Kind,
    disk: TempDir,
    coordinator_host: Host,
    coordinator: Daemon,
    workers: Vec<Worker>,
    channel: Channel,
}

impl Rack {
    /// Starts everything and waits until it serves.
    pub async fn start(kind: Kind) -> Result<Self> {
        let disk = tempfile::tempdir()?;
        network::command(&format!(
            "mount -t tmpfs -o {DISK} none {}",
            disk.path().display()
        ))?;
        let coordinator_host = Host::new(2)?;
        let coordinator = start_coordinator(kind, &coordinator_host, disk.path())?;
        let mut workers = Vec::new();
        for rank in 0..kind.world() {
            let host = Host::new(10 + u8::try_from(rank)?)?;
            let proxy = Proxy::start(SocketAddr::from((COORDINATOR, 7701))).await?;
            let daemon = start_worker(kind, rank, &host, &proxy, disk.path(), false)?;
            workers.push(Worker {
                host,
                proxy,
                daemon,
            });
        }
        let channel = Endpoint::from_shared(format!("http://{COORDINATOR}:7700"))?
            .connect_timeout(Duration::from_secs(1))
            .connect_lazy();
        let rack = Self {
            kind,
            disk,
            coordinator_host,
            coordinator,
            workers,
            channel,
        };
        rack.until_serving(1)
            .await
            .map_err(|error| anyhow!("{error:#}\n{}", rack.logs()))?;
        Ok(rack)
    }

    pub fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }

    /// The group that serves, if one does.
    pub async fn group(&self) -> Option<v1::Group> {
        let model = self.client().get_model(v1::GetModelRequest {}).await;
        model.ok().and_then(|model| model.into_inner().group)
    }

    /// The group that serves, once its epoch is at least `epoch`.
    pub async fn until_serving(&self, epoch: u64) -> Result<v1::Group> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if let Some(group) = self.group().await
                && group.epoch >= epoch
            {
                return Ok(group);
            }
            sleep(Duration::from_millis(20)).await;
        }
        bail!("no group of epoch {epoch} or later forms within {PATIENCE:?}")
    }

    pub fn signal_worker(&self, rank: usize, signal: Signal) -> Result<()> {
        self.workers[rank].daemon.signal(signal)
    }

    pub fn signal_coordinator(&self, signal: Signal) -> Result<()> {
        self.coordinator.signal(signal)
    }

    /// Kills a worker and starts it again, perhaps with a clock of its own.
    pub fn restart_worker(&mut self, rank: usize, other_clock: bool) -> Result<()> {
        let (kind, disk) = (self.kind, self.disk.path());
        let worker = &mut self.workers[rank];
        worker.daemon.kill()?;
        worker.daemon = start_worker(kind, rank, &worker.host, &worker.proxy, disk, other_clock)?;
        Ok(())
    }

    pub fn restart_coordinator(&mut self) -> Result<()> {
        self.coordinator.kill()?;
        let (host, disk) = (&self.coordinator_host, self.disk.path());
        self.coordinator = start_coordinator(self.kind, host, disk)?;
        Ok(())
    }

    pub fn host(&self, rank: usize) -> &Host {
        &self.workers[rank].host
    }

    pub fn proxy(&self, rank: usize) -> &Proxy {
        &self.workers[rank].proxy
    }

    /// Leaves no byte on the disk of the logs, or gives back what was taken.
    pub fn fill_disk(&self, full: bool) -> Result<()> {
        let ballast = self.disk.path().join("ballast");
        if !full {
            return Ok(fs::remove_file(ballast)?);
        }
        let mut file = File::create(ballast)?;
        for piece in [64 << 10, 1] {
            let zeros = vec![0; piece];
            while file.write_all(&zeros).is_ok() {}
        }
        Ok(())
    }

    /// Begins the logs anew, for they are on a small disk.
    pub fn begin_logs(&self) -> Result<()> {
        for log in fs::read_dir(self.disk.path())? {
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(log?.path())?;
        }
        Ok(())
    }

    /// What all of them have logged.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut paths: Vec<PathBuf> = fs::read_dir(self.disk.path())
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|it| it == "log"))
            .collect();
        paths.sort();
        for path in paths {
            let log = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(40)..];
            text += &format!("-- {}\n{}\n", path.display(), last.join("\n"));
        }
        text
    }

    /// What each process holds, the coordinator first.
    pub fn held(&self) -> Result<Vec<Held>> {
        let workers = self.workers.iter().map(|worker| &worker.daemon);
        std::iter::once(&self.coordinator)
            .chain(workers)
            .map(Daemon::held)
            .collect()
    }

    /// The figures of `/metrics` that must be 0 when nobody asks.
    pub async fn in_use(&self) -> Result<[f64; 3]> {
        let mut stream = TcpStream::connect((COORDINATOR, 7700)).await?;
        let request = "GET /metrics HTTP/1.1\r\nHost: rack\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let mut figures = [0.0; 3];
        let names = [
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
        ];
        for (figure, name) in figures.iter_mut().zip(names) {
            let prefix = format!("secondwind_{name} ");
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(prefix.as_str()));
            *figure = line.with_context(|| format!("no {name}"))?.trim().parse()?;
        }
        Ok(figures)
    }

    /// All daemons still run.
    pub fn all_run(&mut self) -> Result<()> {
        let workers = self.workers.iter_mut().map(|worker| &mut worker.daemon);
        for daemon in std::iter::once(&mut self.coordinator).chain(workers) {
            daemon.runs()?;
        }
        Ok(())
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        // The daemons hold files on it: it goes when they do.
        let _ = network::command(&format!("umount --lazy {}", self.disk.path().display()));
    }
}
