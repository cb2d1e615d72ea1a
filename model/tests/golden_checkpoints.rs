//! Opens every checkpoint that the golden script wrote with the real GPTQModel, and compares what is read
//! with what the script wrote down about it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use secondwind_model::checkpoint::Checkpoint;
use secondwind_model::gptq::{unpack_zeros, words};
use secondwind_model::modules::WeightFormat;
use serde_json::Value;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoints");
    let entries = fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(
        folders.len() >= 10,
        "{} holds only {}",
        root.display(),
        folders.len()
    );
    folders
}

#[test]
fn all_are_read_as_the_script_describes_them() {
    for folder in folders() {
        let name = folder.display();
        let golden = fs::read_to_string(folder.join("golden.json"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let golden: Value = serde_json::from_str(&golden).unwrap();
        let checkpoint =
            Checkpoint::open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        checkpoint
            .verify()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(checkpoint.warnings(), [""; 0], "{name}");

        let mut bits: BTreeMap<String, u64> = BTreeMap::new();
        let (mut lowest, mut highest, mut unordered) = (u8::MAX, 0, 0);
        for module in checkpoint.linears() {
            let weights = checkpoint
                .dequantise(module)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(weights.len(), module.k * module.n, "{name} {}", module.name);
            assert!(
                weights.iter().all(|weight| weight.is_finite()),
                "{name} {}",
                module.name
            );
            let WeightFormat::Gptq(format) = &module.format else {
                continue;
            };
            *bits.entry(format.bits.to_string()).or_default() += 1;
            let qzeros = checkpoint
                .tensor(&format!("{}.qzeros", module.name))
                .unwrap();
            let qzeros = words(&checkpoint.read(qzeros).unwrap());
            let zeros = unpack_zeros(&module.name, format, module.n, &qzeros, 0..module.n).unwrap();
            lowest = lowest.min(zeros.iter().copied().min().unwrap());
            highest = highest.max(zeros.iter().copied().max().unwrap());
            unordered += u64::from(
                !checkpoint
                    .group_indices(module, format)
                    .unwrap()
                    .is_sorted(),
            );
        }
        assert_eq!(
            golden["bits_of_modules"],
            serde_json::to_value(&bits).unwrap(),
            "{name}"
        );
        assert_eq!(
            golden["zero_points_lowest_highest"],
            serde_json::json!([lowest, highest]),
            "{name}"
        );
        assert_eq!(golden["modules_with_unordered_g_idx"], unordered, "{name}");
    }
}
