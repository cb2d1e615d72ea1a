//! The search against every cut there is, on small instances.

use super::shapes::{INT4, Random, Sizes, settings, shape, worker};
use crate::capabilities::Capabilities;
use crate::plan::axis::Grain;
use crate::plan::candidate::{Candidate, Score};
use crate::plan::cost::Problem;
use crate::plan::search::best;
use crate::plan::{ModelShape, PlanSettings};

const INSTANCES: u64 = 1000;

struct Instance {
    shape: ModelShape,
    settings: PlanSettings,
    workers: Vec<Capabilities>,
}

/// A random instance; half of them short of memory.
fn instance(seed: u64) -> Instance {
    let mut random = Random(seed);
    let kv_heads = random.within(1, 4);
    let query_heads = kv_heads * random.within(if kv_heads == 1 { 2 } else { 1 }, 8 / kv_heads);
    let world = random.within(2, 4.min(query_heads));
    let shape = shape(
        Sizes {
            hidden: 64 * random.within(2, 8),
            intermediate: 128 * random.within(world, 7),
            layers: random.within(1, 3),
            query_heads,
            kv_heads,
            head_dim: random.one_of(&[32, 64, 128]),
            vocab: 16 * random.within(world, 7),
            tied: random.within(0, 1) == 1,
        },
        INT4,
    );
    let settings = PlanSettings {
        max_context_tokens: random.one_of(&[16, 64, 256, 2048]),
        max_step_tokens: 32,
        ..settings()
    };
    let mut workers: Vec<_> = (0..world)
        .map(|_| worker(1 << 40, 1e9 * random.between(1.0, 10.0)))
        .collect();
    if random.within(0, 1) == 1 {
        let problem = Problem::new(&shape, &settings, &workers, Grain::Group).expect("paths exist");
        let free = best(&problem);
        let needed: Vec<_> = (0..world)
            .map(|rank| {
                problem
                    .memory(
                        rank,
                        free.costs.iter().map(|axis| axis[rank]),
                        problem.least_blocks,
                    )
                    .total()
            })
            .collect();
        for (worker, needed) in workers.iter_mut().zip(needed) {
            worker.usable_bytes = (needed as f64 * random.between(0.8, 1.5)) as u64;
        }
    }
    Instance {
        shape,
        settings,
        workers,
    }
}

/// Every way to give `quanta` steps to `world` ranks, at least `least` each, as boundaries.
fn all_bounds(quanta: usize, world: usize, least: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![0]];
    for rank in 0..world {
        let rest = least * (world - rank - 1);
        all = all
            .into_iter()
            .flat_map(|bounds| {
                let start = bounds[rank];
                let ends = if rank + 1 == world {
                    quanta..=quanta
                } else {
                    start + least..=quanta - rest
                };
                ends.map(move |end| bounds.iter().copied().chain([end]).collect())
                    .collect::<Vec<Vec<usize>>>()
            })
            .collect();
    }
    all
}

#[test]
fn search_is_near_the_best_of_all_cuts() {
    let (mut equal, mut fitting, mut worst) = (0, 0, 1.0f64);
    for seed in 0..INSTANCES {
        let Instance {
            shape,
            settings,
            workers,
        } = instance(seed);
        let problem = Problem::new(&shape, &settings, &workers, Grain::Group).expect("paths exist");
        let found = best(&problem).score;
        let cuts: Vec<_> = problem
            .axes
            .iter()
            .map(|axis| all_bounds(axis.quanta(), workers.len(), axis.least))
            .collect();
        let mut optimum: Option<Score> = None;
        for heads in &cuts[0] {
            for ffn in &cuts[1] {
                for vocab in &cuts[2] {
                    let score =
                        Candidate::new(&problem, vec![heads.clone(), ffn.clone(), vocab.clone()])
                            .score;
                    if optimum.is_none_or(|best| score.beats(&best)) {
                        optimum = Some(score);
                    }
                }
            }
        }
        let optimum = optimum.expect("there are cuts");
        if optimum.overflow_bytes > 0 {
            continue;
        }
        fitting += 1;
        assert_eq!(
            found.overflow_bytes, 0,
            "seed {seed}: a cut fits, but the search found none"
        );
        let ratio = found.seconds / optimum.seconds;
        assert!(
            ratio >= 1.0 - 1e-12,
            "seed {seed}: better than the best of all"
        );
        assert!(
            ratio <= 1.02,
            "seed {seed}: world {}, {ratio} times the best",
            workers.len()
        );
        equal += usize::from(ratio <= 1.0 + 1e-12);
        worst = worst.max(ratio);
    }
    println!("{fitting} of {INSTANCES} instances fit; {equal} found exactly; worst {worst}");
    assert!(fitting > INSTANCES as usize / 2);
    assert!(
        equal * 10 >= fitting * 9,
        "{equal} of {fitting} found exactly, worst {worst}"
    );
}
