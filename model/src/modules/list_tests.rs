use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::Architecture;
use crate::modules::{Axis, PlainRole, Split, ZeroPoints};
use crate::synthetic::{SyntheticModel, SyntheticQuant};

fn open(model: &SyntheticModel) -> Checkpoint {
    let folder = TempDir::new().unwrap();
    model.write(folder.path()).unwrap();
    Checkpoint::open(folder.path()).unwrap()
}

fn tiny() -> SyntheticModel {
    SyntheticModel::tiny(Architecture::Qwen2, 1)
}

/// The error after `change` of the tensor map.
fn broken(model: &SyntheticModel, change: impl FnOnce(&mut TensorMap)) -> String {
    let checkpoint = open(model);
    let mut tensors = checkpoint.tensors().clone();
    change(&mut tensors);
    modules(checkpoint.config(), checkpoint.quant(), &tensors)
        .unwrap_err()
        .to_string()
}

fn add(tensors: &mut TensorMap, name: &str, dtype: StoredType, shape: &[usize]) {
    let info = TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        file: 0,
        offset: 0,
        bytes: 0,
    };
    tensors.insert(name.to_owned(), info);
}

#[test]
fn lists_what_a_qwen2_has() {
    let checkpoint = open(&tiny());
    let names: Vec<_> = checkpoint.linears()[7..]
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj",
            "model.layers.1.self_attn.v_proj",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.gate_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        ]
    );
    let key = &checkpoint.linears()[8];
    assert_eq!(
        (key.layer, key.role, key.k, key.n, key.bias),
        (Some(1), LinearRole::Key, 64, 32, true)
    );
    assert_eq!(
        (key.split, key.axis, key.unit),
        (Split::Column, Axis::KvHeads, 16)
    );
    let format = GptqFormat {
        bits: 4,
        group_size: Some(32),
        sym: true,
        desc_act: false,
        zeros: ZeroPoints::MinusOne,
    };
    assert_eq!(key.format, WeightFormat::Gptq(format));
    let down = &checkpoint.linears()[13];
    assert_eq!(
        (down.k, down.n, down.bias, down.split, down.axis),
        (160, 64, false, Split::Row, Axis::Ffn)
    );
    assert_eq!(
        checkpoint.linears()[14].format,
        WeightFormat::Dense(DType::F16)
    );
    assert_eq!(checkpoint.plain_tensors().len(), 2 * 2 + 2);
    assert_eq!(checkpoint.warnings(), [""; 0]);
}

#[test]
fn qwen3_norms_and_biases() {
    let model = SyntheticModel {
        attention_bias: true,
        ..SyntheticModel::tiny(Architecture::Qwen3, 1)
    };
    let checkpoint = open(&model);
    let biased: Vec<bool> = checkpoint
        .linears()
        .iter()
        .map(|module| module.bias)
        .collect();
    let layer = [true, true, true, true, false, false, false];
    assert_eq!(biased, [&layer[..], &layer, &[false]].concat());
    let roles: Vec<_> = checkpoint
        .plain_tensors()
        .iter()
        .map(|tensor| tensor.role)
        .collect();
    use PlainRole::{Embedding, FinalNorm, InputNorm, KeyNorm, PostAttentionNorm, QueryNorm};
    let layer = [InputNorm, QueryNorm, KeyNorm, PostAttentionNorm];
    assert_eq!(
        roles,
        [&[Embedding][..], &layer, &layer, &[FinalNorm]].concat()
    );
}

#[test]
fn dynamic_decides_by_module() {
    let quant = SyntheticQuant {
        group_size: Some(32),
        dynamic: Some(
            json!({"-:.*o_proj": {}, ".*down.*": {"bits": 8, "group_size": -1, "sym": false}}),
        ),
        lm_head: true,
        ..SyntheticQuant::default()
    };
    let checkpoint = open(&SyntheticModel {
        quant: Some(quant),
        ..tiny()
    });
    let format = |at: usize| &checkpoint.linears()[at].format;
    assert_eq!(format(3), &WeightFormat::Dense(DType::F16));
    let WeightFormat::Gptq(down) = format(6) else {
        panic!()
    };
    assert_eq!((down.bits, down.group_size, down.sym), (8, None, false));
    assert!(matches!(format(14), WeightFormat::Gptq(head) if head.bits == 4));
}

#[test]
fn tied_head_is_the_embedding() {
    let checkpoint = open(&SyntheticModel {
        tie_word_embeddings: true,
        ..tiny()
    });
    let head = checkpoint.linears().last().unwrap();
    assert_eq!(
        (head.name.as_str(), head.k, head.n),
        ("model.embed_tokens", 64, 128)
    );
    assert_eq!(head.format, WeightFormat::Dense(DType::F16));
}

#[test]
fn refusals_name_the_tensor() {
    const UP: &str = "model.layers.0.mlp.up_proj";
    type Change = Box<dyn FnOnce(&mut TensorMap)>;
    let reshape = |name: &str, shape: &[usize]| -> Change {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Box::new(move |tensors| tensors.get_mut(&name).unwrap().shape = shape)
    };
    let retype = |name: &str, dtype| -> Change {
        let name = name.to_owned();
        Box::new(move |tensors| tensors.get_mut(&name).unwrap().dtype = dtype)
    };
    let remove = |name: &str| -> Change {
        let name = name.to_owned();
        Box::new(move |tensors| drop(tensors.remove(&name)))
    };
    let insert = |name: &str, dtype, shape: &[usize]| -> Change {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Box::new(move |tensors| add(tensors, &name, dtype, &shape))
    };
    let up = |suffix: &str| format!("{UP}.{suffix}");
    let cases: Vec<(Change, &str)> = vec![
        (
            remove("model.norm.weight"),
            "tensor model.norm.weight is missing",
        ),
        (
            remove(&up("qweight")),
            "tensor model.layers.0.mlp.up_proj.qweight is missing",
        ),
        (remove(&up("qzeros")), "up_proj.qzeros is missing"),
        (remove(&up("scales")), "up_proj.scales is missing"),
        (
            remove("model.layers.1.self_attn.q_proj.bias"),
            "q_proj.bias is missing",
        ),
        (remove("lm_head.weight"), "tensor lm_head.weight is missing"),
        (
            reshape(&up("qweight"), &[16, 160]),
            "shape [16, 160] holds 8-bit weights but the quantisation config says 4 bits",
        ),
        (
            reshape(&up("qweight"), &[8, 161]),
            "up_proj.qweight: shape is [8, 161], expected [8, 160]",
        ),
        (
            reshape(&up("qzeros"), &[2, 160]),
            "up_proj.qzeros: shape is [2, 160], expected [2, 20]",
        ),
        (
            reshape(&up("scales"), &[1, 160]),
            "up_proj.scales: shape is [1, 160], expected [2, 160]",
        ),
        (
            reshape(&up("g_idx"), &[65]),
            "up_proj.g_idx: shape is [65], expected [64]",
        ),
        (
            reshape("model.embed_tokens.weight", &[128, 65]),
            "model.embed_tokens.weight: shape is [128, 65]",
        ),
        (
            retype(&up("qweight"), StoredType::U8),
            "up_proj.qweight: element type is U8, expected I32",
        ),
        (
            retype(&up("scales"), StoredType::F64),
            "up_proj.scales: element type is F64, expected F16, BF16 or F32",
        ),
        (
            retype("model.norm.weight", StoredType::I8),
            "model.norm.weight: element type is I8",
        ),
        (
            insert(&up("weight"), StoredType::F16, &[160, 64]),
            "module model.layers.0.mlp.up_proj has both .weight and .qweight",
        ),
        (
            insert("model.embed_tokens.qweight", StoredType::I32, &[1]),
            "quantised embeddings are not served",
        ),
        (
            Box::new(move |tensors| {
                tensors.remove(&format!("{UP}.qweight"));
                add(
                    tensors,
                    &format!("{UP}.weight"),
                    StoredType::F16,
                    &[160, 64],
                );
            }),
            "module model.layers.0.mlp.up_proj is quantised according to the quantisation config",
        ),
    ];
    for (change, expected) in cases {
        let error = broken(&tiny(), change);
        assert!(error.contains(expected), "{error}\n{expected}");
    }
    let tied = SyntheticModel {
        tie_word_embeddings: true,
        ..tiny()
    };
    let error = broken(&tied, |tensors| {
        add(tensors, "lm_head.qweight", StoredType::I32, &[8, 128])
    });
    assert!(error.contains("tie_word_embeddings is true"), "{error}");
    let checkpoint = open(&tiny());
    let error = modules(checkpoint.config(), None, checkpoint.tensors())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("q_proj has model.layers.0.self_attn.q_proj.qweight but"),
        "{error}"
    );
}

#[test]
fn partial_words_are_refused() {
    let model = SyntheticModel {
        intermediate_size: 161,
        ..tiny()
    };
    let error = model
        .write(TempDir::new().unwrap().path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("gate_proj: output width 161 does not fill whole 32-bit words at 4 bits"),
        "{error}"
    );
}

#[test]
fn what_is_tolerated() {
    let checkpoint = open(&tiny());
    let mut tensors = checkpoint.tensors().clone();
    tensors.remove("model.layers.0.mlp.up_proj.g_idx");
    add(
        &mut tensors,
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        StoredType::F32,
        &[8],
    );
    add(
        &mut tensors,
        "model.layers.0.mlp.up_proj.bias",
        StoredType::F16,
        &[160],
    );
    add(&mut tensors, "mtp.fc.weight", StoredType::F16, &[1]);
    let list = modules(checkpoint.config(), checkpoint.quant(), &tensors).unwrap();
    assert_eq!(list.extra, ["mtp.fc.weight"]);
    assert_eq!(list.unused_biases, ["model.layers.0.mlp.up_proj.bias"]);
}
