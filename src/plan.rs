//! `secondwind plan`: how a model would be split over cards that need not be there.

use anyhow::Result;
use clap::Args;
use secondwind_coordinator::plan_settings;
use secondwind_model::{
    capabilities::Capabilities,
    checkpoint::Checkpoint,
    plan::{ModelShape, PlanError, card_names, parse_bytes, plan, preset, table},
};

use crate::{
    card_paths,
    cli::Common,
    config::{
        Layer, Origin, Section,
        flags::{KeyFlags, PlanningKeys},
    },
    coordinator,
    exit::UsageError,
    logging, output,
};

/// Flags of `plan`.
#[derive(Args, Debug)]
pub struct Flags {
    /// The cards, one for each rank.
    #[arg(long = "worker", value_name = "CARD[:MEMORY]", required = true, help = worker_help())]
    workers: Vec<String>,
    #[command(flatten)]
    planning: KeyFlags<PlanningKeys>,
    /// Print the whole plan as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    let mut typed = flags.planning.layer;
    // The workers given are the world, whatever a configuration file says.
    typed.set(
        "coordinator",
        "world_size",
        flags.workers.len().to_string(),
        Origin::Flag("--worker".into()),
    );
    let config = common.load_quiet(&[Section::Coordinator], Layer::new("command"), typed)?;
    logging::start(&config)?;
    let settings = coordinator::meant(&config)?;
    let checkpoint = Checkpoint::open_named(&settings.model)?;
    for warning in checkpoint.warnings() {
        output::note(&format!("warning: {warning}"));
    }
    let shape = checkpoint.shape()?.with_lm_head(settings.settings.lm_head);
    let workers = capabilities(&flags.workers, &shape)?;
    let plan = plan(&shape, &plan_settings(&settings.settings, &shape), &workers).map_err(told)?;
    if flags.json {
        return output::print_line(&serde_json::to_string(&plan)?);
    }
    output::print(&table(&plan, &shape))?;
    output::print_line(&format!("\n{}", paths(&workers)))
}

/// Each worker's capabilities; every specification that is no card is told.
fn capabilities(specs: &[String], shape: &ModelShape) -> Result<Vec<Capabilities>> {
    let widest = shape
        .linears
        .iter()
        .map(|linear| linear.k)
        .max()
        .unwrap_or(0);
    let mut workers = Vec::new();
    let mut mistakes = Vec::new();
    for spec in specs {
        let (name, memory) = spec
            .split_once(':')
            .map_or((spec.as_str(), None), |(name, memory)| (name, Some(memory)));
        if name == "cpu" {
            match memory.map(|text| parse_bytes(text).ok_or(text)).transpose() {
                Ok(memory) => {
                    let threads = std::thread::available_parallelism().map_or(1, usize::from);
                    let mut measured = secondwind_worker::measure_cpu(shape, threads, None)?;
                    measured.usable_bytes = memory.unwrap_or(measured.usable_bytes);
                    workers.push(measured);
                }
                Err(text) => mistakes.push(format!(
                    "--worker {spec}: `{text}` is not an amount of memory"
                )),
            }
            continue;
        }
        match preset(spec) {
            Ok(card) => workers.push(Capabilities {
                // A host with cards is taken to have NCCL, too.
                recordings: secondwind_worker::cuda_recordings(true),
                ..card.capabilities(|weights, rows| card_paths::facts(&card, weights, rows, widest))
            }),
            Err(error) => mistakes.push(format!("--worker {spec}: {error}")),
        }
    }
    if mistakes.is_empty() {
        Ok(workers)
    } else {
        Err(UsageError::new(mistakes).into())
    }
}

/// What each device would run, device by device.
fn paths(workers: &[Capabilities]) -> String {
    let mut devices: Vec<&Capabilities> = Vec::new();
    for worker in workers {
        if devices.iter().all(|known| known.device != worker.device) {
            devices.push(worker);
        }
    }
    let lines = devices.iter().map(|worker| {
        let mut paths: Vec<&str> = worker
            .linears
            .iter()
            .map(|linear| linear.path.as_str())
            .collect();
        paths.sort_unstable();
        paths.dedup();
        format!("{}: {}", worker.device, paths.join(", "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Tells what was asked wrongly from a model that does not fit.
pub fn told(error: PlanError) -> anyhow::Error {
    match error {
        PlanError::NoWorkers
        | PlanError::WorldTooLarge { .. }
        | PlanError::BadSetting { .. }
        | PlanError::ContextTooLong { .. }
        | PlanError::BadSplit { .. } => UsageError::one(error.to_string()).into(),
        other => other.into(),
    }
}

fn worker_help() -> String {
    let cards = card_names().collect::<Vec<_>>().join(", ");
    format!(
        "A card, such as p40 or 2080ti:22GiB, or cpu for this machine; one for each rank. Known are {cards}"
    )
}
