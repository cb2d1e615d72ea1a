//! Plans of real shapes, and what holds for every plan.

use proptest::prelude::*;

use super::shapes::{
    INT4, QWEN_0_5B, QWEN_7B, QWEN_32B, QWEN_72B, Random, Sizes, cards, settings, shape, worker,
};
use crate::capabilities::{Capabilities, Recordings};
use crate::plan::{ModelShape, PlanError, PlanSettings, ShardPlan, plan, table};

/// Plans, and checks what must hold for every plan.
pub(super) fn planned(
    shape: &ModelShape,
    settings: &PlanSettings,
    workers: &[Capabilities],
) -> ShardPlan {
    let plan = plan(shape, settings, workers).expect("fits");
    check(&plan, shape, workers);
    plan
}

fn check(plan: &ShardPlan, shape: &ModelShape, workers: &[Capabilities]) {
    plan.check(shape).expect("legal");
    assert_eq!(
        *plan,
        super::super::plan(shape, &plan.settings, workers).expect("fits again")
    );
    for (rank, worker) in workers.iter().enumerate() {
        let taken = &plan.ranks[rank];
        assert_eq!(
            taken.memory,
            plan.rank_memory(shape, workers, rank),
            "rank {rank}"
        );
        assert!(taken.memory.total() <= taken.usable_bytes, "rank {rank}");
        assert!(taken.decode_step_seconds.is_finite() && taken.decode_step_seconds > 0.0);
        assert_eq!(
            taken.usable_bytes,
            worker.usable_bytes - plan.settings.memory_reserve_bytes
        );
    }
}

fn lengths(ranges: &[std::ops::Range<usize>]) -> Vec<usize> {
    ranges.iter().map(|range| range.len()).collect()
}

#[test]
fn half_billion_at_every_world() {
    let shape = shape(QWEN_0_5B, INT4);
    let settings = settings();
    for world in 1..=14 {
        let plan = planned(&shape, &settings, &cards(&vec!["p40"; world]));
        let heads = lengths(&plan.layers[0].query_heads);
        // Seven query heads with one KV head cost less than five with two.
        let most = heads.iter().max().expect("ranks");
        assert!(*most <= 7 || world == 1, "world {world}: {heads:?}");
        assert!(
            plan.layers[0]
                .ffn
                .iter()
                .all(|range| range.start % 128 == 0)
        );
        assert!(plan.vocab.iter().all(|range| range.start % 16 == 0));
        assert_eq!(plan.kv_blocks, 4 * 4096 / 16 + 1);
    }
    let error = plan(&shape, &settings, &cards(&["p40"; 15])).expect_err("too many");
    assert_eq!(
        error,
        PlanError::WorldTooLarge {
            world: 15,
            largest: 14,
            axis: "query heads",
            units: 14
        }
    );
}

#[test]
fn seven_billion_on_three_unlike_cards() {
    let shape = shape(QWEN_7B, INT4);
    let plan = planned(&shape, &settings(), &cards(&["p40", "t4", "2080ti"]));
    let heads = lengths(&plan.layers[0].query_heads);
    // 347, 320 and 616 GB/s.
    assert_eq!(heads.iter().sum::<usize>(), 28);
    assert!(
        heads[2] >= heads[0] && heads[0] >= heads[1] && heads[2] >= 13,
        "{heads:?}"
    );
    let ffn = lengths(&plan.layers[0].ffn);
    assert!(ffn[2] > ffn[0] && ffn[0] > ffn[1], "{ffn:?}");
    assert!(ffn.iter().all(|channels| channels % 128 == 0));
    assert!(plan.layers.iter().all(|layer| *layer == plan.layers[0]));
}

#[test]
fn thirty_two_billion_on_an_odd_rack() {
    let shape = shape(QWEN_32B, INT4);
    let workers = cards(&["p40", "t4", "2080ti:22GiB"]);
    let plan = planned(&shape, &settings(), &workers);
    let ffn = lengths(&plan.layers[0].ffn);
    assert!(ffn[2] > ffn[0] && ffn[0] > ffn[1], "{ffn:?}");
    assert!(plan.kv_blocks > 4096 / 16);
    // A card of half the memory has to take less than its speed would give it.
    let small = planned(&shape, &settings(), &cards(&["p40", "t4", "2080ti:6GiB"]));
    assert!(small.layers[0].ffn[2].len() < plan.layers[0].ffn[2].len());
}

#[test]
fn speed_decides_where_memory_does_not() {
    let shape = shape(QWEN_7B, INT4);
    let workers = [worker(1 << 36, 3e11), worker(1 << 36, 1e11)];
    let plan = planned(&shape, &settings(), &workers);
    // 28 heads in groups of 7 to a KV head; 148 groups of channels.
    assert_eq!(lengths(&plan.layers[0].query_heads), [21, 7]);
    assert_eq!(lengths(&plan.layers[0].ffn), [111 * 128, 37 * 128]);
    let swapped = [workers[1].clone(), workers[0].clone()];
    let plan = planned(&shape, &settings(), &swapped);
    assert_eq!(lengths(&plan.layers[0].query_heads), [7, 21]);
}

#[test]
fn kv_blocks_are_what_is_wanted_or_what_fits() {
    let shape = shape(QWEN_7B, INT4);
    let many = PlanSettings {
        max_sequences: 1000,
        ..settings()
    };
    let wanted = planned(&shape, &settings(), &cards(&["p40", "p40"]));
    assert_eq!(wanted.kv_blocks, 4 * 256 + 1);
    let fits = planned(&shape, &many, &cards(&["p40", "p40"]));
    assert!(fits.kv_blocks > wanted.kv_blocks && fits.kv_blocks < 1000 * 256 + 1);
    // One more block would not fit on some rank.
    let full = (0..2).any(|rank| {
        let taken = &fits.ranks[rank];
        taken.memory.total() + taken.memory.kv_cache / fits.kv_blocks as u64 > taken.usable_bytes
    });
    assert!(full);
}

#[test]
fn cuts_inside_groups_where_groups_do_not_go_round() {
    let sizes = Sizes {
        intermediate: 256,
        query_heads: 4,
        kv_heads: 2,
        layers: 2,
        ..QWEN_0_5B
    };
    let workers = vec![worker(1 << 34, 1e10); 3];
    let plan = planned(&shape(sizes, INT4), &settings(), &workers);
    assert!(
        plan.layers[0]
            .ffn
            .iter()
            .all(|range| range.start % 8 == 0 && range.len() >= 80)
    );
    let odd = Sizes {
        intermediate: 12,
        ..sizes
    };
    let plan = planned(&shape(odd, INT4), &settings(), &workers);
    assert!(
        plan.layers[0]
            .ffn
            .iter()
            .all(|range| (1..=8).contains(&range.len()))
    );
    // Fewer channels than ranks: somebody gets none.
    let few = Sizes {
        intermediate: 2,
        ..sizes
    };
    let plan = planned(&shape(few, INT4), &settings(), &workers);
    assert!(plan.layers[0].ffn.iter().any(|range| range.is_empty()));
}

#[test]
fn forced_shares_are_rounded_and_legal() {
    let shape = shape(QWEN_0_5B, INT4);
    let force = |split: &[f64]| PlanSettings {
        forced_split: Some(split.to_vec()),
        ..settings()
    };
    let plan = planned(&shape, &force(&[3.0, 1.0]), &cards(&["p40", "p40"]));
    assert_eq!(lengths(&plan.layers[0].query_heads), [11, 3]);
    assert_eq!(lengths(&plan.layers[0].ffn), [29 * 128, 9 * 128]);
    let plan = planned(
        &shape,
        &force(&[1e9, 1.0, 1.0]),
        &cards(&["p40", "p40", "p40"]),
    );
    assert_eq!(lengths(&plan.layers[0].query_heads), [12, 1, 1]);
}

#[test]
fn large_groups_are_planned_in_reasonable_time() {
    let shape = shape(QWEN_72B, INT4);
    let specs: Vec<_> = (0..64)
        .map(|rank| ["p40", "t4", "2080ti", "v100-32"][rank % 4])
        .collect();
    let plan = planned(&shape, &settings(), &cards(&specs));
    assert_eq!(lengths(&plan.layers[0].query_heads), [1; 64]);
    // Eight cards on which memory binds: 40 GB of weights and more contexts than fit.
    let specs = [
        "p40:8GiB",
        "t4:6GiB",
        "2080ti:5GiB",
        "p100:8GiB",
        "p40",
        "t4",
        "2080ti",
        "v100-16",
    ];
    let many = PlanSettings {
        max_sequences: 64,
        ..settings()
    };
    let plan = planned(&shape, &many, &cards(&specs));
    assert!(plan.kv_blocks < 64 * 256);
}

#[test]
fn table_is_tidy() {
    let shape = shape(QWEN_32B, INT4);
    let plan = planned(&shape, &settings(), &cards(&["p40", "t4", "2080ti:22GiB"]));
    let text = table(&plan, &shape);
    println!("{text}");
    assert!(
        text.lines()
            .all(|line| line.len() <= 100 && line.trim_end() == line),
        "{text}"
    );
    for word in [
        "Tesla P40",
        "RTX 2080 Ti",
        "kv cache",
        "weights",
        "64 layers on 3 ranks",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_is_legal_and_exact(seed in any::<u64>()) {
        let mut random = Random(seed);
        let kv_heads = random.within(1, 8);
        let query_heads = kv_heads * random.within(1, 8);
        let world = random.within(1, query_heads.min(12));
        let group_size = random.one_of(&[Some(32), Some(64), Some(128), None]);
        let format = crate::modules::GptqFormat {
            bits: random.one_of(&[2, 3, 4, 8]),
            group_size,
            desc_act: random.within(0, 1) == 1,
            ..INT4
        };
        let sizes = Sizes {
            hidden: 32 * random.within(1, 64),
            intermediate: 32 * random.within(1, 128),
            layers: random.within(1, 4),
            query_heads,
            kv_heads,
            head_dim: random.one_of(&[32, 64, 128]),
            vocab: random.within(world, 4000),
            tied: random.within(0, 1) == 1,
        };
        let shape = shape(sizes, format);
        let workers: Vec<_> = (0..world)
            .map(|_| Capabilities {
                recordings: Recordings {
                    sizes: vec![1, 2, 4, 8],
                    bytes_per_layer: random.within(0, 1 << 12) as u64,
                    bytes_per_sum: random.within(0, 1 << 14) as u64,
                    nccl_bytes: random.within(0, 3) as u64,
                },
                ..worker(random.within(1 << 24, 1 << 30) as u64, 1e9 * random.between(1.0, 20.0))
            })
            .collect();
        match plan(&shape, &settings(), &workers) {
            Ok(plan) => check(&plan, &shape, &workers),
            Err(PlanError::DoesNotFit(why)) => prop_assert!(why.missing_bytes > 0 && !why.remedies.is_empty()),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
