//! A worker's life: open the checkpoint, start the engine, attach to the coordinator again and again.

use std::{
    net::SocketAddr,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use secondwind_kernels::{
    KernelError,
    cuda::{self, Arch, PackSource},
    select::{AttentionPath, LinearPath},
};
use secondwind_model::{
    capabilities::Capabilities, checkpoint::Checkpoint, error::CheckpointError,
};
use secondwind_proto::v1;
use tokio::{
    net::TcpListener,
    sync::mpsc::{self as channel, UnboundedReceiver},
    time::sleep,
};
use tonic::transport::{Endpoint, Server, server::TcpIncoming};

use crate::{
    backend::{Backend, CpuBackend, CudaBackend},
    capabilities,
    collective::{
        grpc::{PeerHub, chain},
        local::LocalHub,
        nccl::{self, Nccl, NcclError},
    },
    engine::{self, Event, Order},
    session::{Ended, Meetings, Session},
};

/// How long a worker waits before it dials again.
const REDIAL: Duration = Duration::from_millis(500);

/// What a worker computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The host's processor.
    Cpu,
    /// An NVIDIA card, by the number that the driver gives it.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cpu" => Ok(Self::Cpu),
            other => {
                let ordinal = other
                    .strip_prefix("cuda:")
                    .and_then(|number| number.parse().ok());
                ordinal
                    .map(Self::Cuda)
                    .ok_or_else(|| format!("device {other} is not cpu or cuda:N"))
            }
        }
    }
}

/// Everything a worker is told.
#[derive(Clone)]
pub struct WorkerConfig {
    /// `http://HOST:PORT` of the coordinator's cluster listener.
    pub coordinator: String,
    /// `builtin` or a folder; must hold the coordinator's checkpoint.
    pub model: String,
    /// What to compute on.
    pub device: Device,
    /// Where a card's kernels come from.
    pub kernels: PackSource,
    /// Runs the code of an older architecture on the card.
    pub arch_override: Option<Arch>,
    /// NCCL by path instead of by name.
    pub nccl_library: Option<PathBuf>,
    /// Network interface of NCCL's sockets; `None` is the one that has `peer_listen`'s address.
    pub nccl_interface: Option<String>,
    /// Threads of the kernels; `None` is one per core.
    pub threads: Option<usize>,
    /// Memory that plans may use; `None` is what the device has free.
    pub memory_bytes: Option<u64>,
    /// Where other workers reach this one; port 0 takes any.
    pub peer_listen: SocketAddr,
    /// Its name in logs and plans; unique names give a restarted rack the same ranks.
    pub name: String,
    /// Instead of the selector's choice.
    pub linear_path: Option<LinearPath>,
    /// Instead of the selector's choice.
    pub attention_path: Option<AttentionPath>,
    /// Meets the other workers of this process in memory instead of over gRPC.
    pub local_hub: Option<Arc<LocalHub>>,
    /// What it can do; `None` measures.
    pub capabilities: Option<Capabilities>,
    /// Draws a progress bar on standard error, if that is a terminal.
    pub progress: bool,
}

/// Why a worker could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// NCCL cannot be used as asked.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The address for peers is taken or not this machine's.
    #[error("cannot listen for peers on {address}: {source}")]
    PeerListen {
        /// The address.
        address: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// Peers cannot dial an address that stands for all interfaces.
    #[error(
        "--peer-listen {address} names no interface: give the address at which other workers reach this one"
    )]
    PeerUnspecified {
        /// The address.
        address: SocketAddr,
    },
    /// The coordinator's address cannot be read.
    #[error("coordinator address {address}: {reason}")]
    CoordinatorAddress {
        /// As given.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// The coordinator will not have this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// A thread could not be started or ended before its time.
    #[error("the engine thread stopped: {0}")]
    Engine(String),
}

/// Runs a worker until `shutdown`, attaching again whenever the coordinator is lost.
///
/// # Errors
/// What no retry can mend.
pub async fn run(
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let checkpoint = Arc::new(Checkpoint::open_named(&config.model)?);
    for warning in checkpoint.warnings() {
        tracing::warn!("{warning}");
    }
    let shape = checkpoint.shape()?;
    match config.device {
        Device::Cpu => {
            let threads = config.threads.unwrap_or_else(default_threads);
            let backend = CpuBackend::new(threads, config.linear_path, config.attention_path)?;
            let capabilities = match config.capabilities.clone() {
                Some(capabilities) => capabilities,
                None => capabilities::measure_cpu(&shape, threads, config.linear_path)?,
            };
            attach(
                config,
                checkpoint,
                backend,
                capabilities,
                String::new(),
                shutdown,
            )
            .await
        }
        Device::Cuda(ordinal) => {
            let note = |text: String| tracing::info!("{text}");
            let device = cuda::Device::open(ordinal, config.arch_override, &config.kernels, note)
                .map_err(KernelError::from)?;
            let nccl = match Nccl::open(config.nccl_library.as_deref()) {
                Ok(nccl) => {
                    let (named, address) = (&config.nccl_interface, config.peer_listen.ip());
                    let interface = nccl::choose_interface(named.as_deref(), address)?;
                    tracing::info!(version = nccl.version(), interface, "NCCL");
                    Some(Arc::new(nccl))
                }
                Err(error) => {
                    tracing::info!("groups of several ranks will sum over gRPC: {error}");
                    None
                }
            };
            let capabilities = match config.capabilities.clone() {
                Some(capabilities) => capabilities,
                None => {
                    let (path, nccl) = (config.linear_path, nccl.is_some());
                    capabilities::measure_cuda(&shape, &device, path, nccl)?
                }
            };
            let version = nccl
                .as_ref()
                .map_or_else(String::new, |nccl| nccl.version());
            let (linear, attention) = (config.linear_path, config.attention_path);
            let backend = CudaBackend::new(device, linear, attention, nccl)?;
            attach(config, checkpoint, backend, capabilities, version, shutdown).await
        }
    }
}

/// Serves one backend until `shutdown`.
async fn attach<B: Backend + Send + 'static>(
    config: WorkerConfig,
    checkpoint: Arc<Checkpoint>,
    backend: B,
    mut capabilities: Capabilities,
    nccl_version: String,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    if let Some(bytes) = config.memory_bytes {
        capabilities.usable_bytes = bytes;
    }
    let endpoint = endpoint(&config.coordinator)?;
    let (meetings, peer_address) = match &config.local_hub {
        Some(hub) => (Meetings::Local(hub.clone()), String::new()),
        None => listen_for_peers(config.peer_listen).await?,
    };
    let join = v1::Join {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        worker: config.name.clone(),
        checkpoint_digest: checkpoint.digest_hex(),
        peer_address,
        capabilities: Some((&capabilities).into()),
        local_hub: config
            .local_hub
            .as_ref()
            .map_or_else(String::new, |hub| hub.name().to_owned()),
        nccl_version,
    };

    let (orders, order_queue) = mpsc::channel::<Order>();
    let (emit, mut events) = channel::unbounded_channel::<Event>();
    let engine = thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            engine::run(backend, &checkpoint, &order_queue, |event| {
                // A session that is gone wants no events.
                let _ = emit.send(event);
            });
        })
        .map_err(|error| WorkerError::Engine(error.to_string()))?;

    let mut bar = Bar::new(config.progress);
    let result = attach_until(
        &endpoint,
        Attachment {
            join,
            meetings,
            orders: &orders,
            events: &mut events,
            progress: &mut |loaded, total| bar.show(loaded, total),
        },
        shutdown,
    )
    .await;
    drop(orders);
    // The engine ends with its current step; a panic in it has been printed by its thread.
    let ended = tokio::task::spawn_blocking(move || engine.join()).await;
    match (result, ended) {
        (Ok(()), Ok(Err(_)) | Err(_)) => Err(WorkerError::Engine("it panicked".into())),
        (result, _) => result,
    }
}

struct Attachment<'a> {
    join: v1::Join,
    meetings: Meetings,
    orders: &'a mpsc::Sender<Order>,
    events: &'a mut UnboundedReceiver<Event>,
    progress: &'a mut (dyn FnMut(u64, u64) + Send),
}

async fn attach_until(
    endpoint: &Endpoint,
    attachment: Attachment<'_>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    tokio::pin!(shutdown);
    let mut waiting = false;
    loop {
        let connected = tokio::select! {
            () = &mut shutdown => return Ok(()),
            connected = endpoint.connect() => connected,
        };
        let ended = match connected {
            Ok(channel) => {
                waiting = false;
                tracing::info!(coordinator = %endpoint.uri(), "attached");
                let session = Session {
                    join: attachment.join.clone(),
                    meetings: attachment.meetings.clone(),
                    orders: attachment.orders,
                    events: &mut *attachment.events,
                    progress: &mut *attachment.progress,
                };
                session.run(channel, &mut shutdown).await
            }
            Err(error) => {
                if !waiting {
                    tracing::warn!(coordinator = %endpoint.uri(), "waiting for the coordinator: {}", chain(&error));
                }
                waiting = true;
                tokio::select! {
                    () = &mut shutdown => return Ok(()),
                    () = sleep(REDIAL) => continue,
                }
            }
        };
        match ended {
            Ended::Shutdown => return Ok(()),
            Ended::Refused(status) => {
                return Err(WorkerError::Refused(status.message().to_owned()));
            }
            Ended::EngineStopped => return Err(WorkerError::Engine("its events ended".into())),
            Ended::Lost(status) => {
                tracing::warn!("lost the coordinator: {}", status.message());
                tokio::select! {
                    () = &mut shutdown => return Ok(()),
                    () = sleep(REDIAL) => {}
                }
            }
        }
    }
}

/// Starts the gRPC service for peers; returns how to meet and the address to announce.
async fn listen_for_peers(address: SocketAddr) -> Result<(Meetings, String), WorkerError> {
    if address.ip().is_unspecified() {
        return Err(WorkerError::PeerUnspecified { address });
    }
    let error = |source| WorkerError::PeerListen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    let hub = PeerHub::default();
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .max_concurrent_streams(1024)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(hub.service())
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!("peer service ended: {error}");
        }
    });
    Ok((Meetings::Grpc(hub), format!("http://{bound}")))
}

fn endpoint(address: &str) -> Result<Endpoint, WorkerError> {
    let with_scheme = match address.contains("://") {
        true => address.to_owned(),
        false => format!("http://{address}"),
    };
    let endpoint =
        Endpoint::from_shared(with_scheme).map_err(|error| WorkerError::CoordinatorAddress {
            address: address.to_owned(),
            reason: error.to_string(),
        })?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10)))
}

fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// A load's progress on standard error.
struct Bar {
    wanted: bool,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn new(wanted: bool) -> Self {
        Self { wanted, bar: None }
    }

    fn show(&mut self, loaded: u64, total: u64) {
        if !self.wanted {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            );
            let bar = ProgressBar::new(total);
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        bar.set_length(total);
        bar.set_position(loaded);
        if loaded >= total {
            bar.finish_and_clear();
            self.bar = None;
        }
    }
}
