// Reference values stand as torch prints them.
#![allow(clippy::excessive_precision)]

use serde_json::{Value, json};

use crate::config::{ModelConfig, RopeScaling};

/// A config with this rope block in either spelling.
fn config(
    spelling: &str,
    head_dim: usize,
    max_position_embeddings: usize,
    theta: f64,
    block: Value,
) -> ModelConfig {
    let mut config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 64,
        "max_position_embeddings": max_position_embeddings, "head_dim": head_dim
    });
    config[spelling] = block;
    if spelling == "rope_scaling" {
        config["rope_theta"] = json!(theta);
    } else {
        config[spelling]["rope_theta"] = json!(theta);
    }
    ModelConfig::parse(&config.to_string(), None).unwrap()
}

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (one, two) in found.iter().zip(expected) {
        // transformers takes the powers in f32, we in f64: a few units in the last place.
        assert!(((one - two) / two).abs() < 1e-6, "{found:?} {expected:?}");
    }
}

/// Expected values printed by `ROPE_INIT_FUNCTIONS` of transformers 5.23.
#[test]
fn as_transformers_computes() {
    let million = [
        1.0,
        0.177827939,
        0.0316227786,
        0.00562341325,
        0.00100000005,
        0.00017782794,
        3.16227743e-05,
        5.62341347e-06,
    ];
    let yarn = [
        1.0,
        0.177827939,
        0.0316227786,
        0.00421755994,
        0.000500000024,
        4.44569851e-05,
        7.90569356e-06,
        1.40585337e-06,
    ];
    // Block, head_dim, max_position_embeddings, theta, frequencies, attention factor.
    type Case<'a> = (Value, usize, usize, f64, &'a [f32], f32);
    let cases: [Case<'_>; 6] = [
        (
            json!({"rope_type": "linear", "factor": 4.0}),
            16,
            32768,
            1e6,
            &[
                0.25,
                0.0444569848,
                0.00790569466,
                0.00140585331,
                0.000250000012,
                4.44569851e-05,
                7.90569356e-06,
                1.40585337e-06,
            ],
            1.0,
        ),
        (json!({"type": "default"}), 16, 32768, 1e6, &million, 1.0),
        (
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
            16,
            131072,
            1e6,
            &yarn,
            1.138_629_4,
        ),
        (
            json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 8192}),
            16,
            32768,
            1e6,
            &yarn,
            1.138_629_4,
        ),
        (
            json!({
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.707,
                "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 2, "truncate": false
            }),
            16,
            32768,
            1e4,
            &[
                1.0,
                0.316227764,
                0.100000001,
                0.0122413188,
                0.00249999994,
                0.000790569466,
                0.000250000012,
                7.90569466e-05,
            ],
            0.964_326_9,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}),
            8,
            4096,
            1e4,
            &[1.0, 0.100000001, 0.00624999963, 0.000250000012],
            1.5,
        ),
    ];
    for (block, head_dim, positions, theta, expected, factor) in cases {
        for spelling in ["rope_scaling", "rope_parameters"] {
            let config = config(spelling, head_dim, positions, theta, block.clone());
            let (inv_freq, attention_factor) = config.rope.inv_freq(head_dim, positions);
            close(&inv_freq, expected);
            close(&[attention_factor], &[factor]);
        }
    }
}

#[test]
fn dynamic_follows_the_deployment() {
    let config = config(
        "rope_scaling",
        16,
        32768,
        1e6,
        json!({"type": "dynamic", "factor": 2.0}),
    );
    let expected = RopeScaling::Dynamic {
        factor: 2.0,
        original_max_position_embeddings: 32768,
    };
    assert_eq!(config.rope.scaling, expected);
    let within = [
        1.0,
        0.177827939,
        0.0316227786,
        0.00562341325,
        0.00100000005,
        0.00017782794,
        3.16227743e-05,
        5.62341347e-06,
    ];
    close(&config.rope.inv_freq(16, 1000).0, &within);
    close(&config.rope.inv_freq(16, 32768).0, &within);
    let beyond = [
        1.0,
        0.140888572,
        0.0198495928,
        0.00279658101,
        0.000394006289,
        5.55109873e-05,
        7.82086499e-06,
        1.10187045e-06,
    ];
    close(&config.rope.inv_freq(16, 100_000).0, &beyond);
}

#[test]
fn yarn_defaults() {
    let config = config(
        "rope_parameters",
        16,
        4096,
        1e4,
        json!({"rope_type": "yarn", "factor": 4.0}),
    );
    let RopeScaling::Yarn {
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = config.rope.scaling
    else {
        panic!("{:?}", config.rope)
    };
    assert_eq!(
        (
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate
        ),
        (4096, 32.0, 1.0, true)
    );
}
