//! The gRPC service that workers attach to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secondwind_model::capabilities::Capabilities;
use secondwind_proto::v1::{self, worker_event};
use tokio::{
    sync::mpsc::{self, UnboundedSender},
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{MemberId, membership::Message};

/// Largest message of a worker: a step's results with prompt log-probabilities fit many times over.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A stream says who it is within this time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a worker must have in common with its coordinator.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Version of secondwind.
    pub version: String,
    /// Digest of the checkpoint.
    pub checkpoint_digest: String,
    /// Interval of workers' heartbeats.
    pub heartbeat_ms: u32,
}

/// Accepts workers and passes on what they say.
#[derive(Clone)]
pub struct ClusterService {
    identity: Arc<Identity>,
    messages: UnboundedSender<Message>,
    next_member: Arc<AtomicU64>,
}

impl ClusterService {
    /// A service that tells `messages`, which [`super::Membership::new`] gives.
    pub fn new(identity: Identity, messages: UnboundedSender<Message>) -> Self {
        Self {
            identity: Arc::new(identity),
            messages,
            next_member: Arc::default(),
        }
    }

    /// The tonic service, with limits.
    pub fn server(self) -> v1::cluster_server::ClusterServer<Self> {
        v1::cluster_server::ClusterServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Checks a worker's first event.
    fn admit(&self, event: Option<v1::WorkerEvent>) -> Result<(v1::Join, Capabilities), Status> {
        let Some(worker_event::Event::Join(mut join)) = event.and_then(|event| event.event) else {
            return Err(Status::invalid_argument(
                "a worker's first event must be its join",
            ));
        };
        if join.version != self.identity.version {
            return Err(Status::failed_precondition(format!(
                "worker {} is version {}, this coordinator is {}: install the same version on both",
                join.worker, join.version, self.identity.version
            )));
        }
        if join.checkpoint_digest != self.identity.checkpoint_digest {
            return Err(Status::failed_precondition(format!(
                "worker {} holds another checkpoint ({}) than the coordinator ({}): give both the same files",
                join.worker,
                short(&join.checkpoint_digest),
                short(&self.identity.checkpoint_digest)
            )));
        }
        let capabilities = join
            .capabilities
            .take()
            .ok_or_else(|| Status::invalid_argument("Join lacks capabilities"))?
            .try_into()
            .map_err(|error: secondwind_proto::WireError| {
                Status::invalid_argument(error.to_string())
            })?;
        Ok((join, capabilities))
    }
}

#[tonic::async_trait]
impl v1::cluster_server::Cluster for ClusterService {
    type AttachStream = UnboundedReceiverStream<Result<v1::Command, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::WorkerEvent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut events = request.into_inner();
        let first = timeout(JOIN_TIMEOUT, events.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no join came in time"))??;
        let (join, capabilities) = self.admit(first)?;
        let member: MemberId = self.next_member.fetch_add(1, Ordering::Relaxed);
        let (commands, stream) = mpsc::unbounded_channel();
        super::send(
            &commands,
            v1::command::Command::Welcome(v1::Welcome {
                version: self.identity.version.clone(),
                heartbeat_ms: self.identity.heartbeat_ms,
            }),
        );
        let joined = Message::Joined {
            member,
            join,
            capabilities,
            commands,
        };
        self.messages
            .send(joined)
            .map_err(|_| Status::unavailable("the coordinator is shutting down"))?;
        tokio::spawn(pump(member, events, self.messages.clone()));
        Ok(Response::new(UnboundedReceiverStream::new(stream)))
    }
}

/// Passes on a member's events until its stream ends.
async fn pump(
    member: MemberId,
    mut events: Streaming<v1::WorkerEvent>,
    messages: UnboundedSender<Message>,
) {
    let reason = loop {
        match events.message().await {
            Ok(Some(v1::WorkerEvent {
                event: Some(worker_event::Event::Leave(leave)),
            })) => break leave.reason,
            Ok(Some(v1::WorkerEvent { event: Some(event) })) => {
                if messages.send(Message::Said { member, event }).is_err() {
                    return;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => break "it closed its stream".into(),
            Err(status) => break status.message().to_owned(),
        }
    };
    let _ = messages.send(Message::Left { member, reason });
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}
