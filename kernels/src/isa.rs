//! The instruction sets that the CPU kernels are compiled for, and what this machine has.

use std::fmt;

/// An instruction set that the fast kernels exist for. Ordered: a later one needs more hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CpuIsa {
    /// Safe Rust that the compiler vectorises for the build target's baseline.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and later).
    Avx512,
}

impl CpuIsa {
    /// Every instruction set, least demanding first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The CPU features that the set needs, as `/proc/cpuinfo` spells them.
    pub const fn features(self) -> &'static str {
        match self {
            Self::Portable => "none",
            Self::Avx2 => "avx2 fma f16c",
            Self::Avx512 => "avx512f avx512bw avx512dq avx512vl fma f16c",
        }
    }

    /// True if this machine can run kernels of the set.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 = || {
            std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c")
        };
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => {
                avx2()
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
        }
    }

    /// True if this machine can run kernels of the set.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }
}

impl fmt::Display for CpuIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// The most demanding instruction set that this machine runs. Cheap: the standard library caches it.
pub fn detect() -> CpuIsa {
    CpuIsa::ALL
        .into_iter()
        .rev()
        .find(|isa| isa.is_available())
        .unwrap_or(CpuIsa::Portable)
}
