//! `secondwind profile`: where a step's time and a device's memory go.

mod memory;
mod tree;

use anyhow::Result;
use clap::Args;
use secondwind_model::plan::ShardPlan;
use secondwind_worker::{
    backend::{Backend, LinearUse},
    bench::{BenchError, BenchRank, Profiled},
    loader::Readings,
    timeline::{Mark, Span},
};
use serde::Serialize;

use crate::{
    cli::Common,
    exit::UsageError,
    output,
    ranks::{Load, RankFlags, Work, median},
};
use memory::Purpose;
use tree::Node;

/// Steps that are timed as they are served.
const PLAIN: usize = 8;
/// Steps whose parts are timed; one more comes first and does not count.
const PROFILED: usize = 5;
/// Decoding steps before any is timed.
const WARM: usize = 2;
/// Tokens that decoding adds to each sequence.
const DECODED: usize = WARM + PLAIN + 1 + PROFILED;

/// Tokens of the context and of the prompt where none are asked for and the model has room for them.
const CONTEXT: usize = 128;
const PROMPT: usize = 512;

/// Flags of `profile`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(flatten)]
    ranks: RankFlags,
    /// Sequences that decode together
    #[arg(long, value_name = "N", default_value = "1")]
    batch: std::num::NonZeroU32,
    /// Tokens that each of them holds before [default: 128, or what the model has room for]
    #[arg(long, value_name = "N")]
    context: Option<std::num::NonZeroUsize>,
    /// Tokens of the prompt, which is one step [default: 512, or what the model has room for]
    #[arg(long, value_name = "N")]
    prompt: Option<std::num::NonZeroUsize>,
    /// Show each layer instead of all together
    #[arg(long)]
    layers: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    precision: String,
    sequences: u64,
    context_tokens: usize,
    prompt_tokens: usize,
    ranks: Vec<RankReport>,
}

#[derive(Serialize)]
struct RankReport {
    rank: usize,
    device: String,
    decode: StepReport,
    prefill: StepReport,
    memory: Vec<Purpose>,
}

#[derive(Serialize)]
struct StepReport {
    /// Of a step as it is served, recordings included.
    plain_seconds: f64,
    /// Of a step whose parts are timed, on the rank's clock.
    wall_seconds: f64,
    /// All parts, on the device's clock.
    device_seconds: f64,
    /// Of the wall time, what lies before the first part and after the last.
    gap_seconds: f64,
    /// What waited for sums over ranks: the wait for the others included, not what ran beside them.
    all_reduce_seconds: f64,
    /// The same sums, run with nothing else to do.
    all_reduce_alone_seconds: f64,
    tree: Node,
}

/// What is measured on every rank.
#[derive(Clone)]
struct Measure {
    sequences: u64,
    context: usize,
    prompt: usize,
}

/// What a rank measured.
struct Found {
    decode: Step,
    prefill: Step,
    readings: Readings,
}

struct Step {
    plain_seconds: f64,
    wall_seconds: f64,
    sums_seconds: f64,
    spans: Vec<Span>,
    linears: Vec<(Mark, LinearUse)>,
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    let report = measure(&flags)?;
    if flags.json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print_line(&render(&report))
}

fn measure(flags: &Flags) -> Result<Report> {
    let group = flags.ranks.open(None)?;
    let room = group.shape.context_limit();
    let measure = Measure {
        sequences: u64::from(flags.batch.get()),
        context: flags.context.map_or_else(
            || CONTEXT.min(room.saturating_sub(DECODED)).max(1),
            Into::into,
        ),
        prompt: flags.prompt.map_or(PROMPT.min(room), Into::into),
    };
    let longest = measure.prompt.max(measure.context.saturating_add(DECODED));
    if longest > room {
        let message = format!(
            "{} holds {room} tokens: --prompt {} and --context {} with {DECODED} more that are decoded must fit",
            group.model, measure.prompt, measure.context
        );
        return Err(UsageError::one(message).into());
    }
    let plan = group.plan(&Load {
        sequences: flags.batch.get() as usize,
        context_tokens: longest,
        step_tokens: measure.prompt.max(flags.batch.get() as usize).max(2048),
    })?;
    let model = group.model.clone();
    let found = group.run(&plan, &measure)?;
    Ok(Report {
        model,
        precision: flags.ranks.precision.clone(),
        sequences: measure.sequences,
        context_tokens: measure.context,
        prompt_tokens: measure.prompt,
        ranks: (0..)
            .zip(found)
            .map(|(rank, found)| rank_report(rank, found, &plan, flags.layers))
            .collect(),
    })
}

impl Work for Measure {
    type Found = Found;

    fn on<B: Backend>(&self, mut rank: BenchRank<B>) -> Result<Found> {
        let prompt = |rank: &mut BenchRank<B>| {
            rank.clear();
            rank.prompt(1, self.prompt)
        };
        prompt(&mut rank)?;
        let plain = (0..3)
            .map(|_| prompt(&mut rank))
            .collect::<Result<_, _>>()?;
        let linears = rank.linears(self.prompt, 1)?;
        let sums = sums_alone(&mut rank, self.prompt)?;
        let prefill = Step::of(plain, sums, profiles(&mut rank, prompt)?, linears);

        rank.clear();
        for sequence in 1..=self.sequences {
            rank.prompt(sequence, self.context)?;
        }
        let mut position = self.context;
        let mut decode = |rank: &mut BenchRank<B>, steps| {
            let seconds = rank.decode(self.sequences, position, steps);
            position += steps;
            seconds
        };
        decode(&mut rank, WARM)?;
        let plain = decode(&mut rank, PLAIN)?;
        let rows = self.sequences as usize;
        let linears = rank.linears(rows, rows)?;
        let sums = sums_alone(&mut rank, rows)?;
        let one = |rank: &mut BenchRank<B>| Ok(median(decode(rank, 1)?));
        let decode = Step::of(plain, sums, profiles(&mut rank, one)?, linears);
        Ok(Found {
            decode,
            prefill,
            readings: rank.read_memory().clone(),
        })
    }
}

/// Seconds of the sums of a step of `tokens` tokens with nothing else to do.
fn sums_alone<B: Backend>(rank: &mut BenchRank<B>, tokens: usize) -> Result<f64, BenchError> {
    rank.sums(tokens)?;
    let times = (0..PROFILED).map(|_| rank.sums(tokens));
    Ok(median(times.collect::<Result<_, _>>()?))
}

/// Steps whose parts are timed, without the first, which makes what timing needs.
fn profiles<B: Backend>(
    rank: &mut BenchRank<B>,
    mut step: impl FnMut(&mut BenchRank<B>) -> Result<f64, BenchError>,
) -> Result<Vec<Profiled>, BenchError> {
    rank.profile(&mut step)?;
    (0..PROFILED).map(|_| rank.profile(&mut step)).collect()
}

impl Step {
    /// The profiled step in the middle, by its wall time: parts of one step add up.
    fn of(
        plain: Vec<f64>,
        sums_seconds: f64,
        mut profiled: Vec<Profiled>,
        linears: Vec<(Mark, LinearUse)>,
    ) -> Self {
        profiled.sort_by(|a, b| a.wall_seconds.total_cmp(&b.wall_seconds));
        let middle = profiled.swap_remove(profiled.len() / 2);
        Self {
            plain_seconds: median(plain),
            wall_seconds: middle.wall_seconds,
            sums_seconds,
            spans: middle.spans,
            linears,
        }
    }
}

fn rank_report(rank: usize, found: Found, plan: &ShardPlan, each_layer: bool) -> RankReport {
    let planned = &plan.ranks[rank];
    let step = |step: &Step| {
        let device_seconds = step.spans.iter().map(|span| span.seconds).sum();
        let sums = step.spans.iter().filter(|span| span.mark.part.is_sum());
        StepReport {
            plain_seconds: step.plain_seconds,
            wall_seconds: step.wall_seconds,
            device_seconds,
            gap_seconds: step.wall_seconds - device_seconds,
            all_reduce_seconds: sums.map(|span| span.seconds).sum(),
            all_reduce_alone_seconds: step.sums_seconds,
            tree: tree::tree(&step.spans, &step.linears, each_layer),
        }
    };
    RankReport {
        rank,
        device: planned.device.clone(),
        decode: step(&found.decode),
        prefill: step(&found.prefill),
        memory: memory::compare(&planned.memory, &found.readings),
    }
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{}, {}\nA part's time runs from the end of the part before it. While parts are timed no recorded step is \
         replayed, so on a card\nwaits for launches count to the part that is launched; the time as served has none of that. \
         Memory of a host counts\nonce it is written to; a card's is handed out in chunks of 64 MiB.",
        report.model, report.precision
    );
    for rank in &report.ranks {
        let decode = format!(
            "a decoding step of {} sequence{} after {} tokens of context",
            report.sequences,
            if report.sequences == 1 { "" } else { "s" },
            report.context_tokens
        );
        let prefill = format!("a prompt of {} tokens", report.prompt_tokens);
        text += &format!(
            "\n\nrank {}: {}\n\n{}\n\n{}\n\n{}",
            rank.rank,
            rank.device,
            render_step(&decode, &rank.decode),
            render_step(&prefill, &rank.prefill),
            memory::render(&rank.memory)
        );
    }
    text
}

fn render_step(what: &str, step: &StepReport) -> String {
    let ms = |seconds: f64| format!("{:.3} ms", 1e3 * seconds);
    let mut text = format!(
        "{what}: {} as served; {} with its parts timed, of which {} are theirs and {} a gap",
        ms(step.plain_seconds),
        ms(step.wall_seconds),
        ms(step.device_seconds),
        ms(step.gap_seconds),
    );
    let (waited, alone) = (step.all_reduce_seconds, step.all_reduce_alone_seconds);
    if alone > 0.0 {
        text += &format!(
            "\nsums over ranks: {} were waited for, {:.1} % of the parts' time; with nothing else to do they take {}: \
             {:.0} % hidden",
            ms(waited),
            100.0 * waited / step.device_seconds,
            ms(alone),
            100.0 * (1.0 - waited / alone).max(0.0)
        );
    }
    format!("{text}\n{}", tree::render(&step.tree))
}
