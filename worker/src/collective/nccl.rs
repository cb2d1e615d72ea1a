//! Sums over NCCL: a function table of our own, opened at run time.
//!
//! The ranks already meet over a host link (memory or gRPC), which carries NCCL's unique id, what
//! rank 0 says of it, and the few bytes that sampling exchanges. Sums are put on the card's stream and
//! not waited for. A watchdog aborts the communicator from another thread when a peer is gone, a sum is
//! late or the epoch is over, so that the stream never waits for ever.
#![allow(unsafe_code)]

use std::{
    ffi::{c_char, c_int, c_void},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Collective, CollectiveBuffer, CollectiveError};

mod environment;
mod library;

pub use environment::{choose_interface, disable_p2p};
use library::{Code, Comm, CommConfig, FLOAT32, IN_PROGRESS, SUCCESS, SUM, UniqueId, text};
pub use library::{Nccl, NcclError};

/// How often the watchdog looks at a communicator that has work.
const LOOK: Duration = Duration::from_millis(20);
/// How long the end of a communicator is waited for.
const MOST_CLOSING: Duration = Duration::from_secs(5);
/// How long a call that NCCL works on is polled without sleeping.
const AWAKE: Duration = Duration::from_millis(2);

/// The collective of a rank with a card: sums over NCCL, everything else over the host link.
pub struct NcclCollective {
    host: Box<dyn Collective>,
    shared: Arc<Shared>,
    deadline: Duration,
    watchdog: thread::JoinHandle<()>,
}

/// What the engine's thread and the watchdog share.
struct Shared {
    nccl: Arc<Nccl>,
    cancelled: Arc<AtomicBool>,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    /// Null once aborted.
    comm: Comm,
    /// When the sums given so far must be done; absent while there are none.
    due: Option<Instant>,
    /// Why the communicator was aborted.
    aborted: Option<String>,
    closing: bool,
    /// Ends what waits for other ranks beside NCCL.
    on_end: Box<dyn Fn() + Send>,
}

// SAFETY: a communicator may be used from any thread, one at a time, which the mutex ensures.
unsafe impl Send for State {}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the communicator; what the stream waits for in it ends with an error or garbage. NCCL
    /// comes back only when every recording that sums with it is gone, so the state is let go before:
    /// whoever holds the recordings must learn of the end to drop them.
    fn abort(&self, mut state: MutexGuard<'_, State>, why: String) {
        let comm = std::mem::replace(&mut state.comm, std::ptr::null_mut());
        if !comm.is_null() {
            state.aborted.get_or_insert(why);
            // First, for what NCCL waits for may lie behind it on the stream.
            (state.on_end)();
            drop(state);
            // SAFETY: valid until here, and nobody has it any more.
            unsafe { (self.nccl.abort)(comm) };
        }
    }

    /// What NCCL itself says of the communicator.
    fn async_error(&self, state: &State) -> Code {
        let mut code = SUCCESS;
        // SAFETY: only called while the communicator is valid.
        let asked = unsafe { (self.nccl.async_error)(state.comm, &mut code) };
        if asked == SUCCESS { code } else { asked }
    }

    /// Looks after the communicator until it is closed, and ends it; sleeps while nothing is due.
    fn watch(&self) {
        let mut state = self.lock();
        loop {
            if state.closing {
                return self.abort(state, "the rank left".into());
            }
            let Some(due) = state.due else {
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let code = self.async_error(&state);
            if self.cancelled.load(Ordering::Relaxed) {
                return self.abort(state, "the epoch is over".into());
            } else if code != SUCCESS && code != IN_PROGRESS {
                let why = self.nccl.error("all_reduce_sum", code).to_string();
                return self.abort(state, why);
            } else if Instant::now() > due {
                return self.abort(state, "a sum did not come in time".into());
            } else {
                let waited = self.wake.wait_timeout(state, LOOK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

impl NcclCollective {
    /// Joins the ranks of `host` in one communicator on the card that is current on this thread.
    ///
    /// # Errors
    /// Unlike versions, a rank that did not come before `deadline`, or NCCL's own.
    pub fn join(
        nccl: Arc<Nccl>,
        mut host: Box<dyn Collective>,
        cancelled: Arc<AtomicBool>,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let (rank, world) = (host.rank(), host.world_size());
        let failed = |what: String| CollectiveError::Device {
            rank,
            op: "nccl",
            what,
        };
        let versions = host.gather_to_root(nccl.version.to_le_bytes().to_vec())?;
        let offer = match rank {
            0 => offer(&nccl, &versions),
            _ => Vec::new(),
        };
        let offer = host.broadcast(offer)?;
        // Rank 0 sends an id or, of another length, why there is none.
        let Ok(id) = <[u8; 128]>::try_from(offer.as_slice()) else {
            return Err(failed(String::from_utf8_lossy(&offer).into_owned()));
        };
        let id = UniqueId(id.map(|byte| byte as c_char));
        let mut comm: Comm = std::ptr::null_mut();
        let mut config = CommConfig::non_blocking();
        // SAFETY: the pointers are valid for the call; NCCL copies what it keeps.
        let code =
            unsafe { (nccl.init)(&mut comm, world as c_int, id, rank as c_int, &mut config) };
        if code != SUCCESS && code != IN_PROGRESS {
            return Err(failed(nccl.error("connect", code).to_string()));
        }
        let state = State {
            comm,
            due: None,
            aborted: None,
            closing: false,
            on_end: Box::new(|| ()),
        };
        let shared = Arc::new(Shared {
            nccl,
            cancelled,
            state: Mutex::new(state),
            wake: Condvar::new(),
        });
        let due = Instant::now() + deadline;
        let connected = wait_while_in_progress(&shared, "connect", due);
        if let Err(why) = connected {
            shared.abort(shared.lock(), why.clone());
            return Err(failed(format!("connect: {why}")));
        }
        let watched = shared.clone();
        let watchdog = thread::Builder::new()
            .name("nccl watchdog".into())
            .spawn(move || watched.watch())
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            host,
            shared,
            deadline,
            watchdog,
        })
    }
}

impl NcclCollective {
    /// Has `end` called when the communicator ends, whatever the reason.
    pub fn on_end(&self, end: impl Fn() + Send + 'static) {
        self.shared.lock().on_end = Box::new(end);
    }

    /// Has the watchdog look, if it does not already.
    fn arm(&self, state: &mut State) {
        if state.due.is_none() {
            state.due = Some(Instant::now() + self.deadline);
            self.shared.wake.notify_one();
        }
    }
}

/// What rank 0 sends: an id, or why there is none.
fn offer(nccl: &Nccl, versions: &[Vec<u8>]) -> Vec<u8> {
    let own = nccl.version.to_le_bytes();
    if let Some((rank, other)) = versions
        .iter()
        .enumerate()
        .find(|(_, other)| **other != own)
    {
        let other = <[u8; 4]>::try_from(other.as_slice()).map_or(0, c_int::from_le_bytes);
        return format!(
            "rank 0 has NCCL {} and rank {rank} has {}: install the same version everywhere",
            nccl.version(),
            text(other)
        )
        .into_bytes();
    }
    let mut id = UniqueId([0; 128]);
    // SAFETY: the pointer is valid for the call.
    match unsafe { (nccl.unique_id)(&mut id) } {
        SUCCESS => id.0.iter().map(|&byte| byte as u8).collect(),
        code => nccl
            .error("make a unique id", code)
            .to_string()
            .into_bytes(),
    }
}

/// Waits until NCCL has done what was asked of it without blocking. A sum is on the stream within
/// microseconds, and a step has two in every layer, so it is not slept for at first; connecting takes long.
fn wait_while_in_progress(shared: &Shared, op: &'static str, due: Instant) -> Result<(), String> {
    let start = Instant::now();
    loop {
        let state = shared.lock();
        if let Some(why) = &state.aborted {
            return Err(why.clone());
        }
        let code = shared.async_error(&state);
        drop(state);
        match code {
            SUCCESS => return Ok(()),
            IN_PROGRESS if shared.cancelled.load(Ordering::Relaxed) => {
                return Err("the epoch is over".into());
            }
            IN_PROGRESS if Instant::now() > due => {
                return Err("the other ranks did not come in time".into());
            }
            IN_PROGRESS if start.elapsed() < AWAKE => thread::yield_now(),
            IN_PROGRESS => thread::sleep(Duration::from_millis(1)),
            code => return Err(shared.nccl.error(op, code).to_string()),
        }
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn takes_device(&self) -> bool {
        true
    }

    fn all_reduce_sum(&mut self, data: CollectiveBuffer<'_>) -> Result<(), CollectiveError> {
        let span = match data {
            CollectiveBuffer::Device(span) => span,
            host @ CollectiveBuffer::Host(_) => return self.host.all_reduce_sum(host),
        };
        let rank = self.host.rank();
        let failed = |what: String| CollectiveError::Device {
            rank,
            op: "all_reduce_sum",
            what,
        };
        let mut state = self.shared.lock();
        if let Some(why) = &state.aborted {
            return Err(failed(why.clone()));
        }
        let address = span.address as *mut c_void;
        // SAFETY: the span lies in memory of this rank's card, in whose stream it is used; NCCL sums in
        // place.
        let code = unsafe {
            (self.shared.nccl.all_reduce)(
                address,
                address,
                span.elements,
                FLOAT32,
                SUM,
                state.comm,
                span.stream as *mut c_void,
            )
        };
        if code != SUCCESS && code != IN_PROGRESS {
            return Err(failed(
                self.shared.nccl.error("all_reduce_sum", code).to_string(),
            ));
        }
        self.arm(&mut state);
        drop(state);
        if code == IN_PROGRESS {
            // The stream must not run ahead of a sum that is not on it yet.
            wait_while_in_progress(
                &self.shared,
                "all_reduce_sum",
                Instant::now() + self.deadline,
            )
            .map_err(failed)?;
        }
        Ok(())
    }

    fn expect_device_sums(&mut self) -> Result<(), CollectiveError> {
        let mut state = self.shared.lock();
        self.arm(&mut state);
        Ok(())
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        let mut state = self.shared.lock();
        state.due = None;
        match &state.aborted {
            None => Ok(()),
            // Whoever aborts does so because of the others; which of them NCCL does not say.
            Some(why) => Err(CollectiveError::Device {
                rank: self.host.rank(),
                op: "all_reduce_sum",
                what: why.clone(),
            }),
        }
    }

    fn gather_to_root(&mut self, data: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.host.gather_to_root(data)
    }

    fn broadcast(&mut self, data: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        self.host.broadcast(data)
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        // The watchdog aborts, for destroying waits for peers that may be gone. It is waited for, since a
        // process must not end while NCCL works, but not for ever: a card that hangs hangs NCCL, too.
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        let start = Instant::now();
        while !self.watchdog.is_finished() && start.elapsed() < MOST_CLOSING {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
