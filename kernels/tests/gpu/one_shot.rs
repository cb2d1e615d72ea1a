//! Sums over ranks, which here share one card, each with a stream of its own.

use std::{
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use secondwind_kernels::cuda::{Device, Inbox, Memory, OneShot, Reach, Stop, Ticket};

use crate::{common::Random, told};

/// Odd, whole, one value, all that fits: more of them than an inbox has halves.
const SIZES: [usize; 9] = [
    5120,
    1,
    OneShot::MOST_ELEMENTS,
    1023,
    513,
    OneShot::MOST_ELEMENTS - 1,
    2,
    OneShot::MOST_ELEMENTS,
    20480,
];

struct Rank {
    device: Device,
    inbox: Inbox,
}

pub fn sums(device: &Device, random: &mut Random) -> Result<(), String> {
    for ranks in [2, 3] {
        let group = (0..ranks)
            .map(|_| {
                let device = device.with_new_stream().map_err(told)?;
                let inbox = Inbox::new(&device).map_err(told)?;
                Ok(Rank { device, inbox })
            })
            .collect::<Result<Vec<_>, String>>()?;
        for reach in [Reach::Peer, Reach::Host] {
            // Twice: what the first group left in the inboxes must not reach the second.
            for _ in 0..2 {
                group_sums(&group, reach, random)?;
            }
            gives_up(&group, reach)?;
        }
    }
    Ok(())
}

fn open(group: &[Rank], reach: Reach) -> Result<Vec<OneShot>, String> {
    let offers = group
        .iter()
        .enumerate()
        .map(|(rank, it)| it.inbox.offer(&it.device, rank, group.len()).map_err(told))
        .collect::<Result<Vec<_>, String>>()?;
    let tickets = offers
        .iter()
        .map(|offer| Ticket::from_bytes(&offer.ticket.to_bytes()))
        .collect::<Result<Vec<_>, String>>()?;
    let open = |(rank, it): (usize, &Rank)| {
        let stop = Arc::new(Stop::new(&it.device).map_err(told)?);
        OneShot::open(&it.device, reach, rank, &tickets, &it.inbox, stop).map_err(told)
    };
    group.iter().enumerate().map(open).collect()
}

fn group_sums(group: &[Rank], reach: Reach, random: &mut Random) -> Result<(), String> {
    let one_shots = open(group, reach)?;
    let values: Vec<Vec<Vec<f32>>> = SIZES
        .iter()
        .map(|&elements| group.iter().map(|_| random.floats(elements)).collect())
        .collect();
    // The card may finish what runs on it before it hands out memory.
    let uploaded = Barrier::new(group.len());
    let sums = thread::scope(|scope| {
        let running: Vec<_> = group
            .iter()
            .zip(&one_shots)
            .enumerate()
            .map(|(rank, (it, one_shot))| {
                let (values, uploaded) = (&values, &uploaded);
                scope.spawn(move || -> Result<Vec<Vec<f32>>, String> {
                    let device = &it.device;
                    let own = values.iter().map(|ranks| &ranks[rank]);
                    let memory = own
                        .map(|own| device.upload(own, "a test").map_err(told))
                        .collect::<Result<Vec<Memory<f32>>, String>>();
                    uploaded.wait();
                    let memory = memory?;
                    // In one go, so that rounds follow each other as closely as they can.
                    for x in &memory {
                        one_shot.sum(device, x, x.len()).map_err(told)?;
                    }
                    let read = |x: &Memory<f32>| {
                        let mut sum = vec![f32::NAN; x.len()];
                        device.read(x, 0, &mut sum).map_err(told)?;
                        Ok(sum)
                    };
                    memory.iter().map(read).collect()
                })
            })
            .collect();
        let joined = running.into_iter().map(|rank| rank.join());
        joined
            .map(|sums| sums.map_err(|_| "a rank panicked".to_owned())?)
            .collect::<Result<Vec<_>, String>>()
    })?;
    for (rank, sums) in sums.iter().enumerate() {
        for (sum, ranks) in sums.iter().zip(&values) {
            for (index, &got) in sum.iter().enumerate() {
                // In rank order, so the bits are known.
                let expected = ranks[1..]
                    .iter()
                    .fold(ranks[0][index], |sum, of| sum + of[index]);
                if got.to_bits() != expected.to_bits() {
                    let (ranks, elements) = (ranks.len(), sum.len());
                    return Err(format!(
                        "over {reach}, rank {rank} of {ranks}: value {index} of {elements} is {got}, not {expected}"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// A rank that waits for one that never comes.
fn gives_up(group: &[Rank], reach: Reach) -> Result<(), String> {
    let one_shots = open(group, reach)?;
    let device = &group[1].device;
    let x = device.upload(&[1.0f32; 5120], "a test").map_err(told)?;
    for _ in 0..3 {
        one_shots[1].sum(device, &x, 5120).map_err(told)?;
    }
    let event = device.event().map_err(told)?;
    thread::sleep(Duration::from_millis(20));
    if event.is_past().map_err(told)? {
        return Err(format!("over {reach}: a sum ended without the other ranks"));
    }
    one_shots[1].stop().raise();
    // Waits for good, should nobody have heard.
    device.synchronize().map_err(told)
}
