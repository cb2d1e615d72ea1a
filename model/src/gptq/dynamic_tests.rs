use serde_json::{Value, json};

use super::*;

fn parse(dynamic: Value) -> Result<Dynamic, String> {
    let block = json!({"dynamic": dynamic});
    Dynamic::parse(&Fields::new("config.json", block.as_object().unwrap()))
        .map_err(|error| error.to_string())
}

const MODULE: &str = "model.layers.12.mlp.down_proj";

#[test]
fn anchored_at_the_start_only() {
    let decide = |pattern: &str| parse(json!({pattern: {"bits": 8}})).unwrap().decide(MODULE);
    let own = Decision::Overridden(Override {
        bits: Some(8),
        ..Override::default()
    });
    assert_eq!(decide("model"), own);
    assert_eq!(decide(r".*\.down_proj"), own);
    assert_eq!(decide(r"+:.*\.(?:1[0-9]|2[0-9])\..*"), own);
    assert_eq!(decide(r"^model\.layers\.12\.mlp\.down_proj$"), own);
    assert_eq!(decide(r"^model\.layers\.12\.mlp\.down$"), Decision::Base);
    assert_eq!(decide("mlp|model"), own);
    assert_eq!(decide(r"layers\.12"), Decision::Base);
    assert_eq!(decide("x|mlp"), Decision::Base);
}

#[test]
fn exclusions_first_then_file_order() {
    let dynamic = parse(json!({
        ".*down.*": {"bits": 8, "group_size": 32},
        ".*": {"bits": 2},
        "-:.*mlp.*": {},
    }))
    .unwrap();
    assert_eq!(dynamic.decide(MODULE), Decision::Excluded);
    let dynamic =
        parse(json!({".*down.*": {"bits": 8, "group_size": 32}, ".*": {"bits": 2}})).unwrap();
    let own = Override {
        bits: Some(8),
        group_size: Some(32),
        ..Override::default()
    };
    assert_eq!(dynamic.decide(MODULE), Decision::Overridden(own));
}

#[test]
fn empty_override_and_calibration_keys_change_nothing() {
    let dynamic = parse(json!({"lm_head": {}, ".*": {"damp_percent": 0.1, "mse": 2.4}})).unwrap();
    assert_eq!(
        dynamic.decide("lm_head"),
        Decision::Overridden(Override::default())
    );
    assert_eq!(
        dynamic.decide(MODULE),
        Decision::Overridden(Override::default())
    );
    assert_eq!(dynamic.unmatched([MODULE].into_iter()), ["lm_head"]);
}

#[test]
fn refusals() {
    let cases = [
        (json!({"(": {}}), r#"dynamic pattern "(" cannot be read"#),
        (json!({r"-:(?!model).*": {}}), "look-around"),
        (json!({"!:mlp": {}}), "unknown prefix"),
        (
            json!({"mlp": {"bitz": 4}}),
            "dynamic.mlp.bitz 4 is not served; bits, group_size, sym and desc_act",
        ),
        (json!({"mlp": {"format": "marlin"}}), "dynamic.mlp.format"),
        (json!({"mlp": {"bits": "4"}}), r#"dynamic.mlp.bits is "4""#),
        (json!({"mlp": {"sym": 1}}), "dynamic.mlp.sym is 1"),
        (json!({"mlp": 4}), "dynamic.mlp is 4, expected an object"),
        (json!(["mlp"]), "dynamic is [\"mlp\"], expected an object"),
    ];
    for (dynamic, expected) in cases {
        let error = parse(dynamic.clone()).expect_err(&dynamic.to_string());
        assert!(error.contains(expected), "{dynamic}: {error}");
    }
}
