//! Sums over ranks: small ones in one launch where that wins, others over NCCL, or over the host.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use secondwind_kernels::cuda::{CudaError, Device, Event, Inbox, Memory, Pinned};

use super::one_shot::{Found, SmallSums};
use crate::collective::{
    Collective, CollectiveBuffer, CollectiveError, DeviceSpan,
    nccl::{self, Nccl, NcclCollective},
};

/// How long ranks wait for each other when they connect, and for a sum.
const NCCL_DEADLINE: Duration = Duration::from_secs(60);

/// What a card has for its sums.
pub(super) struct Sums {
    nccl: Option<Arc<Nccl>>,
    /// Made when ranks first meet, kept for those that come after.
    inbox: Option<Inbox>,
    /// Of the epoch.
    small: Option<SmallSums>,
    choice: Option<String>,
    aside: Option<Aside>,
}

/// A stream for sums beside what is computed.
struct Aside {
    device: Device,
    /// By part of the step: on the step's stream where its rows are there, on this one where their sum is.
    given: Vec<Event>,
    summed: Vec<Event>,
}

impl Sums {
    pub(super) fn new(nccl: Option<Arc<Nccl>>) -> Self {
        Self {
            nccl,
            inbox: None,
            small: None,
            choice: None,
            aside: None,
        }
    }

    /// Which sums go where, and why; absent before [`Sums::join`].
    pub(super) fn choice(&self) -> Option<&str> {
        self.choice.as_deref()
    }

    /// Lets go of the other ranks' memory.
    pub(super) fn end_epoch(&mut self) {
        self.small = None;
    }

    /// Joins the ranks of `host` over NCCL, and chooses what takes which sums.
    pub(super) fn join(
        &mut self,
        device: &Device,
        mut host: Box<dyn Collective>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<NcclCollective, CollectiveError> {
        let rank = host.rank();
        let failed = |what: String| CollectiveError::Device {
            rank,
            op: "nccl",
            what,
        };
        if let Some(Aside {
            device: stream,
            summed,
            ..
        }) = &mut self.aside
        {
            // A step that failed may have left a sum there, which nothing has waited for.
            put(stream, summed, 0)
                .and_then(|()| device.wait_for(&summed[0]))
                .map_err(|error| failed(error.to_string()))?;
        }
        let library = self.nccl.clone();
        let library = library.ok_or_else(|| failed("this worker found no NCCL".into()))?;
        let inbox = match self.inbox.take() {
            Some(inbox) => inbox,
            None => Inbox::new(device).map_err(|error| failed(error.to_string()))?,
        };
        let inbox = self.inbox.insert(inbox);
        let found = Found::look(device, inbox, host.as_mut())?;
        if let Some(why) = found.peers_corrupt() {
            tracing::warn!(
                rank,
                "data from card to card is corrupted, NCCL takes other ways: {why}"
            );
            nccl::disable_p2p();
        }
        let mut joined = NcclCollective::join(library, host, cancelled, NCCL_DEADLINE)?;
        let stops = found.stops();
        joined.on_end(move || stops.iter().for_each(|stop| stop.raise()));
        let (small, choice) = found.choose(device, &mut joined)?;
        tracing::info!(rank, "{choice}");
        self.small = small;
        self.choice = Some(choice);
        Ok(joined)
    }

    /// Replaces `x`, which is made by what was given to `device`, by its sum over the ranks of `collective`,
    /// beside what is given to `device` next.
    pub(super) fn start(
        &mut self,
        device: &Device,
        x: &Memory<f32>,
        part: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        let failed = failed_on(collective.rank());
        let aside = match self.aside.take() {
            Some(aside) => aside,
            None => Aside {
                device: device.with_new_stream().map_err(failed)?,
                given: Vec::new(),
                summed: Vec::new(),
            },
        };
        let Aside {
            device: stream,
            given,
            summed,
        } = self.aside.insert(aside);
        put(device, given, part).map_err(failed)?;
        stream.wait_for(&given[part]).map_err(failed)?;
        on_card(stream, x, x.len(), collective)?;
        put(stream, summed, part).map_err(failed)
    }

    /// Has what is given to `device` next wait for the sum of `part`.
    pub(super) fn wait(&self, device: &Device, part: usize) -> Result<(), CudaError> {
        let summed = self.aside.as_ref().and_then(|aside| aside.summed.get(part));
        summed.map_or(Ok(()), |summed| device.wait_for(summed))
    }

    /// Replaces `elements` of `x` by their sum over the ranks of `collective`; `host` is for links that take
    /// host memory only.
    pub(super) fn sum(
        &self,
        device: &Device,
        x: &Memory<f32>,
        elements: usize,
        host: &mut Pinned<f32>,
        collective: &mut dyn Collective,
    ) -> Result<(), CollectiveError> {
        let failed = failed_on(collective.rank());
        if !collective.takes_device() {
            let host = &mut host.as_mut_slice()[..elements];
            device.read(x, 0, host).map_err(failed)?;
            collective.all_reduce_sum(CollectiveBuffer::Host(host))?;
            return device.write(x, 0, host).map_err(failed);
        }
        match &self.small {
            Some(small) if small.takes(elements) => {
                small.sum(device, x, elements).map_err(failed)?;
                collective.expect_device_sums()
            }
            _ => on_card(device, x, elements, collective),
        }
    }
}

/// Moves event `part` to this point of the stream, or makes it there; the earlier ones are there.
fn put(device: &Device, events: &mut Vec<Event>, part: usize) -> Result<(), CudaError> {
    while events.len() <= part {
        events.push(device.event()?);
    }
    device.put(&events[part])
}

/// The card's word on a sum of this rank.
fn failed_on(rank: usize) -> impl Fn(CudaError) -> CollectiveError + Copy {
    move |error| CollectiveError::Device {
        rank,
        op: "all_reduce_sum",
        what: error.to_string(),
    }
}

/// A sum by a collective that takes a card's memory.
pub(super) fn on_card(
    device: &Device,
    x: &Memory<f32>,
    elements: usize,
    collective: &mut dyn Collective,
) -> Result<(), CollectiveError> {
    collective.all_reduce_sum(CollectiveBuffer::Device(DeviceSpan {
        address: x.address(),
        elements,
        stream: device.stream_address(),
    }))
}
