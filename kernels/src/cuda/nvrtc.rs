//! The compiler, opened at run time. Seven functions, looked up one by one, so that a library that
//! lacks one is a sentence and not a crash.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    path::Path,
    ptr,
};

use libloading::Library;

use super::{
    Arch, CudaError,
    source::{HEADERS, OPTIONS, Unit},
};

type Program = *mut std::ffi::c_void;
type Code = c_int;

/// Names under which the dynamic linker may know NVRTC 12. 13 no longer compiles for Pascal and
/// Volta, so it comes last.
const NAMES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so", "libnvrtc.so.13"];

/// An opened NVRTC.
pub struct Nvrtc {
    version: (c_int, c_int),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    log: Getter,
    ptx: Getter,
    cubin: Getter,
    /// Keeps the functions alive.
    _library: Library,
}

/// A pair of "how long" and "write it".
#[derive(Clone, Copy)]
struct Getter {
    size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    read: unsafe extern "C" fn(Program, *mut c_char) -> Code,
}

/// One unit's code for one architecture.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// Its PTX, stamped with the lowest version under which it assembles.
    pub ptx: String,
    /// What each kernel takes.
    pub usage: Vec<Usage>,
}

/// What a kernel takes of a multiprocessor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// The symbol.
    pub kernel: String,
    /// Per thread.
    pub registers: u32,
    /// Static shared memory per block.
    pub shared_bytes: u32,
    /// Written to and read from local memory because registers ran out.
    pub spill_bytes: u32,
    /// Local memory per thread.
    pub stack_bytes: u32,
}

impl Nvrtc {
    /// Opens `library`, or what the linker finds.
    ///
    /// # Errors
    /// [`CudaError::NoNvrtc`] with what was tried.
    pub fn open(library: Option<&Path>) -> Result<Self, CudaError> {
        let names: Vec<&std::ffi::OsStr> = match library {
            Some(path) => vec![path.as_os_str()],
            None => NAMES.iter().map(std::ffi::OsStr::new).collect(),
        };
        let tried = || {
            let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
            CudaError::NoNvrtc {
                tried: names.join(", "),
            }
        };
        // SAFETY: opening runs the library's own initialisers, which for NVRTC only set up tables.
        let library = names
            .iter()
            .find_map(|name| unsafe { Library::new(*name) }.ok())
            .ok_or_else(tried)?;
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11; the library outlives them.
        unsafe {
            let symbol = |_| tried();
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code =
                *library.get(b"nvrtcVersion\0").map_err(symbol)?;
            let getter = |size: &[u8], read: &[u8]| -> Result<Getter, CudaError> {
                Ok(Getter {
                    size: *library.get(size).map_err(symbol)?,
                    read: *library.get(read).map_err(symbol)?,
                })
            };
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Self {
                version: (major, minor),
                create: *library.get(b"nvrtcCreateProgram\0").map_err(symbol)?,
                compile: *library.get(b"nvrtcCompileProgram\0").map_err(symbol)?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").map_err(symbol)?,
                log: getter(b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?,
                ptx: getter(b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0")?,
                cubin: getter(b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0")?,
                _library: library,
            })
        }
    }

    /// (major, minor).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles `unit` for `arch`.
    ///
    /// # Errors
    /// The compiler's own words, or that it does not know the architecture.
    pub fn compile(&self, unit: &Unit, arch: Arch) -> Result<Compiled, CudaError> {
        let text = |text: &str| CString::new(text).expect("sources and options hold no NUL byte");
        let source = text(unit.text);
        let name = text(&format!("{}.cu", unit.name));
        let headers: Vec<_> = HEADERS.iter().map(|header| text(header.text)).collect();
        let header_names: Vec<_> = HEADERS.iter().map(|header| text(header.name)).collect();
        let architecture = format!("--gpu-architecture={arch}");
        let options: Vec<_> = OPTIONS
            .into_iter()
            .chain([&*architecture])
            .map(text)
            .collect();
        let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let (header_texts, header_names, option_texts) = (
            pointers(&headers),
            pointers(&header_names),
            pointers(&options),
        );
        let mut program = Scoped {
            nvrtc: self,
            program: ptr::null_mut(),
        };
        // SAFETY: all strings outlive the calls, and the counts are those of the arrays.
        let code = unsafe {
            (self.create)(
                &mut program.program,
                source.as_ptr(),
                name.as_ptr(),
                header_texts.len() as c_int,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            )
        };
        let failed = |log: String| CudaError::Compile {
            unit: unit.name,
            arch: arch.name(),
            log,
        };
        if code != 0 {
            return Err(failed(format!("NVRTC refuses the source with code {code}")));
        }
        // SAFETY: as above.
        let code = unsafe {
            (self.compile)(
                program.program,
                option_texts.len() as c_int,
                option_texts.as_ptr(),
            )
        };
        let log = String::from_utf8_lossy(&program.get(self.log)).into_owned();
        if code != 0 {
            let (major, minor) = self.version;
            return Err(match log.contains("--gpu-architecture") {
                true => CudaError::NvrtcLacksArch {
                    major,
                    minor,
                    arch: arch.name(),
                },
                false => failed(log),
            });
        }
        let ptx = program.get(self.ptx);
        let ptx = CStr::from_bytes_until_nul(&ptx)
            .map_or_else(|_| String::from_utf8_lossy(&ptx), CStr::to_string_lossy);
        Ok(Compiled {
            cubin: program.get(self.cubin),
            ptx: stamp(&ptx, arch),
            usage: usage(&log),
        })
    }
}

/// A program that is destroyed with its scope.
struct Scoped<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Scoped<'_> {
    fn get(&self, getter: Getter) -> Vec<u8> {
        let mut size = 0;
        // SAFETY: the program is valid, and the buffer has the size that the library names.
        unsafe {
            if (getter.size)(self.program, &mut size) != 0 {
                return Vec::new();
            }
            let mut bytes = vec![0u8; size];
            if (getter.read)(self.program, bytes.as_mut_ptr().cast()) != 0 {
                return Vec::new();
            }
            bytes
        }
    }
}

impl Drop for Scoped<'_> {
    fn drop(&mut self) {
        // SAFETY: created by the same library, destroyed once.
        unsafe { (self.nvrtc.destroy)(&mut self.program) };
    }
}

/// `ptx` under the version that [`Arch::ptx_version`] names. A pragma that tells sanitizers which bytes
/// of a load are used is all that would need a newer one.
fn stamp(ptx: &str, arch: Arch) -> String {
    let lines = ptx
        .lines()
        .filter(|line| !line.contains(".pragma \"used_bytes_mask"));
    lines
        .map(|line| match line.starts_with(".version ") {
            true => format!(".version {}\n", arch.ptx_version()),
            false => format!("{line}\n"),
        })
        .collect()
}

/// Reads what `--ptxas-options=-v` printed.
fn usage(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, words: &str| {
        let end = line.find(words)?;
        line[..end]
            .trim_end()
            .rsplit(|c: char| !c.is_ascii_digit())
            .next()?
            .parse::<u32>()
            .ok()
    };
    let mut all: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Usage {
                kernel,
                registers: 0,
                shared_bytes: 0,
                spill_bytes: 0,
                stack_bytes: 0,
            });
        }
        let Some(last) = all.last_mut() else { continue };
        if let Some(registers) = number_before(line, "registers") {
            last.registers = registers;
            last.shared_bytes = number_before(line, "bytes smem").unwrap_or(0);
        }
        if let Some(bytes) = number_before(line, "bytes stack frame") {
            last.stack_bytes = bytes;
            last.spill_bytes = number_before(line, "bytes spill stores").unwrap_or(0)
                + number_before(line, "bytes spill loads").unwrap_or(0);
        }
    }
    all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_figures_are_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'b' for 'sm_75'\n\
            ptxas info    : Function properties for b\n\
            ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'a' for 'sm_75'\n\
            ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]\n";
        let kernels = usage(log);
        let b = Usage {
            kernel: "b".into(),
            registers: 40,
            shared_bytes: 4096,
            spill_bytes: 20,
            stack_bytes: 16,
        };
        assert_eq!(kernels[1], b);
        assert_eq!((kernels[0].registers, kernels[0].shared_bytes), (8, 0));
    }

    #[test]
    fn ptx_is_stamped_for_old_drivers() {
        let ptx = "// comment\n.version 8.5\n.target sm_61\n.pragma \"used_bytes_mask 0xff\";\n";
        assert_eq!(
            stamp(ptx, Arch::Sm61),
            "// comment\n.version 7.4\n.target sm_61\n"
        );
    }

    #[test]
    fn a_missing_library_is_a_sentence() {
        let error = Nvrtc::open(Some(Path::new("/nowhere/libnvrtc.so")))
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("nvidia-cuda-nvrtc-cu12"),
            "{error}"
        );
    }
}
