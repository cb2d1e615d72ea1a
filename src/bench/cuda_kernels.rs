//! `secondwind bench kernels --device cuda:N`: every path and shape against what bounds it on the card.

use anyhow::{Context, Result};
use secondwind_kernels::{
    cuda::{
        Device,
        bench::{self, AttentionCall, Cublas, RandomLinears},
    },
    kv::KvDtype,
    select::{
        AttentionPath, AttentionTask, DeviceFacts, Instruction, LinearPath, LinearShape, Phase,
        Precision, select_attention, select_linear,
    },
    weights::{Dtype, WeightFormat},
};
use serde::Serialize;

use super::roofline::{Ceiling, Point};
use crate::output;

/// Linears of Qwen2.5 models, as (rows, columns) of W.
const SHAPES: [(&str, (usize, usize)); 7] = [
    ("7B qkv", (3584, 4608)),
    ("7B gate+up", (3584, 37888)),
    ("7B down", (18944, 3584)),
    ("32B gate+up", (5120, 55296)),
    ("32B down", (27648, 5120)),
    ("72B gate+up", (8192, 59136)),
    ("72B down", (29568, 8192)),
];
/// The shape on which the other widths are timed.
const WIDTHS: (&str, (usize, usize)) = ("7B gate+up", (3584, 37888));
const LM_HEAD: (&str, (usize, usize)) = ("7B lm_head", (3584, 152_064));
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 256, 2048];
const GROUP: usize = 128;
/// Heads of a 32B: (query, KV, channels).
const HEADS: (usize, usize, usize) = (40, 8, 128);
/// (sequences, tokens in the cache, tokens that come).
const ATTENTION: [(usize, usize, usize); 6] = [
    (1, 1024, 1),
    (1, 16384, 1),
    (8, 4096, 1),
    (1, 512, 512),
    (1, 4096, 4096),
    (1, 16384, 2048),
];

/// All measurements.
#[derive(Serialize)]
pub struct Report {
    device: String,
    driver: String,
    copy_bytes_per_second: f64,
    launch_seconds: f64,
    peaks: Vec<Peak>,
    linears: Vec<Linear>,
    attention: Vec<Attention>,
}

/// What one kind of instruction reaches alone.
#[derive(Serialize)]
struct Peak {
    instruction: &'static str,
    multiply_adds_per_second: f64,
}

/// What bounds a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Regime {
    Memory,
    Compute,
    /// Starting the work takes as long as the work.
    Overhead,
}

/// A measured time beside its bound.
#[derive(Serialize)]
struct Timed {
    microseconds: f64,
    /// The larger of bytes at copy bandwidth and multiply-adds at the instruction's peak.
    bound_microseconds: f64,
    of_bound: f64,
    regime: Regime,
    bytes_per_second: f64,
    of_copy_bandwidth: f64,
    multiply_adds_per_second: f64,
    multiply_adds_per_byte: f64,
}

/// One product.
#[derive(Serialize)]
struct Linear {
    module: &'static str,
    weights: String,
    k: usize,
    n: usize,
    rows: usize,
    path: &'static str,
    chosen: bool,
    #[serde(flatten)]
    timed: Timed,
    /// cuBLAS in half precision on the same shape takes so many times as long.
    over_cublas_f16: Option<f64>,
}

/// One attention call.
#[derive(Serialize)]
struct Attention {
    kv: String,
    sequences: usize,
    context: usize,
    tokens: usize,
    path: &'static str,
    chosen: bool,
    #[serde(flatten)]
    timed: Timed,
}

/// What a card can do at most, measured.
struct Ceilings {
    copy: f64,
    launch: f64,
    peaks: Vec<(Instruction, f64)>,
}

impl Ceilings {
    fn measure(device: &Device) -> Result<Self> {
        Ok(Self {
            copy: bench::copy_bandwidth(device)?,
            launch: bench::launch_seconds(device)?,
            peaks: bench::instruction_peaks(device)?,
        })
    }

    fn timed(
        &self,
        seconds: f64,
        bytes: f64,
        multiply_adds: f64,
        instruction: Instruction,
    ) -> Timed {
        let peak = self.peaks.iter().find(|(of, _)| *of == instruction);
        let arithmetic = peak.map_or(0.0, |(_, peak)| multiply_adds / peak);
        let memory = bytes / self.copy;
        let bound = memory.max(arithmetic);
        Timed {
            microseconds: 1e6 * seconds,
            bound_microseconds: 1e6 * bound,
            of_bound: bound / seconds,
            regime: match () {
                () if bound < self.launch => Regime::Overhead,
                () if memory >= arithmetic => Regime::Memory,
                () => Regime::Compute,
            },
            bytes_per_second: bytes / seconds,
            of_copy_bandwidth: bytes / seconds / self.copy,
            multiply_adds_per_second: multiply_adds / seconds,
            multiply_adds_per_byte: multiply_adds / bytes,
        }
    }
}

/// Measures `device`; the report and its picture.
pub fn run(device: &Device, json: bool, svg: Option<&std::path::Path>) -> Result<()> {
    let report = measure(device)?;
    if let Some(path) = svg {
        std::fs::write(path, picture(&report))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print_line(&render(&report))
}

fn measure(device: &Device) -> Result<Report> {
    let ceilings = Ceilings::measure(device)?;
    let cublas = Cublas::open(device)?;
    let mut linears = Vec::new();
    let int4 = WeightFormat::Quantised { bits: 4 };
    let other_widths = [2, 3, 8].map(|bits| (WIDTHS, WeightFormat::Quantised { bits }));
    let all = SHAPES
        .map(|shape| (shape, int4))
        .into_iter()
        .chain(other_widths)
        .chain([(LM_HEAD, WeightFormat::Dense(Dtype::F16))]);
    for (module, format) in all {
        linears.extend(time_linears(
            device,
            &ceilings,
            cublas.as_ref(),
            module,
            format,
        )?);
    }
    let mut attention = Vec::new();
    for kv in [KvDtype::F16, KvDtype::Int8] {
        for call in ATTENTION {
            attention.extend(time_attention(device, &ceilings, kv, call)?);
        }
    }
    let facts = device.facts();
    Ok(Report {
        device: format!("{} ({} code)", facts.name, device.arch()),
        driver: format!("CUDA {}.{}", facts.driver.0, facts.driver.1),
        copy_bytes_per_second: ceilings.copy,
        launch_seconds: ceilings.launch,
        peaks: ceilings
            .peaks
            .iter()
            .map(|(instruction, peak)| Peak {
                instruction: instruction.name(),
                multiply_adds_per_second: *peak,
            })
            .collect(),
        linears,
        attention,
    })
}

/// Times every path that the architecture has, where it makes sense to run it.
fn time_linears(
    device: &Device,
    ceilings: &Ceilings,
    cublas: Option<&Cublas<'_>>,
    (module, (k, n)): (&'static str, (usize, usize)),
    format: WeightFormat,
) -> Result<Vec<Linear>> {
    let facts = DeviceFacts::Cuda {
        arch: device.arch(),
    };
    let mut linears = Vec::new();
    let weights = RandomLinears::new(device, format, (k, n), GROUP)?;
    let half_weights = cublas.map(|cublas| cublas.weights((k, n))).transpose()?;
    for rows in ROWS {
        output::note(&format!("timing {format} {module} at {rows} rows"));
        let shape = LinearShape { format, k, n, rows };
        let chosen = select_linear(facts, shape, Precision::Fast, None)?.path;
        let half = cublas
            .zip(half_weights.as_ref())
            .map(|(cublas, weights)| cublas.time(weights, (k, n), rows))
            .transpose()?;
        for &path in LinearPath::ALL {
            let forced = select_linear(facts, shape, Precision::Fast, Some(path));
            let Some(instruction) = path.instruction() else {
                continue;
            };
            // A path for other weights, or of another device, is not what would run.
            let runs = forced.is_ok_and(|choice| choice.path == path);
            if !runs || path != chosen && path.most_rows() < rows {
                continue;
            }
            let timing = weights.time(path, rows)?;
            let bytes = timing.read_bytes as f64 + (4 * rows * (k + n)) as f64;
            let multiply_adds = (path.multiply_adds() * rows) as f64 * k as f64 * n as f64;
            linears.push(Linear {
                module,
                weights: format.to_string(),
                k,
                n,
                rows,
                path: path.name(),
                chosen: path == chosen,
                timed: ceilings.timed(timing.seconds, bytes, multiply_adds, instruction),
                over_cublas_f16: half.map(|half| half / timing.seconds),
            });
        }
    }
    Ok(linears)
}

fn time_attention(
    device: &Device,
    ceilings: &Ceilings,
    kv: KvDtype,
    (sequences, context, tokens): (usize, usize, usize),
) -> Result<Vec<Attention>> {
    let (query_heads, kv_heads, head_dim) = HEADS;
    output::note(&format!(
        "timing attention of {sequences} x {tokens} tokens over {context}"
    ));
    let call = AttentionCall {
        query_heads,
        kv_heads,
        head_dim,
        kv,
        sequences,
        context,
        tokens,
    };
    let facts = DeviceFacts::Cuda {
        arch: device.arch(),
    };
    let task = AttentionTask {
        phase: if tokens == 1 {
            Phase::Decode
        } else {
            Phase::Prefill
        },
        head_dim,
        kv,
        precision: Precision::Fast,
    };
    let chosen = select_attention(facts, task, None)?.path;
    let mut timed = Vec::new();
    for &path in AttentionPath::ALL {
        let forced = select_attention(facts, task, Some(path));
        if path.isa().is_some() || !forced.is_ok_and(|choice| choice.path == path) {
            continue;
        }
        let instruction = match path {
            AttentionPath::PrefillMma => Instruction::MmaF16,
            _ => Instruction::FmaF32,
        };
        let seconds = bench::time_attention(device, path, call)?;
        let bytes =
            call.kv_bytes() as f64 + (8 * sequences * tokens * query_heads * head_dim) as f64;
        timed.push(Attention {
            kv: kv.to_string(),
            sequences,
            context,
            tokens,
            path: path.name(),
            chosen: path == chosen,
            timed: ceilings.timed(seconds, bytes, call.multiply_adds(), instruction),
        });
    }
    Ok(timed)
}

fn picture(report: &Report) -> String {
    let ceilings: Vec<Ceiling> = report
        .peaks
        .iter()
        .map(|peak| Ceiling {
            name: peak.instruction,
            multiply_adds_per_second: peak.multiply_adds_per_second,
        })
        .collect();
    let points: Vec<Point> = report
        .linears
        .iter()
        .filter(|linear| linear.chosen)
        .map(|linear| Point {
            name: format!(
                "{} {}, {} rows, {}",
                linear.module, linear.weights, linear.rows, linear.path
            ),
            rows: linear.rows,
            multiply_adds_per_byte: linear.timed.multiply_adds_per_byte,
            multiply_adds_per_second: linear.timed.multiply_adds_per_second,
        })
        .collect();
    super::roofline::svg(
        &report.device,
        report.copy_bytes_per_second,
        &ceilings,
        &points,
    )
}

fn render(report: &Report) -> String {
    let cells = |timed: &Timed| {
        vec![
            format!("{:.1}", timed.microseconds),
            format!("{:.0}", timed.bytes_per_second / 1e9),
            format!("{:.0} %", 100.0 * timed.of_copy_bandwidth),
            format!("{:.2}", timed.multiply_adds_per_second / 1e12),
            format!("{:.0} %", 100.0 * timed.of_bound),
            format!("{:?}", timed.regime).to_lowercase(),
        ]
    };
    let star = |chosen: bool| if chosen { "*" } else { "" }.to_owned();
    let linears: Vec<Vec<String>> = report
        .linears
        .iter()
        .map(|linear| {
            let mut row = vec![
                linear.module.to_owned(),
                linear.weights.clone(),
                linear.rows.to_string(),
                linear.path.to_owned(),
                star(linear.chosen),
            ];
            row.extend(cells(&linear.timed));
            row.push(
                linear
                    .over_cublas_f16
                    .map_or_else(|| "-".into(), |over| format!("{over:.2}")),
            );
            row
        })
        .collect();
    let attention: Vec<Vec<String>> = report
        .attention
        .iter()
        .map(|call| {
            let mut row = vec![
                call.kv.clone(),
                call.sequences.to_string(),
                call.context.to_string(),
                call.tokens.to_string(),
                call.path.to_owned(),
                star(call.chosen),
            ];
            row.extend(cells(&call.timed));
            row
        })
        .collect();
    let peaks: Vec<String> = report
        .peaks
        .iter()
        .map(|peak| {
            format!(
                "{} {:.1}",
                peak.instruction,
                peak.multiply_adds_per_second / 1e12
            )
        })
        .collect();
    format!(
        "{}, {}: copies {:.0} GB/s, a launch in a graph takes {:.2} us\npeaks in T multiply-adds/s: {}\n\
         * is what the selector takes; x16 is speed over cuBLAS in half precision\n\n{}\n\n{}",
        report.device,
        report.driver,
        report.copy_bytes_per_second / 1e9,
        1e6 * report.launch_seconds,
        peaks.join(", "),
        output::table(
            &[
                "module", "weights", "rows", "path", "", "us", "GB/s", "of copy", "Tmac/s",
                "of bound", "regime", "x16",
            ],
            &linears,
            &[2, 5, 6, 7, 8, 9, 11]
        ),
        output::table(
            &[
                "kv",
                "sequences",
                "context",
                "tokens",
                "path",
                "",
                "us",
                "GB/s",
                "of copy",
                "Tmac/s",
                "of bound",
                "regime",
            ],
            &attention,
            &[1, 2, 3, 6, 7, 8, 9, 10]
        )
    )
}
