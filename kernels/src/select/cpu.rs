//! Reasons and refusals of CPU paths.

use super::Precision;
use crate::cpu::FUSED_ROWS;
use crate::isa::CpuIsa;

pub(super) fn linear_reason(isa: CpuIsa, rows: usize, precision: Precision) -> &'static str {
    match (isa, precision, rows) {
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
    }
}

pub(super) fn attention_reason(isa: CpuIsa) -> &'static str {
    match isa {
        CpuIsa::Portable => "no vector extension beyond the build's baseline",
        CpuIsa::Avx2 | CpuIsa::Avx512 => "widest vectors here; keys are stored 16 tokens a vector",
    }
}

/// What a path that needs `needed` (`None`: a card) lacks on a machine whose best is `isa`.
pub(super) fn missing(needed: Option<CpuIsa>, isa: CpuIsa) -> Option<String> {
    match needed {
        None => Some("it is a CUDA path, this worker's device is cpu".into()),
        Some(needed) if needed > isa => Some(format!(
            "it needs {}, this machine's best is {isa}",
            needed.features()
        )),
        Some(_) => None,
    }
}
