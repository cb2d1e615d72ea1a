use tempfile::TempDir;

use super::*;
use crate::checkpoint::Checkpoint;
use crate::modules::WeightFormat;

#[test]
fn every_format_opens_and_dequantises_to_a_sane_spread() {
    for bits in [2, 3, 4, 8] {
        for (group_size, sym, desc_act, format) in [
            (Some(32), true, false, "gptq"),
            (Some(64), false, true, "gptq"),
            (Some(128), false, false, "gptq_v2"),
            (None, true, true, "gptq_v2"),
        ] {
            let quant = SyntheticQuant {
                bits,
                group_size,
                sym,
                desc_act,
                checkpoint_format: format.to_owned(),
                ..SyntheticQuant::default()
            };
            let model = SyntheticModel {
                quant: Some(quant),
                ..SyntheticModel::tiny(Architecture::Qwen3, 7)
            };
            let folder = TempDir::new().unwrap();
            model.write(folder.path()).unwrap();
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            checkpoint.verify().unwrap();
            assert!(
                checkpoint.warnings().is_empty(),
                "{:?}",
                checkpoint.warnings()
            );
            for module in &checkpoint.linears()[..7] {
                assert!(matches!(module.format, WeightFormat::Gptq(_)));
                let weights = checkpoint.dequantise(module).unwrap();
                let square: f32 = weights.iter().map(|weight| weight * weight).sum();
                let relative = (square / weights.len() as f32 * module.k as f32).sqrt();
                assert!((0.7..1.6).contains(&relative), "{} {relative}", module.name);
            }
        }
    }
}

#[test]
fn shards_hold_the_same_tensors() {
    let one = SyntheticModel::tiny(Architecture::Qwen2, 3);
    let many = SyntheticModel {
        shard_bytes: Some(20_000),
        ..one.clone()
    };
    let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    one.write(first.path()).unwrap();
    many.write(second.path()).unwrap();
    let (one, many) = (
        Checkpoint::open(first.path()).unwrap(),
        Checkpoint::open(second.path()).unwrap(),
    );
    assert!(many.weight_files().count() > 3);
    assert_eq!(one.tensors().len(), many.tensors().len());
    for (name, tensor) in one.tensors() {
        assert_eq!(
            one.read(tensor).unwrap(),
            many.read(many.tensor(name).unwrap()).unwrap(),
            "{name}"
        );
    }
    assert_ne!(one.digest(), many.digest());
}

#[test]
fn published_shapes_are_valid() {
    for size in ["0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"] {
        let model = SyntheticModel::qwen2_5(size).unwrap();
        let text = model.config_json();
        let config = ModelConfig::parse(&text, None).unwrap();
        let quant = QuantConfig::parse(&text, None).unwrap();
        assert!(write::tensors(&model, &config, quant.as_ref()).is_ok());
    }
    assert!(SyntheticModel::qwen2_5("8b").is_none());
}
