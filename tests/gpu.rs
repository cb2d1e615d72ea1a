//! The golden checkpoints on a card, by the code of every architecture that it can run. Without a card
//! every test is listed as ignored.

mod ranks;

use libtest_mimic::{Arguments, Trial};
use ranks::{
    On, Ranks, Setup, greedy,
    oracle::{Golden, check_forced, check_generated, context, folders, forced, generate, golden},
};
use secondwind_kernels::{
    cuda::{Arch, device_count},
    select::{AttentionPath, LinearPath},
};
use secondwind_model::plan::{KvDType, Precision};

/// Mean divergence from the oracle that activations in 8 bits may cost.
const MEAN_DIVERGENCE: f64 = 1.0e-3;

fn main() {
    let missing = match device_count() {
        Ok(0) => Some("the driver sees no card".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let mut trials = Vec::new();
    let mut add = |name: String, test: fn(Option<Arch>), arch: Option<Arch>| {
        let trial = Trial::test(name, move || {
            test(arch);
            Ok(())
        });
        trials.push(match &missing {
            Some(why) => trial.with_ignored_flag(true).with_kind(why),
            None => trial,
        });
    };
    for arch in [
        Some(Arch::Sm60),
        Some(Arch::Sm61),
        Some(Arch::Sm70),
        Some(Arch::Sm75),
        None,
    ] {
        let name = arch.map_or("own code", Arch::name);
        add(
            format!("{name}: exact family agrees with the oracle"),
            exact,
            arch,
        );
        add(
            format!("{name}: f32 and eager agree with the oracle"),
            plainest,
            arch,
        );
        add(
            format!("{name}: int8 activations stay close to the oracle"),
            fast,
            arch,
        );
        add(
            format!("{name}: an f16 cache stays close"),
            half_cache,
            arch,
        );
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Runs `check` on every golden checkpoint.
fn on_all(setup: &Setup, mut check: impl FnMut(&str, &mut Ranks, &[Golden])) {
    for folder in folders() {
        let goldens = golden(&folder);
        let name = format!(
            "{} {:?}",
            folder.file_name().unwrap().to_string_lossy(),
            setup.on
        );
        let mut ranks = Ranks::load(&folder, context(&goldens), setup);
        check(&name, &mut ranks, &goldens);
    }
}

fn agrees(setup: &Setup) {
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

fn exact(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        ..Setup::world(1)
    });
}

fn plainest(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        linear_path: Some(LinearPath::F32),
        attention_path: Some(AttentionPath::Eager),
        ..Setup::world(1)
    });
}

fn fast(arch: Option<Arch>) {
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
                .filter_map(|row| Some(row.token?.top)),
        );
        at = end;
    }
    all
}

fn half_cache(arch: Option<Arch>) {
    let setup = Setup {
        on: On::Card(arch),
        kv_dtype: KvDType::F16,
        ..Setup::world(1)
    };
    on_all(&setup, |name, ranks, goldens| {
        let golden = &goldens[0];
        for (position, logprob) in forced(ranks, golden, 5).into_iter().enumerate() {
            let target = golden.tokens[position + 1] as usize;
            let difference = (logprob - golden.logprobs[position][target]).abs();
            assert!(
                difference <= 2.0e-2,
                "{name}, position {position}: {difference}"
            );
        }
    });
}
