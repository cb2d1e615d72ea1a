//! What the embedded model knows, asked through whole clusters at worlds 1, 2 and 3.

use secondwind_model::plan::KvDType;

use crate::{
    exam::{SUMS, examine},
    harness::Setup,
};

async fn knows(setup: Setup) {
    let world = setup.world;
    let examined = examine(setup).await;
    let right = examined.sums;
    assert!(
        right * 100 >= SUMS * 95,
        "{right} of {SUMS} sums at world {world}"
    );
    assert!(
        examined.wrong_facts.is_empty(),
        "world {world}: {:?}",
        examined.wrong_facts
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn world_1_knows_sums_and_cards() {
    knows(Setup::builtin(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn world_2_knows_sums_and_cards() {
    knows(Setup::builtin(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn world_3_knows_sums_and_cards() {
    knows(Setup::builtin(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_int8_cache_knows_them_too() {
    knows(Setup {
        kv_dtype: KvDType::Int8,
        ..Setup::builtin(2)
    })
    .await;
}
