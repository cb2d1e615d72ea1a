//! What does not fit says why, and its remedies work.

use super::shapes::{INT4, QWEN_0_5B, QWEN_7B, QWEN_72B, cards, settings, shape, worker};
use crate::capabilities::Capabilities;
use crate::plan::{KvDType, ModelShape, PlanError, PlanSettings, Shortfall, plan};

fn shortfall(shape: &ModelShape, settings: &PlanSettings, workers: &[Capabilities]) -> Shortfall {
    match plan(shape, settings, workers) {
        Err(PlanError::DoesNotFit(why)) => *why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn seventy_two_billion_on_two_t4_says_why() {
    let shape = shape(QWEN_72B, INT4);
    let workers = cards(&["t4", "t4"]);
    let why = shortfall(&shape, &settings(), &workers);
    assert_eq!(why.largest, "weights");
    // 40 GB of weights, 30 GB of cards.
    assert!(
        (10 << 30..16 << 30).contains(&why.missing_bytes),
        "{}",
        why.missing_bytes
    );
    assert_eq!(why.ranks.len(), 2);
    assert!(
        why.ranks
            .iter()
            .all(|rank| rank.smallest.total() < rank.usable_bytes)
    );
    assert_eq!(why.remedies, ["it fits with 1 more worker like Tesla T4"]);
    let text = PlanError::DoesNotFit(Box::new(why)).to_string();
    println!("{text}");
    for part in [
        "does not fit",
        "rank 1 (Tesla T4)",
        "usable 14.71 GiB",
        "weights",
        "smallest legal share",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(plan(&shape, &settings(), &cards(&["t4", "t4", "t4"])).is_ok());
}

#[test]
fn long_contexts_are_told_how_far_they_may_go() {
    let shape = shape(QWEN_7B, INT4);
    let long = PlanSettings {
        max_context_tokens: 32_768,
        kv_dtype: KvDType::F32,
        ..settings()
    };
    let workers = cards(&["2080ti:8GiB"]);
    let why = shortfall(&shape, &long, &workers);
    let remedy = why
        .remedies
        .iter()
        .find(|remedy| remedy.contains("max_context_tokens"))
        .expect("a shorter one fits");
    let tokens: usize = remedy
        .rsplit(' ')
        .next()
        .expect("a number")
        .parse()
        .expect("a number");
    let with = |max_context_tokens| {
        plan(
            &shape,
            &PlanSettings {
                max_context_tokens,
                ..long.clone()
            },
            &workers,
        )
    };
    assert!(
        with(tokens).is_ok() && with(tokens + 256).is_err(),
        "{remedy}"
    );
    assert!(
        why.remedies
            .iter()
            .any(|remedy| remedy.contains("more worker")),
        "{:?}",
        why.remedies
    );
}

#[test]
fn kv_type_reserve_and_forced_split_are_remedies() {
    let shape = shape(QWEN_0_5B, INT4);
    let plenty = plan(&shape, &settings(), &[worker(1 << 34, 1e10)]).expect("fits");
    let one_context = PlanSettings {
        max_sequences: 1,
        ..settings()
    };
    let needed = plan(&shape, &one_context, &[worker(1 << 34, 1e10)])
        .expect("fits")
        .ranks[0]
        .memory
        .total();
    assert!(plenty.ranks[0].memory.total() > needed);
    let tight = [worker(needed, 1e10)];
    assert!(plan(&shape, &settings(), &tight).is_ok());
    let remedies = |settings: &PlanSettings, workers: &[Capabilities]| {
        shortfall(&shape, settings, workers).remedies
    };
    let wide = remedies(
        &PlanSettings {
            kv_dtype: KvDType::F32,
            ..settings()
        },
        &tight,
    );
    assert!(
        wide.iter()
            .any(|remedy| remedy == "it fits with kv_dtype = f16"),
        "{wide:?}"
    );
    // An eighth short of what an f16 cache of the least size takes: int8 saves nearly a half.
    let block = 24 * 2 * 16 * 2 * 64 * 2;
    let least = block * (settings().max_context_tokens as u64 / 16 + 1);
    let halves = remedies(&settings(), &[worker(needed - least / 8, 1e10)]);
    assert!(
        halves
            .iter()
            .any(|remedy| remedy == "it fits with kv_dtype = int8"),
        "{halves:?}"
    );
    let reserved = remedies(
        &PlanSettings {
            memory_reserve_bytes: 64 << 20,
            ..settings()
        },
        &[worker(needed + (10 << 20), 1e10)],
    );
    assert!(
        reserved
            .iter()
            .any(|remedy| remedy == "it fits with memory_reserve at most 10MiB"),
        "{reserved:?}"
    );
    let forced = PlanSettings {
        forced_split: Some(vec![1.0, 20.0]),
        ..settings()
    };
    let pair = [worker(needed, 1e10), worker(needed / 2, 1e10)];
    let forced = remedies(&forced, &pair);
    assert!(
        forced[0].contains("instead of the forced one"),
        "{forced:?}"
    );
}

#[test]
fn workers_without_memory_are_told() {
    let why = shortfall(
        &shape(QWEN_0_5B, INT4),
        &settings(),
        &[worker(0, 1e9), worker(0, 1e9)],
    );
    assert!(why.missing_bytes > 0);
    assert!(
        why.ranks
            .iter()
            .all(|rank| rank.smallest.total() > 0 && rank.usable_bytes == 0)
    );
    assert_eq!(why.remedies.len(), 1);
    assert!(
        why.remedies[0].contains("no single change"),
        "{:?}",
        why.remedies
    );
}
