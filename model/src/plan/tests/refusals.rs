//! What is refused, and that it is named.

use super::shapes::{INT4, QWEN_0_5B, QWEN_7B, cards, settings, shape};
use crate::capabilities::{Capabilities, WeightKind};
use crate::config::RopeScaling;
use crate::plan::{ModelShape, PlanError, PlanSettings, ShardPlan, plan};

/// A change that makes an input unusable, and what the refusal must say.
type Case<T> = (&'static str, fn(&mut T));

fn refused(shape: &ModelShape, settings: &PlanSettings, workers: &[Capabilities]) -> String {
    let error = plan(shape, settings, workers).expect_err("refused");
    assert!(!matches!(error, PlanError::DoesNotFit(_)), "{error}");
    let text = error.to_string();
    assert!(
        !text.ends_with('.') && !text.starts_with(char::is_uppercase),
        "{text}"
    );
    text
}

#[test]
fn settings_are_named() {
    let shape = shape(QWEN_0_5B, INT4);
    let workers = cards(&["p40"]);
    let cases: [Case<PlanSettings>; 8] = [
        ("max_context_tokens = 0", |s| s.max_context_tokens = 0),
        ("max_sequences = 0", |s| s.max_sequences = 0),
        ("max_sequences = 18446744073709551615", |s| {
            s.max_sequences = usize::MAX
        }),
        ("max_step_tokens = 0", |s| s.max_step_tokens = 0),
        ("max_step_tokens = 9999999", |s| {
            s.max_step_tokens = 9_999_999
        }),
        ("max_logit_rows = 0", |s| s.max_logit_rows = 0),
        ("block_tokens = 0", |s| s.block_tokens = 0),
        ("max_context_tokens = 32769", |s| {
            s.max_context_tokens = 32_769
        }),
    ];
    for (part, change) in cases {
        let mut settings = settings();
        change(&mut settings);
        let text = refused(&shape, &settings, &workers);
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn scaled_positions_reach_farther() {
    let mut shape = shape(QWEN_0_5B, INT4);
    shape.config.rope.scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 32_768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0,
        truncate: true,
    };
    assert_eq!(shape.context_limit(), 131_072);
    let long = PlanSettings {
        max_context_tokens: 131_072,
        ..settings()
    };
    assert!(plan(&shape, &long, &cards(&["p40"])).is_ok());
}

#[test]
fn forced_splits_are_named() {
    let shape = shape(QWEN_0_5B, INT4);
    let workers = cards(&["p40", "p40"]);
    let cases: [(&[f64], &str); 6] = [
        (&[1.0], "1 shares for 2 workers"),
        (&[], "0 shares"),
        (&[1.0, 0.0], "0 is not a positive number"),
        (&[1.0, -1.0], "-1 is not"),
        (&[1.0, f64::NAN], "NaN is not"),
        (&[f64::MAX, f64::MAX], "too large"),
    ];
    for (split, part) in cases {
        let settings = PlanSettings {
            forced_split: Some(split.to_vec()),
            ..settings()
        };
        let text = refused(&shape, &settings, &workers);
        assert!(
            text.contains(part) && text.contains("forced_split"),
            "{part} is not in {text}"
        );
    }
}

#[test]
fn workers_are_named() {
    let shape = shape(QWEN_7B, INT4);
    assert_eq!(plan(&shape, &settings(), &[]), Err(PlanError::NoWorkers));
    let refusal = |change: fn(&mut Capabilities)| {
        let mut workers = cards(&["p40", "t4"]);
        change(&mut workers[1]);
        let text = refused(&shape, &settings(), &workers);
        assert!(text.contains("rank 1 (Tesla T4)"), "{text}");
        text
    };
    let text = refusal(|worker| {
        worker
            .linears
            .retain(|entry| entry.weights != WeightKind::Gptq { bits: 4 })
    });
    assert!(
        text.contains("4-bit gptq") && text.contains("model.layers.0.self_attn.q_proj"),
        "{text}"
    );
    let text = refusal(|worker| {
        worker
            .linears
            .retain(|entry| entry.weights != WeightKind::Dense16)
    });
    assert!(
        text.contains("16-bit float") && text.contains("lm_head"),
        "{text}"
    );
    assert!(
        refusal(|worker| worker.read_bytes_per_second = 0.0).contains("read_bytes_per_second = 0")
    );
    assert!(
        refusal(|worker| worker.op_latency_seconds = f64::NAN).contains("op_latency_seconds = NaN")
    );
    assert!(
        refusal(|worker| worker.all_reduce_latency_seconds = -1.0)
            .contains("all_reduce_latency_seconds = -1")
    );
    assert!(refusal(|worker| worker.linears[0].column_multiple = 0).contains("column_multiple"));
    assert!(refusal(|worker| worker.linears[0].max_rows = 0).contains("max_rows"));
    assert!(
        refusal(|worker| worker.linears[0].seconds_per_byte = f64::INFINITY)
            .contains("seconds_per_byte")
    );
    assert!(
        refusal(|worker| worker.linears[0].bytes_per_weight = -1.0).contains("bytes_per_weight")
    );
    assert!(
        refusal(|worker| worker.linears[1].row_multiple = 7)
            .contains("differs between row buckets")
    );
}

#[test]
fn contradictory_models_are_named() {
    let workers = cards(&["p40"]);
    let cases: [Case<ModelShape>; 6] = [
        ("model.layers.0.self_attn.q_proj", |shape| {
            shape.linears[0].n += 1
        }),
        ("vocab_size", |shape| shape.config.vocab_size = 0),
        ("layers", |shape| shape.config.layers.clear()),
        ("lm_head: missing", |shape| shape.linears.truncate(168)),
        ("model.layers.3.mlp.down_proj", |shape| {
            shape.linears[27].layer = Some(24)
        }),
        ("model.embed_tokens.weight", |shape| shape.plain.truncate(0)),
    ];
    for (part, change) in cases {
        let mut shape = shape(QWEN_0_5B, INT4);
        change(&mut shape);
        let text = refused(&shape, &settings(), &workers);
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn plans_from_the_wire_are_checked() {
    let shape = shape(QWEN_0_5B, INT4);
    let plan = plan(&shape, &settings(), &cards(&["p40", "t4"])).expect("fits");
    assert_eq!(plan.check(&shape), Ok(()));
    let cases: [Case<ShardPlan>; 8] = [
        ("vocab", |plan| plan.vocab[0].end += 1),
        ("vocab", |plan| plan.vocab.truncate(1)),
        ("query heads of layer 5", |plan| {
            plan.layers[5].query_heads.reverse()
        }),
        ("channels of layer 0", |plan| {
            plan.layers[0].ffn[1].end = usize::MAX
        }),
        ("layers", |plan| plan.layers.truncate(23)),
        ("layer_ranges", |plan| plan.layer_ranges[0].end -= 1),
        ("kv_blocks", |plan| plan.kv_blocks = 1),
        ("block_tokens", |plan| plan.settings.block_tokens = 0),
    ];
    for (part, change) in cases {
        let mut other = plan.clone();
        change(&mut other);
        let text = other.check(&shape).expect_err("illegal").to_string();
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let mut empty = plan;
    empty.ranks.clear();
    assert_eq!(empty.check(&shape), Err(PlanError::NoWorkers));
}
