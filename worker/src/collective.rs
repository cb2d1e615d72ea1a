//! How the ranks of one epoch exchange data.
//!
//! Every rank calls the same operations in the same order. Sums are taken in rank order, element by
//! element, so a run repeats bit for bit at a given plan, over whichever link.

pub mod grpc;
pub mod local;
pub mod mesh;
mod solo;

pub use solo::Solo;

/// Data that a collective works on, where it lies. Device pointers join here with NCCL.
pub enum CollectiveBuffer<'a> {
    /// Host memory.
    Host(&'a mut [f32]),
}

/// The exchange between the ranks of an epoch.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Replaces `data` on every rank by the sum over ranks, taken in rank order.
    ///
    /// # Errors
    /// A peer went away, was late, or disagrees about what comes next.
    fn all_reduce_sum(&mut self, data: CollectiveBuffer<'_>) -> Result<(), CollectiveError>;

    /// Rank 0 gets every rank's bytes, its own first, in rank order; the others get nothing.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn gather_to_root(&mut self, data: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Every rank gets rank 0's bytes.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn broadcast(&mut self, data: Vec<u8>) -> Result<Vec<u8>, CollectiveError>;
}

/// Why an exchange ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The link to a peer closed.
    #[error("rank {rank} lost its link to rank {peer} during {op}: {reason}")]
    PeerLost {
        /// This rank.
        rank: usize,
        /// The other end.
        peer: usize,
        /// The collective.
        op: &'static str,
        /// What the link said.
        reason: String,
    },
    /// Nothing came in time.
    #[error("rank {rank} waited {waited_ms} ms for rank {peer} during {op}")]
    Late {
        /// This rank.
        rank: usize,
        /// The other end.
        peer: usize,
        /// The collective.
        op: &'static str,
        /// How long.
        waited_ms: u128,
    },
    /// A peer sent something of another size: the ranks no longer do the same thing.
    #[error("rank {rank} expected {expected} bytes from rank {peer} during {op} and got {got}")]
    Mismatch {
        /// This rank.
        rank: usize,
        /// The other end.
        peer: usize,
        /// The collective.
        op: &'static str,
        /// Bytes that this rank's own part implies.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
}
