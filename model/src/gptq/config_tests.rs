use serde_json::{Value, json};

use super::*;

const MODULE: &str = "model.layers.0.mlp.up_proj";

fn base() -> Value {
    json!({"bits": 4, "group_size": 128, "sym": true, "desc_act": false, "quant_method": "gptq"})
}

fn with(changes: Value) -> Value {
    let mut base = base();
    for (key, value) in changes.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

fn parse(inner: Option<Value>, own: Option<Value>) -> Result<Option<QuantConfig>, String> {
    let config = match inner {
        Some(block) => json!({"quantization_config": block}),
        None => json!({}),
    };
    let own = own.map(|block| block.to_string());
    QuantConfig::parse(&config.to_string(), own.as_deref()).map_err(|error| error.to_string())
}

fn format(block: Value) -> GptqFormat {
    parse(Some(block), None)
        .unwrap()
        .unwrap()
        .format_of(MODULE)
        .unwrap()
        .unwrap()
}

#[test]
fn either_place_or_both() {
    let expected = GptqFormat {
        bits: 4,
        group_size: Some(128),
        sym: true,
        desc_act: false,
        zeros: ZeroPoints::MinusOne,
    };
    assert_eq!(format(base()), expected);
    assert!(parse(None, None).unwrap().is_none());
    let own = parse(None, Some(base())).unwrap().unwrap();
    assert_eq!(own.format_of(MODULE).unwrap(), Some(expected));
    // Each place may leave out what the other says.
    let both = parse(
        Some(json!({"bits": 4, "quant_method": "gptq"})),
        Some(base()),
    )
    .unwrap()
    .unwrap();
    assert_eq!(both.format_of(MODULE).unwrap(), Some(expected));
    assert!(both.warnings().is_empty());
}

#[test]
fn disagreement_names_field_and_files() {
    for (field, value) in [
        ("bits", json!(8)),
        ("group_size", json!(-1)),
        ("sym", json!(false)),
        ("desc_act", json!(true)),
        ("lm_head", json!(true)),
        ("dynamic", json!({"-:.*": {}})),
        ("checkpoint_format", json!("gptq_v2")),
    ] {
        let one =
            with(json!({"lm_head": false, "dynamic": {".*": {}}, "checkpoint_format": "gptq"}));
        let mut two = one.clone();
        two[field] = value;
        let error = parse(Some(one), Some(two)).expect_err(field);
        let name = field.trim_start_matches("checkpoint_");
        assert!(error.starts_with(&format!("field {name} is ")), "{error}");
        assert!(
            error.contains("quantize_config.json") && error.contains("in config.json"),
            "{error}"
        );
    }
}

#[test]
fn spellings_of_method_and_format() {
    assert_eq!(
        format(with(json!({"checkpoint_format": "gptq_v2"}))).zeros,
        ZeroPoints::Exact
    );
    assert_eq!(
        format(with(json!({"format": "gptq_v2", "method": "gptq"}))).zeros,
        ZeroPoints::Exact
    );
    let auto_round =
        json!({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"});
    assert_eq!(format(with(auto_round)).zeros, ZeroPoints::MinusOne);
    let real = json!({
        "quant_method": "gptq", "method": "gptq", "checkpoint_format": "gptq", "format": "gptq",
        "lm_head": false, "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        "damp_percent": 0.1, "true_sequential": true
    });
    assert_eq!(format(with(real)).bits, 4);
}

#[test]
fn refusals_by_name() {
    let cases = [
        (
            json!({"quant_method": "awq"}),
            r#"quantization_config.quant_method "awq" is not served; gptq"#,
        ),
        (json!({"quant_method": "gguf"}), "gguf"),
        (json!({"quant_method": "fp8"}), "fp8"),
        (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (
            json!({"quant_method": "compressed-tensors"}),
            "compressed-tensors",
        ),
        (json!({"quant_method": "exl3"}), "exl3"),
        (
            json!({"checkpoint_format": "marlin"}),
            r#"checkpoint_format "marlin" is not served; gptq and gptq_v2 are read; re-export"#,
        ),
        (json!({"format": "bitblas"}), r#"format "bitblas""#),
        (json!({"format": "gptq_p"}), "gptq_p"),
        (json!({"format": "exllama"}), "exllama"),
        (json!({"is_marlin_format": true}), "is_marlin_format true"),
        (
            json!({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
            "auto_round:auto_awq",
        ),
        (json!({"quant_method": "auto-round"}), "packing_format"),
        (json!({"pack_dtype": "int16"}), r#"pack_dtype "int16""#),
        (json!({"rotation": "hadamard"}), "rotation"),
        (json!({"activation": {"format": "fp8"}}), "activation"),
        (
            json!({"format": "gptq", "checkpoint_format": "gptq_v2"}),
            "quantization_config.checkpoint_format is gptq_v2",
        ),
        (
            json!({"bits": null}),
            "field quantization_config.bits is missing",
        ),
        (json!({"bits": "four"}), r#"bits is "four""#),
        (json!({"group_size": null}), "group_size is missing"),
        (json!({"group_size": -2}), "group_size is -2"),
        (
            json!({"modules_to_not_convert": [1]}),
            "modules_to_not_convert is 1",
        ),
    ];
    for (changes, expected) in cases {
        let error = parse(Some(with(changes.clone())), None).expect_err(&changes.to_string());
        assert!(error.contains(expected), "{changes}: {error}");
    }
}

#[test]
fn unserved_values_name_the_module() {
    let error = |changes| {
        let config = parse(Some(with(changes)), None).unwrap().unwrap();
        config.format_of(MODULE).unwrap_err().to_string()
    };
    assert_eq!(
        error(json!({"bits": 5})),
        "module model.layers.0.mlp.up_proj: 5 bits are not served; 2, 3, 4 and 8 are"
    );
    assert_eq!(
        error(json!({"group_size": 256})),
        "module model.layers.0.mlp.up_proj: group size 256 is not served; 32, 64, 128 and -1 are"
    );
    assert!(error(json!({"dynamic": {".*up.*": {"bits": 6}}})).contains("6 bits"));
}

#[test]
fn which_modules_are_quantised() {
    let excluded = |changes: Value, module: &str| {
        parse(Some(with(changes)), None)
            .unwrap()
            .unwrap()
            .format_of(module)
            .unwrap()
            .is_none()
    };
    assert!(excluded(json!({"dynamic": {"-:.*up_proj": {}}}), MODULE));
    assert!(excluded(
        json!({"modules_to_not_convert": ["up_proj"]}),
        MODULE
    ));
    let only = json!({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]});
    assert!(excluded(only.clone(), MODULE));
    assert!(!excluded(only.clone(), "model.layers.7.mlp.down_proj"));
    assert!(!excluded(only, "lm_head"));
}

#[test]
fn missing_sym_is_assumed_aloud() {
    let mut block = base();
    block["sym"] = Value::Null;
    let config = parse(Some(block), None).unwrap().unwrap();
    assert!(
        config.warnings()[0].contains("sym is missing"),
        "{:?}",
        config.warnings()
    );
}
