//! What goes wrong with a card, each with the remedy.

/// Why the CUDA side refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// libcuda.so.1 cannot be opened.
    #[error(
        "no NVIDIA driver: libcuda.so.1 cannot be opened; install the driver (Debian: nvidia-driver, branch 535 or 580 for Pascal and Volta)"
    )]
    NoDriver,
    /// The driver is older than what the kernels need.
    #[error(
        "the NVIDIA driver speaks CUDA {major}.{minor}, 12.0 or newer is needed: install branch 535 or 580"
    )]
    DriverTooOld {
        /// CUDA version of the driver.
        major: i32,
        /// CUDA version of the driver.
        minor: i32,
    },
    /// No card of that number.
    #[error(
        "there is no device cuda:{ordinal}: the driver sees {count} (CUDA_VISIBLE_DEVICES may hide some)"
    )]
    NoDevice {
        /// As asked.
        ordinal: usize,
        /// Cards that the driver sees.
        count: usize,
    },
    /// A card before Pascal.
    #[error(
        "{card} has compute capability {major}.{minor}; 6.0 (Pascal) is the oldest that is served"
    )]
    CardTooOld {
        /// Its name.
        card: String,
        /// Of its capability.
        major: i32,
        /// Of its capability.
        minor: i32,
    },
    /// An override to code that the card cannot run.
    #[error(
        "--arch-override {arch}: {card} has compute capability {major}.{minor} and runs code up to that only"
    )]
    ArchTooNew {
        /// As asked.
        arch: &'static str,
        /// Its name.
        card: String,
        /// Of its capability.
        major: i32,
        /// Of its capability.
        minor: i32,
    },
    /// A name that is no architecture.
    #[error("unknown architecture {name:?}, one of {known}")]
    UnknownArch {
        /// As given.
        name: String,
        /// The known names.
        known: String,
    },
    /// A call of the driver failed.
    #[error("{op}: {code}: {text}")]
    Driver {
        /// What was done, with what it was done to.
        op: String,
        /// The driver's name of the error.
        code: String,
        /// The driver's words.
        text: String,
    },
    /// The card has no room.
    #[error(
        "cannot take {needed_bytes} bytes on the card for {what}: {free_bytes} are free; other processes may hold the rest (nvidia-smi lists them)"
    )]
    OutOfMemory {
        /// What for.
        what: &'static str,
        /// Asked.
        needed_bytes: u64,
        /// Left.
        free_bytes: u64,
    },
    /// Memory of another rank cannot be reached.
    #[error("{what} is out of reach: {why}")]
    OutOfReach {
        /// A file, or a rank.
        what: String,
        /// Why.
        why: String,
    },
    /// NVRTC cannot be opened.
    #[error(
        "no kernel pack for this version, and NVRTC, which would compile one, cannot be opened ({tried}): install it (pip: nvidia-cuda-nvrtc-cu12, Debian: libnvrtc12) or give --kernel-pack"
    )]
    NoNvrtc {
        /// Names that were tried.
        tried: String,
    },
    /// NVRTC does not know an architecture.
    #[error(
        "NVRTC {major}.{minor} cannot compile for {arch}; 12.9 is the last that knows Pascal and Volta (pip: nvidia-cuda-nvrtc-cu12)"
    )]
    NvrtcLacksArch {
        /// Its version.
        major: i32,
        /// Its version.
        minor: i32,
        /// What was wanted.
        arch: &'static str,
    },
    /// A source does not compile.
    #[error("{unit} does not compile for {arch}: {log}")]
    Compile {
        /// The source.
        unit: &'static str,
        /// For what.
        arch: &'static str,
        /// The compiler's words.
        log: String,
    },
    /// A kernel pack that cannot be used.
    #[error("kernel pack {path}: {problem}; build one with `secondwind kernels build`")]
    Pack {
        /// The file.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// A kernel that the loaded code does not have.
    #[error("kernel {name} is not built for {arch}")]
    NoKernel {
        /// The symbol.
        name: String,
        /// The architecture.
        arch: &'static str,
    },
}
