//! Why there is no plan, with the nouns that an operator needs.

use std::fmt;

use thiserror::Error;

use super::RankMemory;
use crate::capabilities::WeightKind;

/// Why a model cannot be planned over these workers.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum PlanError {
    /// The list of workers is empty.
    #[error("no workers to plan for")]
    NoWorkers,
    /// Some rank would hold nothing of an axis of which each must hold a part.
    #[error(
        "{world} workers are too many: each needs at least one of the model's {units} {axis}; \
         the largest legal world size is {largest}"
    )]
    WorldTooLarge {
        /// Workers given.
        world: usize,
        /// Largest number of workers that the model allows.
        largest: usize,
        /// What runs out, such as `query heads`.
        axis: &'static str,
        /// How many there are.
        units: usize,
    },
    /// A worker has no way to run a linear of the model.
    #[error("rank {rank} ({device}) has no path for {weights} weights, which {module} needs")]
    NoPath {
        /// Worker, by its place in the list.
        rank: usize,
        /// Its device.
        device: String,
        /// What it cannot run.
        weights: WeightKind,
        /// First module that needs it.
        module: String,
    },
    /// A worker said something impossible about itself.
    #[error("rank {rank} ({device}) reports {field} = {value}, which {why}")]
    BadCapability {
        /// Worker, by its place in the list.
        rank: usize,
        /// Its device.
        device: String,
        /// Field of its capabilities.
        field: String,
        /// What it says.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A setting is zero or absurd.
    #[error("{field} = {value} is not usable: it must be from {least} to {most}")]
    BadSetting {
        /// Name of the setting.
        field: &'static str,
        /// Its value.
        value: usize,
        /// Least legal value.
        least: usize,
        /// Largest legal value.
        most: usize,
    },
    /// The context asked for is longer than the model's positions.
    #[error(
        "max_context_tokens = {max_context_tokens} is more than the {limit} positions of the model; \
         lower it, or use a checkpoint that scales its rotary positions"
    )]
    ContextTooLong {
        /// What was asked for.
        max_context_tokens: usize,
        /// What the model has.
        limit: usize,
    },
    /// The forced shares cannot be used.
    #[error("forced_split {split:?} is not usable: {why}")]
    BadSplit {
        /// The shares.
        split: Vec<f64>,
        /// What is wrong with them.
        why: String,
    },
    /// The model's own description contradicts itself.
    #[error("model cannot be sharded: {module}: {why}")]
    BadShape {
        /// Module or field.
        module: String,
        /// What is wrong with it.
        why: String,
    },
    /// No legal cut fits in the memory of the workers.
    #[error("{0}")]
    DoesNotFit(Box<Shortfall>),
}

/// Why a model does not fit, rank by rank, and what would help.
#[derive(Clone, Debug, PartialEq)]
pub struct Shortfall {
    /// Per rank, what it would need.
    pub ranks: Vec<RankShortfall>,
    /// Bytes missing in the best cut found, all ranks together.
    pub missing_bytes: u64,
    /// Purpose that takes most of the ranks that lack memory, such as `weights`.
    pub largest: &'static str,
    /// Bytes of that purpose on those ranks.
    pub largest_bytes: u64,
    /// Changes that were tried and would make it fit, or, when none would alone, what to change.
    pub remedies: Vec<String>,
}

/// One rank's part of a [`Shortfall`].
#[derive(Clone, Debug, PartialEq)]
pub struct RankShortfall {
    /// The device's own name.
    pub device: String,
    /// Bytes that it may use, after the reserve.
    pub usable_bytes: u64,
    /// What it needs for the smallest legal share and one full context.
    pub smallest: RankMemory,
    /// What it needs in the best cut found, with one full context.
    pub needed: RankMemory,
}

impl RankShortfall {
    /// Bytes that it lacks in the best cut found.
    pub fn missing_bytes(&self) -> u64 {
        self.needed.total().saturating_sub(self.usable_bytes)
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the model does not fit: {} are missing on {} of {} ranks, mostly {} ({})",
            gib(self.missing_bytes),
            self.ranks
                .iter()
                .filter(|rank| rank.missing_bytes() > 0)
                .count(),
            self.ranks.len(),
            self.largest,
            gib(self.largest_bytes),
        )?;
        for (index, rank) in self.ranks.iter().enumerate() {
            write!(
                f,
                "\n  rank {index} ({}): usable {}; needs {} ({}); the smallest legal share needs {} ({})",
                rank.device,
                gib(rank.usable_bytes),
                gib(rank.needed.total()),
                purposes(&rank.needed),
                gib(rank.smallest.total()),
                purposes(&rank.smallest),
            )?;
        }
        for remedy in &self.remedies {
            write!(f, "\n  {remedy}")?;
        }
        Ok(())
    }
}

/// Purposes of memory with their names, largest first, without those that take nothing.
fn purposes(memory: &RankMemory) -> String {
    let mut parts: Vec<_> = memory
        .purposes()
        .into_iter()
        .filter(|part| part.1 > 0)
        .collect();
    parts.sort_by_key(|part| std::cmp::Reverse(part.1));
    let parts: Vec<_> = parts
        .iter()
        .map(|(name, bytes)| format!("{name} {}", gib(*bytes)))
        .collect();
    parts.join(", ")
}

/// Bytes as text: GiB, or MiB below one tenth of a GiB.
pub(super) fn gib(bytes: u64) -> String {
    const MIB: f64 = (1u64 << 20) as f64;
    if bytes < (1 << 30) / 10 {
        format!("{:.1} MiB", bytes as f64 / MIB)
    } else {
        format!("{:.2} GiB", bytes as f64 / MIB / 1024.0)
    }
}
