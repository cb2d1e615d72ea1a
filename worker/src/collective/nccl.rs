//! Sums over NCCL: a function table of our own, opened at run time.
//!
//! The ranks already meet over a host link (memory or gRPC), which carries NCCL's unique id, what
//! rank 0 says of it, and the few bytes that sampling exchanges. Sums are put on the card's stream and
//! not waited for. A watchdog aborts the communicator from another thread when a peer is gone, a sum is
//! late or the epoch is over, so that the stream never waits for ever.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use libloading::Library;

use super::{Collective, CollectiveBuffer, CollectiveError};

/// Names under which the dynamic linker may know NCCL.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first version that can be aborted while it connects.
const OLDEST: (i32, i32) = (2, 18);
/// How often the watchdog looks at a communicator that has work.
const LOOK: Duration = Duration::from_millis(20);
/// How long the end of a communicator is waited for.
const MOST_CLOSING: Duration = Duration::from_secs(5);
/// How long a call that NCCL works on is polled without sleeping.
const AWAKE: Duration = Duration::from_millis(2);

/// `1` keeps NCCL from moving data from card to card.
const P2P_DISABLE: &str = "NCCL_P2P_DISABLE";

type Comm = *mut c_void;
type Code = c_int;

const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

/// `ncclConfig_t` as of 2.18, which later versions read by its size.
#[repr(C)]
struct CommConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl CommConfig {
    /// Nothing chosen but that calls return at once.
    fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_803,
            blocking: 0,
            cga_cluster_size: c_int::MIN,
            min_ctas: c_int::MIN,
            max_ctas: c_int::MIN,
            net_name: std::ptr::null(),
            split_share: c_int::MIN,
        }
    }
}

/// An opened NCCL.
#[derive(Debug)]
pub struct Nccl {
    version: c_int,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut CommConfig) -> Code,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        *mut c_void,
    ) -> Code,
    async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    abort: unsafe extern "C" fn(Comm) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    /// Keeps the functions alive.
    _library: Library,
}

/// Why NCCL cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// It cannot be opened.
    #[error(
        "NCCL cannot be opened ({tried}): install the build for CUDA 12 (pip: nvidia-nccl-cu12; builds for CUDA 13 lack Pascal and Volta) or give --nccl-library"
    )]
    Missing {
        /// Names that were tried.
        tried: String,
    },
    /// It lacks what is needed.
    #[error("NCCL {version} is too old: 2.18 or newer is needed (pip: nvidia-nccl-cu12)")]
    TooOld {
        /// Its version.
        version: String,
    },
    /// No interface is as asked.
    #[error("no network interface is or has {wanted}; there are {known} (worker.nccl_interface)")]
    Interface {
        /// A name or an address.
        wanted: String,
        /// The interfaces that there are.
        known: String,
    },
    /// A call failed.
    #[error("{op}: {what}")]
    Call {
        /// The call.
        op: &'static str,
        /// NCCL's words.
        what: String,
    },
}

impl Nccl {
    /// Opens `library`, or what the linker finds.
    ///
    /// # Errors
    /// That there is none, or one that is too old.
    pub fn open(library: Option<&Path>) -> Result<Self, NcclError> {
        let names: Vec<_> = match library {
            Some(path) => vec![path.as_os_str()],
            None => NAMES.iter().map(std::ffi::OsStr::new).collect(),
        };
        let missing = || {
            let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
            NcclError::Missing {
                tried: names.join(", "),
            }
        };
        // SAFETY: opening runs the library's initialisers, which only set up tables.
        let library = names
            .iter()
            .find_map(|name| unsafe { Library::new(*name) }.ok())
            .ok_or_else(missing)?;
        // SAFETY: the types are those of nccl.h, stable since 2.18; the library outlives them.
        unsafe {
            let lacks = |_| missing();
            let get_version: unsafe extern "C" fn(*mut c_int) -> Code =
                *library.get(b"ncclGetVersion\0").map_err(lacks)?;
            let mut version = 0;
            get_version(&mut version);
            if parts(version) < (OLDEST.0, OLDEST.1, 0) {
                return Err(NcclError::TooOld {
                    version: text(version),
                });
            }
            Ok(Self {
                version,
                unique_id: *library.get(b"ncclGetUniqueId\0").map_err(lacks)?,
                init: *library.get(b"ncclCommInitRankConfig\0").map_err(lacks)?,
                all_reduce: *library.get(b"ncclAllReduce\0").map_err(lacks)?,
                async_error: *library.get(b"ncclCommGetAsyncError\0").map_err(lacks)?,
                abort: *library.get(b"ncclCommAbort\0").map_err(lacks)?,
                error_string: *library.get(b"ncclGetErrorString\0").map_err(lacks)?,
                _library: library,
            })
        }
    }

    /// `2.27.7` and so on: ranks must have the same.
    pub fn version(&self) -> String {
        text(self.version)
    }

    fn error(&self, op: &'static str, code: Code) -> NcclError {
        // SAFETY: the library returns a static string for every code.
        let words = unsafe { CStr::from_ptr((self.error_string)(code)) };
        NcclError::Call {
            op,
            what: words.to_string_lossy().into_owned(),
        }
    }
}

/// Has NCCL's sockets, which know no authentication, use one interface only: the named one, what the
/// environment says already, or the one that has `address`. Gives the interface's name.
///
/// # Errors
/// [`NcclError::Interface`] if there is no such interface.
pub fn choose_interface(named: Option<&str>, address: IpAddr) -> Result<String, NcclError> {
    const VARIABLE: &str = "NCCL_SOCKET_IFNAME";
    if std::env::var_os(P2P_DISABLE).is_none() {
        // As if it were not set, but there: `disable_p2p` may come later.
        // SAFETY: as below.
        unsafe { std::env::set_var(P2P_DISABLE, "0") };
    }
    if let (None, Ok(set)) = (named, std::env::var(VARIABLE)) {
        return Ok(set);
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let chosen = interfaces.iter().find(|interface| match named {
        Some(name) => interface.name == name,
        None => interface.ip() == address,
    });
    let Some(chosen) = chosen else {
        let mut known: Vec<_> = interfaces.iter().map(|it| it.name.as_str()).collect();
        known.dedup();
        return Err(NcclError::Interface {
            wanted: named.map_or_else(|| address.to_string(), str::to_owned),
            known: known.join(", "),
        });
    };
    // SAFETY: comes before the worker's own threads start; the runtime's read no environment meanwhile.
    unsafe { std::env::set_var(VARIABLE, format!("={}", chosen.name)) };
    Ok(chosen.name.clone())
}

/// Has NCCL move nothing from card to card, for what arrives there is wrong.
pub fn disable_p2p() {
    // SAFETY: the C library replaces a variable that is there in one store and frees nothing, so that
    // threads which read the environment meanwhile see the one or the other; `choose_interface` made it.
    unsafe { std::env::set_var(P2P_DISABLE, "1") };
}

fn parts(version: c_int) -> (i32, i32, i32) {
    (version / 10_000, version / 100 % 100, version % 100)
}

fn text(version: c_int) -> String {
    let (major, minor, patch) = parts(version);
    format!("{major}.{minor}.{patch}")
}

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
        let connected = wait_while_in_progress(&shared, due);
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
fn wait_while_in_progress(shared: &Shared, due: Instant) -> Result<(), String> {
    let start = Instant::now();
    loop {
        let code = shared.async_error(&shared.lock());
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
            code => return Err(shared.nccl.error("connect", code).to_string()),
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
            wait_while_in_progress(&self.shared, Instant::now() + self.deadline).map_err(failed)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_a_sentence() {
        let error = Nccl::open(Some(Path::new("/nowhere/libnccl.so.2"))).unwrap_err();
        assert!(error.to_string().contains("nvidia-nccl-cu12"), "{error}");
    }

    #[test]
    fn an_unknown_interface_is_refused_with_those_that_there_are() {
        let address = IpAddr::from([127, 0, 0, 1]);
        let error = choose_interface(Some("nowhere0"), address).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("nowhere0") && text.contains("lo"), "{text}");
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(text(21_803), "2.18.3");
        assert!(parts(23_203) > (OLDEST.0, OLDEST.1, 0) && parts(21_705) < (OLDEST.0, OLDEST.1, 0));
    }
}
