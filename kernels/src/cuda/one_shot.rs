//! A sum over the ranks of one host in one launch, for small messages: `collective/one_shot.cu`.

use std::{fmt, fs, path::PathBuf, sync::Arc};

use cudarc::driver::CudaStream;
use serde::{Deserialize, Serialize};

use super::{
    CudaError, Device, Memory, Stop,
    device::launch,
    shared::{CardMemory, HostFile, HostMemory, Reached},
};

// As in `collective/one_shot.cu`.
const MOST_RANKS: usize = 8;
const THREADS: usize = 256;
const BLOCKS: usize = 32;
const PIECES: usize = 1024;
/// Of one rank's values at another: two halves of 16 bytes for every two values.
const ROOM_BYTES: usize = 2 * BLOCKS * PIECES * 16;
const INBOX_BYTES: usize = MOST_RANKS * ROOM_BYTES;

/// Over what values travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// From card to card.
    Peer,
    /// Through memory of the host.
    Host,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer => "peer memory",
            Self::Host => "host memory",
        })
    }
}

/// Where the values of other ranks arrive on this card. It should outlive the group: what a rank that
/// was left behind still writes must find it.
pub struct Inbox(Memory<u8>);

/// What a rank tells the others so that they can reach it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// Ranks of another host are out of reach.
    host: String,
    card: Result<CardMemory, String>,
    /// Of rank 0: memory of the host with an inbox for each rank.
    file: Result<PathBuf, String>,
    /// Of rank 0: the number before the first round. What was written for another group has others.
    start: u32,
}

/// A ticket, and the file that it names for as long as the others look for it.
pub struct Offer {
    /// For the others.
    pub ticket: Ticket,
    _file: Option<HostFile>,
}

/// All ranks' inboxes, within reach of this rank's card.
pub struct OneShot {
    inboxes: Inboxes,
    stop: Arc<Stop>,
    stream: Arc<CudaStream>,
    _rounds: Memory<u32>,
    _cards: Vec<Reached>,
    _host: Option<HostMemory>,
}

/// `struct Inboxes` of `collective/one_shot.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Inboxes {
    out: [u64; MOST_RANKS],
    into: [u64; MOST_RANKS],
    rounds: u64,
    stop: u64,
    rank: i32,
    ranks: i32,
}

impl Inbox {
    /// On `device`.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let memory = device.zeros_alone(INBOX_BYTES, "sums over ranks")?;
        Ok(Self(memory))
    }

    /// Bytes of [`Inbox::new`].
    pub const BYTES: u64 = INBOX_BYTES as u64;

    /// Empties it and says how `rank` of `ranks` is reached; comes before any rank opens its inboxes.
    ///
    /// # Errors
    /// The card's.
    pub fn offer(&self, device: &Device, rank: usize, ranks: usize) -> Result<Offer, CudaError> {
        device.fill(&self.0, 0)?;
        device.synchronize()?;
        let file = match rank {
            0 => HostFile::new((ranks * INBOX_BYTES) as u64).map_err(|error| error.to_string()),
            _ => Err("rank 0 makes it".into()),
        };
        let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let ticket = Ticket {
            host: host.trim().to_owned(),
            card: CardMemory::of(device, &self.0).map_err(|error| error.to_string()),
            file: file
                .as_ref()
                .map(|file| file.path().to_owned())
                .map_err(String::clone),
            start: getrandom::u32().unwrap_or(std::process::id()),
        };
        Ok(Offer {
            ticket,
            _file: file.ok(),
        })
    }
}

impl Ticket {
    /// For the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads [`Ticket::to_bytes`].
    ///
    /// # Errors
    /// It is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }
}

impl OneShot {
    /// Values of the largest sum.
    pub const MOST_ELEMENTS: usize = 2 * BLOCKS * PIECES;

    /// Opens the inboxes of all ranks' `tickets` for `rank`, whose own is `inbox`; waiting ends when
    /// `stop` is raised. No rank may sum before all have opened theirs.
    ///
    /// # Errors
    /// A rank that is out of reach, or the card's.
    pub fn open(
        device: &Device,
        reach: Reach,
        rank: usize,
        tickets: &[Ticket],
        inbox: &Inbox,
        stop: Arc<Stop>,
    ) -> Result<Self, CudaError> {
        let out_of_reach = |what: String, why: &str| CudaError::OutOfReach {
            what,
            why: why.to_owned(),
        };
        let (ranks, Some(root)) = (tickets.len(), tickets.first()) else {
            return Err(out_of_reach("rank 0".into(), "it sent nothing"));
        };
        if ranks > MOST_RANKS {
            let why = format!("{MOST_RANKS} are the most");
            return Err(out_of_reach(format!("rank {MOST_RANKS}"), &why));
        }
        for (other, ticket) in tickets.iter().enumerate() {
            if ticket.host.is_empty() || ticket.host != root.host {
                let why = "it is not known to be on the host of rank 0";
                return Err(out_of_reach(format!("rank {other}"), why));
            }
        }
        let mut inboxes = Inboxes {
            stop: stop.address(),
            rank: rank as i32,
            ranks: ranks as i32,
            ..Inboxes::default()
        };
        let room = |of: usize| (of * ROOM_BYTES) as u64;
        let (mut cards, mut host) = (Vec::new(), None);
        match reach {
            Reach::Peer => {
                for (other, ticket) in tickets.iter().enumerate().filter(|it| it.0 != rank) {
                    let card = ticket.card.as_ref();
                    let card = card.map_err(|why| out_of_reach(format!("rank {other}"), why))?;
                    let reached = card.reach(device)?;
                    inboxes.out[other] = reached.address + room(rank);
                    inboxes.into[other] = inbox.0.address() + room(other);
                    cards.push(reached);
                }
            }
            Reach::Host => {
                let file = root.file.as_ref();
                let file = file.map_err(|why| out_of_reach("memory of the host".into(), why))?;
                let memory = HostMemory::open(device, file, ranks * INBOX_BYTES)?;
                let inbox_of = |of: usize| memory.address + (of * INBOX_BYTES) as u64;
                for other in (0..ranks).filter(|other| *other != rank) {
                    inboxes.out[other] = inbox_of(other) + room(rank);
                    inboxes.into[other] = inbox_of(rank) + room(other);
                }
                host = Some(memory);
            }
        }
        let rounds = device.upload(&[root.start; BLOCKS], "sums over ranks")?;
        inboxes.rounds = rounds.address();
        Ok(Self {
            inboxes,
            stop,
            stream: device.stream.clone(),
            _rounds: rounds,
            _cards: cards,
            _host: host,
        })
    }

    /// What ends its waiting.
    pub fn stop(&self) -> Arc<Stop> {
        self.stop.clone()
    }

    /// Replaces the first `elements` of `x` by their sum over all ranks, added in rank order. Every rank
    /// asks for the same sums in the same order; `elements` is at most [`OneShot::MOST_ELEMENTS`].
    ///
    /// # Errors
    /// The card's.
    pub fn sum(&self, device: &Device, x: &Memory<f32>, elements: usize) -> Result<(), CudaError> {
        assert!(
            elements <= x.len().min(Self::MOST_ELEMENTS),
            "one_shot: lengths"
        );
        let blocks = elements.div_ceil(2 * THREADS).clamp(1, BLOCKS) as u32;
        launch!(device, "all_reduce_one_shot_f32", [blocks, 1, 1], [THREADS as u32, 1, 1], 0;
            x.address(), elements as i32, self.inboxes)
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        // Nothing that still runs may use what goes now, nor wait for ranks that are gone.
        self.stop.raise();
        let _ = self.stream.context().bind_to_thread();
        let _ = self.stream.synchronize();
    }
}

// A kernel reads it by value: the layout is that of `collective/one_shot.cu`.
const _: () = assert!(size_of::<Inboxes>() == 2 * 8 * MOST_RANKS + 24);
