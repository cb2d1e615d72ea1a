//! Collectives over point-to-point links between every pair of ranks.
//!
//! Small sums are exchanged directly: every rank sends its part to every other and adds in rank order,
//! one message of latency. Large sums are reduced in slices: rank `r` adds slice `r` of every part, in
//! rank order, and sends the result around, which moves `2 (n - 1) / n` instead of `n - 1` parts per
//! rank and divides the additions among the ranks. Both orders of addition are the same.

use std::{
    ops::Range,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use super::{Collective, CollectiveBuffer, CollectiveError, not_host};

/// Sums of at least this many bytes are reduced in slices when three or more ranks take part. With two
/// ranks both ways move the same bytes, and the direct one waits once.
const SLICED_FROM_BYTES: usize = 64 * 1024;

/// What a link delivers: a message, or the reason why there will be no more.
pub type Delivery = Result<Vec<u8>, String>;

/// Sends a message to one peer without waiting; false when the link is closed.
pub type Send = Box<dyn FnMut(Vec<u8>) -> bool + std::marker::Send>;

/// One end of the link to a peer.
pub struct Link {
    /// Outgoing messages.
    pub send: Send,
    /// Incoming messages, in order.
    pub receive: Receiver<Delivery>,
    /// Puts a last word into `receive`, from outside.
    pub abort: Sender<Delivery>,
}

/// Ends a mesh from another thread: a rank that waits in it fails at once.
pub struct Abort(Vec<Sender<Delivery>>);

impl Abort {
    /// Ends every link, saying why.
    pub fn abort(&self, reason: &str) {
        for link in &self.0 {
            // The rank may have dropped the link already.
            let _ = link.send(Err(reason.to_owned()));
        }
    }
}

/// A rank's links to all others.
pub struct Mesh {
    rank: usize,
    /// By rank; none at this rank's own place.
    links: Vec<Option<Link>>,
    deadline: Duration,
}

impl Mesh {
    /// Joins `links` (by rank, none at `rank`); an exchange that waits longer than `deadline` for a
    /// peer fails.
    pub fn new(rank: usize, links: Vec<Option<Link>>, deadline: Duration) -> Self {
        debug_assert!(
            links
                .iter()
                .enumerate()
                .all(|(peer, link)| link.is_none() == (peer == rank))
        );
        Self {
            rank,
            links,
            deadline,
        }
    }

    /// A handle that ends it.
    pub fn abort_handle(&self) -> Abort {
        Abort(
            self.links
                .iter()
                .flatten()
                .map(|link| link.abort.clone())
                .collect(),
        )
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.links.len()).filter(move |&peer| peer != rank)
    }

    fn send(
        &mut self,
        peer: usize,
        op: &'static str,
        data: Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let sent = self.links[peer]
            .as_mut()
            .is_some_and(|link| (link.send)(data));
        if sent {
            return Ok(());
        }
        // The receiving half knows why the link closed.
        match self.receive(peer, op) {
            Err(error) => Err(error),
            Ok(_) => Err(self.lost(peer, op, "closed for sending".into())),
        }
    }

    fn receive(&self, peer: usize, op: &'static str) -> Result<Vec<u8>, CollectiveError> {
        let Some(link) = &self.links[peer] else {
            return Err(self.lost(peer, op, "no link".into()));
        };
        let start = Instant::now();
        match link.receive.recv_timeout(self.deadline) {
            Ok(Ok(data)) => Ok(data),
            Ok(Err(reason)) => Err(self.lost(peer, op, reason)),
            Err(RecvTimeoutError::Disconnected) => Err(self.lost(peer, op, "closed".into())),
            Err(RecvTimeoutError::Timeout) => Err(CollectiveError::Late {
                rank: self.rank,
                peer,
                op,
                waited_ms: start.elapsed().as_millis(),
            }),
        }
    }

    fn lost(&self, peer: usize, op: &'static str, reason: String) -> CollectiveError {
        CollectiveError::PeerLost {
            rank: self.rank,
            peer,
            op,
            reason,
        }
    }

    /// Receives `expected` floats from `peer`.
    fn receive_floats(
        &self,
        peer: usize,
        op: &'static str,
        expected: usize,
    ) -> Result<Vec<f32>, CollectiveError> {
        let data = self.receive(peer, op)?;
        if data.len() != expected * size_of::<f32>() {
            return Err(CollectiveError::Mismatch {
                rank: self.rank,
                peer,
                op,
                expected: expected * size_of::<f32>(),
                got: data.len(),
            });
        }
        Ok(bytemuck::allocation::pod_collect_to_vec(&data))
    }

    /// Replaces `own` by the sum of all ranks' parts of it, in rank order.
    fn sum_parts(&self, op: &'static str, own: &mut [f32]) -> Result<(), CollectiveError> {
        let mut sum: Option<Vec<f32>> = None;
        for peer in 0..self.links.len() {
            let received;
            let part: &[f32] = if peer == self.rank {
                own
            } else {
                received = self.receive_floats(peer, op, own.len())?;
                &received
            };
            match &mut sum {
                None => sum = Some(part.to_vec()),
                Some(sum) => sum
                    .iter_mut()
                    .zip(part)
                    .for_each(|(sum, part)| *sum += part),
            }
        }
        own.copy_from_slice(&sum.unwrap_or_default());
        Ok(())
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn all_reduce_sum(&mut self, data: CollectiveBuffer<'_>) -> Result<(), CollectiveError> {
        let CollectiveBuffer::Host(data) = data else {
            return Err(not_host(self.rank, "all_reduce_sum"));
        };
        let op = "all_reduce_sum";
        let world = self.links.len();
        if world < 3 || size_of_val(data) < SLICED_FROM_BYTES {
            let bytes: Vec<u8> = bytemuck::cast_slice(data).to_vec();
            for peer in self.peers() {
                self.send(peer, op, bytes.clone())?;
            }
            return self.sum_parts(op, data);
        }
        for peer in self.peers() {
            let slice = slice_of(peer, world, data.len());
            self.send(peer, op, bytemuck::cast_slice(&data[slice]).to_vec())?;
        }
        let own = slice_of(self.rank, world, data.len());
        self.sum_parts(op, &mut data[own.clone()])?;
        let summed: Vec<u8> = bytemuck::cast_slice(&data[own]).to_vec();
        for peer in self.peers() {
            self.send(peer, op, summed.clone())?;
        }
        for peer in self.peers() {
            let slice = slice_of(peer, world, data.len());
            let part = self.receive_floats(peer, op, slice.len())?;
            data[slice].copy_from_slice(&part);
        }
        Ok(())
    }

    fn gather_to_root(&mut self, data: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let op = "gather_to_root";
        if self.rank != 0 {
            self.send(0, op, data)?;
            return Ok(Vec::new());
        }
        let mut parts = vec![data];
        for peer in self.peers() {
            parts.push(self.receive(peer, op)?);
        }
        Ok(parts)
    }

    fn broadcast(&mut self, data: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        let op = "broadcast";
        if self.rank != 0 {
            return self.receive(0, op);
        }
        for peer in self.peers() {
            self.send(peer, op, data.clone())?;
        }
        Ok(data)
    }
}

/// The slice of `elements` that `rank` sums for all.
fn slice_of(rank: usize, world: usize, elements: usize) -> Range<usize> {
    elements * rank / world..elements * (rank + 1) / world
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;

    /// Runs `body` on every rank of a local world and returns what each returned.
    fn on_every_rank<T: std::marker::Send>(
        world: usize,
        body: impl Fn(&mut Mesh) -> T + Sync,
    ) -> Vec<T> {
        let meshes = local::meshes(world, Duration::from_secs(5));
        let body = &body;
        std::thread::scope(|scope| {
            let threads: Vec<_> = meshes
                .into_iter()
                .map(|mut mesh| scope.spawn(move || body(&mut mesh)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    fn part(rank: usize, elements: usize) -> Vec<f32> {
        (0..elements)
            .map(|i| {
                ((i * 7919 + rank * 104_729) % 1000) as f32 * 1.0e-3 - 0.3 + rank as f32 * 1.0e4
            })
            .collect()
    }

    #[test]
    fn sums_in_rank_order_at_every_size_and_world() {
        for world in [1, 2, 3, 5] {
            for elements in [0, 1, 7, 64, 16 * 1024 - 1, 16 * 1024, 40_001] {
                let mut expected = part(0, elements);
                for rank in 1..world {
                    expected
                        .iter_mut()
                        .zip(part(rank, elements))
                        .for_each(|(sum, p)| *sum += p);
                }
                let got = on_every_rank(world, |mesh| {
                    let mut data = part(mesh.rank(), elements);
                    mesh.all_reduce_sum(CollectiveBuffer::Host(&mut data))
                        .unwrap();
                    data
                });
                for data in got {
                    assert!(
                        data.iter()
                            .zip(&expected)
                            .all(|(a, b)| a.to_bits() == b.to_bits()),
                        "world {world}, {elements} elements"
                    );
                }
            }
        }
    }

    #[test]
    fn gather_and_broadcast() {
        let got = on_every_rank(3, |mesh| {
            let parts = mesh
                .gather_to_root(vec![mesh.rank() as u8; mesh.rank() + 1])
                .unwrap();
            let answer = mesh.broadcast(parts.concat()).unwrap();
            (parts, answer)
        });
        assert_eq!(got[0].0, [vec![0], vec![1, 1], vec![2, 2, 2]]);
        assert!(got[1].0.is_empty() && got[2].0.is_empty());
        assert!(got.iter().all(|(_, answer)| *answer == [0, 1, 1, 2, 2, 2]));
    }

    #[test]
    fn a_peer_that_leaves_is_named() {
        let got = on_every_rank(3, |mesh| {
            if mesh.rank() == 1 {
                return Ok(());
            }
            mesh.all_reduce_sum(CollectiveBuffer::Host(&mut [1.0]))
        });
        assert!(got[1].is_ok());
        for rank in [0, 2] {
            let error = got[rank].clone().unwrap_err();
            assert!(
                matches!(error, CollectiveError::PeerLost { .. }),
                "rank {rank}: {error}"
            );
        }
    }

    #[test]
    fn a_peer_that_disagrees_is_named() {
        let got = on_every_rank(2, |mesh| {
            let mut data = vec![0.0; 1 + mesh.rank()];
            mesh.all_reduce_sum(CollectiveBuffer::Host(&mut data))
        });
        assert_eq!(
            got[0],
            Err(CollectiveError::Mismatch {
                rank: 0,
                peer: 1,
                op: "all_reduce_sum",
                expected: 4,
                got: 8
            })
        );
    }
}
