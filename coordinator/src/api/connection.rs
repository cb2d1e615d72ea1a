//! Connections of clients as they come in, so many and no more, each cut off when its other end says nothing at
//! first, asks nothing for long, or stops reading.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

/// How long bytes may wait for a client to take them.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a client may take to show which HTTP it speaks. From there on the HTTP server has time limits of
/// its own.
const GREETING: Duration = Duration::from_secs(30);

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4), and no request of HTTP/1.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long nothing is accepted after that failed: the usual cause, no free file descriptors, does not go
/// away by asking again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection is told that finds no place. A client of HTTP/2 cannot read it, and sees a connection that
/// breaks, which it may try again like any other.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/json\r\ncontent-length: 109\r\nretry-after: 5\r\nconnection: close\r\n\r\n\
    {\"error\":{\"message\":\"too many connections\",\"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// How long such a one may take to hear it, and how many do so at a time; others are closed without a word.
const REFUSAL: Duration = Duration::from_secs(1);
const MAX_REFUSALS: usize = 64;

/// Limits of a listener.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Connections at a time. Further ones are accepted, told, and closed.
    pub max_connections: usize,
    /// How long a connection may stay on which nothing is asked and nothing answered.
    pub idle: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            idle: Duration::from_secs(600),
        }
    }
}

/// What a listener accepts.
#[derive(Debug)]
pub struct Connections {
    listener: TcpListener,
    pause: Option<Pin<Box<Sleep>>>,
    limits: ConnectionLimits,
    places: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    /// The last one found no place.
    full: bool,
}

impl Connections {
    /// Accepts within limits.
    pub fn new(listener: TcpListener, limits: ConnectionLimits) -> Self {
        Self {
            listener,
            pause: None,
            limits,
            places: Arc::new(Semaphore::new(limits.max_connections)),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            full: false,
        }
    }

    /// Gives the connection a place, or refuses it.
    fn admit(&mut self, stream: TcpStream) -> Option<Connection> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok();
        let was_full = std::mem::replace(&mut self.full, place.is_none());
        let Some(place) = place else {
            if !was_full {
                let limit = self.limits.max_connections;
                tracing::warn!(limit, "too many connections; further ones are refused");
            }
            if let Ok(turn) = Arc::clone(&self.refusals).try_acquire_owned() {
                tokio::spawn(async move {
                    // Whoever does not listen is not told.
                    let _ = timeout(REFUSAL, refuse(stream)).await;
                    drop(turn);
                });
            }
            return None;
        };
        // Tokens are small and should not wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        let idle = self.limits.idle;
        Some(Connection::new(stream, place, PATIENCE, GREETING, idle))
    }
}

/// Reads to the end, for what is closed before everything is read may never be heard.
async fn refuse(mut stream: TcpStream) -> Result<()> {
    stream.write_all(FULL).await?;
    stream.shutdown().await?;
    while stream.read(&mut [0; 1024]).await? > 0 {}
    Ok(())
}

impl Stream for Connections {
    type Item = Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, _)) => {
                    if let Some(connection) = this.admit(stream) {
                        return Poll::Ready(Some(Ok(connection)));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client's connection");
                    this.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

/// Whose connection a request came over, as its extensions have it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it comes from, if the system knows.
    pub address: Option<SocketAddr>,
    usage: Arc<Mutex<Usage>>,
}

/// What a connection is used for.
#[derive(Debug)]
struct Usage {
    open_requests: usize,
    /// When the last request ended.
    since: Instant,
}

/// A request that its connection may not be closed under.
#[derive(Debug)]
pub(super) struct OpenRequest(Arc<Mutex<Usage>>);

impl Peer {
    /// Until it is dropped the connection is not idle.
    pub(super) fn open_request(&self) -> OpenRequest {
        lock(&self.usage).open_requests += 1;
        OpenRequest(Arc::clone(&self.usage))
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut usage = lock(&self.0);
        usage.open_requests -= 1;
        usage.since = Instant::now();
    }
}

fn lock(usage: &Mutex<Usage>) -> MutexGuard<'_, Usage> {
    // Nothing panics while it holds the lock.
    usage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client's connection. Reads fail if it does not begin or is idle for too long, and a write that makes no way
/// for too long.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    greeting: Option<Greeting>,
    idle: Idle,
    peer: Peer,
    /// Given back with the connection.
    _place: OwnedSemaphorePermit,
    patience: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

/// The beginning of a connection, while it may still become either HTTP.
#[derive(Debug)]
struct Greeting {
    /// Bytes that came, all of them [`PREFACE`]'s.
    bytes: usize,
    patience: Pin<Box<Sleep>>,
}

impl Greeting {
    /// Whether it is over with these bytes.
    fn is_over(&mut self, bytes: &[u8]) -> bool {
        let rest = &PREFACE[self.bytes..];
        self.bytes += bytes.len();
        bytes.len() >= rest.len() || !rest.starts_with(bytes)
    }
}

/// Looks now and then whether a connection is used.
#[derive(Debug)]
struct Idle {
    limit: Duration,
    look: Pin<Box<Sleep>>,
}

impl Idle {
    /// Ready once nothing was asked for as long as the limit.
    fn poll(&mut self, usage: &Mutex<Usage>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.look.as_mut().poll(cx));
            let usage = lock(usage);
            let now = Instant::now();
            let since = match usage.open_requests {
                0 => usage.since,
                _ => now,
            };
            if now - since >= self.limit {
                return Poll::Ready(());
            }
            self.look.as_mut().reset(since + self.limit);
        }
    }
}

impl Connection {
    fn new(
        stream: TcpStream,
        place: OwnedSemaphorePermit,
        patience: Duration,
        greeting: Duration,
        idle: Duration,
    ) -> Self {
        let usage = Usage {
            open_requests: 0,
            since: Instant::now(),
        };
        Self {
            peer: Peer {
                address: stream.peer_addr().ok(),
                usage: Arc::new(Mutex::new(usage)),
            },
            idle: Idle {
                limit: idle,
                look: Box::pin(sleep(idle)),
            },
            _place: place,
            stream,
            greeting: Some(Greeting {
                bytes: 0,
                patience: Box::pin(sleep(greeting)),
            }),
            patience,
            stalled: None,
        }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<Result<T>>) -> Poll<Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        let what = "the client takes nothing";
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, what)))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let Some(greeting) = &mut this.greeting else {
            if read.is_pending() {
                ready!(this.idle.poll(&this.peer.usage, cx));
                let what = "the client asks nothing";
                return Poll::Ready(Err(Error::new(ErrorKind::TimedOut, what)));
            }
            return read;
        };
        if read.is_pending() {
            ready!(greeting.patience.as_mut().poll(cx));
            let what = "the client says nothing";
            return Poll::Ready(Err(Error::new(ErrorKind::TimedOut, what)));
        }
        if greeting.is_over(&buffer.filled()[before..]) {
            this.greeting = None;
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests;
