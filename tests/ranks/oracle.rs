//! Checkpoints written by GPTQModel with the oracle's answers, and runs that are held against them.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{Ranks, Setup, greedy};

/// Largest difference in natural log-probability.
pub const TOLERANCE: f32 = 2.0e-3;
/// Greedy tokens must agree wherever the oracle's best two are further apart than this.
pub const MARGIN: f32 = 1.0e-2;

/// One teacher-forced sequence of the oracle.
pub struct Golden {
    pub tokens: Vec<u32>,
    pub prompt: usize,
    /// (tokens, vocab): log-probabilities of the token after each.
    pub logprobs: Vec<Vec<f32>>,
}

pub fn folders() -> Vec<PathBuf> {
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

pub fn golden(folder: &Path) -> Vec<Golden> {
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
    pub fn best(&self, position: usize) -> (u32, f32) {
        let mut sorted: Vec<(u32, f32)> =
            (0..).zip(self.logprobs[position].iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        (sorted[0].0, sorted[0].1 - sorted[1].1)
    }
}

/// Context of a plan that holds every sequence.
pub fn context(goldens: &[Golden]) -> usize {
    goldens
        .iter()
        .map(|golden| golden.tokens.len())
        .max()
        .unwrap()
}

/// Log-probabilities of each following token, teacher-forced in chunks.
pub fn forced(ranks: &mut Ranks, golden: &Golden, chunk: usize) -> Vec<f32> {
    let mut sequence = ranks.sequence(golden.tokens.len());
    let mut logprobs = Vec::new();
    let mut at = 0;
    while at < golden.tokens.len() {
        let end = (at + chunk).min(golden.tokens.len());
        let targets = &golden.tokens[at + 1..(end + 1).min(golden.tokens.len())];
        let row = sequence.row(&golden.tokens[at..end], targets, None);
        let result = ranks.step(vec![row], Vec::new());
        logprobs.extend(
            result
                .rows
                .into_iter()
                .flat_map(|row| row.prompt_logprobs)
                .map(|of| of.logprob),
        );
        at = end;
    }
    logprobs
}

pub fn check_forced(name: &str, golden: &Golden, logprobs: &[f32]) {
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
pub type Step = (u32, Vec<(u32, f32)>);

pub fn generate(ranks: &mut Ranks, goldens: &[&Golden]) -> Vec<Vec<Step>> {
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
            let token = row.tokens.into_iter().next().unwrap();
            inputs[i] = vec![token.token];
            outputs[i].push((token.token, token.top));
        }
    }
}

pub fn check_generated(name: &str, golden: &Golden, output: &[Step]) {
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

/// How far log-probabilities may be from the oracle's: (mean of a checkpoint, single position).
pub type Tolerance = (f32, f32);

/// Of an f16 cache.
pub const HALF_CACHE: Tolerance = (2.0e-2, 2.0e-2);
/// Of an int8 cache. Set after measuring, not derived: means were 0.9e-2 to 3.0e-2, the largest of 1700
/// positions 1.4e-1. That is 10 to 30 times what an f16 cache does here, as it should be: rounding to
/// 1/127 of a row's largest number is some 30 times as coarse as rounding each number to 11 bits.
pub const INT8_CACHE: Tolerance = (4.0e-2, 2.0e-1);
/// Of an `lm_head` of 8 bits. Set after measuring, not derived: means were 0.9e-2 to 1.7e-2 on the
/// checkpoints with an unquantised head, the largest of 1700 positions 6.9e-2. These models' logits are
/// random, so rounding moves them more than a trained model's.
pub const INT8_HEAD: Tolerance = (2.0e-2, 1.0e-1);

/// Log-probabilities of every golden checkpoint's first text within `tolerance` of the oracle's.
pub fn near(setup: &Setup, tolerance: Tolerance) {
    let (most_mean, most) = tolerance;
    for folder in folders() {
        let goldens = golden(&folder);
        let golden = &goldens[0];
        let mut ranks = Ranks::load(&folder, context(&goldens), setup);
        let logprobs = forced(&mut ranks, golden, 5);
        let differences: Vec<f32> = logprobs
            .iter()
            .zip(&golden.logprobs)
            .zip(&golden.tokens[1..])
            .map(|((logprob, oracle), &target)| (logprob - oracle[target as usize]).abs())
            .collect();
        let name = format!("{} {setup:?}", folder.display());
        assert_eq!(differences.len(), golden.tokens.len() - 1, "{name}");
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let largest = differences.iter().copied().fold(0.0, f32::max);
        println!("{name}: mean {mean:.2e}, largest {largest:.2e}");
        for (position, difference) in differences.iter().enumerate() {
            // A NaN is within nothing.
            let within = *difference <= most;
            assert!(within, "{name}, position {position}: {difference}");
        }
        assert!(mean <= most_mean, "{name}: {mean} in the mean");
    }
}
