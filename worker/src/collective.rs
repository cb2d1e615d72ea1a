//! How the ranks of one epoch exchange data.
//!
//! Every rank calls the same operations in the same order. Sums are taken in rank order, element by
//! element, so a run repeats bit for bit at a given plan, over whichever link.

pub mod grpc;
pub mod local;
pub mod mesh;
pub mod nccl;
mod solo;

pub use solo::Solo;

/// Data that a collective works on, where it lies.
pub enum CollectiveBuffer<'a> {
    /// Host memory.
    Host(&'a mut [f32]),
    /// A card's memory, in the order of its stream; for collectives that say they take it.
    Device(DeviceSpan),
}

/// f32 elements in a card's memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpan {
    /// Of the first element.
    pub address: u64,
    /// How many.
    pub elements: usize,
    /// The stream whose work comes before and after.
    pub stream: u64,
}

/// The exchange between the ranks of an epoch.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// True if sums may be asked for of [`CollectiveBuffer::Device`].
    fn takes_device(&self) -> bool {
        false
    }

    /// Replaces `data` on every rank by the sum over ranks, taken in rank order.
    ///
    /// # Errors
    /// A peer went away, was late, or disagrees about what comes next.
    fn all_reduce_sum(&mut self, data: CollectiveBuffer<'_>) -> Result<(), CollectiveError>;

    /// Says that device sums come which are not asked for one by one, in a recording.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn expect_device_sums(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Says whether the device sums since the last call were good; comes when the device has done
    /// everything that was given to it.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn settle(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

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

/// A link between hosts was given a card's memory.
fn not_host(rank: usize, op: &'static str) -> CollectiveError {
    let what = "this link takes host memory only".into();
    CollectiveError::Device { rank, op, what }
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
    /// The data could not be brought from or to the card, or this link does not take it there.
    #[error("rank {rank}: {op}: {what}")]
    Device {
        /// This rank.
        rank: usize,
        /// The collective.
        op: &'static str,
        /// The card's word.
        what: String,
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
