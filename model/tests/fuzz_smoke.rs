//! Runs the bodies of the fuzz targets over the committed seeds and seeded mutations of it.

use std::fs;
use std::path::Path;

use secondwind_model::config::Architecture;
use secondwind_model::fuzz;
use secondwind_model::synthetic::{SyntheticModel, SyntheticQuant};

const MUTATIONS: u64 = 600;

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/seeds")
        .join(target);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }

    /// One to four changes: a bit, a byte that JSON knows, a digit, a cut, a repetition.
    fn mutate(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(4) {
            // Headers and configs stand at the front.
            let reach = if self.below(2) == 0 {
                bytes.len().min(1600)
            } else {
                bytes.len()
            };
            let at = self.below(reach);
            let Some(byte) = bytes.get_mut(at) else {
                continue;
            };
            match self.below(5) {
                0 => *byte ^= 1 << self.below(8),
                1 => *byte = b"{}[],:\"-0e9.\\ntf"[self.below(16)],
                2 if byte.is_ascii_digit() => *byte = b'0' + self.below(10) as u8,
                2 => *byte = self.below(256) as u8,
                3 => bytes.truncate(at),
                _ => {
                    let part = bytes[at..(at + self.below(40)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        bytes
    }
}

fn smoke(target: &str, body: fn(&[u8])) {
    for (name, seed) in seeds(target) {
        body(&seed);
        let mut random = Random(0x5eed_0001);
        for round in 0..MUTATIONS {
            let input = random.mutate(&seed);
            let outcome = std::panic::catch_unwind(|| body(&input));
            assert!(
                outcome.is_ok(),
                "{target}: mutation {round} of {name} panics: {input:?}"
            );
        }
    }
}

#[test]
fn checkpoint_files() {
    smoke("checkpoint_files", fuzz::checkpoint_files);
}

#[test]
fn gptq_tensors() {
    smoke("gptq_tensors", fuzz::gptq_tensors);
}

/// The seeds of `checkpoint_files` must open, or its mutations would test the first check only.
#[test]
fn seeds_are_valid_and_current() {
    for (name, architecture, sym) in [
        ("qwen2", Architecture::Qwen2, true),
        ("qwen3_asym", Architecture::Qwen3, false),
    ] {
        let quant = SyntheticQuant {
            group_size: Some(32),
            sym,
            desc_act: !sym,
            ..SyntheticQuant::default()
        };
        let model = SyntheticModel {
            hidden_size: 32,
            intermediate_size: 64,
            layers: 1,
            query_heads: 2,
            kv_heads: 1,
            vocab_size: 16,
            quant: Some(quant),
            ..SyntheticModel::tiny(architecture, 11)
        };
        let folder = tempfile::TempDir::new().unwrap();
        model.write(folder.path()).unwrap();
        let config = fs::read(folder.path().join("config.json")).unwrap();
        let weights = fs::read(folder.path().join("model.safetensors")).unwrap();
        let input = [&(config.len() as u32).to_le_bytes()[..], &config, &weights].concat();
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../fuzz/seeds/checkpoint_files")
            .join(name);
        if std::env::var_os("SECONDWIND_WRITE_SEEDS").is_some() {
            fs::write(&path, &input).unwrap();
        }
        let hint = "run this test once with SECONDWIND_WRITE_SEEDS=1";
        assert!(
            fs::read(&path).is_ok_and(|found| found == input),
            "{}: {hint}",
            path.display()
        );
    }
}
