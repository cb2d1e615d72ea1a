//! Ratios that hold the CPU kernels to account, all measured in this one run.

use std::time::Duration;

use secondwind_kernels::bench::{
    COLD_BYTES, copy_bandwidth, fastest, read_bandwidth, time_build, time_linear,
};
use secondwind_kernels::pool::ThreadPool;
use secondwind_kernels::select::{DeviceFacts, LinearPath, LinearShape, Precision, select_linear};
use secondwind_kernels::weights::WeightFormat;

const SHAPES: [(usize, usize); 3] = [(3584, 37888), (18944, 3584), (3584, 4608)];
const GROUP: usize = 128;
const BUDGET: Duration = Duration::from_millis(500);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = 2;
    let pool = ThreadPool::new(threads)?;
    let read = read_bandwidth(&pool, COLD_BYTES, BUDGET);
    println!(
        "{threads} threads: read {:.1} GB/s, copy {:.1} GB/s",
        read / 1e9,
        copy_bandwidth(&pool) / 1e9
    );
    let forced = std::env::var("LINEAR_PATH")
        .ok()
        .map(|name| name.parse())
        .transpose()?;
    gemv(&pool, read, forced)?;
    gemm_ratio(&pool, forced)?;
    build()
}

fn choose(
    format: WeightFormat,
    (k, n): (usize, usize),
    rows: usize,
    forced: Option<LinearPath>,
) -> LinearPath {
    let shape = LinearShape { format, k, n, rows };
    select_linear(DeviceFacts::this_cpu(), shape, Precision::Exact, forced)
        .map_or(LinearPath::CpuPortable, |choice| choice.path)
}

fn gemv(
    pool: &ThreadPool,
    read: f64,
    forced: Option<LinearPath>,
) -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "\n{:<12} {:>5} {:>14} {:>5} {:>10} {:>8} {:>9}",
        "path", "type", "(k, n)", "rows", "us", "GB/s", "of read"
    );
    for bits in [4, 8, 3, 2] {
        let format = WeightFormat::Quantised { bits };
        for shape in SHAPES {
            for rows in [1, 2, 4, 8, 16] {
                let path = choose(format, shape, rows, forced);
                let timing =
                    time_linear(path, format, shape, GROUP, rows, pool, COLD_BYTES, BUDGET)?;
                println!(
                    "{:<12} {:>5} {:>14} {rows:>5} {:>10.1} {:>8.1} {:>8.0}%",
                    path.name(),
                    format.to_string(),
                    format!("{shape:?}"),
                    timing.seconds * 1e6,
                    timing.bytes_per_second() / 1e9,
                    100.0 * timing.bytes_per_second() / read,
                );
            }
        }
    }
    Ok(())
}

fn gemm_ratio(
    pool: &ThreadPool,
    forced: Option<LinearPath>,
) -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "\n{:<12} {:>5} {:>14} {:>5} {:>9} {:>9} {:>7}",
        "path", "type", "(k, n)", "rows", "GFLOP/s", "gemm", "ratio"
    );
    for shape in SHAPES {
        for rows in [64, 256, 1024] {
            let oracle = gemm_flops(shape, rows, pool.threads());
            let format = WeightFormat::Quantised { bits: 4 };
            let path = choose(format, shape, rows, forced);
            let timing = time_linear(path, format, shape, GROUP, rows, pool, COLD_BYTES, BUDGET)?;
            println!(
                "{:<12} {:>5} {:>14} {rows:>5} {:>9.1} {:>9.1} {:>6.2}x",
                path.name(),
                format.to_string(),
                format!("{shape:?}"),
                timing.flops() / 1e9,
                oracle / 1e9,
                timing.flops() / oracle,
            );
        }
    }
    Ok(())
}

/// Floating-point operations per second of the `gemm` crate on f32 matrices of the same shape.
fn gemm_flops((k, n): (usize, usize), rows: usize, threads: usize) -> f64 {
    let x = vec![0.5f32; rows * k];
    let w = vec![0.25f32; k * n];
    let mut out = vec![0.0f32; rows * n];
    let seconds = fastest(BUDGET, || {
        // SAFETY: all three matrices are row-major with exactly the extents that are passed.
        unsafe {
            gemm::gemm(
                rows,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                x.as_ptr(),
                1,
                k as isize,
                w.as_ptr(),
                1,
                n as isize,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(threads),
            );
        }
    });
    2.0 * rows as f64 * k as f64 * n as f64 / seconds
}

fn build() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "\n{:>5} {:>14} {:>9} {:>9} {:>7}",
        "type", "(k, n)", "GB/s", "memcpy", "ratio"
    );
    for bits in [4, 8, 3, 2] {
        for shape in [SHAPES[0], SHAPES[1]] {
            let timing = time_build(bits, shape, GROUP, BUDGET)?;
            let rate = timing.bytes as f64 / timing.build_seconds / 1e9;
            let copy = timing.bytes as f64 / timing.copy_seconds / 1e9;
            println!(
                "{:>5} {:>14} {rate:>9.2} {copy:>9.2} {:>6.2}x",
                format!("int{bits}"),
                format!("{shape:?}"),
                rate / copy
            );
        }
    }
    Ok(())
}
