//! Where the search starts: the exact minimax cut of every axis for itself, and shares by speed and
//! memory.

use std::cmp::Ordering;

use super::candidate::{Cuts, cost};
use super::cost::Problem;

/// Shares of memory in the starts that mix it with speed.
const MIXES: [f64; 3] = [0.0, 0.5, 1.0];
/// Starts that differ from axis to axis are made up to this world size.
const UNLIKE_WORLD: usize = 8;

/// Where to start when memory binds: shares that mix speed with memory, alike on all axes, and in
/// small groups every choice of these and of the minimax cut per axis.
pub(super) fn starts(problem: &Problem<'_>) -> Vec<Cuts> {
    let alike: Vec<Cuts> = MIXES.iter().map(|mix| even_shares(problem, *mix)).collect();
    if problem.world() > UNLIKE_WORLD || problem.axes.len() > 3 {
        return alike;
    }
    let kinds = [
        alike[0].clone(),
        alike[MIXES.len() - 1].clone(),
        minimax(problem),
    ];
    let choices = (0..problem.axes.len()).fold(vec![Vec::new()], |starts, axis| {
        let with = |start: Cuts| {
            kinds
                .iter()
                .map(move |kind| [&start[..], &kind[axis..=axis]].concat())
                .collect::<Vec<_>>()
        };
        starts.into_iter().flat_map(with).collect()
    });
    alike.into_iter().chain(choices).collect()
}

/// Per axis, the cut whose slowest rank is fastest, whatever its memory: bisection of the bound, each
/// rank taking from the left as much as the bound allows.
pub(super) fn minimax(problem: &Problem<'_>) -> Cuts {
    (0..problem.axes.len())
        .map(|axis| {
            let all = |rank| cost(problem, axis, rank, &whole(problem, axis, rank)).seconds;
            let mut high = (0..problem.world()).map(all).fold(0.0, f64::max);
            let mut low = 0.0;
            let mut bounds = None;
            for _ in 0..50 {
                let bound = 0.5 * (low + high);
                match fill(problem, axis, bound) {
                    Some(found) => (high, bounds) = (bound, Some(found)),
                    None => low = bound,
                }
            }
            bounds
                .or_else(|| fill(problem, axis, high))
                .unwrap_or_else(|| {
                    let even = vec![1.0; problem.world()];
                    rounded(&even, problem.axes[axis].quanta(), problem.axes[axis].least)
                })
        })
        .collect()
}

/// Boundaries that give one rank a whole axis.
fn whole(problem: &Problem<'_>, axis: usize, rank: usize) -> Vec<usize> {
    let quanta = problem.axes[axis].quanta();
    (0..=problem.world())
        .map(|bound| if bound <= rank { 0 } else { quanta })
        .collect()
}

/// Boundaries under which no rank takes longer than `bound` seconds, if there are any.
fn fill(problem: &Problem<'_>, axis: usize, bound: f64) -> Option<Vec<usize>> {
    let cut = &problem.axes[axis];
    let world = problem.world();
    let mut bounds = vec![0];
    for rank in 0..world {
        let start = bounds[rank];
        let least = start + cut.least;
        let most = cut.quanta().checked_sub(cut.least * (world - rank - 1))?;
        let allowed = |end: usize| problem.cost(cut, rank, &cut.range(start, end)).seconds <= bound;
        if least > most || !allowed(least) {
            return None;
        }
        let (mut low, mut high) = (least, most);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if allowed(middle) {
                low = middle
            } else {
                high = middle - 1
            }
        }
        bounds.push(low);
    }
    (bounds[world] == cut.quanta()).then_some(bounds)
}

/// The same share of every axis for a rank: `mix` of what its memory holds, and the rest of its speed
/// up to what its memory holds; rounded per axis.
pub(super) fn even_shares(problem: &Problem<'_>, mix: f64) -> Cuts {
    let world = problem.world();
    let mut speeds = Vec::with_capacity(world);
    let mut caps = Vec::with_capacity(world);
    for rank in 0..world {
        let costs = || {
            (0..problem.axes.len())
                .map(|axis| cost(problem, axis, rank, &whole(problem, axis, rank)))
        };
        let seconds: f64 = costs().map(|cost| cost.seconds).sum();
        let none = problem.memory(rank, std::iter::empty(), 0).total();
        let all = problem.memory(rank, costs(), problem.least_blocks).total();
        let room = problem.usable(rank).saturating_sub(none);
        speeds.push(1.0 / seconds);
        caps.push(room as f64 / all.saturating_sub(none).max(1) as f64);
    }
    let room: f64 = caps.iter().sum();
    let shares = if room <= 1.0 {
        caps
    } else {
        let by_speed = water_filled(&speeds, &caps);
        by_speed
            .iter()
            .zip(&caps)
            .map(|(speed, cap)| (1.0 - mix) * speed + mix * cap / room)
            .collect()
    };
    problem
        .axes
        .iter()
        .map(|axis| rounded(&shares, axis.quanta(), axis.least))
        .collect()
}

/// Shares in proportion to `speeds`, none above its cap, that sum to 1; the caps sum to more.
fn water_filled(speeds: &[f64], caps: &[f64]) -> Vec<f64> {
    let at = |level: f64| -> Vec<f64> {
        speeds
            .iter()
            .zip(caps)
            .map(|(speed, cap)| (speed * level).min(*cap))
            .collect()
    };
    let (mut low, mut high) = (
        0.0,
        1.0 / speeds.iter().copied().fold(f64::INFINITY, f64::min),
    );
    while at(high).iter().sum::<f64>() < 1.0 && high < f64::MAX / 2.0 {
        high *= 2.0;
    }
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if at(middle).iter().sum::<f64>() < 1.0 {
            low = middle
        } else {
            high = middle
        }
    }
    at(high)
}

/// Boundaries that share `quanta` steps in proportion to `shares`, by largest remainder (ties to the
/// lower rank), at least `least` to each.
pub(super) fn rounded(shares: &[f64], quanta: usize, least: usize) -> Vec<usize> {
    let sum: f64 = shares.iter().sum();
    let even = 1.0 / shares.len() as f64;
    let exact: Vec<f64> = shares
        .iter()
        .map(|share| if sum > 0.0 { share / sum } else { even })
        .map(|share| share * quanta as f64)
        .collect();
    let mut counts: Vec<usize> = exact
        .iter()
        .map(|exact| (*exact as usize).max(least))
        .collect();
    let furthest = |counts: &[usize], sign: f64, eligible: &dyn Fn(usize) -> bool| {
        let gap = |rank: &usize| sign * (exact[*rank] - counts[*rank] as f64);
        let ranks = (0..counts.len()).filter(|rank| eligible(counts[*rank]));
        // `max_by` keeps the last of equals, so the order is turned round.
        ranks.rev().max_by(|a, b| gap(a).total_cmp(&gap(b)))
    };
    loop {
        let given: usize = counts.iter().sum();
        let rank = match given.cmp(&quanta) {
            Ordering::Equal => break,
            Ordering::Less => furthest(&counts, 1.0, &|_| true),
            Ordering::Greater => furthest(&counts, -1.0, &|count| count > least),
        };
        let Some(rank) = rank else { break };
        if given < quanta {
            counts[rank] += 1
        } else {
            counts[rank] -= 1
        }
    }
    let mut bounds = vec![0];
    for count in counts {
        bounds.push(bounds[bounds.len() - 1] + count);
    }
    bounds
}
