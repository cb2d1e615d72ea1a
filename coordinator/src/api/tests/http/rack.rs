use std::sync::atomic::Ordering;

use serde_json::{Value as Json, json};

use super::{answer, get, says, serve};

#[tokio::test]
async fn how_things_stand_is_told_whether_a_group_serves_or_not() {
    let served = serve(says(answer("x"))).await;
    let reply = get(&served, "/rack").await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["content-type"], "application/json");
    assert_eq!(reply.headers["cache-control"], "no-store");
    let told = reply.json();
    assert_eq!(told["state"], "serving");
    assert_eq!(told["group"]["epoch"], 7);
    let model = json!({
        "id": "fixture",
        "architecture": "Qwen2ForCausalLM",
        "max_context_tokens": 64,
        "chat": true,
        "takes_enable_thinking": true,
    });
    assert_eq!(told["model"], model);
    served.engine.no_group.store(true, Ordering::Relaxed);
    let told = get(&served, "/rack").await.json();
    assert_eq!(told["state"], "gathering");
    assert_eq!(told["detail"], "1 of 2 workers are attached");
    assert_eq!(told["group"], Json::Null);
}
