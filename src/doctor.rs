//! `secondwind doctor`: what this host has for serving, what it lacks, and which paths its cards take.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use nvml_wrapper::{Nvml, bitmasks::device::ThrottleReasons};
use secondwind_kernels::{
    cuda::{Arch, CardFacts, CudaError, Nvrtc, PackSource, cards},
    isa,
    kv::KvDtype,
    select::{
        AttentionTask, DeviceFacts, LinearShape, Phase, Precision, select_attention, select_linear,
    },
    weights::{Dtype, WeightFormat},
};
use secondwind_worker::collective::nccl::Nccl;
use serde::Serialize;

use crate::{cli::Common, output, worker::cache_directory};

/// Rows for which paths are shown: a token, a small batch, a large one, a prompt.
const ROWS: [usize; 4] = [1, 8, 32, 512];

/// Flags of `doctor`.
#[derive(Args, Debug)]
pub struct Flags {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Kernel pack to look at [default: the installed one, then the cache]
    #[arg(long, value_name = "FILE")]
    kernel_pack: Option<PathBuf>,
}

/// Everything that is known.
#[derive(Serialize)]
struct Report {
    cpu: String,
    driver: Finding,
    nvrtc: Finding,
    nccl: Finding,
    cards: Vec<Card>,
}

/// Something that is there, or why not.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Finding {
    Found(String),
    Missing(String),
}

#[derive(Serialize)]
struct Card {
    device: String,
    #[serde(flatten)]
    facts: CardFacts,
    /// Whose code it runs; absent below 6.0.
    arch: Option<&'static str>,
    /// Other cards whose memory it can reach.
    peers: Vec<usize>,
    kernels: Finding,
    health: Option<Health>,
    paths: Vec<Path>,
}

/// What the management library says of a card.
#[derive(Serialize)]
struct Health {
    free_bytes: u64,
    ecc: Option<bool>,
    pcie: Option<String>,
    watts: Option<f64>,
    performance_state: Option<String>,
    throttled: Vec<&'static str>,
}

#[derive(Serialize)]
struct Path {
    what: String,
    path: &'static str,
    reason: &'static str,
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    let report = examine(&flags);
    if flags.json {
        return output::print_line(&serde_json::to_string(&report)?);
    }
    output::print(&render(&report))
}

fn examine(flags: &Flags) -> Report {
    let found = cards();
    let driver = match &found {
        Ok(cards) => match cards.first() {
            Some((facts, _)) => {
                Finding::Found(format!("CUDA {}.{}", facts.driver.0, facts.driver.1))
            }
            None => Finding::Missing("the driver sees no card".into()),
        },
        Err(error) => Finding::Missing(error.to_string()),
    };
    let nvml = Nvml::init().ok();
    let cards = found.unwrap_or_default().into_iter().enumerate();
    Report {
        cpu: format!(
            "{}, {} threads",
            isa::detect(),
            std::thread::available_parallelism().map_or(1, usize::from)
        ),
        driver,
        nvrtc: match Nvrtc::open(None) {
            Ok(nvrtc) => Finding::Found(format!("{}.{}", nvrtc.version().0, nvrtc.version().1)),
            Err(error) => Finding::Missing(error.to_string()),
        },
        nccl: match Nccl::open(None) {
            Ok(nccl) => Finding::Found(nccl.version()),
            Err(error) => Finding::Missing(error.to_string()),
        },
        cards: cards
            .map(|(ordinal, (facts, peers))| card(flags, nvml.as_ref(), ordinal, facts, peers))
            .collect(),
    }
}

fn card(
    flags: &Flags,
    nvml: Option<&Nvml>,
    ordinal: usize,
    facts: CardFacts,
    peers: Vec<usize>,
) -> Card {
    let arch = Arch::for_card(facts.capability);
    Card {
        device: format!("cuda:{ordinal}"),
        kernels: match arch {
            Some(arch) => kernels(flags, arch),
            None => Finding::Missing(too_old(&facts)),
        },
        health: nvml.and_then(|nvml| health(nvml, ordinal)),
        paths: arch.map_or_else(Vec::new, paths),
        arch: arch.map(Arch::name),
        peers,
        facts,
    }
}

fn too_old(facts: &CardFacts) -> String {
    let (major, minor) = (i32::from(facts.capability.0), i32::from(facts.capability.1));
    CudaError::CardTooOld {
        card: facts.name.clone(),
        major,
        minor,
    }
    .to_string()
}

/// Where a worker would take its kernels from; compiles nothing.
fn kernels(flags: &Flags, arch: Arch) -> Finding {
    let source = PackSource {
        pack: flags.kernel_pack.clone(),
        nvrtc: None,
        cache: cache_directory(),
    };
    match source.find(arch) {
        Ok(Some((path, _))) => Finding::Found(path.display().to_string()),
        Ok(None) => match Nvrtc::open(None) {
            Ok(_) => Finding::Found("compiled at a worker's first start".into()),
            Err(error) => Finding::Missing(error.to_string()),
        },
        Err(error) => Finding::Missing(error.to_string()),
    }
}

/// NVML counts cards as the driver does unless CUDA_VISIBLE_DEVICES says otherwise.
fn health(nvml: &Nvml, ordinal: usize) -> Option<Health> {
    let device = nvml.device_by_index(u32::try_from(ordinal).ok()?).ok()?;
    let link = device
        .current_pcie_link_gen()
        .ok()
        .zip(device.current_pcie_link_width().ok());
    let throttled = device
        .current_throttle_reasons()
        .unwrap_or(ThrottleReasons::empty());
    let reasons = [
        (ThrottleReasons::SW_POWER_CAP, "power cap"),
        (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "heat"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "heat (hardware)"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power brake"),
    ];
    Some(Health {
        free_bytes: device.memory_info().ok()?.free,
        ecc: device
            .is_ecc_enabled()
            .ok()
            .map(|ecc| ecc.currently_enabled),
        pcie: link.map(|(generation, width)| format!("gen {generation} x{width}")),
        watts: device
            .power_usage()
            .ok()
            .map(|milliwatts| f64::from(milliwatts) / 1e3),
        performance_state: device
            .performance_state()
            .ok()
            .map(|state| format!("{state:?}")),
        throttled: reasons
            .into_iter()
            .filter(|(reason, _)| throttled.contains(*reason))
            .map(|(_, name)| name)
            .collect(),
    })
}

fn paths(arch: Arch) -> Vec<Path> {
    let device = DeviceFacts::Cuda { arch };
    let int4 = WeightFormat::Quantised { bits: 4 };
    let f16 = WeightFormat::Dense(Dtype::F16);
    let families = [
        ("int4, fast", int4, Precision::Fast),
        ("int4, exact", int4, Precision::Exact),
        ("f16", f16, Precision::Fast),
    ];
    let mut paths = Vec::new();
    for (name, format, precision) in families {
        for rows in ROWS {
            let shape = LinearShape {
                format,
                k: 4096,
                n: 4096,
                rows,
            };
            let what = format!("{name}, {rows} rows");
            if let Ok(choice) = select_linear(device, shape, precision, None) {
                paths.push(Path {
                    what,
                    path: choice.path.name(),
                    reason: choice.reason,
                });
            }
        }
    }
    for (name, phase) in [("decode", Phase::Decode), ("prefill", Phase::Prefill)] {
        let task = AttentionTask {
            phase,
            head_dim: 128,
            kv: KvDtype::F16,
            precision: Precision::Fast,
        };
        if let Ok(choice) = select_attention(device, task, None) {
            let what = format!("attention, {name}");
            paths.push(Path {
                what,
                path: choice.path.name(),
                reason: choice.reason,
            });
        }
    }
    paths
}

impl Finding {
    fn line(&self) -> &str {
        match self {
            Self::Found(text) | Self::Missing(text) => text,
        }
    }
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "cpu      {}\ndriver   {}\nNVRTC    {}\nNCCL     {}\n",
        report.cpu,
        report.driver.line(),
        report.nvrtc.line(),
        report.nccl.line()
    );
    for card in &report.cards {
        let facts = &card.facts;
        text += &format!(
            "\n{}   {}, compute capability {}.{}, {} multiprocessors, {}\n",
            card.device,
            facts.name,
            facts.capability.0,
            facts.capability.1,
            facts.multiprocessors,
            output::bytes(facts.total_bytes)
        );
        if let Some(health) = &card.health {
            let known = [
                Some(format!("{} free", output::bytes(health.free_bytes))),
                health
                    .ecc
                    .map(|on| format!("ECC {}", if on { "on" } else { "off" })),
                health.pcie.as_ref().map(|link| format!("PCIe {link}")),
                health.watts.map(|watts| format!("{watts:.0} W")),
                health.performance_state.clone(),
                (!health.throttled.is_empty())
                    .then(|| format!("throttled by {}", health.throttled.join(", "))),
            ];
            let known: Vec<String> = known.into_iter().flatten().collect();
            text += &format!("  {}\n", known.join(", "));
        }
        let peers: Vec<String> = card
            .peers
            .iter()
            .map(|peer| format!("cuda:{peer}"))
            .collect();
        if !peers.is_empty() {
            text += &format!("  reaches the memory of {}\n", peers.join(", "));
        }
        text += &format!("  kernels: {}\n", card.kernels.line());
        let rows: Vec<Vec<String>> = card
            .paths
            .iter()
            .map(|path| {
                vec![
                    path.what.clone(),
                    path.path.to_owned(),
                    path.reason.to_owned(),
                ]
            })
            .collect();
        if !rows.is_empty() {
            text += &output::table(&["for", "path", "because"], &rows, &[]);
            text.push('\n');
        }
    }
    text
}
