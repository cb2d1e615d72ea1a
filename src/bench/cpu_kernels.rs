//! `secondwind bench kernels --device cpu`: linears of a 7B model against this machine's memory.

use std::{num::NonZeroUsize, time::Duration};

use anyhow::Result;
use secondwind_kernels::{
    bench,
    pool::ThreadPool,
    select::{DeviceFacts, LinearShape, Precision, select_linear},
    weights::{Dtype, WeightFormat},
};
use serde::Serialize;

use crate::output;

/// Linears of a 7-billion-parameter Qwen2.5, as (rows, columns) of W.
const SHAPES: [(&str, (usize, usize)); 3] = [
    ("q_proj", (3584, 3584)),
    ("gate_proj", (3584, 18944)),
    ("down_proj", (18944, 3584)),
];
/// Rows of one call: a token, a small batch, a prompt's chunk.
const ROWS: [usize; 3] = [1, 8, 512];
const GROUP: usize = 128;

/// All measurements.
#[derive(Serialize)]
struct Report {
    device: String,
    threads: usize,
    read_bytes_per_second: f64,
    copy_bytes_per_second: f64,
    load: Load,
    linears: Vec<Linear>,
}

/// Laying out weights, against copying them.
#[derive(Serialize)]
struct Load {
    bytes_per_second: f64,
    of_copy: f64,
}

/// One linear.
#[derive(Serialize)]
struct Linear {
    module: &'static str,
    weights: String,
    rows: usize,
    path: String,
    milliseconds: f64,
    gflops: f64,
    weight_bytes_per_second: f64,
    of_read_bandwidth: f64,
}

/// Measures with `threads` threads, or one per core.
pub fn run(threads: Option<NonZeroUsize>, json: bool) -> Result<()> {
    let report = measure(threads)?;
    if json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print_line(&render(&report))
}

fn measure(threads: Option<NonZeroUsize>) -> Result<Report> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.map_or(cores, NonZeroUsize::get);
    let pool = ThreadPool::new(threads)?;
    let read = bench::read_bandwidth(&pool, bench::COLD_BYTES, Duration::from_millis(600));
    let build = bench::time_build(4, SHAPES[1].1, GROUP, Duration::from_millis(200))?;
    let mut linears = Vec::new();
    let formats = [2, 3, 4, 8].map(|bits| {
        (
            format!("int{bits} g{GROUP}"),
            WeightFormat::Quantised { bits },
        )
    });
    for (weights, format) in formats
        .into_iter()
        .chain([("f16".to_owned(), WeightFormat::Dense(Dtype::F16))])
    {
        // Four bits is what the checkpoints are; the others are timed on one shape.
        let all = matches!(format, WeightFormat::Quantised { bits: 4 });
        for (module, (k, n)) in SHAPES.into_iter().take(if all { SHAPES.len() } else { 1 }) {
            for rows in ROWS {
                output::note(&format!("timing {weights} {module} at {rows} rows"));
                let shape = LinearShape { format, k, n, rows };
                let path =
                    select_linear(DeviceFacts::this_cpu(), shape, Precision::Exact, None)?.path;
                let timing = bench::time_linear(
                    path,
                    format,
                    (k, n),
                    GROUP,
                    rows,
                    &pool,
                    bench::COLD_BYTES,
                    Duration::from_millis(200),
                )?;
                linears.push(Linear {
                    module,
                    weights: weights.clone(),
                    rows,
                    path: path.to_string(),
                    milliseconds: 1e3 * timing.seconds,
                    gflops: timing.flops() / 1e9,
                    weight_bytes_per_second: timing.bytes_per_second(),
                    of_read_bandwidth: timing.bytes_per_second() / read,
                });
            }
        }
    }
    Ok(Report {
        device: format!("cpu ({})", secondwind_kernels::isa::detect()),
        threads,
        read_bytes_per_second: read,
        copy_bytes_per_second: bench::copy_bandwidth(&pool),
        load: Load {
            bytes_per_second: build.bytes as f64 / build.build_seconds,
            of_copy: build.copy_seconds / build.build_seconds,
        },
        linears,
    })
}

fn render(report: &Report) -> String {
    let header = [
        "module", "weights", "rows", "path", "ms", "GFLOP/s", "GB/s", "of read",
    ];
    let rows = report.linears.iter().map(|linear| {
        vec![
            linear.module.to_owned(),
            linear.weights.clone(),
            linear.rows.to_string(),
            linear.path.clone(),
            format!("{:.3}", linear.milliseconds),
            format!("{:.1}", linear.gflops),
            format!("{:.2}", linear.weight_bytes_per_second / 1e9),
            // Many rows are bound by arithmetic, not by reading.
            match linear.rows {
                1 => format!("{:.0} %", 100.0 * linear.of_read_bandwidth),
                _ => "-".to_owned(),
            },
        ]
    });
    format!(
        "{}, {} threads: reads {:.2} GB/s, copies {:.2} GB/s; lays out int4 weights at {:.2} GB/s ({:.0} % of a copy)\n\n{}",
        report.device,
        report.threads,
        report.read_bytes_per_second / 1e9,
        report.copy_bytes_per_second / 1e9,
        report.load.bytes_per_second / 1e9,
        100.0 * report.load.of_copy,
        output::table(&header, &rows.collect::<Vec<_>>(), &[2, 4, 5, 6, 7])
    )
}
