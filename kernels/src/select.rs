//! The one selector: which kernel path runs, decided from plain data, with its reason.
//!
//! The run, the scratch size, the benches and the log all ask here, so they cannot disagree.

use std::fmt;
use std::str::FromStr;

use crate::cpu::FUSED_ROWS;
use crate::error::KernelError;
use crate::isa::{CpuIsa, detect};
use crate::weights::{LinearWeights, WeightFormat};

/// What the selector knows about the device that will run the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceFacts {
    /// A CPU worker.
    Cpu {
        /// The most demanding instruction set that the machine runs.
        isa: CpuIsa,
    },
}

impl DeviceFacts {
    /// The facts of the machine that this process runs on.
    pub fn this_cpu() -> Self {
        Self::Cpu { isa: detect() }
    }
}

/// The shape of one linear layer's shard and the rows it will see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// How the weights are stored.
    pub format: WeightFormat,
    /// Rows of W.
    pub k: usize,
    /// Columns of W.
    pub n: usize,
    /// Activation rows of one call.
    pub rows: usize,
}

impl LinearShape {
    /// The shape of `weights` with `rows` activation rows.
    pub fn of(weights: &LinearWeights, rows: usize) -> Self {
        Self {
            format: weights.format(),
            k: weights.k(),
            n: weights.n(),
            rows,
        }
    }
}

/// Which family of arithmetic the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// fp32 activations and accumulation.
    #[default]
    Exact,
    /// Reduced-precision activations where the device gains from them.
    Fast,
}

/// A kernel path and why it was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<P> {
    /// The path.
    pub path: P,
    /// One sentence for the log and for `doctor`.
    pub reason: &'static str,
}

macro_rules! cpu_paths {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            /// Plain loops with f64 sums: the twin that the others are tested against.
            CpuReference,
            /// Safe Rust, vectorised by the compiler.
            CpuPortable,
            /// AVX2, FMA and F16C.
            CpuAvx2,
            /// AVX-512 F, BW, DQ and VL.
            CpuAvx512,
        }

        impl $name {
            /// The closed set of paths.
            pub const ALL: [Self; 4] =
                [Self::CpuReference, Self::CpuPortable, Self::CpuAvx2, Self::CpuAvx512];

            /// The name that flags, logs and reports use.
            pub const fn name(self) -> &'static str {
                match self {
                    Self::CpuReference => "cpu_reference",
                    Self::CpuPortable => "cpu_portable",
                    Self::CpuAvx2 => "cpu_avx2",
                    Self::CpuAvx512 => "cpu_avx512",
                }
            }

            /// The instruction set that the path's kernels are compiled for.
            pub const fn isa(self) -> CpuIsa {
                match self {
                    Self::CpuReference | Self::CpuPortable => CpuIsa::Portable,
                    Self::CpuAvx2 => CpuIsa::Avx2,
                    Self::CpuAvx512 => CpuIsa::Avx512,
                }
            }

            const fn fastest(isa: CpuIsa) -> Self {
                match isa {
                    CpuIsa::Portable => Self::CpuPortable,
                    CpuIsa::Avx2 => Self::CpuAvx2,
                    CpuIsa::Avx512 => Self::CpuAvx512,
                }
            }

            fn choose(
                device: DeviceFacts,
                forced: Option<Self>,
                reason: &'static str,
            ) -> Result<Choice<Self>, KernelError> {
                let DeviceFacts::Cpu { isa } = device;
                let Some(path) = forced else {
                    return Ok(Choice { path: Self::fastest(isa), reason });
                };
                if path.isa() > isa {
                    return Err(KernelError::PathRefused {
                        path: path.name(),
                        reason: format!(
                            "it needs {}, this machine's best is {isa}",
                            path.isa().features()
                        ),
                    });
                }
                Ok(Choice { path, reason: "forced by name" })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $name {
            type Err = KernelError;

            fn from_str(name: &str) -> Result<Self, KernelError> {
                Self::ALL.into_iter().find(|path| path.name() == name).ok_or_else(|| {
                    KernelError::UnknownPath {
                        kind: $kind,
                        name: name.to_owned(),
                        known: Self::ALL.map(Self::name).join(", "),
                    }
                })
            }
        }
    };
}

cpu_paths!(
    /// How a linear layer is computed.
    LinearPath,
    "linear"
);
cpu_paths!(
    /// How attention is computed.
    AttentionPath,
    "attention"
);

/// Chooses the path of one linear layer, or checks a forced one.
///
/// # Errors
/// [`KernelError::PathRefused`] if `forced` needs more than the device has.
pub fn select_linear(
    device: DeviceFacts,
    shape: LinearShape,
    precision: Precision,
    forced: Option<LinearPath>,
) -> Result<Choice<LinearPath>, KernelError> {
    let DeviceFacts::Cpu { isa } = device;
    let reason = match (isa, precision, shape.rows) {
        (_, Precision::Fast, _) => "cpu has the exact family only, so fast is served by it",
        (CpuIsa::Portable, ..) => "no vector extension beyond the build's baseline",
        (CpuIsa::Avx2, _, 0..=FUSED_ROWS) => {
            "widest vectors here; weights are unpacked in registers"
        }
        (CpuIsa::Avx2, ..) => "widest vectors here; weights are unpacked once for all rows",
        (CpuIsa::Avx512, _, 0..=FUSED_ROWS) => {
            "16 lanes; codes become floats by a table permute in registers"
        }
        (CpuIsa::Avx512, ..) => "16 lanes; weights are unpacked once for all rows",
    };
    LinearPath::choose(device, forced, reason)
}

/// Chooses the attention path of a worker, or checks a forced one.
///
/// # Errors
/// [`KernelError::PathRefused`] if `forced` needs more than the device has.
pub fn select_attention(
    device: DeviceFacts,
    forced: Option<AttentionPath>,
) -> Result<Choice<AttentionPath>, KernelError> {
    let DeviceFacts::Cpu { isa } = device;
    let reason = match isa {
        CpuIsa::Portable => "no vector extension beyond the build's baseline",
        CpuIsa::Avx2 | CpuIsa::Avx512 => "widest vectors here; keys are stored 16 tokens a vector",
    };
    AttentionPath::choose(device, forced, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Dtype;

    #[test]
    fn paths_follow_the_device_and_forced_ones_are_checked() {
        let shape = LinearShape {
            format: WeightFormat::Dense(Dtype::F16),
            k: 64,
            n: 64,
            rows: 1,
        };
        let cases = [
            (CpuIsa::Portable, LinearPath::CpuPortable),
            (CpuIsa::Avx2, LinearPath::CpuAvx2),
            (CpuIsa::Avx512, LinearPath::CpuAvx512),
        ];
        for (isa, expected) in cases {
            let device = DeviceFacts::Cpu { isa };
            let choice = select_linear(device, shape, Precision::Exact, None).unwrap();
            assert_eq!(choice.path, expected);
            assert!(!choice.reason.is_empty());
            assert_eq!(select_attention(device, None).unwrap().path.isa(), isa);
            for path in LinearPath::ALL {
                let forced = select_linear(device, shape, Precision::Exact, Some(path));
                assert_eq!(forced.is_ok(), path.isa() <= isa, "{path} on {isa}");
            }
        }
        let refused = select_attention(
            DeviceFacts::Cpu { isa: CpuIsa::Avx2 },
            Some(AttentionPath::CpuAvx512),
        );
        let message = refused.unwrap_err().to_string();
        assert!(
            message.contains("cpu_avx512") && message.contains("avx512f"),
            "{message}"
        );
    }

    #[test]
    fn names_parse_back() {
        for path in LinearPath::ALL {
            assert_eq!(path.to_string().parse::<LinearPath>().unwrap(), path);
        }
        let error = "cpu_avx1024"
            .parse::<AttentionPath>()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("cpu_reference, cpu_portable, cpu_avx2, cpu_avx512"),
            "{error}"
        );
    }
}
