//! What this worker can do: measured, and asked of the one selector.

mod cpu;
mod cuda;

use secondwind_kernels::weights::{Dtype, WeightFormat as KernelFormat};
use secondwind_model::capabilities::WeightKind;

pub use cpu::measure_cpu;
pub use cuda::{cuda_recordings, measure_cuda};

/// Rows at which linears are timed: one token, a small batch, a large one, a prompt's chunk.
const ROW_BUCKETS: [usize; 4] = [1, 8, 64, 512];

fn kernel_format(kind: WeightKind) -> KernelFormat {
    match kind {
        WeightKind::Gptq { bits } => KernelFormat::Quantised { bits },
        WeightKind::Dense16 => KernelFormat::Dense(Dtype::F16),
        WeightKind::Dense32 => KernelFormat::Dense(Dtype::F32),
    }
}

fn bytes_per_weight(kind: WeightKind) -> f64 {
    match kind {
        WeightKind::Gptq { bits } => f64::from(bits) / 8.0,
        WeightKind::Dense16 => 2.0,
        WeightKind::Dense32 => 4.0,
    }
}
