use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::config::Architecture;
use crate::modules::WeightFormat;
use crate::synthetic::{SyntheticModel, SyntheticQuant};

type Files = BTreeMap<String, Cow<'static, [u8]>>;

fn files(model: &SyntheticModel) -> Files {
    let folder = TempDir::new().unwrap();
    model.write(folder.path()).unwrap();
    let entries = fs::read_dir(folder.path()).unwrap().map(Result::unwrap);
    let read = |entry: fs::DirEntry| {
        (
            entry.file_name().into_string().unwrap(),
            Cow::Owned(fs::read(entry.path()).unwrap()),
        )
    };
    entries.map(read).collect()
}

fn tiny() -> SyntheticModel {
    SyntheticModel::tiny(Architecture::Qwen2, 1)
}

fn open(files: Files) -> Result<Checkpoint, String> {
    Checkpoint::from_memory("model", files).map_err(|error| error.to_string())
}

/// The error after `change` of the files of a tiny model in several shards.
fn broken(change: impl FnOnce(&mut Files)) -> String {
    let mut files = files(&SyntheticModel {
        shard_bytes: Some(20_000),
        ..tiny()
    });
    change(&mut files);
    open(files).expect_err("opened")
}

fn edit_json(files: &mut Files, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&files[name]).unwrap();
    change(&mut value);
    files.insert(name.to_owned(), Cow::Owned(value.to_string().into_bytes()));
}

fn overwrite(
    files: &mut Files,
    checkpoint: &Checkpoint,
    tensor: &str,
    offset: usize,
    bytes: &[u8],
) {
    let info = checkpoint.tensor(tensor).unwrap();
    let name = checkpoint.weight_files().nth(info.file).unwrap().to_owned();
    let at = info.offset as usize + offset;
    files.get_mut(&name).unwrap().to_mut()[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn memory_and_folder_are_alike() {
    let folder = TempDir::new().unwrap();
    tiny().write(folder.path()).unwrap();
    let one = Checkpoint::open(folder.path()).unwrap();
    let two = open(files(&tiny())).unwrap();
    assert_eq!(one.digest(), two.digest());
    assert_eq!(one.linears(), two.linears());
    for (name, tensor) in one.tensors() {
        assert_eq!(
            one.read(tensor).unwrap(),
            two.read(two.tensor(name).unwrap()).unwrap()
        );
    }
    assert_eq!(one.digest_hex().len(), 64);
    let named = Checkpoint::open_named(folder.path().to_str().unwrap()).unwrap();
    assert_eq!(named.name(), folder.path().display().to_string());
}

#[test]
fn parts_of_tensors() {
    let checkpoint = open(files(&tiny())).unwrap();
    let tensor = checkpoint.tensor("lm_head.weight").unwrap();
    let whole = checkpoint.read(tensor).unwrap();
    let mut part = [0; 6];
    checkpoint.read_at(tensor, 10, &mut part).unwrap();
    assert_eq!(part, whole[10..16]);
    let error = checkpoint
        .read_at(tensor, tensor.bytes - 5, &mut part)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tensor lm_head.weight: bytes 16379..16385 are outside its 16384"),
        "{error}"
    );
    assert!(checkpoint.read_at(tensor, u64::MAX, &mut part).is_err());
    // A tied head reads as the transposed embedding.
    let tied = open(files(&SyntheticModel {
        tie_word_embeddings: true,
        ..tiny()
    }))
    .unwrap();
    let weights = tied.dequantise(tied.linears().last().unwrap()).unwrap();
    let embedding = tied.floats("model.embed_tokens.weight").unwrap();
    assert_eq!(weights[3 * 128 + 5], embedding[5 * 64 + 3]);
}

#[test]
fn text_files() {
    let mut files = files(&tiny());
    files.insert("tokenizer.json".to_owned(), Cow::Borrowed(b"{}"));
    files.insert("merges.txt".to_owned(), Cow::Borrowed(b"\xff"));
    let error = open(files.clone()).unwrap_err();
    assert_eq!(error, "model/merges.txt: not UTF-8");
    files.remove("merges.txt");
    let checkpoint = open(files).unwrap();
    assert_eq!(
        checkpoint.text_file("tokenizer.json").unwrap().as_deref(),
        Some("{}")
    );
    assert_eq!(checkpoint.text_file("vocab.json").unwrap(), None);
    assert_eq!(checkpoint.text_file("../config.json").unwrap(), None);
}

#[test]
fn digest_covers_what_it_says() {
    let base = files(&tiny());
    let digest = |files: Files| open(files).unwrap().digest();
    let original = digest(base.clone());
    for (name, content) in [
        ("tokenizer.json", "{}"),
        ("chat_template.jinja", ""),
        ("quantize_config.json", r#"{"bits":4,"group_size":32}"#),
    ] {
        let mut changed = base.clone();
        changed.insert(name.to_owned(), Cow::Borrowed(content.as_bytes()));
        assert_ne!(digest(changed), original, "{name}");
    }
    let mut changed = base.clone();
    edit_json(&mut changed, "config.json", |config| {
        config["rms_norm_eps"] = json!(1e-5)
    });
    assert_ne!(digest(changed), original);
    let mut same = base.clone();
    edit_json(&mut same, "generation_config.json", |config| {
        config["temperature"] = json!(0.5)
    });
    assert_eq!(digest(same), original);
    let mut weights = base.clone();
    overwrite(
        &mut weights,
        &open(base).unwrap(),
        "model.norm.weight",
        0,
        &[0, 0],
    );
    assert_eq!(digest(weights), original);
}

#[test]
fn broken_files_are_refused() {
    const SHARD: &str = "model-00002-of-00005.safetensors";
    type Change = Box<dyn FnOnce(&mut Files)>;
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(|files| drop(files.remove("config.json"))),
            "model/ has no config.json; pass a checkpoint folder",
        ),
        (
            Box::new(|files| drop(files.remove(INDEX_FILE))),
            "has neither model.safetensors nor model.safetensors.index.json; rename model-00001-of-00005.safetensors",
        ),
        (
            Box::new(|files| drop(files.remove(SHARD))),
            "model-00002-of-00005.safetensors: tensor",
        ),
        (
            Box::new(|files| {
                edit_json(files, INDEX_FILE, |index| {
                    index["weight_map"]["x"] = json!("../../etc/passwd")
                })
            }),
            r#"tensor x is said to be in "../../etc/passwd", which is not a plain file name"#,
        ),
        (
            Box::new(|files| {
                edit_json(files, INDEX_FILE, |index| {
                    index["weight_map"]["x"] = json!("/etc/passwd")
                })
            }),
            "refused, for it may point outside the folder",
        ),
        (
            Box::new(|files| {
                edit_json(files, INDEX_FILE, |index| {
                    index["weight_map"]["x"] = json!(SHARD)
                })
            }),
            "tensor x is missing, although model.safetensors.index.json says it is there",
        ),
        (
            Box::new(|files| {
                edit_json(files, INDEX_FILE, |index| {
                    index["weight_map"]
                        .as_object_mut()
                        .unwrap()
                        .remove("model.norm.weight");
                })
            }),
            "tensor model.norm.weight is not listed for this file",
        ),
        (
            Box::new(|files| {
                drop(files.insert(
                    INDEX_FILE.to_owned(),
                    Cow::Borrowed(br#"{"weight_map":{"a":"b","a":"c"}}"#),
                ))
            }),
            "a stands there twice",
        ),
        (
            Box::new(|files| drop(files.insert(INDEX_FILE.to_owned(), Cow::Borrowed(b"{}")))),
            "missing field `weight_map`",
        ),
        (
            Box::new(|files| files.get_mut(SHARD).unwrap().to_mut().truncate(5)),
            "5 bytes long, too short",
        ),
        (
            Box::new(|files| files.get_mut(SHARD).unwrap().to_mut().truncate(50)),
            "truncated: the header needs",
        ),
        (
            Box::new(|files| {
                files.get_mut(SHARD).unwrap().to_mut().pop();
            }),
            "tensors end at byte",
        ),
        (
            Box::new(|files| files.get_mut(SHARD).unwrap().to_mut().push(0)),
            "tensors end at byte",
        ),
        (
            Box::new(|files| {
                files.get_mut(SHARD).unwrap().to_mut()[..8]
                    .copy_from_slice(&100_000_001_u64.to_le_bytes())
            }),
            "header of 100000001 bytes is over the limit of 100000000",
        ),
        (
            Box::new(|files| {
                edit_json(files, "config.json", |config| {
                    config["quantization_config"]["bits"] = json!(5)
                })
            }),
            "q_proj: 5 bits are not served",
        ),
        (
            Box::new(|files| {
                edit_json(files, "config.json", |config| {
                    config["quantization_config"]["bits"] = json!(8)
                })
            }),
            "holds 4-bit weights but the quantisation config says 8 bits",
        ),
        (
            Box::new(|files| {
                edit_json(files, "config.json", |config| {
                    config["hidden_size"] = json!(128)
                })
            }),
            "tensor model.embed_tokens.weight: shape is [128, 64], expected [128, 128]",
        ),
    ];
    for (change, expected) in cases {
        let error = broken(change);
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}

#[test]
fn names_that_are_no_folder() {
    let error = |name: &str| Checkpoint::open_named(name).unwrap_err().to_string();
    assert!(
        error("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4")
            .contains("`hf download Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4")
    );
    assert!(error("/no/such/folder").starts_with("no folder /no/such/folder; pass a folder"));
    assert!(error("./models/qwen").starts_with("no folder ./models/qwen; pass"));
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("model.gguf");
    fs::write(&file, "").unwrap();
    assert!(error(file.to_str().unwrap()).contains("is not a folder"));
    assert!(
        error(folder.path().to_str().unwrap())
            .contains("has no config.json; GGUF files are not read")
    );
    fs::create_dir(folder.path().join("snapshots")).unwrap();
    assert!(error(folder.path().to_str().unwrap()).contains("hub cache"));
    fs::create_dir(folder.path().join("config.json")).unwrap();
    assert!(error(folder.path().to_str().unwrap()).contains("config.json is not a regular file"));
}

#[test]
fn damaged_contents() {
    let base = files(&tiny());
    let intact = open(base.clone()).unwrap();
    intact.verify().unwrap();
    let damaged = |tensor: &str, bytes: &[u8]| {
        let mut files = base.clone();
        overwrite(&mut files, &intact, tensor, 4, bytes);
        open(files).unwrap().verify().unwrap_err().to_string()
    };
    let error = damaged("model.layers.1.mlp.down_proj.scales", &[0x00, 0x7c]);
    assert!(
        error.contains("down_proj.scales: scale of group 0, column 2 is inf"),
        "{error}"
    );
    let error = damaged("model.layers.1.mlp.down_proj.g_idx", &5_i32.to_le_bytes());
    assert!(
        error.contains("down_proj.g_idx: row 1 belongs to group 5, but there are 5 groups"),
        "{error}"
    );
    let error = damaged("model.layers.0.mlp.up_proj.g_idx", &(-1_i32).to_le_bytes());
    assert!(error.contains("row 1 belongs to group -1"), "{error}");
}

#[test]
fn odd_things_are_told() {
    let quant = SyntheticQuant {
        sym: false,
        group_size: Some(32),
        dynamic: Some(json!({"-:.*visual.*": {}})),
        ..SyntheticQuant::default()
    };
    let base = files(&SyntheticModel {
        quant: Some(quant),
        ..tiny()
    });
    let intact = open(base.clone()).unwrap();
    assert_eq!(
        intact.warnings(),
        ["1 dynamic pattern(s) match no module: -:.*visual.*"]
    );
    let mut v2_in_disguise = base;
    for module in intact.linears() {
        let WeightFormat::Gptq(format) = &module.format else {
            continue;
        };
        let row = vec![0x88; format.packed_words(module.n).unwrap() * 4];
        overwrite(
            &mut v2_in_disguise,
            &intact,
            &format!("{}.qzeros", module.name),
            0,
            &row,
        );
    }
    let warnings = open(v2_in_disguise).unwrap().warnings().join("\n");
    assert!(
        warnings.contains("14 asymmetric module(s) labelled gptq store 2^(bits-1)"),
        "{warnings}"
    );
}

#[test]
fn a_tied_head_that_is_stored_must_be_equal() {
    let base = files(&tiny());
    let untied = open(base.clone()).unwrap();
    let tie = |files: &mut Files| {
        edit_json(files, "config.json", |config| {
            config["tie_word_embeddings"] = json!(true)
        })
    };
    let mut different = base.clone();
    tie(&mut different);
    assert!(
        open(different)
            .unwrap_err()
            .contains("lm_head.weight differs from model.embed_tokens.weight")
    );
    let mut equal = base;
    tie(&mut equal);
    let embedding = untied
        .read(untied.tensor("model.embed_tokens.weight").unwrap())
        .unwrap();
    overwrite(&mut equal, &untied, "lm_head.weight", 0, &embedding);
    assert_eq!(
        open(equal).unwrap().linears().last().unwrap().name,
        "model.embed_tokens"
    );
}
