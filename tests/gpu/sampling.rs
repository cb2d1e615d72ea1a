//! What changes what is sampled, on a card as on a CPU.

use std::path::PathBuf;

use secondwind_kernels::cuda::Arch;
use secondwind_model::step::{LogitRules, Sampling, TokenSet};

use crate::ranks::{
    On, Ranks, Setup, greedy,
    oracle::{folders, golden},
};

/// A small checkpoint, and the beginning of a text.
fn checkpoint() -> (PathBuf, Vec<u32>) {
    let mut folders = folders().into_iter();
    let folder = folders.find(|folder| folder.ends_with("qwen3_4bit_v2_asym"));
    let folder = folder.expect("the checkpoint is in the repository");
    let prompt = golden(&folder)[0].tokens[..8].to_vec();
    (folder, prompt)
}

/// Two sequences that decode together, one under rules: greedy tokens are those of a CPU, and are others than
/// without the rules.
pub fn rules(arch: Option<Arch>) {
    let (folder, prompt) = checkpoint();
    let decoded = |on, rules: LogitRules| {
        let setup = Setup {
            on,
            ..Setup::world(1)
        };
        let mut ranks = Ranks::load(&folder, 64, &setup);
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
pub fn guesses_and_masks(arch: Option<Arch>) {
    let (folder, prompt) = checkpoint();
    let load = |on| {
        let setup = Setup {
            on,
            ..Setup::world(1)
        };
        Ranks::load(&folder, 64, &setup)
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
        let first = first.map(|sequence| sequence.row(&prompt, &[], greedy(None)));
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
