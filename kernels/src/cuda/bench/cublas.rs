//! cuBLAS in half precision, where it is installed: the yardstick of every other engine. Six functions,
//! looked up one by one.

use std::ffi::{c_int, c_void};

use libloading::Library;

use super::{COLD_BYTES, Device, median, random_halves};
use crate::cuda::{CudaError, Memory};

const NAMES: [&str; 3] = ["libcublas.so.12", "libcublas.so.13", "libcublas.so"];
/// cuBLAS asks for at most this much on the cards that are served.
const WORKSPACE_BYTES: usize = 64 << 20;

type Handle = *mut c_void;
type Code = c_int;

const TRANSPOSED: c_int = 1;
const PLAIN: c_int = 0;
const F16: c_int = 2;
const COMPUTE_F32: c_int = 68;
const DEFAULT_ALGORITHM: c_int = -1;

type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const f32,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const f32,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Code;

/// An opened cuBLAS on one card.
pub struct Cublas<'a> {
    device: &'a Device,
    handle: Handle,
    gemm: GemmEx,
    destroy: unsafe extern "C" fn(Handle) -> Code,
    _workspace: Memory<u8>,
    /// Keeps the functions alive.
    _library: Library,
}

impl<'a> Cublas<'a> {
    /// The library as the linker finds it; `None` without one.
    ///
    /// # Errors
    /// The card's, or the library's.
    pub fn open(device: &'a Device) -> Result<Option<Self>, CudaError> {
        // SAFETY: opening runs the library's initialisers, which only set up tables.
        let library = NAMES
            .iter()
            .find_map(|name| unsafe { Library::new(*name) }.ok());
        let Some(library) = library else {
            return Ok(None);
        };
        device.bind()?;
        let workspace = device.zeros(WORKSPACE_BYTES, "cuBLAS")?;
        // SAFETY: the types are those of cublas_api.h since 11.0; the library outlives them.
        unsafe {
            let lacks = |error: libloading::Error| failed("open", error.to_string());
            let create: unsafe extern "C" fn(*mut Handle) -> Code =
                *library.get(b"cublasCreate_v2\0").map_err(lacks)?;
            let set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> Code =
                *library.get(b"cublasSetStream_v2\0").map_err(lacks)?;
            let set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> Code =
                *library.get(b"cublasSetWorkspace_v2\0").map_err(lacks)?;
            let gemm = *library.get(b"cublasGemmEx\0").map_err(lacks)?;
            let destroy = *library.get(b"cublasDestroy_v2\0").map_err(lacks)?;
            let mut handle: Handle = std::ptr::null_mut();
            check("create a handle", create(&mut handle))?;
            let cublas = Self {
                device,
                handle,
                gemm,
                destroy,
                _workspace: workspace,
                _library: library,
            };
            check(
                "set the stream",
                set_stream(handle, device.stream_address() as *mut c_void),
            )?;
            let workspace = cublas._workspace.address() as *mut c_void;
            check(
                "set the workspace",
                set_workspace(handle, workspace, WORKSPACE_BYTES),
            )?;
            Ok(Some(cublas))
        }
    }

    /// Random f16 weights of shape (n, k), as many copies as no cache of the card holds.
    ///
    /// # Errors
    /// The card's.
    pub fn weights(&self, (k, n): (usize, usize)) -> Result<Vec<Memory<u8>>, CudaError> {
        let copies = COLD_BYTES.div_ceil(2 * k * n).clamp(1, 8);
        (1..=copies as u32)
            .map(|seed| random_halves(self.device, n * k, seed))
            .collect()
    }

    /// Seconds of a product of (rows, k) by the transpose of (n, k) weights, with sums in fp32.
    ///
    /// # Errors
    /// The card's, or the library's.
    pub fn time(
        &self,
        weights: &[Memory<u8>],
        (k, n): (usize, usize),
        rows: usize,
    ) -> Result<f64, CudaError> {
        let device = self.device;
        let x = random_halves(device, rows * k, 99)?;
        let out = device.zeros::<u16>(rows * n, "a product")?;
        let (one, zero) = (1.0f32, 0.0f32);
        let run = |weights: &Memory<u8>| {
            let [a, b, c] =
                [weights.address(), x.address(), out.address()].map(|at| at as *mut c_void);
            let [m, width, depth] = [n, rows, k].map(|size| size as c_int);
            // SAFETY: the buffers have the sizes that the call names, and outlive the stream's work.
            let code = unsafe {
                (self.gemm)(
                    self.handle,
                    TRANSPOSED,
                    PLAIN,
                    m,
                    width,
                    depth,
                    &one,
                    a,
                    F16,
                    depth,
                    b,
                    F16,
                    depth,
                    &zero,
                    c,
                    F16,
                    m,
                    COMPUTE_F32,
                    DEFAULT_ALGORITHM,
                )
            };
            check("multiply", code)
        };
        run(&weights[0])?;
        device.synchronize()?;
        let launches = weights.len().max(4);
        let graph = device.record(|| {
            (0..launches).try_for_each(|launch| run(&weights[launch % weights.len()]))
        })?;
        Ok(median(device, || device.replay(&graph))? / launches as f64)
    }
}

impl Drop for Cublas<'_> {
    fn drop(&mut self) {
        // SAFETY: made by the same library, destroyed once.
        unsafe { (self.destroy)(self.handle) };
    }
}

fn check(op: &str, code: Code) -> Result<(), CudaError> {
    match code {
        0 => Ok(()),
        code => Err(failed(op, format!("status {code}"))),
    }
}

fn failed(op: &str, text: String) -> CudaError {
    CudaError::Driver {
        op: format!("cuBLAS: {op}"),
        code: "CUBLAS".into(),
        text,
    }
}
