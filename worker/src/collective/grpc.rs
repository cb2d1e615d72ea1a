//! Links between workers over gRPC: one bidirectional stream per pair of ranks, dialled by the higher
//! rank. A stream is admitted by the epoch's token, which only the coordinator hands out.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Sender},
    },
    time::Duration,
};

use secondwind_proto::v1::{
    PeerMessage,
    peer_client::PeerClient,
    peer_server::{Peer, PeerServer},
};
use tokio::{
    sync::{mpsc as channel, oneshot},
    time::{Instant, sleep, timeout_at},
};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, transport::Endpoint};

use super::mesh::{Delivery, Link, Mesh};

/// Largest message between peers: the largest activation of a step fits.
const MAX_MESSAGE_BYTES: usize = 512 << 20;

/// What a stream says about itself in its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct StreamName {
    epoch: u64,
    token: String,
    rank: usize,
}

/// Streams that peers opened or will open, by what they must present.
#[derive(Default)]
struct Expected {
    /// Waiting for the peer.
    awaited: HashMap<StreamName, oneshot::Sender<PeerStream>>,
}

struct PeerStream {
    incoming: Streaming<PeerMessage>,
    outgoing: channel::UnboundedSender<Result<PeerMessage, Status>>,
}

/// Accepts the streams of higher ranks and dials lower ones.
#[derive(Clone, Default)]
pub struct PeerHub {
    expected: Arc<Mutex<Expected>>,
}

/// What a worker needs to reach the others of an epoch.
pub struct Meeting<'a> {
    /// Of the Form command.
    pub epoch: u64,
    /// Of the Form command; a stream that presents another is refused.
    pub token: &'a str,
    /// This worker's.
    pub rank: usize,
    /// Addresses by rank, as `http://HOST:PORT`.
    pub peers: &'a [String],
    /// How long all of it may take.
    pub timeout: Duration,
    /// How long an exchange may wait for a peer.
    pub deadline: Duration,
}

/// A peer that could not be met.
#[derive(Debug, thiserror::Error)]
#[error(
    "rank {rank} cannot reach rank {peer} at {address}: {reason}; workers on several machines need --peer-listen with an address that the others reach"
)]
pub struct MeetError {
    rank: usize,
    peer: usize,
    address: String,
    reason: String,
}

impl PeerHub {
    /// The gRPC service that accepts peers.
    pub fn service(&self) -> PeerServer<Self> {
        PeerServer::new(self.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Links to every other rank.
    ///
    /// # Errors
    /// Names the peer that could not be met in time.
    pub async fn meet(&self, meeting: Meeting<'_>) -> Result<Mesh, MeetError> {
        let deadline = Instant::now() + meeting.timeout;
        let name = |rank| StreamName {
            epoch: meeting.epoch,
            token: meeting.token.to_owned(),
            rank,
        };
        let mut awaited = Vec::new();
        {
            let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
            expected.awaited.clear();
            for peer in meeting.rank + 1..meeting.peers.len() {
                let (sender, receiver) = oneshot::channel();
                expected.awaited.insert(name(peer), sender);
                awaited.push((peer, receiver));
            }
        }
        let error = |peer: usize, reason: String| MeetError {
            rank: meeting.rank,
            peer,
            address: meeting.peers[peer].clone(),
            reason,
        };
        let mut links = Vec::new();
        for peer in 0..meeting.rank {
            let stream = dial(&meeting.peers[peer], &name(meeting.rank), deadline)
                .await
                .map_err(|reason| error(peer, reason))?;
            links.push(Some(link(stream)));
        }
        links.push(None);
        for (peer, receiver) in awaited {
            let stream = match timeout_at(deadline, receiver).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(_)) => return Err(error(peer, "a later epoch forms".into())),
                Err(_) => return Err(error(peer, "it did not dial in time".into())),
            };
            links.push(Some(link(stream)));
        }
        Ok(Mesh::new(meeting.rank, links, meeting.deadline))
    }
}

#[tonic::async_trait]
impl Peer for PeerHub {
    type ExchangeStream = UnboundedReceiverStream<Result<PeerMessage, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<PeerMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let name = stream_name(request.metadata())?;
        let (outgoing, replies) = channel::unbounded_channel();
        let incoming = request.into_inner();
        let waiting = {
            let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
            expected.awaited.remove(&name)
        };
        // UNAVAILABLE, not PERMISSION_DENIED: the peer may have heard of the epoch first and retries.
        let waiting = waiting.ok_or_else(|| Status::unavailable("no such epoch and rank here"))?;
        waiting
            .send(PeerStream { incoming, outgoing })
            .map_err(|_| Status::unavailable("the epoch is over"))?;
        Ok(Response::new(UnboundedReceiverStream::new(replies)))
    }
}

fn stream_name(metadata: &MetadataMap) -> Result<StreamName, Status> {
    let text = |key: &'static str| {
        metadata
            .get(key)
            .and_then(|value| value.to_str().ok())
            .ok_or_else(|| Status::invalid_argument(format!("metadata lack {key}")))
    };
    let number = |key: &'static str| {
        text(key)?
            .parse()
            .map_err(|_| Status::invalid_argument(format!("metadata {key} is not a number")))
    };
    Ok(StreamName {
        epoch: number("secondwind-epoch")?,
        token: text("secondwind-token")?.to_owned(),
        rank: number("secondwind-rank")? as usize,
    })
}

/// Dials until the peer knows the epoch or `deadline` passes.
async fn dial(address: &str, name: &StreamName, deadline: Instant) -> Result<PeerStream, String> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|error| error.to_string())?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10));
    loop {
        let reason = match timeout_at(deadline, open(&endpoint, name)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(reason)) => reason,
            Err(_) => return Err("it did not answer in time".into()),
        };
        if Instant::now() + RETRY > deadline {
            return Err(reason);
        }
        sleep(RETRY).await;
    }
}

const RETRY: Duration = Duration::from_millis(50);

/// An error with its causes: a transport error alone says nothing.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

async fn open(endpoint: &Endpoint, name: &StreamName) -> Result<PeerStream, String> {
    let transport = endpoint.connect().await.map_err(|error| chain(&error))?;
    let mut client = PeerClient::new(transport)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (outgoing, messages) = channel::unbounded_channel::<Result<PeerMessage, Status>>();
    let messages = UnboundedReceiverStream::new(messages).filter_map(Result::ok);
    let mut request = Request::new(messages);
    for (key, value) in [
        ("secondwind-epoch", name.epoch.to_string()),
        ("secondwind-token", name.token.clone()),
        ("secondwind-rank", name.rank.to_string()),
    ] {
        let value = value
            .parse()
            .map_err(|_| format!("{key} is not printable"))?;
        request.metadata_mut().insert(key, value);
    }
    let response = client
        .exchange(request)
        .await
        .map_err(|status| status.message().to_owned())?;
    Ok(PeerStream {
        incoming: response.into_inner(),
        outgoing,
    })
}

/// The engine's end of a stream: a task moves what arrives into a channel that a thread can wait on.
fn link(stream: PeerStream) -> Link {
    let PeerStream {
        mut incoming,
        outgoing,
    } = stream;
    let (deliver, receive) = mpsc::channel::<Delivery>();
    let abort = deliver.clone();
    tokio::spawn(async move {
        let reason = pump(&mut incoming, &deliver).await;
        let _ = deliver.send(Err(reason));
    });
    let mut next = 0;
    let send = move |payload| {
        let message = PeerMessage {
            sequence: next,
            payload,
        };
        next += 1;
        outgoing.send(Ok(message)).is_ok()
    };
    Link {
        send: Box::new(send),
        receive,
        abort,
    }
}

/// Delivers messages until the stream ends; returns why it did.
async fn pump(incoming: &mut Streaming<PeerMessage>, deliver: &Sender<Delivery>) -> String {
    let mut expected = 0;
    loop {
        match incoming.message().await {
            Ok(Some(message)) if message.sequence == expected => {
                expected += 1;
                if deliver.send(Ok(message.payload)).is_err() {
                    return "this rank left".into();
                }
            }
            Ok(Some(message)) => {
                return format!("message {} came, {expected} was due", message.sequence);
            }
            Ok(None) => return "the peer closed the stream".into(),
            Err(status) => return status.message().to_owned(),
        }
    }
}
