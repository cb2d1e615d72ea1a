//! Cards that are planned for without being there: published figures from `presets.json`.

use std::sync::LazyLock;

use serde::Deserialize;
use thiserror::Error;

use crate::capabilities::{Capabilities, LinearCapability, Recordings, WeightKind};

/// Rows for which a preset asks for paths; each is a bucket of its capabilities.
const ROW_BUCKETS: [usize; 5] = [1, 4, 16, 64, 512];
/// Weight kinds for which a preset asks for paths.
const WEIGHT_KINDS: [WeightKind; 6] = [
    WeightKind::Gptq { bits: 2 },
    WeightKind::Gptq { bits: 3 },
    WeightKind::Gptq { bits: 4 },
    WeightKind::Gptq { bits: 8 },
    WeightKind::Dense16,
    WeightKind::Dense32,
];

/// The data file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Presets {
    /// Share of the published bandwidth that a matrix-vector product reaches.
    memory_efficiency: f64,
    /// Share of the published arithmetic rate that a matrix-matrix product reaches.
    arithmetic_efficiency: f64,
    /// Bytes that the driver and its context take.
    driver_allowance_bytes: u64,
    cards: Vec<CardPreset>,
}

static PRESETS: LazyLock<Presets> = LazyLock::new(|| {
    serde_json::from_str(include_str!("presets.json")).expect("a test reads the embedded presets")
});

/// Published figures of a card.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardPreset {
    /// Name on the command line, such as `p40`.
    pub name: String,
    /// The vendor's name.
    pub device: String,
    /// CUDA compute capability, such as `6.1`.
    pub compute_capability: String,
    /// Device memory, in bytes.
    pub memory_bytes: u64,
    /// Part of the memory that error correction takes, where it shares the memory.
    pub inline_ecc_fraction: f64,
    /// Published memory bandwidth, in bytes per second.
    pub read_bytes_per_second: f64,
    /// Seconds of a small all-reduce inside a host.
    pub all_reduce_latency_seconds: f64,
    /// Seconds of fixed cost per launch.
    pub op_latency_seconds: f64,
    /// Published arithmetic rates.
    pub operations_per_second: ArithmeticRates,
}

/// Operations per second by kind of arithmetic, a multiply and an add counting two; absent kinds do
/// not exist on the card.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArithmeticRates {
    /// 32-bit floats.
    pub fp32: f64,
    /// 16-bit floats without tensor cores.
    pub fp16: f64,
    /// Four-way 8-bit integer dot products.
    pub dp4a: Option<f64>,
    /// 16-bit float tensor cores with 32-bit accumulation.
    pub fp16_tensor: Option<f64>,
    /// 8-bit integer tensor cores.
    pub int8_tensor: Option<f64>,
}

/// Arithmetic that a path spends its time in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// 32-bit floats.
    Fp32,
    /// 16-bit floats without tensor cores.
    Fp16,
    /// Four-way 8-bit integer dot products.
    Dp4a,
    /// 16-bit float tensor cores.
    Fp16Tensor,
    /// 8-bit integer tensor cores.
    Int8Tensor,
}

/// What the path selector says about a path on a card: a [`LinearCapability`] without its cost.
#[derive(Clone, Debug, PartialEq)]
pub struct PathFacts {
    /// Name of the path.
    pub path: String,
    /// Arithmetic that bounds it when rows are many.
    pub arithmetic: Arithmetic,
    /// Bytes per weight in its layout.
    pub bytes_per_weight: f64,
    /// Columns are padded to a multiple of this.
    pub column_multiple: usize,
    /// Rows of each group's run are padded to a multiple of this.
    pub row_multiple: usize,
    /// See [`LinearCapability::scale_rows`].
    pub scale_rows: usize,
    /// Bytes per scale plus its zero point.
    pub bytes_per_scale: f64,
    /// Scratch bytes per row.
    pub scratch_bytes_per_row: f64,
    /// Scratch bytes whatever the rows.
    pub scratch_bytes: f64,
}

/// Why a card specification cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PresetError {
    /// No such card.
    #[error("no card named `{name}`; known are {known}")]
    UnknownCard {
        /// What was asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// The part after the colon is not an amount of memory.
    #[error("`{text}` is not an amount of memory: write it like 22GiB, 11000MiB or 16GB")]
    BadMemory {
        /// What was written.
        text: String,
    },
}

/// The card of a specification `name` or `name:memory`, such as `p40` or `2080ti:22GiB`. A memory
/// given replaces the published one, error correction included.
///
/// # Errors
/// [`PresetError`] with the known names, or with the memory that cannot be read.
pub fn preset(spec: &str) -> Result<CardPreset, PresetError> {
    let (name, memory) = match spec.split_once(':') {
        Some((name, memory)) => (name, Some(memory)),
        None => (spec, None),
    };
    let wanted = name.trim().to_ascii_lowercase();
    let known = PRESETS.cards.iter().find(|card| card.name == wanted);
    let mut card = known.cloned().ok_or_else(|| PresetError::UnknownCard {
        name: name.trim().to_owned(),
        known: card_names().collect::<Vec<_>>().join(", "),
    })?;
    if let Some(text) = memory {
        let bytes = parse_bytes(text).filter(|bytes| *bytes > 0);
        card.memory_bytes = bytes.ok_or_else(|| PresetError::BadMemory {
            text: text.to_owned(),
        })?;
        card.inline_ecc_fraction = 0.0;
    }
    Ok(card)
}

/// Names of the cards in the data file.
pub fn card_names() -> impl Iterator<Item = &'static str> {
    PRESETS.cards.iter().map(|card| card.name.as_str())
}

/// Reads an amount of memory: a number and one of `B`, `KiB`, `MiB`, `GiB`, `TiB`, `KB`, `MB`, `GB`,
/// `TB` in any case, or nothing for bytes. `None` when it is not one, or beyond 64 bits.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit);
    }
    let bytes = number.parse::<f64>().ok()? * unit as f64;
    (bytes.is_finite() && bytes < u64::MAX as f64).then_some(bytes as u64)
}

impl CardPreset {
    /// Bytes that a plan may use: the memory without error correction and the driver's allowance.
    pub fn usable_bytes(&self) -> u64 {
        let ecc = (self.memory_bytes as f64 * self.inline_ecc_fraction) as u64;
        self.memory_bytes
            .saturating_sub(ecc)
            .saturating_sub(PRESETS.driver_allowance_bytes)
    }

    /// Capabilities of the card, without what it keeps beside a model, with the paths that `paths` chooses for a weight kind and a number
    /// of rows; `None` where there is no path.
    ///
    /// A linear takes the longer of reading its weights at 65 % of the published bandwidth and
    /// computing at 35 % of the published rate of its path's arithmetic (that of `fp32` where the
    /// card has no such arithmetic).
    pub fn capabilities(
        &self,
        paths: impl Fn(WeightKind, usize) -> Option<PathFacts>,
    ) -> Capabilities {
        let mut linears = Vec::new();
        for weights in WEIGHT_KINDS {
            for rows in ROW_BUCKETS {
                let Some(facts) = paths(weights, rows) else {
                    continue;
                };
                linears.push(LinearCapability {
                    weights,
                    max_rows: rows,
                    seconds_per_byte: self.seconds_per_byte(&facts, rows),
                    path: facts.path,
                    bytes_per_weight: facts.bytes_per_weight,
                    column_multiple: facts.column_multiple,
                    row_multiple: facts.row_multiple,
                    scale_rows: facts.scale_rows,
                    bytes_per_scale: facts.bytes_per_scale,
                    scratch_bytes_per_row: facts.scratch_bytes_per_row,
                    scratch_bytes: facts.scratch_bytes,
                });
            }
        }
        Capabilities {
            device: self.device.clone(),
            usable_bytes: self.usable_bytes(),
            read_bytes_per_second: self.read_bytes_per_second * PRESETS.memory_efficiency,
            all_reduce_latency_seconds: self.all_reduce_latency_seconds,
            op_latency_seconds: self.op_latency_seconds,
            linears,
            recordings: Recordings::default(),
        }
    }

    fn seconds_per_byte(&self, facts: &PathFacts, rows: usize) -> f64 {
        let rates = &self.operations_per_second;
        let rate = match facts.arithmetic {
            Arithmetic::Fp32 => None,
            Arithmetic::Fp16 => Some(rates.fp16),
            Arithmetic::Dp4a => rates.dp4a,
            Arithmetic::Fp16Tensor => rates.fp16_tensor,
            Arithmetic::Int8Tensor => rates.int8_tensor,
        };
        let rate = rate.unwrap_or(rates.fp32) * PRESETS.arithmetic_efficiency;
        let compute = 2.0 * rows as f64 / (rate * facts.bytes_per_weight);
        let read = 1.0 / (self.read_bytes_per_second * PRESETS.memory_efficiency);
        compute.max(read)
    }
}
