//! How far the group is.

use secondwind_proto::v1;

/// How far the group is, for health checks, clients and operators.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Workers are missing.
    Gathering {
        /// Attached.
        attached: usize,
        /// Needed.
        needed: usize,
    },
    /// The workers that are there cannot serve the model.
    NoPlan {
        /// Why, and what to change.
        reason: String,
    },
    /// Ranks are loading.
    Loading {
        /// The forming epoch.
        epoch: u64,
        /// Bytes read so far, over all ranks.
        loaded_bytes: u64,
        /// Bytes to read, over all ranks.
        total_bytes: u64,
    },
    /// The group serves.
    Serving(v1::Group),
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gathering { attached, needed } => {
                write!(f, "{attached} of {needed} workers are attached")
            }
            Self::NoPlan { reason } => write!(f, "the attached workers cannot serve: {reason}"),
            Self::Loading {
                loaded_bytes,
                total_bytes,
                ..
            } => {
                let percent = loaded_bytes.saturating_mul(100) / (*total_bytes).max(1);
                write!(f, "workers are loading, {percent} % done")
            }
            Self::Serving(group) => write!(f, "epoch {} serves", group.epoch),
        }
    }
}
