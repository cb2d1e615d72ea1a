//! Links between ranks of one process.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::mesh::{Delivery, Link, Mesh};

/// Meshes of `world` ranks that meet in memory, by rank.
pub fn meshes(world: usize, deadline: Duration) -> Vec<Mesh> {
    links(world)
        .into_iter()
        .enumerate()
        .map(|(rank, links)| Mesh::new(rank, links, deadline))
        .collect()
}

/// All ends of a complete graph: `[rank][peer]`.
fn links(world: usize) -> Vec<Vec<Option<Link>>> {
    let mut senders: Vec<Vec<Sender<Delivery>>> = Vec::new();
    let mut receivers: Vec<Vec<Receiver<Delivery>>> = (0..world).map(|_| Vec::new()).collect();
    for _ in 0..world {
        let (row, column): (Vec<_>, Vec<_>) = (0..world).map(|_| mpsc::channel()).unzip();
        senders.push(row);
        for (received, receiver) in receivers.iter_mut().zip(column) {
            received.push(receiver);
        }
    }
    receivers
        .into_iter()
        .enumerate()
        .map(|(rank, received)| {
            received
                .into_iter()
                .enumerate()
                .map(|(peer, receive)| {
                    let farewell = Farewell {
                        rank,
                        sender: senders[rank][peer].clone(),
                    };
                    (peer != rank).then(|| Link {
                        send: Box::new(move |data| farewell.sender.send(Ok(data)).is_ok()),
                        receive,
                        abort: senders[peer][rank].clone(),
                    })
                })
                .collect()
        })
        .collect()
}

/// Tells the peer when this end is dropped; its channel stays open for the peer's own abort handle.
struct Farewell {
    rank: usize,
    sender: Sender<Delivery>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        // A peer that has gone too needs no farewell.
        let _ = self.sender.send(Err(format!("rank {} left", self.rank)));
    }
}

/// Where the workers of one process find each other. Its name travels in their Join messages.
pub struct LocalHub {
    name: String,
    /// By epoch, the meshes that no rank has taken yet.
    waiting: Mutex<HashMap<u64, Vec<Option<Mesh>>>>,
}

impl Default for LocalHub {
    /// A hub with a name that no other process has.
    fn default() -> Self {
        static HUBS: AtomicU64 = AtomicU64::new(0);
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let (process, hub) = (std::process::id(), HUBS.fetch_add(1, Ordering::Relaxed));
        Self {
            name: format!("{process}-{}-{hub}", started.as_nanos()),
            waiting: Mutex::default(),
        }
    }
}

impl LocalHub {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The mesh of `rank` in epoch `epoch`; the first caller of an epoch makes them for all. `None`
    /// when it was taken before or the ranks disagree about the world.
    pub fn meet(&self, epoch: u64, world: usize, rank: usize, deadline: Duration) -> Option<Mesh> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // An epoch that never completed is over once a later one forms.
        waiting.retain(|&former, _| former >= epoch);
        let ranks = waiting
            .entry(epoch)
            .or_insert_with(|| meshes(world, deadline).into_iter().map(Some).collect());
        let taken = ranks.get_mut(rank)?.take();
        if ranks.iter().all(Option::is_none) {
            waiting.remove(&epoch);
        }
        taken
    }
}
