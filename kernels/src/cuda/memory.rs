//! Memory of a card and page-locked memory of the host.

use std::{
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use cudarc::driver::{CudaContext, result, sys};

use super::{
    CudaError,
    device::{Device, driver_error},
};

/// Bytes of a [`Chunk`] that begins with something small.
const CHUNK_BYTES: usize = 64 << 20;
/// What is larger begins a chunk of its own, as large as it takes: it would leave too much of another unused.
const MOST_SHARED_BYTES: usize = 16 << 20;
/// What the driver hands out is a multiple of this.
const PAGE_BYTES: usize = 2 << 20;
/// Of every buffer's address, as the driver's own.
const ALIGNMENT: usize = 256;

/// `len` elements of device memory, freed with the last part of its allocation.
pub struct Memory<T> {
    address: sys::CUdeviceptr,
    len: usize,
    allocation: Arc<Allocation>,
    of: PhantomData<T>,
}

struct Allocation {
    address: sys::CUdeviceptr,
    context: Arc<CudaContext>,
}

/// Device memory that many buffers share. What is left of it is only ever given out once, so nothing
/// needs to wait for work on a buffer that went away; it is freed with the last of them.
pub(super) struct Chunk {
    allocation: Weak<Allocation>,
    bytes: usize,
    used: usize,
}

/// The chunks of a card that have buffers.
pub(super) type Chunks = Mutex<Vec<Chunk>>;

/// Page-locked host memory, which the card copies from without the driver's help.
pub struct Pinned<T: Copy> {
    pointer: *mut T,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the pointer is owned, and host memory has no thread.
unsafe impl<T: Copy + Send> Send for Pinned<T> {}

impl Device {
    /// `len` zeroed elements, for `what`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or the driver's.
    pub fn zeros<T: Copy>(&self, len: usize, what: &'static str) -> Result<Memory<T>, CudaError> {
        self.bind()?;
        // A buffer of nothing still has an address.
        let bytes = (len * size_of::<T>()).max(1);
        let (address, allocation) = self.place(bytes.next_multiple_of(ALIGNMENT), what)?;
        let memory = Memory {
            address,
            len,
            allocation,
            of: PhantomData,
        };
        // SAFETY: the range lies within the allocation.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| driver_error(format!("clear {what}"), error))?;
        Ok(memory)
    }

    /// `bytes` zeroed bytes that share their allocation with nothing.
    pub(super) fn zeros_alone(
        &self,
        bytes: usize,
        what: &'static str,
    ) -> Result<Memory<u8>, CudaError> {
        self.bind()?;
        let allocation = self.allocate(bytes, what)?;
        let memory = Memory {
            address: allocation.address,
            len: bytes,
            allocation,
            of: PhantomData,
        };
        self.fill(&memory, 0)?;
        Ok(memory)
    }

    /// Room for `bytes`: in a chunk that has some left, or in a new one. The driver hands out whole pages,
    /// which would cost a model's many small tensors a twentieth of its size; they fill up what large ones
    /// leave of theirs.
    fn place(
        &self,
        bytes: usize,
        what: &'static str,
    ) -> Result<(sys::CUdeviceptr, Arc<Allocation>), CudaError> {
        // Between statements the list is as it should be, so a panic elsewhere does not spoil it.
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.retain(|chunk| chunk.allocation.strong_count() > 0);
        let large = bytes > MOST_SHARED_BYTES;
        let has_room = |chunk: &&mut Chunk| !large && chunk.used + bytes <= chunk.bytes;
        for chunk in chunks.iter_mut().filter(has_room) {
            if let Some(allocation) = chunk.allocation.upgrade() {
                let address = allocation.address + chunk.used as u64;
                chunk.used += bytes;
                return Ok((address, allocation));
            }
        }
        let wanted = match large {
            true => bytes.next_multiple_of(PAGE_BYTES),
            false => CHUNK_BYTES,
        };
        let (allocation, held) = match self.allocate(wanted, what) {
            Ok(allocation) => (allocation, wanted),
            // A card that has no room for a chunk may have room for this.
            Err(CudaError::OutOfMemory { .. }) => (self.allocate(bytes, what)?, bytes),
            Err(error) => return Err(error),
        };
        chunks.push(Chunk {
            allocation: Arc::downgrade(&allocation),
            bytes: held,
            used: bytes,
        });
        Ok((allocation.address, allocation))
    }

    fn allocate(&self, bytes: usize, what: &'static str) -> Result<Arc<Allocation>, CudaError> {
        // SAFETY: the address is checked by the driver, and freed once, by `Allocation`.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            match error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                true => CudaError::OutOfMemory {
                    what,
                    needed_bytes: bytes as u64,
                    free_bytes: self.memory().map_or(0, |(free, _)| free),
                },
                false => driver_error(format!("take {bytes} bytes for {what}"), error),
            }
        })?;
        Ok(Arc::new(Allocation {
            address,
            context: self.context.clone(),
        }))
    }

    /// A copy of `values`, complete when this returns.
    ///
    /// # Errors
    /// As [`Device::zeros`].
    pub fn upload<T: Copy>(
        &self,
        values: &[T],
        what: &'static str,
    ) -> Result<Memory<T>, CudaError> {
        let memory = self.zeros(values.len(), what)?;
        self.write(&memory, 0, values)?;
        self.synchronize()?;
        Ok(memory)
    }

    /// Writes `values` from element `first` on, in stream order. Host memory that is not pinned is
    /// copied before this returns.
    ///
    /// # Errors
    /// The driver's.
    pub fn write<T: Copy>(
        &self,
        memory: &Memory<T>,
        first: usize,
        values: &[T],
    ) -> Result<(), CudaError> {
        assert!(
            first + values.len() <= memory.len,
            "a write past device memory"
        );
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let address = memory.address + (first * size_of::<T>()) as u64;
        // SAFETY: the range lies within the allocation; pageable sources are staged by the driver.
        unsafe { result::memcpy_htod_async(address, values, self.stream.cu_stream()) }
            .map_err(|error| driver_error("copy to the card", error))
    }

    /// Reads `into.len()` elements from `first` on, after everything given before.
    ///
    /// # Errors
    /// The driver's; also what earlier launches ran into.
    pub fn read<T: Copy>(
        &self,
        memory: &Memory<T>,
        first: usize,
        into: &mut [T],
    ) -> Result<(), CudaError> {
        assert!(
            first + into.len() <= memory.len,
            "a read past device memory"
        );
        if into.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let address = memory.address + (first * size_of::<T>()) as u64;
        // SAFETY: the range lies within the allocation, and the stream is waited for.
        unsafe { result::memcpy_dtoh_async(into, address, self.stream.cu_stream()) }
            .map_err(|error| driver_error("copy from the card", error))?;
        self.synchronize()
    }

    /// Copies `len` elements on the card, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy<T: Copy>(
        &self,
        from: &Memory<T>,
        to: &Memory<T>,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(
            len <= from.len && len <= to.len,
            "a copy past device memory"
        );
        let bytes = len * size_of::<T>();
        // SAFETY: both ranges lie within their allocations.
        unsafe {
            result::memcpy_dtod_async(to.address, from.address, bytes, self.stream.cu_stream())
        }
        .map_err(|error| driver_error("copy on the card", error))
    }

    /// Sets every byte of `memory` to `byte`, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill<T: Copy>(&self, memory: &Memory<T>, byte: u8) -> Result<(), CudaError> {
        let bytes = memory.len * size_of::<T>();
        // SAFETY: exactly the allocation.
        unsafe { result::memset_d8_async(memory.address, byte, bytes, self.stream.cu_stream()) }
            .map_err(|error| driver_error("fill device memory", error))
    }

    /// Page-locked host memory.
    ///
    /// # Errors
    /// The driver's; a limit on locked memory is a usual cause.
    pub fn pinned<T: Copy + Default>(&self, len: usize) -> Result<Pinned<T>, CudaError> {
        self.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: freed by `Pinned`; written below before anything reads it.
        let pointer = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| driver_error(format!("lock {bytes} bytes of host memory"), error))?
            .cast::<T>();
        for index in 0..len {
            // SAFETY: within the allocation.
            unsafe { pointer.add(index).write(T::default()) };
        }
        Ok(Pinned {
            pointer,
            len,
            context: self.context.clone(),
        })
    }
}

impl<T> Memory<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address on the card.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }
}

impl<T> Memory<T> {
    /// Elements `first..first + len`, without copying them.
    pub fn part(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "a part past device memory");
        Self {
            address: self.address + (first * size_of::<T>()) as u64,
            len,
            allocation: self.allocation.clone(),
            of: PhantomData,
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // A context that fails takes its memory with it: nothing is left to do about an error.
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by `Device::allocate`, freed once; the driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl<T: Copy> Pinned<T> {
    /// Its elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: owned, initialised by `Device::pinned`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// Its elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T: Copy> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by `Device::pinned`, freed once.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}
