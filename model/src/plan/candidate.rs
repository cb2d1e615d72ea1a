//! A cut with what it costs and is worth, and the moves that change it.

use std::cmp::Ordering;
use std::ops::RangeInclusive;

use super::cost::{AxisCost, Problem};

/// How much slower a group without any of the KV blocks wanted may be rated than one with all.
const SHORTFALL_WEIGHT: f64 = 0.5;

/// What a cut is worth; less is better, in the order of the fields.
#[derive(Clone, Copy, Debug)]
pub(super) struct Score {
    /// Bytes over what ranks may use, with the least KV blocks.
    pub overflow_bytes: u64,
    /// Per axis the slowest rank's seconds, summed, and raised by the share of wanted KV blocks
    /// that do not fit.
    pub seconds: f64,
    /// Sum over ranks and axes of squared seconds: work that is shared, and evenly.
    pub spread: f64,
}

impl Score {
    /// Whether this score is the better one. A spread that is less by a millionth is not.
    pub fn beats(&self, other: &Self) -> bool {
        let order = self
            .overflow_bytes
            .cmp(&other.overflow_bytes)
            .then(self.seconds.total_cmp(&other.seconds));
        match order {
            Ordering::Less => true,
            Ordering::Equal => self.spread < other.spread * (1.0 - 1e-6),
            Ordering::Greater => false,
        }
    }

    /// Better first.
    pub fn order(&self, other: &Self) -> Ordering {
        self.overflow_bytes
            .cmp(&other.overflow_bytes)
            .then(self.seconds.total_cmp(&other.seconds))
            .then(self.spread.total_cmp(&other.spread))
    }

    /// Whether this score is better by enough to go on with moves of two boundaries.
    pub fn beats_clearly(&self, other: &Self) -> bool {
        self.overflow_bytes < other.overflow_bytes
            || (self.overflow_bytes == other.overflow_bytes
                && self.seconds < other.seconds * (1.0 - 1e-4))
    }
}

/// A cut: per axis the boundaries in steps, `0` first and the axis's steps last.
pub(super) type Cuts = Vec<Vec<usize>>;

/// A cut with what it costs.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub cuts: Cuts,
    /// Per axis and rank.
    pub costs: Vec<Vec<AxisCost>>,
    /// Per rank, bytes without KV cache, and bytes of one KV block.
    needs: Vec<(u64, u64)>,
    pub score: Score,
}

impl Candidate {
    /// Costs a cut.
    pub fn new(problem: &Problem<'_>, cuts: Cuts) -> Self {
        let costs: Vec<Vec<_>> = cuts
            .iter()
            .enumerate()
            .map(|(axis, bounds)| {
                (0..problem.world())
                    .map(|rank| cost(problem, axis, rank, bounds))
                    .collect()
            })
            .collect();
        let needs = (0..problem.world())
            .map(|rank| need(problem, &costs, rank))
            .collect();
        let score = Score {
            overflow_bytes: 0,
            seconds: 0.0,
            spread: 0.0,
        };
        let mut candidate = Self {
            cuts,
            costs,
            needs,
            score,
        };
        candidate.score = candidate.rate(problem);
        candidate
    }

    /// KV blocks that fit on every rank, up to what is wanted.
    pub fn blocks(&self, problem: &Problem<'_>) -> usize {
        let fit = |rank: usize| {
            let (bytes, block) = self.needs[rank];
            let fit = problem
                .usable(rank)
                .saturating_sub(bytes)
                .checked_div(block)
                .unwrap_or(u64::MAX);
            usize::try_from(fit).unwrap_or(usize::MAX)
        };
        (0..problem.world())
            .map(fit)
            .fold(problem.wanted_blocks, usize::min)
    }

    fn rate(&self, problem: &Problem<'_>) -> Score {
        let over = |(rank, (bytes, block)): (usize, &(u64, u64))| {
            let needed = bytes.saturating_add(block.saturating_mul(problem.least_blocks as u64));
            needed.saturating_sub(problem.usable(rank))
        };
        let overflow_bytes = self
            .needs
            .iter()
            .enumerate()
            .map(over)
            .fold(0, u64::saturating_add);
        let shortfall = 1.0 - self.blocks(problem) as f64 / problem.wanted_blocks as f64;
        let slowest =
            |axis: &Vec<AxisCost>| axis.iter().map(|cost| cost.seconds).fold(0.0, f64::max);
        let seconds: f64 = self.costs.iter().map(slowest).sum();
        let spread = self
            .costs
            .iter()
            .flatten()
            .map(|cost| cost.seconds * cost.seconds)
            .sum();
        Score {
            overflow_bytes,
            seconds: seconds * (1.0 + SHORTFALL_WEIGHT * shortfall),
            spread,
        }
    }

    /// Applies moves on different axes if `better` says so of the new score and the old one.
    pub fn try_moves(
        &mut self,
        problem: &Problem<'_>,
        moves: &[Move],
        better: impl Fn(&Score, &Score) -> bool,
    ) -> bool {
        let applied = moves
            .iter()
            .take_while(|m| self.shift(problem, m, m.by))
            .count();
        if applied == moves.len() {
            let before: Vec<_> = moves
                .iter()
                .map(|m| self.costs[m.axis][m.ranks()].to_vec())
                .collect();
            let needs = self.needs.clone();
            self.update(problem, moves);
            let score = self.rate(problem);
            if better(&score, &self.score) {
                self.score = score;
                return true;
            }
            self.needs = needs;
            for (m, costs) in moves.iter().zip(before) {
                self.costs[m.axis][m.ranks()].copy_from_slice(&costs);
            }
        }
        for m in &moves[..applied] {
            self.shift(problem, m, -m.by);
        }
        false
    }

    /// Costs the ranks that moves touch anew.
    fn update(&mut self, problem: &Problem<'_>, moves: &[Move]) {
        for m in moves {
            for rank in m.ranks() {
                self.costs[m.axis][rank] = cost(problem, m.axis, rank, &self.cuts[m.axis]);
            }
        }
        for rank in moves.iter().flat_map(Move::ranks) {
            self.needs[rank] = need(problem, &self.costs, rank);
        }
    }

    /// Shifts boundaries; `false`, with nothing shifted, when a rank would be left with less than its
    /// least.
    fn shift(&mut self, problem: &Problem<'_>, m: &Move, by: isize) -> bool {
        let bounds = &mut self.cuts[m.axis];
        let least = problem.axes[m.axis].least;
        let ends = bounds[m.first]
            .checked_add_signed(by)
            .zip(bounds[m.last].checked_add_signed(by));
        let legal = ends.is_some_and(|(first, last)| {
            first >= bounds[m.first - 1] + least && bounds[m.last + 1] >= last.saturating_add(least)
        });
        if legal {
            bounds[m.first..=m.last]
                .iter_mut()
                .for_each(|bound| *bound = bound.saturating_add_signed(by));
        }
        legal
    }
}

/// Boundaries `first..=last` of an axis go `by` steps: rank `last` gives and rank `first - 1` takes,
/// or the other way round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    pub axis: usize,
    pub first: usize,
    pub last: usize,
    pub by: isize,
}

impl Move {
    /// Ranks whose range changes.
    fn ranks(&self) -> RangeInclusive<usize> {
        self.first - 1..=self.last
    }
}

/// What a rank's part of an axis costs under these boundaries.
pub(super) fn cost(problem: &Problem<'_>, axis: usize, rank: usize, bounds: &[usize]) -> AxisCost {
    let axis = &problem.axes[axis];
    problem.cost(axis, rank, &axis.range(bounds[rank], bounds[rank + 1]))
}

fn need(problem: &Problem<'_>, costs: &[Vec<AxisCost>], rank: usize) -> (u64, u64) {
    let of_rank = || costs.iter().map(|axis| axis[rank]);
    let block = of_rank()
        .map(|cost| cost.kv_block)
        .fold(0, u64::saturating_add);
    (problem.memory(rank, of_rank(), 0).total(), block)
}
