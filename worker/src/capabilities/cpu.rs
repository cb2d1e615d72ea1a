//! The host's processor, measured.

use std::time::Duration;

use secondwind_kernels::{
    KernelError, bench,
    cpu::linear_scratch_bytes,
    pool::ThreadPool,
    select::{DeviceFacts, LinearPath, LinearShape, Precision, select_linear},
};
use secondwind_model::{
    capabilities::{Capabilities, LinearCapability, Recordings, WeightKind},
    plan::{ModelShape, possible_weight_kinds},
};

use super::{ROW_BUCKETS, bytes_per_weight, kernel_format};

/// Shape of the linear that is timed; small, so that a worker joins quickly.
const TIMED: (usize, usize) = (1024, 4096);

/// How long each timing may repeat.
const BUDGET: Duration = Duration::from_millis(15);

/// Memory of the host that is left to others.
const HOST_RESERVE_BYTES: u64 = 512 << 20;

/// Measures the CPU for the weight formats of `shape`.
///
/// # Errors
/// The forced path cannot run here, or threads cannot be started.
pub fn measure_cpu(
    shape: &ModelShape,
    threads: usize,
    linear_path: Option<LinearPath>,
) -> Result<Capabilities, KernelError> {
    let pool = ThreadPool::new(threads)?;
    let device = DeviceFacts::this_cpu();
    let kinds = possible_weight_kinds(shape);
    let widest = shape
        .linears
        .iter()
        .map(|linear| linear.k)
        .max()
        .unwrap_or(0);
    let mut linears = Vec::new();
    for kind in kinds {
        for max_rows in ROW_BUCKETS {
            let format = kernel_format(kind);
            let (k, n) = TIMED;
            let shape = LinearShape {
                format,
                k,
                n,
                rows: max_rows,
            };
            let path = select_linear(device, shape, Precision::Exact, linear_path)?.path;
            let timing = bench::time_linear(
                path,
                format,
                TIMED,
                128,
                max_rows,
                &pool,
                bench::COOL_BYTES,
                BUDGET,
            )?;
            linears.push(LinearCapability {
                weights: kind,
                max_rows,
                path: path.to_string(),
                bytes_per_weight: bytes_per_weight(kind),
                column_multiple: secondwind_kernels::weights::PANEL_COLUMNS,
                row_multiple: secondwind_kernels::weights::UNIT_ROWS,
                scale_rows: 0,
                // An F16 scale and, where not symmetric, a 16-bit zero point.
                bytes_per_scale: match kind {
                    WeightKind::Gptq { .. } => 4.0,
                    WeightKind::Dense16 | WeightKind::Dense32 => 0.0,
                },
                scratch_bytes_per_row: linear_scratch_bytes(widest, 1, 0) as f64,
                scratch_bytes: linear_scratch_bytes(0, 0, threads) as f64,
                seconds_per_byte: timing.seconds / timing.read_bytes as f64,
            });
        }
    }
    Ok(Capabilities {
        device: format!(
            "cpu ({}, {threads} threads)",
            secondwind_kernels::isa::detect()
        ),
        usable_bytes: available_bytes().saturating_sub(HOST_RESERVE_BYTES),
        read_bytes_per_second: bench::read_bandwidth(&pool, bench::COOL_BYTES, 4 * BUDGET),
        all_reduce_latency_seconds: 50.0e-6,
        op_latency_seconds: 5.0e-6,
        linears,
        recordings: Recordings::default(),
    })
}

/// Memory that this host says it can give, in bytes.
fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        // A host that does not say is believed to have a little.
        .map_or(4 << 30, |kib| kib * 1024)
}
