//! The search for the cut with the least [`Score`].
//!
//! Starts: the exact minimax cut of every axis for itself (bisection of the bound with a greedy fill,
//! as for chains-on-chains partitioning: Pınar and Aykanat, "Fast optimal load balancing algorithms
//! for 1D partitioning", 2004); where memory binds also one share per rank by water-filling of speed
//! under memory caps, by memory alone and between the two, rounded by largest remainder, and their
//! mixtures per axis. From each, exact-cost descent over moves of boundaries; then, in small groups,
//! moves on two and three axes at once. The best wins.

use super::candidate::{Candidate, Move, Score};
use super::cost::Problem;
use super::starts::{even_shares, minimax, starts};

/// Moves of two boundaries at once are tried up to this world size.
const PAIRED_WORLD: usize = 8;
/// Moves of three boundaries at once are tried up to this world size.
const TRIPLE_WORLD: usize = 3;
/// Units are moved between ranks that are not neighbours up to this world size.
const DISTANT_WORLD: usize = 16;
/// Descents end after as many accepted moves; none comes near it.
const MOST_MOVES: usize = 100_000;
/// Candidates that go on to moves of several boundaries at once.
const KEPT: usize = 4;
/// Such moves are no finer than this part of an axis.
const FINEST_JOINT: usize = 32;

/// The best cut found.
pub(super) fn best(problem: &Problem<'_>) -> Candidate {
    let free = Candidate::new(problem, minimax(problem));
    let bound = free.score.overflow_bytes > 0 || free.blocks(problem) < problem.wanted_blocks;
    let free = descend(problem, free, |_| false);
    if !bound {
        // Every axis has its own optimum and nothing can be faster.
        return free;
    }
    let mut found = vec![free];
    found.extend(
        starts(problem)
            .into_iter()
            .map(|cuts| descend(problem, Candidate::new(problem, cuts), |_| false)),
    );
    found.sort_by(|a, b| a.score.order(&b.score));
    found.dedup_by(|a, b| a.cuts == b.cuts);
    found.truncate(KEPT);
    if problem.world() <= PAIRED_WORLD {
        found = found
            .into_iter()
            .map(|candidate| descend_jointly(problem, candidate, 2))
            .collect();
        found.sort_by(|a, b| a.score.order(&b.score));
    }
    let best = found.swap_remove(0);
    if problem.world() <= TRIPLE_WORLD && problem.axes.len() == 3 {
        return descend_jointly(problem, best, 3);
    }
    best
}

/// Whether the search finds a cut that fits with the least KV blocks.
pub(super) fn fits(problem: &Problem<'_>) -> bool {
    [1.0, 0.0].into_iter().any(|mix| {
        let start = Candidate::new(problem, even_shares(problem, mix));
        descend(problem, start, |score| score.overflow_bytes == 0)
            .score
            .overflow_bytes
            == 0
    })
}

/// Moves boundaries while the score falls and is not good enough.
fn descend(
    problem: &Problem<'_>,
    mut candidate: Candidate,
    enough: impl Fn(&Score) -> bool,
) -> Candidate {
    let of_axis = |axis: usize| {
        moves(
            problem,
            axis,
            &steps(problem.axes[axis].quanta()),
            DISTANT_WORLD,
        )
    };
    let moves: Vec<_> = (0..problem.axes.len()).flat_map(of_axis).collect();
    let mut left = MOST_MOVES;
    loop {
        let before = left;
        for m in &moves {
            while left > 0
                && !enough(&candidate.score)
                && candidate.try_moves(problem, &[*m], Score::beats)
            {
                left -= 1;
            }
        }
        if left == before || left == 0 {
            return candidate;
        }
    }
}

/// Moves one boundary on each of `axes` axes at once, while the score falls clearly: what memory
/// forces when a rank must give on one axis to take on another.
fn descend_jointly(problem: &Problem<'_>, mut candidate: Candidate, axes: usize) -> Candidate {
    let all = 0..problem.axes.len();
    let sets: Vec<Vec<usize>> = match axes {
        2 => all
            .clone()
            .flat_map(|a| (a + 1..all.end).map(move |b| vec![a, b]))
            .collect(),
        _ => vec![all.clone().collect()],
    };
    let moves: Vec<_> = all.map(|axis| joint_moves(problem, axis)).collect();
    loop {
        let mut improved = false;
        for set in &sets {
            let mut at = vec![0; set.len()];
            while at[0] < moves[set[0]].len() {
                let joint: Vec<_> = set
                    .iter()
                    .zip(&at)
                    .map(|(axis, at)| moves[*axis][*at])
                    .collect();
                improved |= candidate.try_moves(problem, &joint, Score::beats_clearly);
                // Counts on, the last axis fastest.
                for place in (0..set.len()).rev() {
                    at[place] += 1;
                    if place == 0 || at[place] < moves[set[place]].len() {
                        break;
                    }
                    at[place] = 0;
                }
            }
        }
        if !improved {
            return candidate;
        }
        candidate = descend(problem, candidate, |_| false);
    }
}

/// Moves of one axis that are tried together with others: not finer than a part of it.
fn joint_moves(problem: &Problem<'_>, axis: usize) -> Vec<Move> {
    let quanta = problem.axes[axis].quanta();
    let finest = (quanta / FINEST_JOINT).max(1);
    let mut powers = steps(quanta);
    powers.retain(|step| *step >= finest as isize);
    let threes: Vec<_> = powers
        .iter()
        .map(|step| step / 4 * 3)
        .filter(|step| *step > 0)
        .collect();
    powers.extend(threes);
    moves(problem, axis, &powers, PAIRED_WORLD / 2)
}

/// Powers of two up to an axis's steps, longest first.
fn steps(quanta: usize) -> Vec<isize> {
    let longest = quanta.next_power_of_two().ilog2();
    (0..=longest).rev().map(|power| 1 << power).collect()
}

/// Moves of an axis: every boundary by every step, both ways. In groups up to `distant` ranks runs of
/// boundaries move as well, which carries units between ranks that are not neighbours.
fn moves(problem: &Problem<'_>, axis: usize, steps: &[isize], distant: usize) -> Vec<Move> {
    let world = problem.world();
    let mut moves = Vec::new();
    for step in steps {
        for first in 1..world {
            let end = if world <= distant { world - 1 } else { first };
            for last in first..=end {
                moves.extend([*step, -step].map(|by| Move {
                    axis,
                    first,
                    last,
                    by,
                }));
            }
        }
    }
    moves
}
