//! Log-probabilities and greedy tokens of checkpoints written by GPTQModel, against a float32 forward
//! pass of transformers over the dequantised weights (`tests/golden/make.py`).

mod ranks;

use std::path::Path;

use ranks::{
    Ranks, Setup, Via,
    oracle::{
        HALF_CACHE, INT8_CACHE, INT8_HEAD, check_forced, check_generated, context, folders, forced,
        generate, golden, near,
    },
};
use secondwind_kernels::{
    isa::CpuIsa,
    select::{AttentionPath, LinearPath},
};
use secondwind_model::plan::{KvDType, LmHead};

/// Everything a setup must get right on one checkpoint.
fn check(folder: &Path, setup: &Setup) {
    let name = format!(
        "{} {setup:?}",
        folder.file_name().unwrap().to_string_lossy()
    );
    let goldens = golden(folder);
    let mut ranks = Ranks::load(folder, context(&goldens), setup);
    let mut alone = Vec::new();
    for golden in &goldens {
        let whole = forced(&mut ranks, golden, usize::MAX >> 1);
        check_forced(&name, golden, &whole);
        ranks.clear();
        for chunk in [1, 7] {
            let chunked = forced(&mut ranks, golden, chunk);
            ranks.clear();
            let same = whole
                .iter()
                .zip(&chunked)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: chunks of {chunk} change bits");
        }
        let mut output = generate(&mut ranks, &[golden]);
        ranks.clear();
        check_generated(&name, golden, &output[0]);
        alone.append(&mut output);
    }
    let together = generate(&mut ranks, &goldens.iter().collect::<Vec<_>>());
    assert!(alone == together, "{name}: a batch changes bits");
}

#[test]
fn world_1_agrees_with_the_oracle() {
    for folder in folders() {
        check(&folder, &Setup::world(1));
    }
}

#[test]
fn an_int8_lm_head_stays_close() {
    for world in [1, 2] {
        near(
            &Setup {
                lm_head: LmHead::Int8,
                ..Setup::world(world)
            },
            INT8_HEAD,
        );
    }
}

#[test]
fn world_2_agrees_with_the_oracle() {
    for folder in folders() {
        check(&folder, &Setup::world(2));
    }
}

#[test]
fn world_3_agrees_with_the_oracle() {
    for folder in folders() {
        check(&folder, &Setup::world(3));
    }
}

#[test]
fn an_uneven_split_agrees_with_the_oracle() {
    for folder in folders() {
        let split = Some(vec![3.0, 1.0]);
        check(
            &folder,
            &Setup {
                split,
                ..Setup::world(2)
            },
        );
    }
}

#[test]
fn grpc_collectives_agree_with_the_oracle_and_repeat_memory_bit_for_bit() {
    for folder in folders() {
        let goldens = golden(&folder);
        for world in [2, 3] {
            let [memory, grpc] = [Via::Memory, Via::Grpc].map(|via| {
                let setup = Setup {
                    via,
                    ..Setup::world(world)
                };
                let mut ranks = Ranks::load(&folder, context(&goldens), &setup);
                forced(&mut ranks, &goldens[0], usize::MAX >> 1)
            });
            check_forced("grpc", &goldens[0], &grpc);
            assert!(
                memory
                    .iter()
                    .zip(&grpc)
                    .all(|(a, b)| a.to_bits() == b.to_bits())
            );
        }
    }
}

#[test]
fn every_path_that_this_machine_has_agrees_with_the_oracle() {
    let cpu = |isa: Option<CpuIsa>| isa.is_some_and(CpuIsa::is_available);
    let linear = LinearPath::ALL.iter().filter(|path| cpu(path.isa()));
    for (&linear, &attention) in linear.zip(AttentionPath::ALL) {
        for folder in folders() {
            let goldens = golden(&folder);
            let setup = Setup {
                linear_path: Some(linear),
                attention_path: Some(attention),
                ..Setup::world(1)
            };
            let mut ranks = Ranks::load(&folder, context(&goldens), &setup);
            let logprobs = forced(&mut ranks, &goldens[0], usize::MAX >> 1);
            check_forced(
                &format!("{linear} {}", folder.display()),
                &goldens[0],
                &logprobs,
            );
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    let folder = &folders()[0];
    let goldens = golden(folder);
    let mut all = Vec::new();
    for threads in [1, 2, 3] {
        let setup = Setup {
            threads,
            ..Setup::world(2)
        };
        let mut ranks = Ranks::load(folder, context(&goldens), &setup);
        all.push(
            forced(&mut ranks, &goldens[0], 5)
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>(),
        );
    }
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_half_precision_kv_cache_stays_close() {
    near(
        &Setup {
            kv_dtype: KvDType::F16,
            ..Setup::world(2)
        },
        HALF_CACHE,
    );
}

#[test]
fn an_int8_kv_cache_stays_close() {
    for world in [1, 2] {
        near(
            &Setup {
                kv_dtype: KvDType::Int8,
                ..Setup::world(world)
            },
            INT8_CACHE,
        );
    }
}

#[test]
#[should_panic(expected = "its digest is")]
fn a_rank_whose_plan_digest_differs_never_starts() {
    let plan_digest = Some("another".to_owned());
    Ranks::load(
        &folders()[0],
        64,
        &Setup {
            plan_digest,
            ..Setup::world(1)
        },
    );
}
