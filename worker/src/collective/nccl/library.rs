//! NCCL's functions as far as they are used, looked up one by one when the library is opened.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    path::Path,
};

use libloading::Library;

/// Names under which the dynamic linker may know NCCL.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first version that can be aborted while it connects.
const OLDEST: (i32, i32) = (2, 18);

pub(super) type Comm = *mut c_void;
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;
pub(super) const FLOAT32: c_int = 7;
pub(super) const SUM: c_int = 0;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub [c_char; 128]);

/// `ncclConfig_t` as of 2.18, which later versions read by its size.
#[repr(C)]
pub(super) struct CommConfig {
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
    pub fn non_blocking() -> Self {
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
    pub(super) version: c_int,
    pub(super) unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub(super) init:
        unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut CommConfig) -> Code,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        *mut c_void,
    ) -> Code,
    pub(super) async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    pub(super) abort: unsafe extern "C" fn(Comm) -> Code,
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

    pub(super) fn error(&self, op: &'static str, code: Code) -> NcclError {
        // SAFETY: the library returns a static string for every code.
        let words = unsafe { CStr::from_ptr((self.error_string)(code)) };
        NcclError::Call {
            op,
            what: words.to_string_lossy().into_owned(),
        }
    }
}

fn parts(version: c_int) -> (i32, i32, i32) {
    (version / 10_000, version / 100 % 100, version % 100)
}

pub(super) fn text(version: c_int) -> String {
    let (major, minor, patch) = parts(version);
    format!("{major}.{minor}.{patch}")
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
    fn versions_read_as_people_write_them() {
        assert_eq!(text(21_803), "2.18.3");
        assert!(parts(23_203) > (OLDEST.0, OLDEST.1, 0) && parts(21_705) < (OLDEST.0, OLDEST.1, 0));
    }
}
