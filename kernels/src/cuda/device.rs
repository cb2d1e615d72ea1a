//! A card: its driver, its loaded kernels, its one stream. This file, `memory.rs`, `graph.rs` and
//! `shared.rs` are all that calls the driver.

use std::{collections::HashMap, ffi::c_void, sync::Arc};

use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::{Arch, CudaError, Form, PackSource, memory::Chunks};

/// The oldest driver whose CUDA version runs code of a 12.x compiler: any of 12.x does.
const DRIVER_FLOOR: i32 = 12000;

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
    pub(super) stream: Arc<CudaStream>,
    pub(super) context: Arc<CudaContext>,
    kernels: HashMap<String, CudaFunction>,
    facts: CardFacts,
    arch: Arch,
    pub(super) chunks: Chunks,
}

/// A point in the stream.
pub struct Event(CudaEvent);

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

impl Event {
    /// True once the card has come to it.
    ///
    /// # Errors
    /// What an earlier launch ran into: the card comes to nothing any more.
    pub fn is_past(&self) -> Result<bool, CudaError> {
        self.0
            .try_is_complete()
            .map_err(|error| driver_error("look at an event", error))
    }
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
            chunks: Chunks::default(),
        })
    }

    /// The same card and code with a stream of its own, whose blocks come before those of other streams.
    ///
    /// # Errors
    /// The driver's.
    pub fn with_new_stream(&self) -> Result<Self, CudaError> {
        self.bind()?;
        // A larger number is a lower priority.
        let stream = result::stream::get_priority_range()
            .and_then(|(_, greatest)| self.context.new_stream_with_priority(greatest));
        Ok(Self {
            stream: stream.map_err(|error| driver_error("make a stream", error))?,
            context: self.context.clone(),
            kernels: self.kernels.clone(),
            facts: self.facts.clone(),
            arch: self.arch,
            chunks: Chunks::default(),
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

    /// Has this stream wait for a mark, on whichever stream that is.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.stream
            .wait(&event.0)
            .map_err(|error| driver_error("wait for an event", error))
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

pub(super) fn driver_error(op: impl Into<String>, error: DriverError) -> CudaError {
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
