//! The stream to the coordinator: commands in, events out. Decides nothing about the model.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use secondwind_model::plan::ShardPlan;
use secondwind_proto::{
    step_from_wire, step_result_to_wire,
    v1::{self, command, worker_event},
};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    collective::{
        Collective, Solo,
        grpc::{Meeting, PeerHub},
        local::LocalHub,
        mesh::{Abort, Mesh},
    },
    engine::{Event, Formation, Order},
};

/// How long ranks may take to find each other.
const MEET_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a rank waits for another inside a collective. A peer that dies closes its link at once;
/// this bounds one that hangs.
const COLLECTIVE_DEADLINE: Duration = Duration::from_secs(120);

/// Where this worker meets others.
#[derive(Clone)]
pub enum Meetings {
    /// In the same process.
    Local(Arc<LocalHub>),
    /// Over gRPC.
    Grpc(PeerHub),
}

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The worker was told to stop.
    Shutdown,
    /// The coordinator will not have this worker; trying again is of no use.
    Refused(Status),
    /// The stream broke; the coordinator may come back.
    Lost(Status),
    /// The engine thread is gone.
    EngineStopped,
}

/// One attachment to the coordinator.
pub struct Session<'a> {
    /// First event.
    pub join: v1::Join,
    /// Where to meet the other ranks.
    pub meetings: Meetings,
    /// To the engine.
    pub orders: &'a Sender<Order>,
    /// From the engine.
    pub events: &'a mut UnboundedReceiver<Event>,
    /// Told about load progress: (loaded bytes, total bytes).
    pub progress: &'a mut (dyn FnMut(u64, u64) + Send),
}

/// The epoch that this worker is in or about to join.
struct Epoch {
    number: u64,
    cancelled: Arc<AtomicBool>,
    abort: Option<Abort>,
    meeting: Option<JoinHandle<Result<Met, String>>>,
}

struct Met {
    collective: Box<dyn Collective>,
    nccl: bool,
    abort: Option<Abort>,
    rank: usize,
    plan: ShardPlan,
    plan_digest: String,
}

impl Session<'_> {
    /// Attaches over `channel` and serves until the stream or the worker ends.
    pub async fn run(
        mut self,
        channel: Channel,
        shutdown: &mut (impl Future<Output = ()> + Unpin),
    ) -> Ended {
        // What the engine said of an epoch of the former session concerns nobody.
        while self.events.try_recv().is_ok() {}
        let (outgoing, stream) = mpsc::unbounded_channel();
        let send = |event| {
            let event = v1::WorkerEvent { event: Some(event) };
            // A closed stream shows on the receiving side, with its status.
            let _ = outgoing.send(event);
        };
        send(worker_event::Event::Join(self.join.clone()));
        let mut client = v1::cluster_client::ClusterClient::new(channel)
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let mut commands = match client.attach(UnboundedReceiverStream::new(stream)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return refusal(status),
        };
        let mut heartbeat = match welcome(&mut commands).await {
            Ok(period) => interval(period),
            Err(status) => return refusal(status),
        };
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);

        let mut epoch: Option<Epoch> = None;
        let ended = loop {
            tokio::select! {
                () = &mut *shutdown => {
                    let reason = "the worker was asked to stop".into();
                    send(worker_event::Event::Leave(v1::Leave { reason }));
                    break Ended::Shutdown;
                }
                _ = heartbeat.tick() => send(worker_event::Event::Heartbeat(v1::Heartbeat {})),
                met = met(&mut epoch) => self.join_epoch(&mut epoch, met, &send),
                event = self.events.recv() => match event {
                    None => break Ended::EngineStopped,
                    Some(event) => self.report(event, &send),
                },
                command = commands.message() => match command {
                    Ok(Some(v1::Command { command: Some(command) })) => {
                        if let Err(status) = self.obey(command, &mut epoch) {
                            break Ended::Lost(status);
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break Ended::Lost(Status::unavailable("the coordinator closed the stream")),
                    Err(status) => break refusal(status),
                },
            }
        };
        self.leave_epoch(&mut epoch, "the session with the coordinator ended");
        ended
    }

    fn obey(&mut self, command: command::Command, epoch: &mut Option<Epoch>) -> Result<(), Status> {
        match command {
            command::Command::Welcome(_) => Ok(()),
            command::Command::Disband(disband) => {
                tracing::info!(
                    epoch = disband.epoch,
                    reason = disband.reason,
                    "epoch ended"
                );
                self.leave_epoch(epoch, &disband.reason);
                Ok(())
            }
            command::Command::Form(form) => {
                self.leave_epoch(epoch, "a new epoch forms");
                tracing::info!(epoch = form.epoch, rank = form.rank, "epoch forms");
                *epoch = Some(Epoch {
                    number: form.epoch,
                    cancelled: Arc::default(),
                    abort: None,
                    meeting: Some(tokio::spawn(meet(form, self.meetings.clone()))),
                });
                Ok(())
            }
            command::Command::Step(step) => {
                let number = step.epoch;
                let step = step_from_wire(step)?;
                self.order(Order::Step {
                    epoch: number,
                    step,
                });
                Ok(())
            }
        }
    }

    fn join_epoch(
        &mut self,
        epoch: &mut Option<Epoch>,
        met: Result<Met, String>,
        send: &impl Fn(worker_event::Event),
    ) {
        let Some(epoch) = epoch else { return };
        match met {
            Ok(met) => {
                epoch.abort = met.abort;
                self.order(Order::Form(Box::new(Formation {
                    epoch: epoch.number,
                    rank: met.rank,
                    plan: met.plan,
                    plan_digest: met.plan_digest,
                    collective: met.collective,
                    nccl: met.nccl,
                    cancelled: epoch.cancelled.clone(),
                })));
            }
            Err(message) => send(worker_event::Event::LoadFailed(v1::LoadFailed {
                epoch: epoch.number,
                message,
                peer_lost: true,
            })),
        }
    }

    fn leave_epoch(&mut self, epoch: &mut Option<Epoch>, reason: &str) {
        let Some(epoch) = epoch.take() else { return };
        epoch.cancelled.store(true, Ordering::Relaxed);
        if let Some(meeting) = epoch.meeting {
            meeting.abort();
        }
        if let Some(abort) = epoch.abort {
            abort.abort(reason);
        }
        self.order(Order::Disband);
    }

    fn order(&self, order: Order) {
        // A stopped engine closes its events, which ends the session.
        let _ = self.orders.send(order);
    }

    fn report(&mut self, event: Event, send: &impl Fn(worker_event::Event)) {
        send(match event {
            Event::LoadProgress {
                epoch,
                loaded_bytes,
                total_bytes,
            } => {
                (self.progress)(loaded_bytes, total_bytes);
                worker_event::Event::LoadProgress(v1::LoadProgress {
                    epoch,
                    loaded_bytes,
                    total_bytes,
                })
            }
            Event::Ready {
                epoch,
                plan_digest,
                choices,
            } => {
                for choice in &choices {
                    tracing::info!(epoch, "{choice}");
                }
                worker_event::Event::Ready(v1::Ready {
                    epoch,
                    plan_digest,
                    resident_bytes: peak_resident_bytes(),
                    choices,
                })
            }
            Event::LoadFailed { epoch, message } => {
                tracing::error!(epoch, "load failed: {message}");
                worker_event::Event::LoadFailed(v1::LoadFailed {
                    epoch,
                    message,
                    peer_lost: false,
                })
            }
            Event::StepDone {
                epoch,
                result,
                took,
                collectives,
            } => worker_event::Event::StepResult(v1::StepResult {
                took_us: took.as_micros() as u64,
                collectives: collectives.map(|spent| v1::CollectiveTimes {
                    us: spent.iter().map(micros).collect(),
                }),
                ..step_result_to_wire(epoch, result)
            }),
            Event::StepFailed {
                epoch,
                number,
                message,
                peer_lost,
                sequence,
            } => {
                // A lost peer is an echo: the rank that has the cause tells it.
                match peer_lost {
                    true => tracing::info!(epoch, step = number, "step failed: {message}"),
                    false => tracing::error!(epoch, step = number, "step failed: {message}"),
                }
                worker_event::Event::StepFailed(v1::StepFailed {
                    epoch,
                    number,
                    message,
                    peer_lost,
                    sequence,
                })
            }
        });
    }
}

/// Resolves when the ranks have met; never while none are meeting.
async fn met(epoch: &mut Option<Epoch>) -> Result<Met, String> {
    let Some(meeting) = epoch.as_mut().and_then(|epoch| epoch.meeting.as_mut()) else {
        return std::future::pending().await;
    };
    let met = meeting.await.unwrap_or_else(|error| Err(error.to_string()));
    if let Some(epoch) = epoch {
        epoch.meeting = None;
    }
    met
}

/// Finds the other ranks of a forming epoch.
async fn meet(form: v1::Form, meetings: Meetings) -> Result<Met, String> {
    let rank = form.rank as usize;
    let kind = form.collective();
    let plan = form.plan.ok_or("the plan is missing")?;
    let plan: ShardPlan = plan
        .try_into()
        .map_err(|error: secondwind_proto::WireError| error.to_string())?;
    let world = plan.ranks.len();
    if rank >= world {
        return Err(format!("rank {rank} is outside a plan of {world} ranks"));
    }
    let over_grpc = matches!(kind, v1::CollectiveKind::Grpc | v1::CollectiveKind::Nccl);
    if over_grpc && form.peers.len() != world {
        return Err(format!(
            "{} peer addresses came for {world} ranks",
            form.peers.len()
        ));
    }
    let mesh = match (kind, meetings) {
        (v1::CollectiveKind::Solo, _) if world == 1 => None,
        (v1::CollectiveKind::Local, Meetings::Local(hub)) => Some(
            hub.meet(form.epoch, world, rank, COLLECTIVE_DEADLINE)
                .ok_or("this rank's place in the process is taken")?,
        ),
        (v1::CollectiveKind::Grpc | v1::CollectiveKind::Nccl, Meetings::Grpc(hub)) => {
            let meeting = Meeting {
                epoch: form.epoch,
                token: &form.token,
                rank,
                peers: &form.peers,
                timeout: MEET_TIMEOUT,
                deadline: COLLECTIVE_DEADLINE,
            };
            Some(hub.meet(meeting).await.map_err(|error| error.to_string())?)
        }
        (kind, _) => {
            let message =
                format!("this worker cannot serve collective {kind:?} with {world} ranks");
            return Err(message);
        }
    };
    let abort = mesh.as_ref().map(Mesh::abort_handle);
    let collective: Box<dyn Collective> = match mesh {
        None => Box::new(Solo),
        Some(mesh) => Box::new(mesh),
    };
    Ok(Met {
        collective,
        nccl: kind == v1::CollectiveKind::Nccl,
        abort,
        rank,
        plan,
        plan_digest: form.plan_digest,
    })
}

/// The coordinator's first word; returns the heartbeat period.
async fn welcome(commands: &mut Streaming<v1::Command>) -> Result<Duration, Status> {
    match commands.message().await? {
        Some(v1::Command {
            command: Some(command::Command::Welcome(welcome)),
        }) => Ok(Duration::from_millis(u64::from(
            welcome.heartbeat_ms.clamp(50, 60_000),
        ))),
        Some(_) => Err(Status::internal(
            "the coordinator's first command is not a welcome",
        )),
        None => Err(Status::unavailable("the coordinator closed the stream")),
    }
}

fn refusal(status: Status) -> Ended {
    match status.code() {
        Code::Unimplemented => Ended::Refused(Status::unimplemented(
            "this is not a coordinator's address for workers (--cluster-listen)",
        )),
        Code::FailedPrecondition | Code::InvalidArgument => Ended::Refused(status),
        _ => Ended::Lost(status),
    }
}

/// Highest resident memory of this process so far, in bytes; 0 where the system does not say.
pub fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// More than an hour is as good as an hour.
fn micros(time: &Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
