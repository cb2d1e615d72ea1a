//! The golden checkpoints on a card, by the code of every architecture that it can run. Without a card
//! every test is listed as ignored.

#[path = "cluster/exam.rs"]
mod exam;
#[allow(dead_code)] // Shared with the tests of clusters.
#[path = "cluster/harness.rs"]
mod harness;
mod ranks;

use std::{
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use libtest_mimic::{Arguments, Trial};
use ranks::{
    On, Ranks, Setup, Via, greedy,
    oracle::{
        Golden, HALF_CACHE, INT8_CACHE, INT8_HEAD, TOLERANCE, check_forced, check_generated,
        context, folders, forced, generate, golden, near,
    },
};
use secondwind_kernels::{
    cuda::{Arch, device_count},
    select::{AttentionPath, LinearPath},
};
use secondwind_model::{
    checkpoint::Checkpoint,
    plan::{KvDType, LmHead, Precision, ShardPlan},
    step::{LogitRules, Sampling, TokenSet},
};
use secondwind_worker::{
    Device,
    backend::CudaBackend,
    bench::BenchRank,
    collective::{local, nccl::Nccl},
    loader,
    timeline::{Mark, Part},
};

/// A sum over NCCL holds its cards until every rank has come, so nothing else of this process may wait
/// for them meanwhile.
static CARDS: RwLock<()> = RwLock::new(());

/// Mean divergence from the oracle that activations in 8 bits may cost.
const MEAN_DIVERGENCE: f64 = 1.0e-3;

/// A test of the code of an architecture; `None` is the card's own.
type Check = fn(Option<Arch>);

fn main() {
    let missing = match device_count() {
        Ok(0) => Some("the driver sees no card".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let mut trials = Vec::new();
    let mut add = |name: String, test: Check, arch: Option<Arch>| {
        let trial = Trial::test(name, move || {
            let _shared = CARDS.read().unwrap_or_else(PoisonError::into_inner);
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
        add(
            format!("{name}: an int8 cache stays close"),
            int8_cache,
            arch,
        );
        add(
            format!("{name}: a card and a cpu worker agree over grpc"),
            card_and_cpu,
            arch,
        );
        add(
            format!("{name}: an int8 lm_head stays close"),
            int8_head,
            arch,
        );
        add(
            format!("{name}: the embedded model knows as much as on a cpu"),
            embedded_model,
            arch,
        );
        add(
            format!("{name}: rules change logits as on a cpu"),
            rules,
            arch,
        );
        add(
            format!("{name}: guesses are decoding, masks hold"),
            guesses_and_masks,
            arch,
        );
    }
    let one_card = matches!(device_count(), Ok(1)).then(|| "the driver sees one card".to_owned());
    let missing_pair = missing.clone().or(one_card);
    let pairs: [(&str, Check); 2] = [
        ("two cards agree over NCCL", two_cards),
        ("a step in two parts is the same step", two_parts),
    ];
    for arch in [Some(Arch::Sm61), Some(Arch::Sm75), None] {
        let name = arch.map_or("own code", Arch::name);
        for (what, test) in pairs {
            let trial = Trial::test(format!("{name}: {what}"), move || {
                let _alone = CARDS.write().unwrap_or_else(PoisonError::into_inner);
                test(arch);
                Ok(())
            });
            trials.push(match &missing_pair {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            });
        }
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
        // Where it stands, should it hang.
        println!("{name}");
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

fn card_and_cpu(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::CardAndCpu(arch),
        via: Via::Grpc,
        ..Setup::world(2)
    });
}

fn two_cards(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        via: Via::Nccl,
        split: Some(vec![3.0, 2.0]),
        ..Setup::world(2)
    });
}

/// Prompts that two cards work on in two parts, as any step of so many tokens over NCCL, the second of which begins
/// within a sequence; against one card, which sums nothing.
fn two_parts(arch: Option<Arch>) {
    let one = Setup {
        on: On::Card(arch),
        step_tokens: 1024,
        ..Setup::world(1)
    };
    let two = Setup {
        via: Via::Nccl,
        split: Some(vec![3.0, 2.0]),
        world: 2,
        ..one.clone()
    };
    for name in ["qwen2_4bit_g64_act_order", "qwen3_4bit_v2_asym"] {
        let folder = folders().into_iter().find(|folder| folder.ends_with(name));
        let folder = folder.expect("the checkpoint is in the repository");
        let tokens = &golden(&folder)[0].tokens;
        let prompts = [100, 400, 250].map(|len| -> Vec<u32> {
            let cycled = tokens.iter().cycle().skip(len / 3);
            cycled.take(len).copied().collect()
        });
        let [alone, together] = [&one, &two].map(|setup| {
            let mut ranks = Ranks::load(&folder, 512, setup);
            let rows = prompts
                .iter()
                .map(|prompt| ranks.sequence(prompt.len()).row(prompt, &prompt[1..], None))
                .collect();
            let result = ranks.step(rows, Vec::new());
            let plan = ranks.plan.clone();
            drop(ranks);
            if setup.world == 2 {
                assert_eq!(parts(&folder, &plan, arch, 512), [2, 2]);
                assert_eq!(parts(&folder, &plan, arch, 511), [1, 1]);
            }
            let logprobs = result.rows.into_iter().map(|row| {
                let of = row.prompt_logprobs.into_iter();
                of.map(|of| of.logprob).collect::<Vec<f32>>()
            });
            logprobs.collect::<Vec<_>>()
        });
        assert_eq!(
            alone.iter().map(Vec::len).collect::<Vec<_>>(),
            [99, 399, 249]
        );
        for (alone, together) in alone.iter().flatten().zip(together.iter().flatten()) {
            let difference = (alone - together).abs();
            assert!(
                difference <= TOLERANCE,
                "{name}: {together} in two parts, {alone} on one card"
            );
        }
    }
}

/// Through a whole cluster: what 8-bit activations cost is at most a point of the exact score.
fn embedded_model(arch: Option<Arch>) {
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

/// Two sequences that decode together, one under rules: greedy tokens are those of a CPU, and are others than
/// without the rules.
fn rules(arch: Option<Arch>) {
    let folders = folders();
    let folder = folders
        .iter()
        .find(|folder| folder.ends_with("qwen3_4bit_v2_asym"));
    let folder = folder.expect("the checkpoint is in the repository");
    let prompt = &golden(folder)[0].tokens[..8];
    let decoded = |on, rules: LogitRules| {
        let setup = Setup {
            on,
            ..Setup::world(1)
        };
        let mut ranks = Ranks::load(folder, 64, &setup);
        let mut sequences = [ranks.sequence(64), ranks.sequence(64)];
        let mut tokens = [prompt.to_vec(), prompt[1..].to_vec()];
        for step in 0..24 {
            let rows = (0..2).map(|which| {
                let known = tokens[which].len();
                let new = if step == 0 { 0 } else { known - 1 };
                let sampling = Sampling {
                    rules: (which == 0 && step == 0).then(|| Box::new(rules.clone())),
                    ..Sampling::default()
                };
                sequences[which].row(&tokens[which][new..], &[], Some(sampling))
            });
            let rows = rows.collect();
            let result = ranks.step(rows, Vec::new());
            for (tokens, row) in tokens.iter_mut().zip(result.rows) {
                tokens.extend(row.tokens.into_iter().map(|token| token.token));
            }
        }
        tokens
    };
    let plain = decoded(On::Cpu, LogitRules::default());
    let rules = LogitRules {
        repetition_penalty: 1.5,
        presence_penalty: 0.5,
        frequency_penalty: 0.5,
        logit_bias: vec![(plain[0][prompt.len()], -100.0)],
        min_tokens: 4,
        stop_tokens: vec![plain[0][prompt.len() + 1]],
        prompt_tokens: prompt.len(),
        ..LogitRules::default()
    };
    let expected = decoded(On::Cpu, rules.clone());
    assert!(expected[0] != plain[0] && expected[1] == plain[1]);
    assert_eq!(decoded(On::Card(arch), rules), expected);
}

/// Two sequences: one is guessed, rightly and wrongly, the other sampled under masks. The first says what it
/// says token by token, on a card as on a CPU; the second only what it may.
fn guesses_and_masks(arch: Option<Arch>) {
    let folders = folders();
    let folder = folders
        .iter()
        .find(|folder| folder.ends_with("qwen3_4bit_v2_asym"));
    let folder = folder.expect("the checkpoint is in the repository");
    let prompt = &golden(folder)[0].tokens[..8];
    let load = |on| {
        let setup = Setup {
            on,
            ..Setup::world(1)
        };
        Ranks::load(folder, 64, &setup)
    };
    let plainly = |on| {
        let mut ranks = load(on);
        let mut sequence = ranks.sequence(64);
        let mut tokens = prompt.to_vec();
        let mut new = 0;
        for _ in 0..12 {
            let row = sequence.row(&tokens[new..], &[], greedy(None));
            new = tokens.len();
            let result = ranks.step(vec![row], Vec::new());
            tokens.push(result.rows[0].tokens[0].token);
        }
        tokens
    };
    let expected = plainly(On::Cpu);
    for on in [On::Cpu, On::Card(arch)] {
        let mut ranks = load(on);
        let vocab_size = ranks.plan.vocab[0].end;
        let mut sequences = [ranks.sequence(64), ranks.sequence(64)];
        let first = sequences.each_mut();
        let first = first.map(|sequence| sequence.row(prompt, &[], greedy(None)));
        let result = ranks.step(first.into(), Vec::new());
        let mut tokens = [prompt.to_vec(), prompt.to_vec()];
        for (tokens, row) in tokens.iter_mut().zip(result.rows) {
            tokens.push(row.tokens[0].token);
        }
        // With the other sequence they fill the step's four places.
        for right in [2, 0, 1] {
            let known = tokens[0].len();
            let mut row = expected[known - 1..known + 2].to_vec();
            if let Some(wrong) = row.get_mut(right + 1) {
                *wrong = (*wrong + 1) % vocab_size as u32;
            }
            let guessing = sequences[0].guessing(&row, right);
            let allowed = [5, 7 + right as u32];
            let mut masked = sequences[1].row(&tokens[1][tokens[1].len() - 1..], &[], greedy(None));
            masked.mask = Some(TokenSet::from_tokens(allowed, vocab_size));
            let result = ranks.step(vec![guessing, masked], Vec::new());
            let drawn = result.rows[0].tokens.iter().map(|token| token.token);
            tokens[0].extend(drawn);
            assert_eq!(tokens[0].len(), known + right + 1);
            assert_eq!(tokens[0], expected[..tokens[0].len()]);
            let only = result.rows[1].tokens[0].token;
            assert!(allowed.contains(&only), "{only} is none of {allowed:?}");
            tokens[1].push(only);
        }
    }
}

/// In how many parts each of two ranks works on a prompt, the first step after load: sums that layer 0 waits for.
fn parts(folder: &Path, plan: &ShardPlan, arch: Option<Arch>, tokens: usize) -> Vec<usize> {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let nccl = Arc::new(Nccl::open(None).unwrap());
    let threads: Vec<_> = local::meshes(2, ranks::DEADLINE)
        .into_iter()
        .enumerate()
        .map(|(rank, mesh)| {
            let (checkpoint, plan, nccl) = (checkpoint.clone(), plan.clone(), nccl.clone());
            std::thread::spawn(move || {
                let card = ranks::card(rank, arch);
                let backend = CudaBackend::new(card, None, None, Some(nccl)).unwrap();
                let load = |backend: &mut CudaBackend| {
                    loader::load(backend, &checkpoint, &plan, rank, |_, _| true)
                };
                let shape = checkpoint.shape().unwrap();
                let rank = BenchRank::new(backend, &shape, &plan, load, Box::new(mesh), true);
                let profiled = rank.unwrap().profile(|rank| rank.prompt(1, tokens));
                let sum = Mark {
                    layer: Some(0),
                    part: Part::AttentionSum,
                };
                let spans = profiled.unwrap().spans;
                spans.iter().filter(|span| span.mark == sum).count()
            })
        })
        .collect();
    let parts = threads.into_iter().map(|thread| thread.join().unwrap());
    parts.collect()
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
                .flat_map(|row| row.tokens.into_iter().map(|token| token.top)),
        );
        at = end;
    }
    all
}

fn half_cache(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            kv_dtype: KvDType::F16,
            ..Setup::world(1)
        },
        HALF_CACHE,
    );
}

fn int8_cache(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            kv_dtype: KvDType::Int8,
            ..Setup::world(1)
        },
        INT8_CACHE,
    );
}

fn int8_head(arch: Option<Arch>) {
    near(
        &Setup {
            on: On::Card(arch),
            lm_head: LmHead::Int8,
            ..Setup::world(1)
        },
        INT8_HEAD,
    );
}
