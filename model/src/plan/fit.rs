//! Why a model does not fit, and which single change would make it.

use super::axis::Grain;
use super::candidate::Candidate;
use super::cost::{AxisCost, Problem};
use super::error::{RankShortfall, Shortfall};
use super::search;
use super::{KvDType, PlanSettings, RankMemory, forced};
use crate::capabilities::Capabilities;

/// Contexts shorter than this are not proposed.
const LEAST_CONTEXT_TOKENS: usize = 256;
/// More workers than this are not proposed.
const MOST_MORE_WORKERS: usize = 8;

/// Explains the best cut that does not fit.
pub(super) fn explain(problem: &Problem<'_>, candidate: &Candidate) -> Shortfall {
    let ranks: Vec<_> = (0..problem.world())
        .map(|rank| RankShortfall {
            device: problem.workers[rank].device.clone(),
            usable_bytes: problem.usable(rank),
            smallest: smallest(problem, rank),
            needed: problem.memory(
                rank,
                candidate.costs.iter().map(|axis| axis[rank]),
                problem.least_blocks,
            ),
        })
        .collect();
    let short = || ranks.iter().filter(|rank| rank.missing_bytes() > 0);
    let sum = short().fold(RankMemory::default(), |sum, rank| add(&sum, &rank.needed));
    let (largest, largest_bytes) = sum
        .purposes()
        .into_iter()
        .max_by_key(|(_, bytes)| *bytes)
        .unwrap_or(("weights", 0));
    let missing_bytes = short()
        .map(RankShortfall::missing_bytes)
        .fold(0, u64::saturating_add);
    let mut remedies = remedies(problem);
    if remedies.is_empty() {
        remedies.push(
            "no single change of max_context_tokens, kv_dtype, memory_reserve, max_step_tokens or up to 8 more \
             such workers makes it fit: combine them, use workers with more memory, or a smaller model"
                .to_owned(),
        );
    }
    Shortfall {
        ranks,
        missing_bytes,
        largest,
        largest_bytes,
        remedies,
    }
}

/// Bytes of the smallest legal share: one step of every axis, at its cheapest end.
fn smallest(problem: &Problem<'_>, rank: usize) -> RankMemory {
    let costs = problem.axes.iter().map(|axis| -> AxisCost {
        let quanta = axis.quanta();
        // A sole rank holds everything.
        let least = if problem.world() == 1 {
            quanta
        } else {
            axis.least
        };
        let (first, last) = (axis.range(0, least), axis.range(quanta - least, quanta));
        let (first, last) = (
            problem.cost(axis, rank, &first),
            problem.cost(axis, rank, &last),
        );
        if last.memory.total() < first.memory.total() {
            last
        } else {
            first
        }
    });
    problem.memory(rank, costs, problem.least_blocks)
}

fn add(a: &RankMemory, b: &RankMemory) -> RankMemory {
    RankMemory {
        weights: a.weights.saturating_add(b.weights),
        padding: a.padding.saturating_add(b.padding),
        scales: a.scales.saturating_add(b.scales),
        kv_cache: a.kv_cache.saturating_add(b.kv_cache),
        scratch: a.scratch.saturating_add(b.scratch),
        buffers: a.buffers.saturating_add(b.buffers),
        graphs: a.graphs.saturating_add(b.graphs),
        nccl: a.nccl.saturating_add(b.nccl),
    }
}

/// Single changes that make the model fit; each was planned before it is proposed.
fn remedies(problem: &Problem<'_>) -> Vec<String> {
    let settings = problem.settings;
    let mut found = Vec::new();
    let mut with = |changed: &PlanSettings, text: &dyn Fn() -> String| {
        if fits(problem, changed, problem.workers) {
            found.push(text());
        }
    };
    if settings.forced_split.is_some() {
        let changed = PlanSettings {
            forced_split: None,
            ..settings.clone()
        };
        with(&changed, &|| {
            "it fits with the planner's own split instead of the forced one".to_owned()
        });
    }
    let narrower: &[KvDType] = match settings.kv_dtype {
        KvDType::F32 => &[KvDType::F16, KvDType::Int8],
        KvDType::F16 => &[KvDType::Int8],
        KvDType::Int8 => &[],
    };
    for &kv_dtype in narrower {
        let changed = PlanSettings {
            kv_dtype,
            ..settings.clone()
        };
        if fits(problem, &changed, problem.workers) {
            found.push(format!("it fits with kv_dtype = {}", kv_dtype.name()));
            break;
        }
    }
    if settings.memory_reserve_bytes > 0 {
        let reserve = |mib: u64| PlanSettings {
            memory_reserve_bytes: mib << 20,
            ..settings.clone()
        };
        let end = settings.memory_reserve_bytes.div_ceil(1 << 20);
        if let Some(most) = largest(end, |mib| fits(problem, &reserve(mib), problem.workers)) {
            found.push(format!("it fits with memory_reserve at most {most}MiB"));
        }
    }
    let context = |tokens| PlanSettings {
        max_context_tokens: tokens,
        ..settings.clone()
    };
    let shorter = |steps: u64| context(steps as usize * LEAST_CONTEXT_TOKENS);
    let steps = (settings.max_context_tokens / LEAST_CONTEXT_TOKENS) as u64;
    if let Some(steps) = largest(steps + 1, |steps| {
        steps > 0 && fits(problem, &shorter(steps), problem.workers)
    }) {
        found.push(format!(
            "it fits with max_context_tokens at most {}",
            steps as usize * LEAST_CONTEXT_TOKENS
        ));
    }
    let mut step_tokens = settings.max_step_tokens / 2;
    while step_tokens >= 32 {
        let changed = PlanSettings {
            max_step_tokens: step_tokens,
            ..settings.clone()
        };
        if fits(problem, &changed, problem.workers) {
            found.push(format!("it fits with max_step_tokens = {step_tokens}"));
            break;
        }
        step_tokens /= 2;
    }
    found.extend(more_workers(problem));
    found
}

/// Largest value below `end` for which `holds` is true, if it is for 0 or 1 (values of a setting of
/// which less always fits).
fn largest(end: u64, holds: impl Fn(u64) -> bool) -> Option<u64> {
    let (mut low, mut high) = (
        if holds(0) {
            0
        } else if end > 1 && holds(1) {
            1
        } else {
            return None;
        },
        end,
    );
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle
        } else {
            high = middle
        }
    }
    Some(low)
}

/// How many more workers like the one with most memory make it fit.
fn more_workers(problem: &Problem<'_>) -> Option<String> {
    let (most, _, _) = problem.shape.largest_world();
    let like = problem
        .workers
        .iter()
        .rev()
        .max_by_key(|worker| worker.usable_bytes)?;
    let settings = PlanSettings {
        forced_split: None,
        ..problem.settings.clone()
    };
    let mut workers = problem.workers.to_vec();
    for more in 1..=MOST_MORE_WORKERS {
        workers.push(like.clone());
        if workers.len() > most {
            return None;
        }
        if fits(problem, &settings, &workers) {
            let plural = if more == 1 { "" } else { "s" };
            return Some(format!(
                "it fits with {more} more worker{plural} like {}",
                like.device
            ));
        }
    }
    None
}

fn fits(problem: &Problem<'_>, settings: &PlanSettings, workers: &[Capabilities]) -> bool {
    let changed = Problem::new(problem.shape, settings, workers, Grain::Group);
    changed.is_ok_and(|changed| match &settings.forced_split {
        Some(shares) => forced(&changed, shares).score.overflow_bytes == 0,
        None => search::fits(&changed),
    })
}
