//! `secondwind bench model`: prompts and decoding of a model of random weights, on one card or more.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use secondwind_model::plan::{self, ModelShape, ShardPlan};
use secondwind_worker::{
    backend::{Backend, LinearUse},
    bench::BenchRank,
    loader::{Phase, Readings},
    timeline::Mark,
};
use serde::Serialize;

use super::roofline::{self, Ceiling, Point};
use crate::{
    output,
    ranks::{Load, RankFlags, Work, median},
};

/// The model where none is asked for.
const SHAPE: &str = "qwen2.5-7b";
/// Decoding steps that are timed.
const STEPS: usize = 24;
/// Tokens that a sequence holds when it is first timed.
const CONTEXT: usize = 128;

/// Flags of `bench model`.
#[derive(Args, Debug)]
pub struct ModelFlags {
    #[command(flatten)]
    ranks: RankFlags,
    /// Sequences that decode together
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "1,8,16,32,64"
    )]
    batch: Vec<u64>,
    /// Prompt lengths
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "512,2048"
    )]
    prompt: Vec<usize>,
    /// Also draw rank 0's roofline into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    shape: String,
    devices: Vec<String>,
    precision: String,
    kv_dtype: String,
    copy_bytes_per_second: f64,
    /// Bytes of weights that rank 0 reads for one token.
    bytes_per_token: u64,
    planned_bytes: u64,
    taken_bytes: u64,
    recording_bytes: u64,
    paths: Vec<String>,
    prompts: Vec<Prompt>,
    decoding: Vec<Decoding>,
}

#[derive(Serialize)]
struct Prompt {
    tokens: usize,
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct Decoding {
    sequences: u64,
    tokens_per_second: f64,
    milliseconds: f64,
    /// The step's time over that of reading rank 0's weights once at copy bandwidth.
    byte_times: f64,
}

/// What is measured on every rank.
#[derive(Clone)]
struct Measure {
    batch: Vec<u64>,
    prompt: Vec<usize>,
}

/// What a rank measured.
struct Measured {
    readings: Readings,
    paths: Vec<String>,
    prompts: Vec<(usize, f64)>,
    decoding: Vec<(u64, f64)>,
    /// Of the picture.
    points: Vec<Point>,
}

/// Runs the command.
pub fn run(flags: &ModelFlags) -> Result<()> {
    let report = measure(flags)?;
    if flags.json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print_line(&render(&report))
}

fn measure(flags: &ModelFlags) -> Result<Report> {
    let group = flags.ranks.open(Some(SHAPE))?;
    let prompt = flags.prompt.iter().copied().max().unwrap_or(0);
    let plan = group.plan(&Load {
        sequences: flags.batch.iter().copied().max().unwrap_or(1) as usize,
        context_tokens: prompt.max(CONTEXT + 2 * STEPS).next_multiple_of(16) + 16,
        step_tokens: 2048,
    })?;
    let (model, shape) = (group.model.clone(), group.shape.clone());
    // A copy reads and writes at the same time; its rate is what a card says of its reads.
    let copy = group.capabilities[0].read_bytes_per_second;
    let ceilings = match flags.svg {
        Some(_) => group.peaks()?,
        None => Vec::new(),
    };
    let measured = group.run(
        &plan,
        &Measure {
            batch: flags.batch.clone(),
            prompt: flags.prompt.clone(),
        },
    )?;
    let root = measured.into_iter().next();
    let root = root.context("no rank ran")?;
    if let Some(path) = &flags.svg {
        let ceilings: Vec<Ceiling> = ceilings
            .into_iter()
            .map(|(instruction, multiply_adds_per_second)| Ceiling {
                name: instruction.name(),
                multiply_adds_per_second,
            })
            .collect();
        let picture = roofline::svg(&model, copy, &ceilings, &root.points);
        std::fs::write(path, picture)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report(flags, model, &shape, &plan, copy, root))
}

impl Work for Measure {
    type Found = Measured;

    fn on<B: Backend>(&self, mut rank: BenchRank<B>) -> Result<Measured> {
        let mut points = Vec::new();
        let mut prompts = Vec::new();
        for &tokens in &self.prompt {
            rank.clear();
            rank.prompt(1, tokens)?;
            let mut seconds = Vec::new();
            for _ in 0..3 {
                rank.clear();
                seconds.push(rank.prompt(1, tokens)?);
            }
            let seconds = median(seconds);
            let linears = rank.linears(tokens, 1)?;
            points.push(point("a prompt", tokens, seconds, &linears));
            prompts.push((tokens, seconds));
        }
        let mut decoding = Vec::new();
        for &sequences in &self.batch {
            rank.clear();
            for sequence in 1..=sequences {
                rank.prompt(sequence, CONTEXT)?;
            }
            rank.decode(sequences, CONTEXT, 3)?;
            let seconds = median(rank.decode(sequences, CONTEXT + 3, STEPS)?);
            let rows = sequences as usize;
            let linears = rank.linears(rows, rows)?;
            points.push(point("a decoding step", rows, seconds, &linears));
            decoding.push((sequences, seconds));
        }
        Ok(Measured {
            readings: rank.readings,
            paths: rank.choices,
            prompts,
            decoding,
            points,
        })
    }
}

/// A whole step in the picture: its products with weights, which are read once.
fn point(what: &str, rows: usize, seconds: f64, linears: &[(Mark, LinearUse)]) -> Point {
    let total = |of: fn(&LinearUse) -> u64| -> f64 {
        linears.iter().map(|(_, linear)| of(linear) as f64).sum()
    };
    let multiply_adds = total(|linear| linear.multiply_adds);
    Point {
        name: format!("{what} of {rows} tokens"),
        rows,
        multiply_adds_per_byte: multiply_adds / total(|linear| linear.read_bytes),
        multiply_adds_per_second: multiply_adds / seconds,
    }
}

fn report(
    flags: &ModelFlags,
    model: String,
    shape: &ModelShape,
    plan: &ShardPlan,
    copy: f64,
    root: Measured,
) -> Report {
    let memory = &plan.ranks[0].memory;
    // The embedding is there for single rows only.
    let embedding = plan::embedding_bytes(shape, plan.vocab[0].len());
    let bytes_per_token =
        (memory.weights + memory.scales + memory.padding).saturating_sub(embedding);
    let byte_time = bytes_per_token as f64 / copy;
    Report {
        shape: model,
        devices: plan.ranks.iter().map(|rank| rank.device.clone()).collect(),
        precision: flags.ranks.precision.clone(),
        kv_dtype: flags.ranks.kv_dtype.clone(),
        copy_bytes_per_second: copy,
        bytes_per_token,
        planned_bytes: memory.total(),
        taken_bytes: root.readings.total(),
        recording_bytes: root.readings.taken(Phase::Recordings).unwrap_or(0),
        paths: root.paths,
        prompts: root
            .prompts
            .into_iter()
            .map(|(tokens, seconds)| Prompt {
                tokens,
                tokens_per_second: tokens as f64 / seconds,
            })
            .collect(),
        decoding: root
            .decoding
            .into_iter()
            .map(|(sequences, seconds)| Decoding {
                sequences,
                tokens_per_second: sequences as f64 / seconds,
                milliseconds: 1e3 * seconds,
                byte_times: seconds / byte_time,
            })
            .collect(),
    }
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{}, {}, {} cache on {}\n{} read per token and rank at {:.0} GB/s (copy); memory {} planned, {} taken, {} of it by recordings\n\n{}\n\n",
        report.shape,
        report.precision,
        report.kv_dtype,
        report.devices.join(" + "),
        output::bytes(report.bytes_per_token),
        report.copy_bytes_per_second / 1e9,
        output::bytes(report.planned_bytes),
        output::bytes(report.taken_bytes),
        output::bytes(report.recording_bytes),
        report.paths.join("\n"),
    );
    let prompts: Vec<Vec<String>> = report
        .prompts
        .iter()
        .map(|row| {
            vec![
                row.tokens.to_string(),
                format!("{:.0}", row.tokens_per_second),
            ]
        })
        .collect();
    text += &output::table(&["prompt", "tokens/s"], &prompts, &[0, 1]);
    text += "\n\n";
    let decoding: Vec<Vec<String>> = report
        .decoding
        .iter()
        .map(|row| {
            vec![
                row.sequences.to_string(),
                format!("{:.1}", row.tokens_per_second),
                format!("{:.2}", row.milliseconds),
                format!("{:.2}", row.byte_times),
            ]
        })
        .collect();
    text + &output::table(
        &["sequences", "tokens/s", "ms", "byte times"],
        &decoding,
        &[0, 1, 2, 3],
    )
}
