//! Which path a card takes. The rows at which paths change hands were measured where nothing else is
//! said; docs/gpu-report.md has the tables.

use super::{AttentionPath, AttentionTask, Choice, LinearPath, LinearShape, Phase, Precision};
use crate::cuda::Arch;
use crate::error::KernelError;
use crate::kv::KvDtype;
use crate::weights::{Dtype, WeightFormat};

/// Rows up to which `a16_f32_gemv` wins over `f32`, although it reads the weights again for every 4
/// of them.
const F32_GEMV_ROWS: usize = 32;
/// Rows up to which it wins over `a16_mma`: those of one pass. Two passes take as long as it on a card of 2023.
const F32_GEMV_ROWS_BESIDE_MMA: usize = 4;
/// Rows up to which it wins over `a16_half2`. Not measured, but by count: a weight takes a P100 one
/// operation to unpack and one for each row in fp32, of which 3 fit into the time of its half byte;
/// in half2 one to unpack and 5/8 a row, the way to fp32 sums after every 8 products included.
const F32_GEMV_ROWS_BESIDE_HALF2: usize = 2;
/// Rows up to which `a8_dp4a_gemv` wins, which takes 8 rows at once.
const DP4A_GEMV_ROWS: usize = 16;
/// The same for `dense_gemv`, against tensor cores and against fp32.
const DENSE_GEMV_ROWS: (usize, usize) = (8, 48);

pub(super) fn linear(arch: Arch, shape: LinearShape, precision: Precision) -> Choice<LinearPath> {
    let (path, reason) = match (shape.format, precision) {
        (WeightFormat::Dense(dtype), _) => dense(arch, dtype, shape.rows, precision),
        (WeightFormat::Quantised { .. }, Precision::Exact) => exact(arch, shape.rows),
        (WeightFormat::Quantised { .. }, Precision::Fast) => fast(arch, shape.rows),
    };
    Choice { path, reason }
}

fn dense(
    arch: Arch,
    dtype: Dtype,
    rows: usize,
    precision: Precision,
) -> (LinearPath, &'static str) {
    let mma = arch.has_int8_mma() && dtype == Dtype::F16 && precision == Precision::Fast;
    let most = if mma {
        DENSE_GEMV_ROWS.0
    } else {
        DENSE_GEMV_ROWS.1
    };
    match rows {
        _ if rows <= most => (
            LinearPath::DenseGemv,
            "one pass over the weights serves 8 rows",
        ),
        _ if mma => (
            LinearPath::DenseMma,
            "f16 weights feed the tensor cores as they are; m16n8k8 starts at 7.5",
        ),
        _ => (
            LinearPath::DenseGemm,
            "fp32 multiply-add runs at full rate on every card",
        ),
    }
}

fn exact(arch: Arch, rows: usize) -> (LinearPath, &'static str) {
    let mma = arch.has_f16_mma();
    let gemv_rows = if mma {
        F32_GEMV_ROWS_BESIDE_MMA
    } else {
        F32_GEMV_ROWS
    };
    match rows {
        _ if rows <= gemv_rows => (
            LinearPath::A16F32Gemv,
            "exact; weights are widened in registers, one pass serves 4 rows",
        ),
        _ if mma => (
            LinearPath::A16Mma,
            "exact; activations in two f16 parts make tensor cores, from 7.0 on, as good as fp32",
        ),
        _ => (LinearPath::F32, "exact; weights are widened tile by tile"),
    }
}

fn fast(arch: Arch, rows: usize) -> (LinearPath, &'static str) {
    if arch.has_int8_mma() {
        return match rows {
            0..=1 => (
                LinearPath::A8Dp4aGemv,
                "one row leaves tensor cores idle; four-way dot products ask for less beside the weights",
            ),
            _ => (LinearPath::A8Mma, "integer tensor cores start at 7.5"),
        };
    }
    if !arch.has_dp4a() {
        let half2 = F32_GEMV_ROWS_BESIDE_HALF2 + 1..=F32_GEMV_ROWS;
        if arch.has_half2() && half2.contains(&rows) {
            return (
                LinearPath::A16Half2,
                "half arithmetic at twice the fp32 rate; one pass over the weights serves 8 rows",
            );
        }
        let (path, _) = exact(arch, rows);
        return (
            path,
            "four-way dot products start at 6.1, so fast is served by the exact family",
        );
    }
    match rows {
        0..=1 => (
            LinearPath::A16F32Gemv,
            "at one row fp32 keeps up with dp4a before 7.5, so exact arithmetic is free",
        ),
        2..=DP4A_GEMV_ROWS => (
            LinearPath::A8Dp4aGemv,
            "four-way dot products; one pass over the weights serves 8 rows",
        ),
        _ => (
            LinearPath::A8Dp4aGemm,
            "four-way dot products are 4 times the fp32 rate before 7.5",
        ),
    }
}

/// Checks a forced path. A forced path of the other kind of weights leaves these to the selector:
/// a model has both kinds.
pub(super) fn forced_linear(
    arch: Arch,
    shape: LinearShape,
    precision: Precision,
    path: LinearPath,
) -> Result<Choice<LinearPath>, KernelError> {
    let for_dense = match path {
        LinearPath::DenseGemv | LinearPath::DenseGemm | LinearPath::DenseMma => true,
        LinearPath::F32
        | LinearPath::A16F32Gemv
        | LinearPath::A16Half2
        | LinearPath::A16Mma
        | LinearPath::A8Dp4aGemv
        | LinearPath::A8Dp4aGemm
        | LinearPath::A8Mma => false,
        LinearPath::CpuReference
        | LinearPath::CpuPortable
        | LinearPath::CpuAvx2
        | LinearPath::CpuAvx512 => return path.forced(Some(NOT_CUDA.into())),
    };
    let missing = match path {
        LinearPath::A8Dp4aGemv | LinearPath::A8Dp4aGemm if !arch.has_dp4a() => Some(format!(
            "four-way dot products start at sm_61, this is {arch}"
        )),
        LinearPath::A8Mma if !arch.has_int8_mma() => Some(format!(
            "integer tensor cores start at sm_75, this is {arch}"
        )),
        LinearPath::A16Half2 if !arch.has_half2() => Some(format!(
            "its half arithmetic is for sm_60 and sm_70, this is {arch}"
        )),
        LinearPath::A16Half2 if precision == Precision::Exact => {
            Some("it sums in half precision and precision is exact".into())
        }
        LinearPath::A16Mma if !arch.has_f16_mma() => {
            Some(format!("its tensor cores start at sm_70, this is {arch}"))
        }
        LinearPath::DenseMma if !arch.has_int8_mma() => {
            Some(format!("its tensor cores start at sm_75, this is {arch}"))
        }
        LinearPath::DenseMma if precision == Precision::Exact => {
            Some("it rounds activations to f16 and precision is exact".into())
        }
        LinearPath::DenseMma if matches!(shape.format, WeightFormat::Dense(dtype) if dtype != Dtype::F16) => {
            Some("it reads f16 weights only".into())
        }
        LinearPath::A8Dp4aGemv | LinearPath::A8Dp4aGemm | LinearPath::A8Mma
            if precision == Precision::Exact =>
        {
            Some("it rounds activations to 8 bits and precision is exact".into())
        }
        _ => None,
    };
    let choice = path.forced(missing)?;
    match for_dense == matches!(shape.format, WeightFormat::Dense(_)) {
        true => Ok(choice),
        false => Ok(linear(arch, shape, precision)),
    }
}

const NOT_CUDA: &str = "it is a cpu path, this worker's device is a card";

/// Head sizes that the fused kernels are built for.
const FUSED_HEADS: [usize; 3] = [64, 128, 256];

pub(super) fn attention(arch: Arch, task: AttentionTask) -> Choice<AttentionPath> {
    let (path, reason) = match (task.phase, task.precision) {
        _ if !FUSED_HEADS.contains(&task.head_dim) => (
            AttentionPath::Eager,
            "the fused kernels are built for heads of 64, 128 and 256 channels",
        ),
        (Phase::Decode, _) => (
            AttentionPath::DecodeSplit,
            "splits the sequence over the card and reads every KV head once",
        ),
        (Phase::Prefill, Precision::Fast) if arch.has_int8_mma() && task.kv != KvDtype::F32 => (
            AttentionPath::PrefillMma,
            "fused, on tensor cores: m16n8k8 starts at 7.5, and f16 holds what the cache does",
        ),
        (Phase::Prefill, _) => (
            AttentionPath::PrefillTile,
            "fused: no scores in memory; fp32 runs at full rate on every card",
        ),
    };
    Choice { path, reason }
}

/// Checks a forced path; one of the other phase leaves this phase to the selector.
pub(super) fn forced_attention(
    arch: Arch,
    task: AttentionTask,
    path: AttentionPath,
) -> Result<Choice<AttentionPath>, KernelError> {
    let of = match path {
        AttentionPath::Eager => return path.forced(None),
        AttentionPath::DecodeSplit => Phase::Decode,
        AttentionPath::PrefillTile | AttentionPath::PrefillMma => Phase::Prefill,
        AttentionPath::CpuReference
        | AttentionPath::CpuPortable
        | AttentionPath::CpuAvx2
        | AttentionPath::CpuAvx512 => return path.forced(Some(NOT_CUDA.into())),
    };
    let mma = path == AttentionPath::PrefillMma;
    let missing = if !FUSED_HEADS.contains(&task.head_dim) {
        Some(format!(
            "it is not built for heads of {} channels",
            task.head_dim
        ))
    } else if mma && !arch.has_int8_mma() {
        Some(format!("its tensor cores start at sm_75, this is {arch}"))
    } else if mma && task.kv == KvDtype::F32 {
        Some("it reads an f16 or int8 cache, and kv_dtype is f32".into())
    } else if mma && task.precision == Precision::Exact {
        Some("it rounds queries and keys to fp16 and precision is exact".into())
    } else {
        None
    };
    let choice = path.forced(missing)?;
    match of == task.phase {
        true => Ok(choice),
        false => Ok(attention(arch, task)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::{DeviceFacts, select_attention, select_linear};

    const CARDS: [(&str, Arch); 6] = [
        ("P100", Arch::Sm60),
        ("P40", Arch::Sm61),
        ("V100", Arch::Sm70),
        ("T4", Arch::Sm75),
        ("2080 Ti", Arch::Sm75),
        ("3090", Arch::Sm86),
    ];
    const ROWS: [usize; 5] = [1, 4, 8, 16, 512];

    fn shape(format: WeightFormat, rows: usize) -> LinearShape {
        LinearShape {
            format,
            k: 4096,
            n: 4096,
            rows,
        }
    }

    /// Every decision for the cards that this is for, as one table.
    #[test]
    fn every_card_takes_the_paths_it_should() {
        let int4 = WeightFormat::Quantised { bits: 4 };
        let dense = WeightFormat::Dense(Dtype::F16);
        let expected = [
            ("P100", "a16_f32_gemv a16_half2 a16_half2 a16_half2 f32"),
            (
                "P40",
                "a16_f32_gemv a8_dp4a_gemv a8_dp4a_gemv a8_dp4a_gemv a8_dp4a_gemm",
            ),
            (
                "V100",
                "a16_f32_gemv a8_dp4a_gemv a8_dp4a_gemv a8_dp4a_gemv a8_dp4a_gemm",
            ),
            ("T4", "a8_dp4a_gemv a8_mma a8_mma a8_mma a8_mma"),
            ("2080 Ti", "a8_dp4a_gemv a8_mma a8_mma a8_mma a8_mma"),
            ("3090", "a8_dp4a_gemv a8_mma a8_mma a8_mma a8_mma"),
        ];
        for ((card, arch), (named, fast)) in CARDS.into_iter().zip(expected) {
            assert_eq!(card, named);
            let device = DeviceFacts::Cuda { arch };
            let paths = |format, precision| {
                let path = |rows| {
                    let choice =
                        select_linear(device, shape(format, rows), precision, None).unwrap();
                    assert!(!choice.reason.is_empty());
                    choice.path.name()
                };
                ROWS.map(path).join(" ")
            };
            assert_eq!(paths(int4, Precision::Fast), fast, "{card}");
            let exact = match arch.has_f16_mma() {
                true => "a16_f32_gemv a16_f32_gemv a16_mma a16_mma a16_mma",
                false => "a16_f32_gemv a16_f32_gemv a16_f32_gemv a16_f32_gemv f32",
            };
            assert_eq!(paths(int4, Precision::Exact), exact, "{card}");
            let plain = match arch.has_int8_mma() {
                true => "dense_gemv dense_gemv dense_gemv dense_mma dense_mma",
                false => "dense_gemv dense_gemv dense_gemv dense_gemv dense_gemm",
            };
            assert_eq!(paths(dense, Precision::Fast), plain, "{card}");
            for kv in KvDtype::ALL {
                let attention = |phase, head_dim, precision| {
                    let task = AttentionTask {
                        phase,
                        head_dim,
                        kv,
                        precision,
                    };
                    select_attention(device, task, None).unwrap().path
                };
                for head_dim in [64, 128, 256] {
                    let decode = attention(Phase::Decode, head_dim, Precision::Fast);
                    assert_eq!(decode, AttentionPath::DecodeSplit);
                    let exact = attention(Phase::Prefill, head_dim, Precision::Exact);
                    assert_eq!(exact, AttentionPath::PrefillTile);
                    let fast = match (arch.has_int8_mma(), kv) {
                        (true, KvDtype::F16 | KvDtype::Int8) => AttentionPath::PrefillMma,
                        _ => AttentionPath::PrefillTile,
                    };
                    assert_eq!(attention(Phase::Prefill, head_dim, Precision::Fast), fast);
                }
                assert_eq!(
                    attention(Phase::Decode, 80, Precision::Fast),
                    AttentionPath::Eager
                );
            }
        }
    }

    #[test]
    fn what_a_card_lacks_is_refused_with_its_reason() {
        let int4 = shape(WeightFormat::Quantised { bits: 4 }, 1);
        let force = |arch, path, precision| {
            select_linear(DeviceFacts::Cuda { arch }, int4, precision, Some(path))
        };
        for (arch, path, precision, part) in [
            (
                Arch::Sm60,
                LinearPath::A8Dp4aGemv,
                Precision::Fast,
                "start at sm_61",
            ),
            (
                Arch::Sm70,
                LinearPath::A8Mma,
                Precision::Fast,
                "start at sm_75",
            ),
            (
                Arch::Sm75,
                LinearPath::A8Mma,
                Precision::Exact,
                "precision is exact",
            ),
            (
                Arch::Sm61,
                LinearPath::A16Mma,
                Precision::Exact,
                "start at sm_70",
            ),
            (
                Arch::Sm61,
                LinearPath::A16Half2,
                Precision::Fast,
                "for sm_60 and sm_70",
            ),
            (
                Arch::Sm75,
                LinearPath::A16Half2,
                Precision::Fast,
                "for sm_60 and sm_70",
            ),
            (
                Arch::Sm60,
                LinearPath::A16Half2,
                Precision::Exact,
                "precision is exact",
            ),
            (Arch::Sm75, LinearPath::CpuAvx2, Precision::Fast, "cpu path"),
        ] {
            let error = force(arch, path, precision).unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains(path.name()),
                "{error}"
            );
        }
        for (arch, path, precision) in [
            (Arch::Sm75, LinearPath::A8Dp4aGemv, Precision::Fast),
            (Arch::Sm75, LinearPath::A16Mma, Precision::Fast),
            (Arch::Sm70, LinearPath::A16Mma, Precision::Exact),
            (Arch::Sm86, LinearPath::A16Mma, Precision::Exact),
            (Arch::Sm75, LinearPath::F32, Precision::Exact),
            (Arch::Sm70, LinearPath::A16Half2, Precision::Fast),
        ] {
            assert_eq!(force(arch, path, precision).unwrap().path, path);
        }
        // A path for quantised weights says nothing about lm_head.
        let lm_head = shape(WeightFormat::Dense(Dtype::F16), 1);
        let device = DeviceFacts::Cuda { arch: Arch::Sm61 };
        let choice =
            select_linear(device, lm_head, Precision::Fast, Some(LinearPath::F32)).unwrap();
        assert_eq!(choice.path, LinearPath::DenseGemv);
        let task = AttentionTask {
            phase: Phase::Decode,
            head_dim: 128,
            kv: KvDtype::F16,
            precision: Precision::Fast,
        };
        let choice = select_attention(device, task, Some(AttentionPath::PrefillTile)).unwrap();
        assert_eq!(choice.path, AttentionPath::DecodeSplit);
        let refused = select_attention(device, task, Some(AttentionPath::PrefillMma));
        assert!(refused.unwrap_err().to_string().contains("start at sm_75"));
        let turing = DeviceFacts::Cuda { arch: Arch::Sm75 };
        let wide = AttentionTask {
            phase: Phase::Prefill,
            kv: KvDtype::F32,
            ..task
        };
        let refused = select_attention(turing, wide, Some(AttentionPath::PrefillMma));
        assert!(refused.unwrap_err().to_string().contains("kv_dtype is f32"));
        let small = AttentionTask {
            head_dim: 80,
            ..task
        };
        assert!(select_attention(device, small, Some(AttentionPath::DecodeSplit)).is_err());
    }
}
