//! A card: its driver, its memory, its loaded kernels. The only file that calls the driver.

use std::{
    collections::HashMap,
    ffi::c_void,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::{Arch, CudaError, Form, PackSource};

/// The oldest driver whose CUDA version runs code of a 12.x compiler: any of 12.x does.
const DRIVER_FLOOR: i32 = 12000;

/// Bytes of a [`Chunk`].
const CHUNK_BYTES: usize = 64 << 20;
/// What is larger lies alone: it would leave too much of a chunk unused, and wastes little of a page.
const MOST_SHARED_BYTES: usize = 16 << 20;
/// Of every buffer's address, as the driver's own.
const ALIGNMENT: usize = 256;

/// What a card is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CardFacts {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u8, u8),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// CUDA version of the driver, (major, minor).
    pub driver: (i32, i32),
    /// Device memory in all.
    pub total_bytes: u64,
}

/// A card that computes. One stream: work runs in the order in which it was given.
pub struct Device {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    kernels: HashMap<String, CudaFunction>,
    facts: CardFacts,
    arch: Arch,
    chunks: Mutex<Vec<Chunk>>,
}

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
struct Chunk {
    allocation: Weak<Allocation>,
    used: usize,
}

/// Page-locked host memory, which the card copies from without the driver's help.
pub struct Pinned<T: Copy> {
    pointer: *mut T,
    len: usize,
    context: Arc<CudaContext>,
}

/// A recorded sequence of launches.
pub struct Graph(CudaGraph);

/// A recording that goes on; dropped, it is ended and thrown away.
pub struct Recording(Option<Arc<CudaStream>>);

impl Recording {
    /// Ends it.
    ///
    /// # Errors
    /// Something in it cannot be recorded, or nothing was.
    pub fn finish(mut self) -> Result<Graph, CudaError> {
        match self.end() {
            Some(Ok(Some(graph))) => {
                // The first launch would else upload it.
                let uploaded = graph.upload();
                uploaded.map_err(|error| driver_error("upload a graph", error))?;
                Ok(Graph(graph))
            }
            Some(Err(error)) => Err(driver_error("record a graph", error)),
            Some(Ok(None)) | None => Err(CudaError::Driver {
                op: "record a graph".into(),
                code: "empty".into(),
                text: "nothing was recorded".into(),
            }),
        }
    }

    fn end(&mut self) -> Option<Result<Option<CudaGraph>, DriverError>> {
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        Some(self.0.take()?.end_capture(flags))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Somebody failed while recording: that error is the one to tell.
        let _ = self.end();
    }
}

// SAFETY: a graph belongs to no thread; it is used by one at a time, through `&mut` of its owner.
unsafe impl Send for Graph {}

/// A point in the stream.
pub struct Event(CudaEvent);

// SAFETY: the pointer is owned, and host memory has no thread.
unsafe impl<T: Copy + Send> Send for Pinned<T> {}

/// How many cards the driver sees.
///
/// # Errors
/// No driver, or one that fails.
pub fn device_count() -> Result<usize, CudaError> {
    open_driver()?;
    let count =
        CudaContext::device_count().map_err(|error| driver_error("count devices", error))?;
    Ok(count as usize)
}

/// Every card that the driver sees, and for each the others whose memory it can reach. Opens none.
///
/// # Errors
/// As [`device_count`].
pub fn cards() -> Result<Vec<(CardFacts, Vec<usize>)>, CudaError> {
    let count = device_count()?;
    let facts = (0..count).map(card_facts).collect::<Result<Vec<_>, _>>()?;
    let reaches = |from: usize, to: usize| -> Result<bool, DriverError> {
        let (from, to) = (
            result::device::get(from as i32)?,
            result::device::get(to as i32)?,
        );
        let mut can = 0;
        // SAFETY: both handles come from the driver, and the pointer is valid for the call.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, from, to) }.result()?;
        Ok(can != 0)
    };
    let mut cards = Vec::with_capacity(count);
    for (own, facts) in facts.into_iter().enumerate() {
        let mut peers = Vec::new();
        for other in (0..count).filter(|other| *other != own) {
            if reaches(own, other).map_err(|error| driver_error("ask for peers", error))? {
                peers.push(other);
            }
        }
        cards.push((facts, peers));
    }
    Ok(cards)
}

impl Device {
    /// Opens card `ordinal` and loads its kernels; `arch_override` runs an older architecture's PTX.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn open(
        ordinal: usize,
        arch_override: Option<Arch>,
        source: &PackSource,
        note: impl FnMut(String),
    ) -> Result<Self, CudaError> {
        let (context, facts) = open_card(ordinal)?;
        let (major, minor) = (i32::from(facts.capability.0), i32::from(facts.capability.1));
        let card = || facts.name.clone();
        let native = Arch::for_card(facts.capability).ok_or_else(|| CudaError::CardTooOld {
            card: card(),
            major,
            minor,
        })?;
        let arch = arch_override.unwrap_or(native);
        if arch.capability() > facts.capability {
            return Err(CudaError::ArchTooNew {
                arch: arch.name(),
                card: card(),
                major,
                minor,
            });
        }
        let form = match arch.runs_cubin(facts.capability) && arch_override.is_none() {
            true => Form::Cubin,
            false => Form::Ptx,
        };
        let pack = source.load(arch, note)?;
        let mut kernels = HashMap::new();
        for (unit, code) in pack.codes(arch, form) {
            let op = || format!("load {unit} for {arch}");
            // The driver reads PTX up to a NUL byte.
            let module = context
                .load_module(Ptx::from_binary([&code.bytes, &[0][..]].concat()))
                .map_err(|error| driver_error(op(), error))?;
            for name in &code.kernels {
                let kernel = module
                    .load_function(name)
                    .map_err(|error| driver_error(op(), error))?;
                kernels.insert(name.clone(), kernel);
            }
        }
        let stream = context
            .new_stream()
            .map_err(|error| driver_error("make a stream", error))?;
        Ok(Self {
            stream,
            context,
            kernels,
            facts,
            arch,
            chunks: Mutex::default(),
        })
    }

    /// What the card is.
    pub fn facts(&self) -> &CardFacts {
        &self.facts
    }

    /// The architecture whose code runs.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Makes this thread one that may use the card.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.context
            .bind_to_thread()
            .map_err(|error| driver_error("bind the thread", error))
    }

    /// (free, total) bytes of device memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (free, total) = self
            .context
            .mem_get_info()
            .map_err(|error| driver_error("ask for memory", error))?;
        Ok((free as u64, total as u64))
    }

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

    /// Room for `bytes`: in a chunk that has some left, or in memory of its own. The driver hands out
    /// whole pages of 2 MiB, which would cost a model's many small tensors a twentieth of its size.
    fn place(
        &self,
        bytes: usize,
        what: &'static str,
    ) -> Result<(sys::CUdeviceptr, Arc<Allocation>), CudaError> {
        if bytes > MOST_SHARED_BYTES {
            let own = self.allocate(bytes, what)?;
            return Ok((own.address, own));
        }
        // Between statements the list is as it should be, so a panic elsewhere does not spoil it.
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.retain(|chunk| chunk.allocation.strong_count() > 0);
        for chunk in chunks.iter_mut() {
            if chunk.used + bytes <= CHUNK_BYTES
                && let Some(allocation) = chunk.allocation.upgrade()
            {
                let address = allocation.address + chunk.used as u64;
                chunk.used += bytes;
                return Ok((address, allocation));
            }
        }
        // A card that has no room for a chunk may have room for this.
        let (allocation, used) = match self.allocate(CHUNK_BYTES, what) {
            Ok(allocation) => (allocation, bytes),
            Err(CudaError::OutOfMemory { .. }) => (self.allocate(bytes, what)?, CHUNK_BYTES),
            Err(error) => return Err(error),
        };
        chunks.push(Chunk {
            allocation: Arc::downgrade(&allocation),
            used,
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

    /// Waits for everything given so far.
    ///
    /// # Errors
    /// What a launch ran into, if one did.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream
            .synchronize()
            .map_err(|error| driver_error("wait for the card", error))
    }

    /// True if the loaded code has this kernel.
    pub fn has(&self, kernel: &str) -> bool {
        self.kernels.contains_key(kernel)
    }

    /// Launches `kernel`.
    ///
    /// # Safety
    /// `arguments` are addresses of values with the types of the kernel's parameters, and what the
    /// kernel reaches through them lies within allocations that live until the stream gets there.
    ///
    /// # Errors
    /// An unknown kernel, or the driver's word on the launch.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let function = self
            .kernels
            .get(kernel)
            .ok_or_else(|| CudaError::NoKernel {
                name: kernel.to_owned(),
                arch: self.arch.name(),
            })?;
        let op = || {
            let [x, y, z] = grid;
            format!("launch {kernel} on {x}x{y}x{z} blocks of {block:?}")
        };
        if shared_bytes > self.arch.static_shared_bytes() {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, shared_bytes as i32)
                .map_err(|error| driver_error(op(), error))?;
        }
        // SAFETY: the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid.into(),
                block.into(),
                shared_bytes as u32,
                self.stream.cu_stream(),
                arguments,
            )
        }
        .map_err(|error| driver_error(op(), error))
    }

    /// Records what is launched from here on instead of running it.
    ///
    /// # Errors
    /// The driver's.
    pub fn start_recording(&self) -> Result<Recording, CudaError> {
        self.bind()?;
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|error| driver_error("record a graph", error))?;
        Ok(Recording(Some(self.stream.clone())))
    }

    /// Records what `give` launches.
    ///
    /// # Errors
    /// Of `give`, or something in it that cannot be recorded.
    pub fn record<E: From<CudaError>>(
        &self,
        give: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let recording = self.start_recording()?;
        give()?;
        Ok(recording.finish()?)
    }

    /// Runs a recording, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.bind()?;
        graph
            .0
            .launch()
            .map_err(|error| driver_error("replay a graph", error))
    }

    /// The stream's address, for libraries that take one.
    pub fn stream_address(&self) -> u64 {
        self.stream.cu_stream() as u64
    }

    /// Marks this point of the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self) -> Result<Event, CudaError> {
        self.stream
            .record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
            .map(Event)
            .map_err(|error| driver_error("record an event", error))
    }

    /// Moves a mark to this point of the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn put(&self, event: &Event) -> Result<(), CudaError> {
        event
            .0
            .record(&self.stream)
            .map_err(|error| driver_error("record an event", error))
    }

    /// Seconds on the card between two marks; waits for the later one.
    ///
    /// # Errors
    /// The driver's.
    pub fn seconds_between(&self, start: &Event, end: &Event) -> Result<f64, CudaError> {
        let milliseconds = start
            .0
            .elapsed_ms(&end.0)
            .map_err(|error| driver_error("time an event", error))?;
        Ok(f64::from(milliseconds) / 1e3)
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

/// Opens libcuda, which need not be there.
fn open_driver() -> Result<(i32, i32), CudaError> {
    // SAFETY: probing opens the library and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the library is there, and this function needs no initialisation.
    let code = unsafe { sys::cuDriverGetVersion(&mut version) };
    code.result()
        .map_err(|error| driver_error("ask for the driver's version", error))?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if version < DRIVER_FLOOR {
        return Err(CudaError::DriverTooOld { major, minor });
    }
    result::init().map_err(|error| driver_error("start the driver", error))?;
    Ok((major, minor))
}

fn open_card(ordinal: usize) -> Result<(Arc<CudaContext>, CardFacts), CudaError> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let facts = card_facts(ordinal)?;
    let context = CudaContext::new(ordinal)
        .map_err(|error| driver_error(format!("open cuda:{ordinal}"), error))?;
    // SAFETY: one stream orders all work, so nothing relies on the events that this turns off.
    unsafe { context.disable_event_tracking() };
    Ok((context, facts))
}

/// What card `ordinal` is; it must exist.
fn card_facts(ordinal: usize) -> Result<CardFacts, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let driver = open_driver()?;
    let ask = || -> Result<CardFacts, DriverError> {
        let device = result::device::get(ordinal as i32)?;
        // SAFETY: the handle comes from the driver.
        let attribute = |of| unsafe { result::device::get_attribute(device, of) };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(CardFacts {
            name: result::device::get_name(device)?,
            capability: (major as u8, minor as u8),
            multiprocessors: multiprocessors as u32,
            driver,
            // SAFETY: as above.
            total_bytes: unsafe { result::device::total_mem(device) }? as u64,
        })
    };
    ask().map_err(|error| driver_error(format!("ask about cuda:{ordinal}"), error))
}

fn driver_error(op: impl Into<String>, error: DriverError) -> CudaError {
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned());
    CudaError::Driver {
        op: op.into(),
        code: format!("{:?}", error.0),
        text: text.unwrap_or_else(|_| "the driver has no words for it".into()),
    }
}

/// Launches a kernel with arguments by value, in the order and with the types of its parameters.
macro_rules! launch {
    ($device:expr, $kernel:expr, $grid:expr, $block:expr, $shared:expr; $($argument:expr),* $(,)?) => {
        // SAFETY: the arguments live until the end of the statement and have the types that the
        // kernel declares, which the parity tests of every op prove; callers check lengths.
        unsafe {
            $device.launch(
                $kernel,
                $grid,
                $block,
                $shared,
                &mut [$(std::ptr::from_ref(&$argument).cast_mut().cast::<std::ffi::c_void>()),*],
            )
        }
    };
}
pub(super) use launch;
