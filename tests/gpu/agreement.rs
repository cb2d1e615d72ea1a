//! The golden checkpoints and the embedded model on a card, held against the oracle and a CPU.

use secondwind_kernels::{
    cuda::Arch,
    select::{AttentionPath, LinearPath},
};
use secondwind_model::plan::{KvDType, LmHead, Precision};
use secondwind_worker::Device;

use crate::{
    exam, harness,
    ranks::{
        On, Ranks, Setup, Via, greedy,
        oracle::{
            Golden, HALF_CACHE, INT8_CACHE, INT8_HEAD, check_forced, check_generated, context,
            folders, forced, generate, golden, near,
        },
    },
};

/// Mean divergence from the oracle that activations in 8 bits may cost.
const MEAN_DIVERGENCE: f64 = 1.0e-3;

/// Runs `check` on every golden checkpoint.
fn on_all(setup: &Setup, mut check: impl FnMut(&str, &mut Ranks, &[Golden])) {
    for folder in folders() {
        let goldens = golden(&folder);
        let name = format!(
            "{} {:?}",
            folder.file_name().unwrap().to_string_lossy(),
            setup.on
        );
        // Where it stands, should it hang.
        println!("{name}");
        let mut ranks = Ranks::load(&folder, context(&goldens), setup);
        check(&name, &mut ranks, &goldens);
    }
}

pub fn agrees(setup: &Setup) {
    on_all(setup, |name, ranks, goldens| {
        for golden in goldens {
            for chunk in [usize::MAX >> 1, 1, 7] {
                let logprobs = forced(ranks, golden, chunk);
                ranks.clear();
                check_forced(name, golden, &logprobs);
            }
        }
        let together = generate(ranks, &goldens.iter().collect::<Vec<_>>());
        for (golden, output) in goldens.iter().zip(&together) {
            check_generated(name, golden, output);
        }
    });
}

pub fn exact(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        ..Setup::world(1)
    });
}

pub fn card_and_cpu(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::CardAndCpu(arch),
        via: Via::Grpc,
        ..Setup::world(2)
    });
}

pub fn plainest(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        linear_path: Some(LinearPath::F32),
        attention_path: Some(AttentionPath::Eager),
        ..Setup::world(1)
    });
}

pub fn fast(arch: Option<Arch>) {
    let setup = Setup {
        on: On::Card(arch),
        precision: Precision::Fast,
        ..Setup::world(1)
    };
    // A mean over all positions of all checkpoints: single positions of random models say little.
    let (mut sum, mut positions) = (0.0, 0);
    on_all(&setup, |_, ranks, goldens| {
        for golden in goldens {
            for (position, ours) in distributions(ranks, golden).into_iter().enumerate() {
                let oracle = &golden.logprobs[position];
                sum += ours
                    .into_iter()
                    .map(|(id, logprob)| {
                        let expected = f64::from(oracle[id as usize]);
                        expected.exp() * (expected - f64::from(logprob))
                    })
                    .sum::<f64>();
                positions += 1;
            }
            ranks.clear();
        }
    });
    let divergence = sum / f64::from(positions);
    println!("mean divergence {divergence:.2e} over {positions} positions");
    assert!(
        divergence <= MEAN_DIVERGENCE,
        "mean divergence {divergence:.2e}"
    );
}

/// The 256 most likely tokens after each position with their log-probabilities; the oracle's
/// vocabularies are hardly larger.
fn distributions(ranks: &mut Ranks, golden: &Golden) -> Vec<Vec<(u32, f32)>> {
    let mut sequence = ranks.sequence(golden.tokens.len());
    // A prompt first and then token by token, so that both kinds of paths count.
    let mut ends: Vec<usize> = (golden.prompt..=golden.tokens.len()).collect();
    let mut all = vec![Vec::new(); golden.prompt - 1];
    let mut at = 0;
    for end in ends.drain(..) {
        let row = sequence.row(&golden.tokens[at..end], &[], greedy(Some(256)));
        let result = ranks.step(vec![row], Vec::new());
        all.extend(
            result
                .rows
                .into_iter()
                .flat_map(|row| row.tokens.into_iter().map(|token| token.top)),
        );
        at = end;
    }
    all
}

pub fn half_cache(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            kv_dtype: KvDType::F16,
            ..Setup::world(1)
        },
        HALF_CACHE,
    );
}

pub fn int8_cache(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            kv_dtype: KvDType::Int8,
            ..Setup::world(1)
        },
        INT8_CACHE,
    );
}

pub fn int8_head(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            lm_head: LmHead::Int8,
            ..Setup::world(1)
        },
        INT8_HEAD,
    );
}

/// Through a whole cluster: what 8-bit activations cost is at most a point of the exact score.
pub fn embedded_model(arch: Option<Arch>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let examined = |setup: harness::Setup| runtime.block_on(exam::examine(setup));
    let on_cpu = examined(harness::Setup::builtin(1)).sums;
    let card = examined(harness::Setup {
        device: Device::Cuda(0),
        arch,
        precision: Precision::Fast,
        kv_dtype: KvDType::F16,
        ..harness::Setup::builtin(1)
    });
    let on_card = card.sums;
    println!("{on_card} sums of {}, {on_cpu} on a cpu", exam::SUMS);
    println!("facts that are wrong: {:?}", card.wrong_facts);
    assert!(
        on_card.abs_diff(on_cpu) * 100 <= exam::SUMS,
        "{on_card} sums are right, {on_cpu} on a cpu"
    );
}
