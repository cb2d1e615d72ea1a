//! What stands between a worker and its coordinator: a link that delays and corrupts.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
    time::sleep,
};

use crate::network::HUB;

/// Bytes that a corruption writes over. As many cannot pass for a value of ours: not one varint is as long, and no
/// frame of HTTP/2.
const CORRUPTED_BYTES: usize = 64;

/// What is to be done to the bytes of one direction.
#[derive(Default)]
struct Direction {
    delay_ms: AtomicU64,
    corrupt: AtomicBool,
}

/// Passes on connections to one address.
pub struct Proxy {
    pub address: SocketAddr,
    /// To the coordinator, and from it.
    directions: [Arc<Direction>; 2],
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// A proxy before `target`.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((HUB, 0)).await?;
        let address = listener.local_addr()?;
        let directions: [Arc<Direction>; 2] = Default::default();
        let [up, down] = directions.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((worker, _)) = listener.accept().await {
                tokio::spawn(pass(worker, target, up.clone(), down.clone()));
            }
        });
        Ok(Self {
            address,
            directions,
            accepting,
        })
    }

    /// Delays everything by so much.
    pub fn delay(&self, by: Duration) {
        for direction in &self.directions {
            let ms = by.as_millis() as u64;
            direction.delay_ms.store(ms, Ordering::Relaxed);
        }
    }

    /// Corrupts what comes next.
    pub fn corrupt(&self, downwards: bool) {
        let direction = &self.directions[usize::from(downwards)];
        direction.corrupt.store(true, Ordering::Relaxed);
    }

    /// What was to be corrupted has been.
    pub fn has_corrupted(&self, downwards: bool) -> bool {
        let direction = &self.directions[usize::from(downwards)];
        !direction.corrupt.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn pass(worker: TcpStream, target: SocketAddr, up: Arc<Direction>, down: Arc<Direction>) {
    // Without a coordinator the worker's connection just closes.
    let Ok(coordinator) = TcpStream::connect(target).await else {
        return;
    };
    let _ = (worker.set_nodelay(true), coordinator.set_nodelay(true));
    let (from_worker, to_worker) = worker.into_split();
    let (from_coordinator, to_coordinator) = coordinator.into_split();
    // When one direction ends, so does the other.
    tokio::select! {
        _ = copy(from_worker, to_coordinator, up) => {}
        _ = copy(from_coordinator, to_worker, down) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Arc<Direction>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        let delay_ms = direction.delay_ms.load(Ordering::Relaxed);
        if delay_ms > 0 {
            sleep(Duration::from_millis(delay_ms)).await;
        }
        let bytes = &mut buffer[..count];
        if direction.corrupt.swap(false, Ordering::Relaxed) {
            let begin = bytes.len().saturating_sub(CORRUPTED_BYTES) / 2;
            let end = (begin + CORRUPTED_BYTES).min(bytes.len());
            bytes[begin..end].fill(0xff);
        }
        to.write_all(bytes).await?;
    }
}
