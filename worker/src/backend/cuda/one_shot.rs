//! Whether small sums go past NCCL: what is within reach is tried with numbers that are known, timed
//! beside NCCL in recordings, as decoding uses both, and used up to the size at which it is faster.

use std::{
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use secondwind_kernels::cuda::{CudaError, Device, Inbox, Memory, OneShot, Reach, Stop, Ticket};

use super::sums::on_card;
use crate::collective::{Collective, CollectiveError};

/// Values of the sums that are timed: from one token of a small model to several of a large one.
const SIZES: [usize; 4] = [2048, 8192, 20480, OneShot::MOST_ELEMENTS];
/// Of sums that are tried first: more than an inbox has halves, odd and whole.
const CHECKED: [usize; 6] = [
    OneShot::MOST_ELEMENTS,
    1,
    5120,
    1025,
    OneShot::MOST_ELEMENTS,
    8192,
];
/// The same over NCCL, which moves much data in another way than little.
const CHECKED_BY_NCCL: [usize; 3] = [5120, 1025, 1 << 20];
/// Sums of a recording that is timed.
const SUMS: usize = 32;
/// How often it is replayed; the fastest counts.
const REPLAYS: usize = 5;
/// In which a few small sums are done, if they ever are.
const PATIENCE: Duration = Duration::from_secs(5);

/// Seconds of a sum of each of [`SIZES`].
type Times = [f64; SIZES.len()];

/// The sums of an epoch that go past NCCL.
pub(super) struct SmallSums {
    one_shot: Box<OneShot>,
    /// Values of the largest.
    most: usize,
}

impl SmallSums {
    pub(super) fn takes(&self, elements: usize) -> bool {
        elements <= self.most
    }

    pub(super) fn sum(
        &self,
        device: &Device,
        x: &Memory<f32>,
        elements: usize,
    ) -> Result<(), CudaError> {
        self.one_shot.sum(device, x, elements)
    }
}

/// What came of a way to reach the other ranks.
enum Tried {
    /// A rank cannot open it, or is told not to.
    OutOfReach(String),
    /// What arrives is not what was sent.
    Corrupts(String),
    Good(Box<OneShot>),
}

/// All ranks' inboxes as far as they are within reach; made before NCCL connects.
pub(super) struct Found {
    ways: Vec<(Reach, Tried)>,
}

impl Found {
    /// Opens and tries what there is. Every rank comes here.
    ///
    /// # Errors
    /// Of the exchange, or the card's.
    pub(super) fn look(
        device: &Device,
        inbox: &Inbox,
        host: &mut dyn Collective,
    ) -> Result<Self, CollectiveError> {
        let (rank, ranks) = (host.rank(), host.world_size());
        let failed = |error: CudaError| failure(rank, error.to_string());
        let offer = inbox.offer(device, rank, ranks).map_err(failed)?;
        let tickets = all_gather(host, offer.ticket.to_bytes())?
            .iter()
            .map(|bytes| Ticket::from_bytes(bytes))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|why| failure(rank, why))?;
        let mut ways = Vec::new();
        for (reach, off) in [
            (Reach::Peer, "NCCL_P2P_DISABLE"),
            (Reach::Host, "NCCL_SHM_DISABLE"),
        ] {
            let stop = Arc::new(Stop::new(device).map_err(failed)?);
            let opened = match std::env::var(off) {
                Ok(set) if set == "1" => Err(format!("{off} is 1")),
                _ => OneShot::open(device, reach, rank, &tickets, inbox, stop.clone())
                    .map_err(|error| error.to_string()),
            };
            // Nobody sums before all can.
            let tried = match (first_problem(host, opened.as_ref().err())?, opened) {
                (None, Ok(one_shot)) => {
                    let sum = |x: &_, elements| {
                        let given = one_shot.sum(device, x, elements);
                        given.map_err(|error| error.to_string())
                    };
                    let wrong = check(device, (rank, ranks), &CHECKED, Some(&stop), sum);
                    match first_problem(host, wrong.err().as_ref())? {
                        None => Tried::Good(Box::new(one_shot)),
                        Some(why) => Tried::Corrupts(why),
                    }
                }
                (why, _) => Tried::OutOfReach(why.unwrap_or_default()),
            };
            ways.push((reach, tried));
        }
        Ok(Self { ways })
    }

    /// What ends the waiting of those that are good.
    pub(super) fn stops(&self) -> Vec<Arc<Stop>> {
        let good = self.ways.iter().filter_map(|(_, tried)| match tried {
            Tried::Good(one_shot) => Some(one_shot.stop()),
            _ => None,
        });
        good.collect()
    }

    /// Why NCCL should not move data from card to card either, if so.
    pub(super) fn peers_corrupt(&self) -> Option<&str> {
        self.ways.iter().find_map(|(reach, tried)| match tried {
            Tried::Corrupts(why) if *reach == Reach::Peer => Some(why.as_str()),
            _ => None,
        })
    }

    /// Times what is good beside `nccl`, which joins the same ranks, and says what was chosen and why.
    ///
    /// # Errors
    /// Of the exchange, or the card's.
    pub(super) fn choose(
        self,
        device: &Device,
        nccl: &mut dyn Collective,
    ) -> Result<(Option<SmallSums>, String), CollectiveError> {
        let (rank, ranks) = (nccl.rank(), nccl.world_size());
        let failed = |error: CudaError| failure(rank, error.to_string());
        let wrong = check(
            device,
            (rank, ranks),
            &CHECKED_BY_NCCL,
            None,
            |x, elements| on_card(device, x, elements, nccl).map_err(|error| error.to_string()),
        );
        nccl.settle()?;
        if let Some(why) = first_problem(nccl, wrong.err().as_ref())? {
            return Err(failure(
                rank,
                format!("sums over NCCL are wrong ({why}): try NCCL_P2P_DISABLE=1 on every worker"),
            ));
        }
        let x: Memory<f32> = device
            .zeros(OneShot::MOST_ELEMENTS, "sums over ranks")
            .map_err(failed)?;
        let over_nccl = time(device, rank, |elements| on_card(device, &x, elements, nccl))?;
        nccl.settle()?;
        let over_nccl = slowest(nccl, over_nccl)?;
        let mut notes = Vec::new();
        let mut good = Vec::new();
        for (reach, tried) in self.ways {
            match tried {
                Tried::OutOfReach(why) => notes.push(format!("{reach}: {why}")),
                Tried::Corrupts(why) => notes.push(format!("{reach} corrupts data: {why}")),
                Tried::Good(one_shot) => {
                    // So that somebody looks after the ranks meanwhile.
                    nccl.expect_device_sums()?;
                    let times = time(device, rank, |elements| {
                        one_shot.sum(device, &x, elements).map_err(failed)
                    })?;
                    nccl.settle()?;
                    good.push((reach, one_shot, slowest(nccl, times)?));
                }
            }
        }
        let times: Vec<Times> = good.iter().map(|(_, _, times)| *times).collect();
        let chosen = fastest(&over_nccl, &times);
        let seconds = |times: &Times| Microseconds(*times).to_string();
        for (reach, _, times) in &good {
            notes.push(format!("{reach} {}", seconds(times)));
        }
        let sizes: Vec<String> = SIZES.iter().map(ToString::to_string).collect();
        let figures = format!(
            "us for {} values: NCCL {}, {}",
            sizes.join(", "),
            seconds(&over_nccl),
            notes.join(", ")
        );
        Ok(match chosen {
            None => (None, format!("sums over ranks: NCCL ({figures})")),
            Some((way, most)) => {
                let (reach, one_shot, _) = good.swap_remove(way);
                let choice = format!(
                    "sums over ranks: one shot over {reach} up to {most} values ({figures})"
                );
                (Some(SmallSums { one_shot, most }), choice)
            }
        })
    }
}

struct Microseconds(Times);

impl fmt::Display for Microseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times: Vec<String> = self.0.iter().map(|s| format!("{:.1}", 1e6 * s)).collect();
        f.write_str(&times.join("/"))
    }
}

fn failure(rank: usize, what: String) -> CollectiveError {
    CollectiveError::Device {
        rank,
        op: "small sums",
        what,
    }
}

/// The way that is faster than NCCL up to the largest of [`SIZES`], and that size; of two such the one
/// that is faster for the smallest.
fn fastest(nccl: &Times, ways: &[Times]) -> Option<(usize, usize)> {
    let faster = |times: &Times| {
        let pairs = times.iter().zip(nccl);
        pairs.take_while(|(own, nccl)| own < nccl).count()
    };
    let best = (0..ways.len()).max_by(|&a, &b| {
        let sizes = faster(&ways[a]).cmp(&faster(&ways[b]));
        sizes.then(ways[b][0].total_cmp(&ways[a][0]))
    })?;
    let sizes = faster(&ways[best]);
    Some((best, SIZES[sizes.checked_sub(1)?]))
}

/// What every rank sent, in rank order, on every rank.
fn all_gather(
    collective: &mut dyn Collective,
    own: Vec<u8>,
) -> Result<Vec<Vec<u8>>, CollectiveError> {
    let rank = collective.rank();
    let all = collective.gather_to_root(own)?;
    let mut packed = Vec::new();
    for bytes in &all {
        packed.extend((bytes.len() as u64).to_le_bytes());
        packed.extend(bytes);
    }
    let packed = collective.broadcast(packed)?;
    let mut rest = packed.as_slice();
    let mut all = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (bytes, after) = after
            .split_at_checked(length)
            .ok_or_else(|| failure(rank, "what rank 0 sent is cut off".into()))?;
        all.push(bytes.to_vec());
        rest = after;
    }
    match all.len() == collective.world_size() {
        true => Ok(all),
        false => Err(failure(rank, "rank 0 did not hear of every rank".into())),
    }
}

/// What the first rank that has a problem says, on every rank.
fn first_problem(
    collective: &mut dyn Collective,
    own: Option<&String>,
) -> Result<Option<String>, CollectiveError> {
    let own = own.map(String::as_str).unwrap_or_default();
    let all = all_gather(collective, own.as_bytes().to_vec())?;
    let first = all.iter().enumerate().find(|(_, what)| !what.is_empty());
    Ok(first.map(|(rank, what)| format!("rank {rank}: {}", String::from_utf8_lossy(what))))
}

/// The largest of all ranks' times.
fn slowest(collective: &mut dyn Collective, own: Times) -> Result<Times, CollectiveError> {
    let rank = collective.rank();
    let bytes = own.iter().flat_map(|time| time.to_le_bytes()).collect();
    let mut most = [0.0; SIZES.len()];
    for bytes in all_gather(collective, bytes)? {
        let (times, rest) = bytes.as_chunks::<8>();
        if times.len() != most.len() || !rest.is_empty() {
            return Err(failure(rank, "a rank timed other sums".into()));
        }
        for (most, time) in most.iter_mut().zip(times) {
            *most = f64::max(*most, f64::from_le_bytes(*time));
        }
    }
    Ok(most)
}

/// Element `index` of round `round` on `rank`: whole numbers, whose sums are exact.
fn known(rank: usize, round: usize, index: usize) -> f32 {
    ((index * 7 + round * 131 + rank * 1009) % 8191) as f32
}

/// Sums numbers that are known, `sizes` of them; says what is wrong. Whoever waits in vain is ended
/// through `stop`, or else by the collective.
fn check(
    device: &Device,
    (rank, ranks): (usize, usize),
    sizes: &[usize],
    stop: Option<&Stop>,
    mut sum: impl FnMut(&Memory<f32>, usize) -> Result<(), String>,
) -> Result<(), String> {
    let words = |error: CudaError| error.to_string();
    let mut sums = Vec::new();
    for (round, &elements) in sizes.iter().enumerate() {
        let own: Vec<f32> = (0..elements).map(|i| known(rank, round, i)).collect();
        sums.push(device.upload(&own, "known sums").map_err(words)?);
    }
    for (x, &elements) in sums.iter().zip(sizes) {
        sum(x, elements)?;
    }
    let event = device.event().map_err(words)?;
    let start = Instant::now();
    while !event.is_past().map_err(words)? {
        if let Some(stop) = stop
            && start.elapsed() > PATIENCE
        {
            stop.raise();
            device.synchronize().map_err(words)?;
            return Err("what other ranks sent did not arrive".into());
        }
        thread::sleep(Duration::from_micros(50));
    }
    for (round, (x, &elements)) in sums.iter().zip(sizes).enumerate() {
        let mut got = vec![0.0; elements];
        device.read(x, 0, &mut got).map_err(words)?;
        for (index, got) in got.into_iter().enumerate() {
            let expected: f32 = (0..ranks).map(|rank| known(rank, round, index)).sum();
            if got != expected {
                return Err(format!(
                    "value {index} of sum {round} over {elements} is {got}, not {expected}"
                ));
            }
        }
    }
    Ok(())
}

/// Seconds of a sum of each of [`SIZES`], many in a row.
fn time(
    device: &Device,
    rank: usize,
    mut sum: impl FnMut(usize) -> Result<(), CollectiveError>,
) -> Result<Times, CollectiveError> {
    let failed = |error: CudaError| failure(rank, error.to_string());
    let mut times = [f64::INFINITY; SIZES.len()];
    for (time, elements) in times.iter_mut().zip(SIZES) {
        // Once outside of a recording: what is made at the first use must not be made within one.
        sum(elements)?;
        let recording = device.start_recording().map_err(failed)?;
        (0..SUMS).try_for_each(|_| sum(elements))?;
        let graph = recording.finish().map_err(failed)?;
        let replay = || -> Result<f64, CudaError> {
            let start = device.event()?;
            device.replay(&graph)?;
            let end = device.event()?;
            device.seconds_between(&start, &end)
        };
        replay().map_err(failed)?;
        for _ in 0..REPLAYS {
            *time = time.min(replay().map_err(failed)? / SUMS as f64);
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;

    #[test]
    fn the_way_that_wins_up_to_the_largest_size_is_taken() {
        let nccl = [10.0, 10.0, 12.0, 20.0];
        let peer = [3.0, 4.0, 8.0, 25.0];
        let host = [5.0, 9.0, 15.0, 60.0];
        assert_eq!(fastest(&nccl, &[peer, host]), Some((0, SIZES[2])));
        assert_eq!(fastest(&nccl, &[host]), Some((0, SIZES[1])));
        assert_eq!(fastest(&[2.0; 4], &[peer, host]), None);
        // Faster for large sums only: which of them are small depends on nothing else.
        assert_eq!(fastest(&nccl, &[[11.0, 1.0, 1.0, 1.0]]), None);
        assert_eq!(
            fastest(&nccl, &[host.map(|t| t / 10.0), peer.map(|t| t / 10.0)]),
            Some((1, SIZES[3]))
        );
        assert_eq!(fastest(&nccl, &[]), None);
    }

    #[test]
    fn every_rank_hears_every_rank() {
        let meshes = local::meshes(3, Duration::from_secs(5));
        let ranks: Vec<_> = meshes
            .into_iter()
            .enumerate()
            .map(|(rank, mut mesh)| {
                thread::spawn(move || {
                    let all = all_gather(&mut mesh, vec![rank as u8; rank]).unwrap();
                    assert_eq!(all, [vec![], vec![1], vec![2, 2]]);
                    let problem = (rank > 0).then(|| format!("no {rank}"));
                    let first = first_problem(&mut mesh, problem.as_ref()).unwrap();
                    assert_eq!(first.unwrap(), "rank 1: no 1");
                    assert_eq!(first_problem(&mut mesh, None).unwrap(), None);
                    let times = slowest(&mut mesh, [rank as f64, 1.0, 5.0 - rank as f64, 0.5]);
                    assert_eq!(times.unwrap(), [2.0, 1.0, 5.0, 0.5]);
                })
            })
            .collect();
        for rank in ranks {
            rank.join().unwrap();
        }
    }
}
