use serde_json::{Map, Value, json};

use crate::config::{
    Architecture, AttentionKind, GenerationDefaults, LayerConfig, MlpKind, ModelConfig, RopeConfig,
    RopeScaling,
};

/// `config.json` of Qwen2.5-7B-Instruct-GPTQ-Int4, without its quantisation block.
fn older() -> Map<String, Value> {
    let value = json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 152064
    });
    value.as_object().unwrap().clone()
}

/// A small Qwen3 in the spelling of 2026.
fn newer() -> Map<String, Value> {
    let value = json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "dtype": "bfloat16",
        "eos_token_id": [7, 5], "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 2,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "sliding_window": null,
        "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936
    });
    value.as_object().unwrap().clone()
}

fn parse(map: &Map<String, Value>) -> Result<ModelConfig, String> {
    ModelConfig::parse(&Value::Object(map.clone()).to_string(), None)
        .map_err(|error| error.to_string())
}

/// `base` with `changes`; null removes a field.
fn changed(mut base: Map<String, Value>, changes: Value) -> Map<String, Value> {
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => base.remove(key),
            value => base.insert(key.clone(), value.clone()),
        };
    }
    base
}

#[test]
fn older_spelling() {
    let config = parse(&older()).unwrap();
    let layer = LayerConfig {
        attention: AttentionKind::Full {
            query_heads: 28,
            kv_heads: 4,
            head_dim: 128,
            qkv_bias: true,
            output_bias: false,
            qk_norm: false,
        },
        mlp: MlpKind::Dense {
            intermediate_size: 18944,
        },
    };
    let expected = ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: 3584,
        vocab_size: 152064,
        max_position_embeddings: 32768,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        rope: RopeConfig {
            theta: 1e6,
            scaling: RopeScaling::Default,
        },
        layers: vec![layer; 28],
        eos_token_ids: vec![151645],
        generation: GenerationDefaults::default(),
    };
    assert_eq!(config, expected);
}

#[test]
fn newer_spelling() {
    let config = parse(&newer()).unwrap();
    assert_eq!(config.architecture, Architecture::Qwen3);
    assert_eq!(
        config.rope,
        RopeConfig {
            theta: 1e6,
            scaling: RopeScaling::Default
        }
    );
    assert_eq!(config.eos_token_ids, [5, 7]);
    assert!(config.tie_word_embeddings);
    assert_eq!(
        config.layers[1].attention,
        AttentionKind::Full {
            query_heads: 16,
            kv_heads: 8,
            head_dim: 128,
            qkv_bias: false,
            output_bias: false,
            qk_norm: true
        }
    );
}

#[test]
fn generation_config_adds_ends_and_defaults() {
    let generation = json!({
        "eos_token_id": [151645, 151643], "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
        "typical_p": 0.9, "repetition_penalty": 1.05, "transformers_version": "5.23.0"
    });
    let text = Value::Object(older()).to_string();
    let config = ModelConfig::parse(&text, Some(&generation.to_string())).unwrap();
    assert_eq!(config.eos_token_ids, [151643, 151645]);
    assert_eq!(
        config.generation,
        GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.7),
            top_k: Some(20),
            top_p: Some(0.8),
            min_p: None,
            typical_p: Some(0.9),
            repetition_penalty: Some(1.05),
        }
    );
}

#[test]
fn head_width_and_biases() {
    let attention =
        |base, changes| match parse(&changed(base, changes)).unwrap().layers[0].attention {
            AttentionKind::Full {
                head_dim,
                qkv_bias,
                output_bias,
                ..
            } => (head_dim, qkv_bias, output_bias),
        };
    assert_eq!(
        attention(older(), json!({"head_dim": 64})),
        (64, true, false)
    );
    assert_eq!(
        attention(newer(), json!({"head_dim": null})),
        (128, false, false)
    );
    assert_eq!(
        attention(newer(), json!({"attention_bias": true})),
        (128, true, true)
    );
    let mut null_width = newer();
    null_width.insert("head_dim".to_owned(), Value::Null);
    assert_eq!(attention(null_width, json!({})), (64, false, false));
}

#[test]
fn refusals_name_the_field() {
    let cases = [
        (
            json!({"architectures": ["LlamaForCausalLM"]}),
            r#"architectures "LlamaForCausalLM" is not served; Qwen2ForCausalLM"#,
        ),
        (
            json!({"architectures": ["Qwen3MoeForCausalLM"]}),
            "Qwen3MoeForCausalLM",
        ),
        (
            json!({"architectures": []}),
            "architectures [] is not served",
        ),
        (
            json!({"architectures": null}),
            "field architectures is missing",
        ),
        (
            json!({"use_sliding_window": true}),
            "use_sliding_window true is not served",
        ),
        (
            json!({"hidden_act": "gelu"}),
            r#"hidden_act "gelu" is not served"#,
        ),
        (
            json!({"layer_types": ["full_attention"]}),
            "layer_types is \"a list of 1\", expected one entry for each of the 28",
        ),
        (
            json!({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}),
            r#"layer_types[1] "sliding_attention" is not served"#,
        ),
        (
            json!({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
            r#"layer_types[0] "linear_attention" is not served"#,
        ),
        (json!({"hidden_size": null}), "field hidden_size is missing"),
        (
            json!({"hidden_size": 0}),
            "hidden_size is 0, expected an integer from 1 to",
        ),
        (json!({"hidden_size": -1}), "hidden_size is -1"),
        (json!({"hidden_size": 4096.5}), "hidden_size is 4096.5"),
        (
            json!({"hidden_size": 18_446_744_073_709_551_615_u64}),
            "hidden_size is 18446744073709551615",
        ),
        (
            json!({"num_hidden_layers": 1_000_000_000_000_u64}),
            "num_hidden_layers is 1000000000000",
        ),
        (
            json!({"vocab_size": 4_294_967_296_u64}),
            "vocab_size is 4294967296",
        ),
        (
            json!({"intermediate_size": "18944"}),
            r#"intermediate_size is "18944""#,
        ),
        (
            json!({"num_attention_heads": 0}),
            "num_attention_heads is 0",
        ),
        (
            json!({"num_key_value_heads": 3}),
            "num_attention_heads 28 is not divisible by num_key_value_heads 3",
        ),
        (
            json!({"num_attention_heads": 24}),
            "hidden_size 3584 is not divisible by num_attention_heads 24",
        ),
        (
            json!({"head_dim": 127}),
            "head_dim is 127, expected an even number",
        ),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1.0"),
        (
            json!({"eos_token_id": "x"}),
            r#"eos_token_id is "x", expected a token id"#,
        ),
        (json!({"eos_token_id": [1, -2]}), "eos_token_id is [1,-2]"),
        (json!({"rope_theta": 0}), "rope_theta is 0"),
        (
            json!({"rope_scaling": {"type": "longrope"}}),
            r#"rope_scaling.type "longrope" is not served; default, linear, dynamic and yarn"#,
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            r#"rope_scaling.rope_type "llama3""#,
        ),
        (
            json!({"rope_scaling": {"type": "yarn"}}),
            "field rope_scaling.factor is missing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}),
            "rope_parameters is",
        ),
        (
            json!({"partial_rotary_factor": 0.25}),
            "partial_rotary_factor 0.25 is not served",
        ),
    ];
    for (changes, expected) in cases {
        let error = parse(&changed(older(), changes.clone())).expect_err(&changes.to_string());
        assert!(error.contains(expected), "{changes}: {error}");
    }
    let error = ModelConfig::parse("[1, 2]", None).unwrap_err().to_string();
    assert!(error.contains("config.json: not a JSON object"), "{error}");
    let text = Value::Object(older()).to_string();
    let error = ModelConfig::parse(&text, Some("{\"temperature\": -1}"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("generation_config.json: field temperature is -1"),
        "{error}"
    );
}
