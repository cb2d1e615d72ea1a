//! The one selector: which kernel path runs, decided from plain data, with its reason.
//!
//! The run, the scratch size, the planner, the benches and the log all ask here, so they cannot
//! disagree. A combination that is not built is refused with its reason; nothing falls through.

mod cpu;
mod cuda;

use std::fmt;
use std::str::FromStr;

use crate::cuda::Arch;
use crate::error::KernelError;
use crate::isa::{CpuIsa, detect};
use crate::kv::KvDtype;
use crate::weights::{LinearWeights, WeightFormat};

/// What the selector knows about the device that will run the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceFacts {
    /// A CPU worker.
    Cpu {
        /// The most demanding instruction set that the machine runs.
        isa: CpuIsa,
    },
    /// A CUDA worker.
    Cuda {
        /// The architecture whose code runs.
        arch: Arch,
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
    /// Activations of fp32's accuracy, fp32 accumulation.
    #[default]
    Exact,
    /// Reduced-precision activations where the device gains from them.
    Fast,
}

/// What attention has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A token or a few of every sequence.
    Decode,
    /// Many tokens of a sequence.
    Prefill,
}

/// One kind of attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionTask {
    /// Few or many tokens of a sequence.
    pub phase: Phase,
    /// Channels of a head.
    pub head_dim: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
    /// Which family of arithmetic is allowed.
    pub precision: Precision,
}

/// A kernel path and why it was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<P> {
    /// The path.
    pub path: P,
    /// One sentence for the log and for `doctor`.
    pub reason: &'static str,
}

/// A card's multiply-add, of which a path's arithmetic is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instruction {
    /// fp32.
    FmaF32,
    /// Pairs of fp16.
    FmaF16,
    /// Four-way int8.
    Dp4a,
    /// int8 tensor cores, `m8n8k16`.
    MmaS8,
    /// fp16 tensor cores with fp32 sums, `m16n8k8`.
    MmaF16,
}

impl Instruction {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::FmaF32,
        Self::FmaF16,
        Self::Dp4a,
        Self::MmaS8,
        Self::MmaF16,
    ];

    /// As reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FmaF32 => "fma_f32",
            Self::FmaF16 => "fma_f16x2",
            Self::Dp4a => "dp4a",
            Self::MmaS8 => "mma_s8_m8n8k16",
            Self::MmaF16 => "mma_f16_m16n8k8",
        }
    }
}

macro_rules! paths {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $($(#[$path_doc:meta])* $path:ident = $path_name:literal,)*) => {
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
            $($(#[$path_doc])* $path,)*
        }

        impl $name {
            /// The closed set of paths.
            pub const ALL: &[Self] = &[
                Self::CpuReference, Self::CpuPortable, Self::CpuAvx2, Self::CpuAvx512,
                $(Self::$path,)*
            ];

            /// The name that flags, logs and reports use.
            pub const fn name(self) -> &'static str {
                match self {
                    Self::CpuReference => "cpu_reference",
                    Self::CpuPortable => "cpu_portable",
                    Self::CpuAvx2 => "cpu_avx2",
                    Self::CpuAvx512 => "cpu_avx512",
                    $(Self::$path => $path_name,)*
                }
            }

            /// The instruction set that a CPU path's kernels are compiled for.
            pub const fn isa(self) -> Option<CpuIsa> {
                match self {
                    Self::CpuReference | Self::CpuPortable => Some(CpuIsa::Portable),
                    Self::CpuAvx2 => Some(CpuIsa::Avx2),
                    Self::CpuAvx512 => Some(CpuIsa::Avx512),
                    $(Self::$path => None,)*
                }
            }

            const fn fastest(isa: CpuIsa) -> Self {
                match isa {
                    CpuIsa::Portable => Self::CpuPortable,
                    CpuIsa::Avx2 => Self::CpuAvx2,
                    CpuIsa::Avx512 => Self::CpuAvx512,
                }
            }

            /// This path because somebody asked for it, if `missing` names nothing that it lacks.
            fn forced(self, missing: Option<String>) -> Result<Choice<Self>, KernelError> {
                match missing {
                    Some(reason) => Err(KernelError::PathRefused { path: self.name(), reason }),
                    None => Ok(Choice { path: self, reason: "forced by name" }),
                }
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
                Self::ALL.iter().copied().find(|path| path.name() == name).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|path| path.name()).collect();
                    KernelError::UnknownPath {
                        kind: $kind,
                        name: name.to_owned(),
                        known: known.join(", "),
                    }
                })
            }
        }
    };
}

paths!(
    /// How a linear layer is computed. `a8` stands for activations in 8-bit integers, `a16` for
    /// wider ones, weights being widened in registers.
    LinearPath,
    "linear",
    /// CUDA: weights widened to fp32 tile by tile, fp32 multiply-add.
    F32 = "f32",
    /// CUDA: weights widened to fp32 in registers, one pass over them for 4 rows.
    A16F32Gemv = "a16_f32_gemv",
    /// CUDA: activations rounded to f16, paired half arithmetic that sums 8 products, one pass over
    /// the weights for 8 rows.
    A16Half2 = "a16_half2",
    /// CUDA: every activation as the sum of two f16, tensor cores, fp32 sums: exact.
    A16Mma = "a16_mma",
    /// CUDA: int8 activations, four-way dot products, one pass over the weights for 8 rows.
    A8Dp4aGemv = "a8_dp4a_gemv",
    /// CUDA: int8 activations, four-way dot products, tiled.
    A8Dp4aGemm = "a8_dp4a_gemm",
    /// CUDA: int8 activations on integer tensor cores.
    A8Mma = "a8_mma",
    /// CUDA: unquantised weights, fp32 multiply-add, one pass over them for 8 rows.
    DenseGemv = "dense_gemv",
    /// CUDA: unquantised weights, fp32 multiply-add, tiled.
    DenseGemm = "dense_gemm",
    /// CUDA: f16 weights, activations rounded to f16, tensor cores, fp32 sums.
    DenseMma = "dense_mma",
);

paths!(
    /// How attention is computed.
    AttentionPath,
    "attention",
    /// CUDA: scores are materialised.
    Eager = "eager",
    /// CUDA: split over the sequence, the queries of one KV head share its reads.
    DecodeSplit = "decode_split",
    /// CUDA: fused, fp32, tiles of queries.
    PrefillTile = "prefill_tile",
    /// CUDA: fused, fp16 operands on tensor cores, fp32 sums.
    PrefillMma = "prefill_mma",
);

impl LinearPath {
    /// Rows beyond which the path reads the weights again and again.
    pub const fn most_rows(self) -> usize {
        match self {
            Self::A16F32Gemv => 4,
            Self::A16Half2 | Self::A8Dp4aGemv | Self::DenseGemv => 8,
            _ => usize::MAX,
        }
    }

    /// What a card spends the path's time in when rows are many; `None` for a CPU's.
    pub const fn instruction(self) -> Option<Instruction> {
        match self {
            Self::F32 | Self::A16F32Gemv | Self::DenseGemv | Self::DenseGemm => {
                Some(Instruction::FmaF32)
            }
            Self::A8Dp4aGemv | Self::A8Dp4aGemm => Some(Instruction::Dp4a),
            Self::A8Mma => Some(Instruction::MmaS8),
            Self::A16Half2 => Some(Instruction::FmaF16),
            Self::A16Mma | Self::DenseMma => Some(Instruction::MmaF16),
            Self::CpuReference | Self::CpuPortable | Self::CpuAvx2 | Self::CpuAvx512 => None,
        }
    }

    /// Multiply-adds of its instruction for one of the product.
    pub const fn multiply_adds(self) -> usize {
        match self {
            // Activations are in two parts.
            Self::A16Mma => 2,
            _ => 1,
        }
    }

    /// True if the path reads activations as 8-bit integers.
    pub const fn takes_a8(self) -> bool {
        matches!(self, Self::A8Dp4aGemv | Self::A8Dp4aGemm | Self::A8Mma)
    }
}

/// Chooses the path of one linear layer, or checks a forced one.
///
/// # Errors
/// [`KernelError::PathRefused`] if `forced` needs more than the device has, or is not for weights
/// of this format.
pub fn select_linear(
    device: DeviceFacts,
    shape: LinearShape,
    precision: Precision,
    forced: Option<LinearPath>,
) -> Result<Choice<LinearPath>, KernelError> {
    match (device, forced) {
        (DeviceFacts::Cpu { isa }, None) => Ok(Choice {
            path: LinearPath::fastest(isa),
            reason: cpu::linear_reason(isa, shape.rows, precision),
        }),
        (DeviceFacts::Cpu { isa }, Some(path)) => path.forced(cpu::missing(path.isa(), isa)),
        (DeviceFacts::Cuda { arch }, None) => Ok(cuda::linear(arch, shape, precision)),
        (DeviceFacts::Cuda { arch }, Some(path)) => {
            cuda::forced_linear(arch, shape, precision, path)
        }
    }
}

/// Chooses the attention path of a worker, or checks a forced one.
///
/// # Errors
/// [`KernelError::PathRefused`] if `forced` needs more than the device has.
pub fn select_attention(
    device: DeviceFacts,
    task: AttentionTask,
    forced: Option<AttentionPath>,
) -> Result<Choice<AttentionPath>, KernelError> {
    match (device, forced) {
        (DeviceFacts::Cpu { isa }, None) => Ok(Choice {
            path: AttentionPath::fastest(isa),
            reason: cpu::attention_reason(isa),
        }),
        (DeviceFacts::Cpu { isa }, Some(path)) => path.forced(cpu::missing(path.isa(), isa)),
        (DeviceFacts::Cuda { arch }, None) => Ok(cuda::attention(arch, task)),
        (DeviceFacts::Cuda { arch }, Some(path)) => cuda::forced_attention(arch, task, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Dtype;

    const TASK: AttentionTask = AttentionTask {
        phase: Phase::Decode,
        head_dim: 64,
        kv: KvDtype::F16,
        precision: Precision::Exact,
    };

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
            let attention = select_attention(device, TASK, None).unwrap();
            assert_eq!(attention.path.isa(), Some(isa));
            for &path in LinearPath::ALL {
                let forced = select_linear(device, shape, Precision::Exact, Some(path));
                let runs = path.isa().is_some_and(|needed| needed <= isa);
                assert_eq!(forced.is_ok(), runs, "{path} on {isa}");
            }
        }
        let refused = select_attention(
            DeviceFacts::Cpu { isa: CpuIsa::Avx2 },
            TASK,
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
        for &path in LinearPath::ALL {
            assert_eq!(path.to_string().parse::<LinearPath>().unwrap(), path);
        }
        let error = "cpu_avx1024"
            .parse::<AttentionPath>()
            .unwrap_err()
            .to_string();
        assert!(error.contains("cpu_avx512, eager, decode_split"), "{error}");
    }
}
