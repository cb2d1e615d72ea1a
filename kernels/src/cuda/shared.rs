//! Memory of one rank that the cards of others reach: a card's own, over the bus between cards, or
//! memory of the host that several processes map.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use cudarc::driver::{CudaContext, DriverError, sys};
use memmap2::{MmapOptions, MmapRaw};
use serde::{Deserialize, Serialize};

use super::{
    CudaError, Memory, Pinned,
    device::{Device, driver_error},
};

/// Where processes of a host leave memory for each other.
const SHARED_FOLDER: &str = "/dev/shm";

/// How to reach memory of a card from another one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CardMemory {
    process: u32,
    /// Within the process.
    context: u64,
    /// Within the process.
    address: u64,
    /// Of other processes.
    handle: Vec<u8>,
}

/// Memory of another card, within reach of this one.
pub(super) struct Reached {
    pub address: u64,
    /// Set if another process has it.
    foreign: Option<Arc<CudaContext>>,
}

/// Host memory that several processes map and their cards reach.
pub(super) struct HostMemory {
    pub address: u64,
    map: MmapRaw,
    context: Arc<CudaContext>,
}

/// The file through which processes find [`HostMemory`]; it goes with this.
pub(super) struct HostFile(PathBuf);

/// A word that a card reads while it waits, and that the host sets when nobody may wait any more.
pub struct Stop(Pinned<u32>);

// SAFETY: the word is only touched as an atomic.
unsafe impl Sync for Stop {}

impl Stop {
    /// A card that reads it waits.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self(device.pinned(1)?))
    }

    /// Whoever waits gives up, also in whatever is still to run.
    pub fn raise(&self) {
        let word = self.0.as_slice().as_ptr().cast_mut();
        // SAFETY: the word lives as long as `self`, is aligned, and nobody writes it but here.
        unsafe { AtomicU32::from_ptr(word) }.store(1, Ordering::SeqCst);
    }

    pub(super) fn address(&self) -> u64 {
        // Page-locked memory has the same address on the card.
        self.0.as_slice().as_ptr() as u64
    }
}

impl CardMemory {
    /// Of memory that is an allocation of its own.
    pub fn of(device: &Device, memory: &Memory<u8>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the address is that of an allocation, and the pointer is valid for the call.
        let code = unsafe { sys::cuIpcGetMemHandle(&mut handle, memory.address()) };
        code.result()
            .map_err(|error| driver_error("share a card's memory", error))?;
        Ok(Self {
            process: std::process::id(),
            context: device.context.cu_ctx() as u64,
            address: memory.address(),
            handle: handle.reserved.map(|byte| byte as u8).to_vec(),
        })
    }

    /// Brings it within reach of `device`.
    pub fn reach(&self, device: &Device) -> Result<Reached, CudaError> {
        device.bind()?;
        let failed = |error: DriverError| driver_error("reach another card's memory", error);
        if self.process == std::process::id() {
            if self.context != device.context.cu_ctx() as u64 {
                // SAFETY: the context is one of this process, which the ranks leave open.
                let code = unsafe { sys::cuCtxEnablePeerAccess(self.context as *mut _, 0) };
                if code != sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
                    code.result().map_err(failed)?;
                }
            }
            return Ok(Reached {
                address: self.address,
                foreign: None,
            });
        }
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        for (to, from) in handle.reserved.iter_mut().zip(&self.handle) {
            *to = *from as _;
        }
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver checks the handle; the pointer is valid for the call.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) }
            .result()
            .map_err(failed)?;
        Ok(Reached {
            address,
            foreign: Some(device.context.clone()),
        })
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        if let Some(context) = &self.foreign {
            let _ = context.bind_to_thread();
            // SAFETY: opened once, closed once; whoever held it has waited for the card.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

impl HostFile {
    /// A file of `bytes` zeros that only this user can open.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let name = getrandom::u64().map_err(|error| std::io::Error::other(error.to_string()))?;
        let path = Path::new(SHARED_FOLDER).join(format!("secondwind-{name:016x}"));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let made = Self(path);
        file.set_len(bytes)?;
        Ok(made)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Whoever has mapped it keeps the memory.
        let _ = fs::remove_file(&self.0);
    }
}

impl HostMemory {
    /// Maps `file` and brings it within reach of `device`.
    pub fn open(device: &Device, file: &Path, bytes: usize) -> Result<Self, CudaError> {
        let failed = |why: String| CudaError::OutOfReach {
            what: file.display().to_string(),
            why,
        };
        let opened = OpenOptions::new().read(true).write(true).open(file);
        let opened = opened.map_err(|error| failed(error.to_string()))?;
        let long_enough = opened.metadata().is_ok_and(|it| it.len() == bytes as u64);
        if !long_enough {
            return Err(failed(format!("it does not have {bytes} bytes")));
        }
        let map = MmapOptions::new().len(bytes).map_raw(&opened);
        let map = map.map_err(|error| failed(error.to_string()))?;
        device.bind()?;
        let pointer = map.as_mut_ptr().cast();
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the range is mapped until `Drop`, which takes it from the driver before.
        unsafe { sys::cuMemHostRegister_v2(pointer, bytes, flags) }
            .result()
            .map_err(|error| driver_error("lock shared host memory", error))?;
        let mut memory = Self {
            address: 0,
            map,
            context: device.context.clone(),
        };
        // SAFETY: registered above, and the pointer is valid for the call.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut memory.address, pointer, 0) }
            .result()
            .map_err(|error| driver_error("reach shared host memory", error))?;
        Ok(memory)
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: registered by `HostMemory::open`; whoever held it has waited for the card.
        let _ = unsafe { sys::cuMemHostUnregister(self.map.as_mut_ptr().cast()) };
    }
}
