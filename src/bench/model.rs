//! `secondwind bench model`: prompts and decoding of a model of random weights, on one card or more.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use secondwind_kernels::cuda::bench::copy_bandwidth;
use secondwind_model::{
    plan::{self, KvDType, LmHead, ModelShape, PlanSettings, Precision, ShardPlan},
    synthetic::SyntheticModel,
};
use secondwind_worker::{
    backend::CudaBackend,
    bench::BenchRank,
    collective::{Collective, Solo, local, nccl::Nccl},
    measure_cuda,
};
use serde::Serialize;

use super::CardFlags;
use crate::{exit::UsageError, output};

/// How long ranks wait for each other.
const DEADLINE: Duration = Duration::from_secs(120);
/// Decoding steps that are timed.
const STEPS: usize = 24;
/// Tokens that a sequence holds when it is first timed.
const CONTEXT: usize = 128;

/// Flags of `bench model`.
#[derive(Args, Debug)]
pub struct ModelFlags {
    /// Shape of the model: `qwen2.5-0.5b`, `-1.5b`, `-3b`, `-7b`, `-14b`, `-32b` or `-72b`
    #[arg(long, value_name = "SHAPE", default_value = "qwen2.5-7b")]
    shape: String,
    /// Cards, such as `cuda:0` or `cuda:0,cuda:1`; one rank on each
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "cuda:0"
    )]
    device: Vec<String>,
    /// `fast` or `exact`
    #[arg(long, value_name = "WORD", default_value = "fast")]
    precision: String,
    /// `fp16` or `int8`
    #[arg(long, value_name = "WORD", default_value = "fp16")]
    lm_head: String,
    /// `f32`, `f16` or `int8`
    #[arg(long, value_name = "WORD", default_value = "f16")]
    kv_dtype: String,
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
    #[command(flatten)]
    card: CardFlags,
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

/// What rank 0 measured.
struct Measured {
    copy: f64,
    taken_bytes: u64,
    recording_bytes: u64,
    paths: Vec<String>,
    prompts: Vec<(usize, f64)>,
    decoding: Vec<(u64, f64)>,
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
    let size = flags
        .shape
        .strip_prefix("qwen2.5-")
        .and_then(SyntheticModel::qwen2_5);
    let model = size.ok_or_else(|| {
        UsageError::one(format!(
            "--shape {}: known are qwen2.5-0.5b to qwen2.5-72b",
            flags.shape
        ))
    })?;
    let shape = model.shape().context("the shape cannot be made")?;
    let shape = Arc::new(shape.with_lm_head(lm_head(flags)?));
    let ordinals = ordinals(&flags.device)?;
    let cards = ordinals
        .iter()
        .map(|&ordinal| flags.card.open(ordinal))
        .collect::<Result<Vec<_>>>()?;
    let devices = cards
        .iter()
        .map(|card| format!("{} ({} code)", card.facts().name, card.arch()))
        .collect();
    let capabilities = cards
        .iter()
        .map(|card| measure_cuda(&shape, card, None))
        .collect::<Result<Vec<_>, _>>()?;
    let plan = plan::plan(&shape, &settings(flags)?, &capabilities)?;
    let nccl = match cards.len() {
        1 => None,
        _ => Some(Arc::new(Nccl::open(None)?)),
    };
    let mut hosts: Vec<Box<dyn Collective>> = match cards.len() {
        1 => vec![Box::new(Solo)],
        world => local::meshes(world, DEADLINE)
            .into_iter()
            .map(|mesh| Box::new(mesh) as Box<dyn Collective>)
            .collect(),
    };
    let mut ranks = Vec::new();
    for (rank, card) in cards.into_iter().enumerate().rev() {
        let host = hosts.pop().context("a rank has no link")?;
        let (shape, plan, nccl) = (shape.clone(), plan.clone(), nccl.clone());
        let (batch, prompt) = (flags.batch.clone(), flags.prompt.clone());
        ranks.push(thread::spawn(move || -> Result<Measured> {
            let copy = copy_bandwidth(&card)?;
            let sums = nccl.is_some();
            let backend = CudaBackend::new(card, None, None, nccl)?;
            let rank = BenchRank::new(backend, &shape, &plan, rank, host, sums)?;
            time(rank, copy, &batch, &prompt)
        }));
    }
    let mut root = None;
    for rank in ranks {
        // Rank 0 was started last.
        root = Some(rank.join().map_err(|_| anyhow!("a rank panicked"))??);
    }
    let root = root.context("no rank ran")?;
    Ok(report(flags, &shape, &plan, devices, root))
}

fn ordinals(devices: &[String]) -> Result<Vec<usize>> {
    let ordinal = |name: &String| match name.trim().parse() {
        Ok(secondwind_worker::Device::Cuda(ordinal)) => Ok(ordinal),
        Ok(_) => Err(UsageError::one("--device: this measures cards, such as cuda:0").into()),
        Err(why) => Err(UsageError::one(format!("--device: {why}")).into()),
    };
    devices.iter().map(ordinal).collect()
}

fn lm_head(flags: &ModelFlags) -> Result<LmHead> {
    match flags.lm_head.as_str() {
        "fp16" => Ok(LmHead::Fp16),
        "int8" => Ok(LmHead::Int8),
        other => {
            let message = format!("--lm-head {other}: known are fp16 and int8");
            Err(UsageError::one(message).into())
        }
    }
}

fn settings(flags: &ModelFlags) -> Result<PlanSettings> {
    let sequences = flags.batch.iter().copied().max().unwrap_or(1) as usize;
    let prompt = flags.prompt.iter().copied().max().unwrap_or(0);
    Ok(PlanSettings {
        max_context_tokens: prompt.max(CONTEXT + 2 * STEPS).next_multiple_of(16) + 16,
        max_sequences: sequences,
        max_step_tokens: 2048,
        max_logit_rows: sequences,
        block_tokens: 16,
        kv_dtype: flags
            .kv_dtype
            .parse::<KvDType>()
            .map_err(|why| UsageError::one(format!("--kv-dtype: {why}")))?,
        precision: match flags.precision.as_str() {
            "fast" => Precision::Fast,
            "exact" => Precision::Exact,
            other => {
                let message = format!("--precision {other}: known are fast and exact");
                return Err(UsageError::one(message).into());
            }
        },
        lm_head: lm_head(flags)?,
        memory_reserve_bytes: 0,
        forced_split: None,
    })
}

fn time(mut rank: BenchRank, copy: f64, batch: &[u64], prompt: &[usize]) -> Result<Measured> {
    let mut prompts = Vec::new();
    for &tokens in prompt {
        rank.clear();
        rank.prompt(1, tokens)?;
        let mut seconds = Vec::new();
        for _ in 0..3 {
            rank.clear();
            seconds.push(rank.prompt(1, tokens)?);
        }
        prompts.push((tokens, median(seconds)));
    }
    let mut decoding = Vec::new();
    for &sequences in batch {
        rank.clear();
        for sequence in 1..=sequences {
            rank.prompt(sequence, CONTEXT)?;
        }
        rank.decode(sequences, CONTEXT, 3)?;
        decoding.push((
            sequences,
            median(rank.decode(sequences, CONTEXT + 3, STEPS)?),
        ));
    }
    Ok(Measured {
        copy,
        taken_bytes: rank.taken_bytes,
        recording_bytes: rank.recording_bytes,
        paths: rank.choices,
        prompts,
        decoding,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn report(
    flags: &ModelFlags,
    shape: &ModelShape,
    plan: &ShardPlan,
    devices: Vec<String>,
    root: Measured,
) -> Report {
    let memory = &plan.ranks[0].memory;
    // The embedding is there for single rows only.
    let embedding = plan::embedding_bytes(shape, plan.vocab[0].len());
    let bytes_per_token =
        (memory.weights + memory.scales + memory.padding).saturating_sub(embedding);
    let byte_time = bytes_per_token as f64 / root.copy;
    Report {
        shape: flags.shape.clone(),
        devices,
        precision: flags.precision.clone(),
        kv_dtype: flags.kv_dtype.clone(),
        copy_bytes_per_second: root.copy,
        bytes_per_token,
        planned_bytes: memory.total(),
        taken_bytes: root.taken_bytes,
        recording_bytes: root.recording_bytes,
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
