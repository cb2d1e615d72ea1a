//! The plan digest.

use super::planning::planned;
use super::shapes::{INT4, QWEN_0_5B, cards, settings, shape};
use crate::plan::{KvDType, Precision, ShardPlan, digest};

#[test]
fn digest_depends_on_everything() {
    let plan = planned(&shape(QWEN_0_5B, INT4), &settings(), &cards(&["p40", "t4"]));
    let known = digest(&plan, "abc", "0.1.0");
    assert_eq!(known.len(), 64);
    assert!(
        known
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
    );
    assert_eq!(known, digest(&plan.clone(), "abc", "0.1.0"));
    let changed = |change: &dyn Fn(&mut ShardPlan)| {
        let mut other = plan.clone();
        change(&mut other);
        digest(&other, "abc", "0.1.0")
    };
    let others = [
        digest(&plan, "abd", "0.1.0"),
        digest(&plan, "abc", "0.1.1"),
        // Lengths keep neighbouring strings apart.
        digest(&plan, "0abc", "0.1."),
        changed(&|plan| plan.kv_blocks += 1),
        changed(&|plan| plan.layers[23].ffn[0].end += 1),
        changed(&|plan| plan.layers[0].query_heads[1].start += 1),
        changed(&|plan| plan.vocab[0].end += 16),
        changed(&|plan| plan.layer_ranges[1].end -= 1),
        changed(&|plan| plan.settings.kv_dtype = KvDType::F32),
        changed(&|plan| plan.settings.kv_dtype = KvDType::Int8),
        changed(&|plan| plan.settings.precision = Precision::Fast),
        changed(&|plan| plan.settings.max_logit_rows += 1),
        changed(&|plan| plan.settings.forced_split = Some(vec![1.0, 1.0])),
        changed(&|plan| plan.ranks[0].memory.scratch += 1),
        changed(&|plan| plan.ranks[1].device.push('x')),
    ];
    for (index, other) in others.iter().enumerate() {
        assert_ne!(*other, known, "change {index}");
    }
}

#[test]
fn plan_survives_json() {
    let plan = planned(&shape(QWEN_0_5B, INT4), &settings(), &cards(&["p40", "t4"]));
    let text = serde_json::to_string(&plan).expect("plain data");
    let read: ShardPlan = serde_json::from_str(&text).expect("the same data");
    assert_eq!(digest(&read, "", ""), digest(&plan, "", ""));
}
