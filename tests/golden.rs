//! Log-probabilities and greedy tokens of checkpoints written by GPTQModel, against a float32 forward
//! pass of transformers over the dequantised weights (`tests/golden/make.py`).

mod ranks;

use std::path::{Path, PathBuf};

use ranks::{Ranks, Setup, Via, greedy};
use safetensors::SafeTensors;
use secondwind_kernels::select::{AttentionPath, LinearPath};
use secondwind_model::plan::KvDType;

/// Largest difference in natural log-probability.
const TOLERANCE: f32 = 2.0e-3;
/// Greedy tokens must agree wherever the oracle's best two are further apart than this.
const MARGIN: f32 = 1.0e-2;

/// One teacher-forced sequence of the oracle.
struct Golden {
    tokens: Vec<u32>,
    prompt: usize,
    /// (tokens, vocab): log-probabilities of the token after each.
    logprobs: Vec<Vec<f32>>,
}

fn folders() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    let mut folders: Vec<PathBuf> = all
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(
        folders.len() >= 10,
        "only {} golden checkpoints",
        folders.len()
    );
    folders
}

fn golden(folder: &Path) -> Vec<Golden> {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ints = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().unwrap()) as u32)
            .collect()
    };
    ["", "_b"]
        .iter()
        .filter(|suffix| tensors.tensor(&format!("input_ids{suffix}")).is_ok())
        .map(|suffix| {
            // With dynamic rope a token's rotation depends on how far the sequence had come; the oracle
            // then also goes token by token, as any server does.
            let stepwise = tensors.tensor(&format!("logprobs_stepwise{suffix}"));
            let view = stepwise
                .or_else(|_| tensors.tensor(&format!("logprobs{suffix}")))
                .unwrap();
            let vocab = view.shape()[1];
            let flat: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            Golden {
                tokens: ints(&format!("input_ids{suffix}")),
                prompt: ints(&format!("prompt_len{suffix}"))[0] as usize,
                logprobs: flat.chunks(vocab).map(<[f32]>::to_vec).collect(),
            }
        })
        .collect()
}

impl Golden {
    /// The most likely token after a position, and how far it is ahead of the second.
    fn best(&self, position: usize) -> (u32, f32) {
        let mut sorted: Vec<(u32, f32)> =
            (0..).zip(self.logprobs[position].iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        (sorted[0].0, sorted[0].1 - sorted[1].1)
    }
}

/// Context of a plan that holds every sequence.
fn context(goldens: &[Golden]) -> usize {
    goldens
        .iter()
        .map(|golden| golden.tokens.len())
        .max()
        .unwrap()
}

/// Log-probabilities of each following token, teacher-forced in chunks.
fn forced(ranks: &mut Ranks, golden: &Golden, chunk: usize) -> Vec<f32> {
    let mut sequence = ranks.sequence(golden.tokens.len());
    let mut logprobs = Vec::new();
    let mut at = 0;
    while at < golden.tokens.len() {
        let end = (at + chunk).min(golden.tokens.len());
        let targets = &golden.tokens[at + 1..(end + 1).min(golden.tokens.len())];
        let row = sequence.row(&golden.tokens[at..end], targets, None);
        let result = ranks.step(vec![row], Vec::new());
        logprobs.extend(result.rows.into_iter().flat_map(|row| row.prompt_logprobs));
        at = end;
    }
    logprobs
}

fn check_forced(name: &str, golden: &Golden, logprobs: &[f32]) {
    assert_eq!(logprobs.len(), golden.tokens.len() - 1, "{name}");
    for (position, &logprob) in logprobs.iter().enumerate() {
        let expected = golden.logprobs[position][golden.tokens[position + 1] as usize];
        let difference = (logprob - expected).abs();
        // A NaN is not within any tolerance.
        assert!(
            difference <= TOLERANCE,
            "{name}, position {position}: {logprob} instead of {expected}"
        );
    }
}

/// Greedy continuation of several prompts in one batch: (token, its most likely ones) each.
type Step = (u32, Vec<(u32, f32)>);

fn generate(ranks: &mut Ranks, goldens: &[&Golden]) -> Vec<Vec<Step>> {
    let mut sequences: Vec<_> = goldens
        .iter()
        .map(|golden| ranks.sequence(golden.tokens.len()))
        .collect();
    let mut inputs: Vec<Vec<u32>> = goldens
        .iter()
        .map(|golden| golden.tokens[..golden.prompt].to_vec())
        .collect();
    let mut outputs: Vec<Vec<Step>> = goldens.iter().map(|_| Vec::new()).collect();
    loop {
        let running: Vec<usize> = (0..goldens.len())
            .filter(|&i| outputs[i].len() < goldens[i].tokens.len() - goldens[i].prompt)
            .collect();
        if running.is_empty() {
            return outputs;
        }
        let rows = running
            .iter()
            .map(|&i| sequences[i].row(&inputs[i], &[], greedy(Some(8))))
            .collect();
        let result = ranks.step(rows, Vec::new());
        assert_eq!(result.rows.len(), running.len());
        for (row, &i) in result.rows.into_iter().zip(&running) {
            let token = row.token.unwrap();
            inputs[i] = vec![token.token];
            outputs[i].push((token.token, token.top));
        }
    }
}

fn check_generated(name: &str, golden: &Golden, output: &[Step]) {
    for (index, (token, top)) in output.iter().enumerate() {
        let position = golden.prompt + index - 1;
        for &(id, logprob) in top {
            let expected = golden.logprobs[position][id as usize];
            assert!(
                (logprob - expected).abs() <= TOLERANCE,
                "{name}, position {position}, token {id}: {logprob} instead of {expected}"
            );
        }
        let (best, margin) = golden.best(position);
        assert!(
            *token == best || margin <= MARGIN,
            "{name}, position {position}: token {token} instead of {best}, margin {margin}"
        );
        if *token != golden.tokens[position + 1] {
            // From here on the oracle speaks of another sequence.
            return;
        }
    }
}

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
    let paths = LinearPath::ALL.into_iter().zip(AttentionPath::ALL);
    for (linear, attention) in paths.filter(|(linear, _)| linear.isa().is_available()) {
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
    let folder = &folders()[0];
    let goldens = golden(folder);
    let setup = Setup {
        kv_dtype: KvDType::F16,
        ..Setup::world(2)
    };
    let mut ranks = Ranks::load(folder, context(&goldens), &setup);
    let logprobs = forced(&mut ranks, &goldens[0], 16);
    for (position, &logprob) in logprobs.iter().enumerate() {
        let expected = goldens[0].logprobs[position][goldens[0].tokens[position + 1] as usize];
        assert!(
            (logprob - expected).abs() <= 2.0e-2,
            "position {position}: {logprob}, {expected}"
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
