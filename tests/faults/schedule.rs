//! What is done to whom, and when: a pure function of the seed.

use std::{fmt, time::Duration};

use crate::random::Random;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, and the worker is started again.
    Kill,
    /// SIGSTOP, longer or shorter than a step may take, then SIGCONT.
    Stop,
    /// The worker's link is down for a while.
    Cut,
    /// The link goes down and up, time and again: packets are lost in bursts.
    Flap,
    /// Packets are lost and late, by netem.
    Netem,
    /// What worker and coordinator tell each other comes late.
    Delay,
    /// 64 bytes from or to the coordinator are written over.
    Corrupt,
    /// The disk that all logs go to is full while the worker is killed and started again.
    FullDisk,
    /// The worker runs for a fifth of the time.
    Slow,
    /// The worker is killed and comes back on a host whose monotonic clock is ten days ahead.
    Clock,
    /// SIGKILL of the coordinator, which is started again.
    CoordinatorKill,
    /// SIGSTOP of the coordinator, then SIGCONT.
    CoordinatorStop,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Kill,
        Self::Stop,
        Self::Cut,
        Self::CoordinatorKill,
        Self::Corrupt,
        Self::FullDisk,
        Self::Slow,
        Self::Flap,
        Self::Clock,
        Self::Delay,
        Self::CoordinatorStop,
        Self::Netem,
    ];

    /// The last fault is over; every stream goes on within this time.
    pub fn bound(self) -> Duration {
        Duration::from_secs(match self {
            Self::Slow | Self::Delay | Self::CoordinatorStop => 5,
            Self::Kill | Self::FullDisk | Self::Clock | Self::CoordinatorKill => 10,
            // TCP's own timers have grown meanwhile.
            Self::Stop | Self::Cut | Self::Flap | Self::Netem | Self::Corrupt => 15,
        })
    }

    /// The group cannot go on without forming again.
    pub fn ends_epoch(self) -> bool {
        matches!(
            self,
            Self::Kill | Self::FullDisk | Self::Clock | Self::Corrupt
        )
    }

    /// In the words of the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "worker killed",
            Self::Stop => "worker stopped",
            Self::Cut => "link cut",
            Self::Flap => "packets lost in bursts",
            Self::Netem => "packets lost and late (netem)",
            Self::Delay => "messages late",
            Self::Corrupt => "message corrupted",
            Self::FullDisk => "disk full, worker killed",
            Self::Slow => "slow rank",
            Self::Clock => "worker killed, back with another clock",
            Self::CoordinatorKill => "coordinator killed",
            Self::CoordinatorStop => "coordinator stopped",
        }
    }
}

/// When it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Before the first token of the answers.
    Prefill,
    /// After so many tokens of the first answer.
    Decode,
    /// While the same rank, killed before, starts and loads.
    Load,
    /// While the group forms again because another rank was killed.
    Reform,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Decode, Self::Prefill, Self::Load, Self::Reform];
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// What everything below follows from.
    pub seed: u64,
    /// What is done.
    pub fault: Fault,
    /// When.
    pub phase: Phase,
    /// To which worker.
    pub victim: usize,
    /// Tokens of the first answer before anything happens, but for [`Phase::Prefill`].
    pub after_tokens: u32,
    /// After the phase begins.
    pub after: Duration,
    /// How long it lasts, where it does.
    pub lasts: Duration,
    /// Corruption hits what the coordinator says, instead of what it hears.
    pub downwards: bool,
}

impl Schedule {
    /// The schedule of `seed` for a group of `world` workers.
    pub fn new(seed: u64, world: usize) -> Self {
        let mut random = Random::new(seed, 0);
        let faults = Fault::ALL.len() as u64;
        // All faults come in turn, and each goes through all phases.
        let fault = Fault::ALL[(seed % faults) as usize];
        let phase = Phase::ALL[((seed + seed / faults) % Phase::ALL.len() as u64) as usize];
        let latest = match phase {
            Phase::Prefill => 60,
            Phase::Decode => 1,
            Phase::Load | Phase::Reform => 700,
        };
        let millis =
            |most: u32, random: &mut Random| Duration::from_millis(random.below(most).into());
        Self {
            seed,
            fault,
            phase,
            victim: random.below(world as u32) as usize,
            after_tokens: random.between(1, 60),
            after: millis(latest, &mut random),
            lasts: Duration::from_millis(200) + millis(2_800, &mut random),
            downwards: random.below(2) == 1,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            fault,
            phase,
            victim,
            after_tokens,
            after,
            lasts,
            downwards,
        } = self;
        write!(
            f,
            "FAULT_SEED={seed}: {} at {phase:?}, rank {victim}, after {after_tokens} tokens and {after:?}, for {lasts:?}, downwards: {downwards}",
            fault.name()
        )
    }
}
