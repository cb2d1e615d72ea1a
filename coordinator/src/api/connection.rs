//! Connections of clients as they come in, each cut off when its other end says nothing at first, or stops
//! reading later.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo};

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

/// What a listener accepts.
#[derive(Debug)]
pub struct Connections {
    listener: TcpListener,
    pause: Option<Pin<Box<Sleep>>>,
}

impl From<TcpListener> for Connections {
    fn from(listener: TcpListener) -> Self {
        Self {
            listener,
            pause: None,
        }
    }
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
                    // Tokens are small and should not wait for one another.
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, "TCP_NODELAY");
                    }
                    return Poll::Ready(Some(Ok(Connection::new(stream, PATIENCE, GREETING))));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client's connection");
                    this.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

/// A client's connection. Reads fail if it does not begin, and a write that makes no way for too long.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    greeting: Option<Greeting>,
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

impl Connection {
    fn new(stream: TcpStream, patience: Duration, greeting: Duration) -> Self {
        Self {
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
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut connections = Connections::from(listener);
        let mut connection = connections.next().await.unwrap().unwrap();
        assert!(connection.stream.nodelay().unwrap());
        connection.patience = Duration::from_millis(50);
        // More than the buffers of both ends hold.
        let error = connection.write_all(&vec![0; 64 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        drop(client);
    }

    #[tokio::test]
    async fn a_client_that_does_not_begin_is_cut_off() {
        use tokio::io::AsyncReadExt;

        for (said, begins) in [
            ("", false),
            ("PRI * HT", false),
            ("POST", true),
            ("PRI /", true),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap())
                .await
                .unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = Connection::new(stream, PATIENCE, Duration::from_millis(50));
            client.write_all(said.as_bytes()).await.unwrap();
            let mut heard = vec![0; said.len()];
            connection.read_exact(&mut heard).await.unwrap();
            let rest = tokio::time::timeout(Duration::from_millis(200), connection.read_u8());
            match rest.await {
                Ok(cut_off) => {
                    assert_eq!(cut_off.unwrap_err().kind(), ErrorKind::TimedOut);
                    assert!(!begins, "{said:?}");
                }
                Err(_) => assert!(begins, "{said:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_client_that_reads_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut connections = Connections::from(listener);
        let mut connection = connections.next().await.unwrap().unwrap();
        connection.patience = Duration::from_secs(30);
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut client, &mut all)
                .await
                .unwrap();
            all.len()
        });
        connection.write_all(&vec![0; 16 << 20]).await.unwrap();
        drop(connection);
        assert_eq!(reader.await.unwrap(), 16 << 20);
    }
}
