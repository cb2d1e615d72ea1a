//! What the embedded model knows, asked through whole clusters at worlds 1, 2 and 3.

use secondwind_model::plan::KvDType;
use tokio::task::JoinSet;

use crate::harness::{Cluster, Setup, answer, chat};

/// Questions in flight at once.
const STREAMS: usize = 16;

/// Asks every question; returns what was answered, in their order.
async fn ask(cluster: &Cluster, questions: &[String]) -> Vec<String> {
    let client = cluster.client().await;
    let mut asking = JoinSet::new();
    let mut answers = vec![String::new(); questions.len()];
    let mut next = 0;
    while next < questions.len() || !asking.is_empty() {
        if next < questions.len() && asking.len() < STREAMS {
            let (index, question, mut client) = (next, questions[next].clone(), client.clone());
            asking.spawn(async move {
                let (text, ..) = answer(&mut client, chat(&question, 64)).await.unwrap();
                (index, text)
            });
            next += 1;
        } else {
            let (index, text) = asking.join_next().await.unwrap().unwrap();
            answers[index] = text;
        }
    }
    answers
}

async fn examine(setup: Setup) {
    let world = setup.world;
    let eval: serde_json::Value =
        serde_json::from_str(include_str!("../../model/builtin/eval.json")).unwrap();
    let list = |name: &str, key: &str| -> Vec<String> {
        let of = |entry: &serde_json::Value| entry[key].as_str().unwrap().to_owned();
        eval[name].as_array().unwrap().iter().map(of).collect()
    };
    let cluster = Cluster::start(setup).await;
    let sums = ask(&cluster, &list("sums", "question")).await;
    let facts = ask(&cluster, &list("card_facts", "question")).await;
    cluster.stop().await;

    let right = sums
        .iter()
        .zip(list("sums", "answer"))
        .filter(|(got, right)| *got == right)
        .count();
    assert_eq!(sums.len(), 200);
    assert!(
        right * 100 >= sums.len() * 95,
        "{right} of {} sums at world {world}",
        sums.len()
    );
    for ((question, got), expected) in list("card_facts", "question")
        .iter()
        .zip(&facts)
        .zip(list("card_facts", "expected"))
    {
        assert!(
            got.contains(&expected),
            "world {world}, {question:?}: {got:?} lacks {expected:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn world_1_knows_sums_and_cards() {
    examine(Setup::builtin(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn world_2_knows_sums_and_cards() {
    examine(Setup::builtin(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn world_3_knows_sums_and_cards() {
    examine(Setup::builtin(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_int8_cache_knows_them_too() {
    examine(Setup {
        kv_dtype: KvDType::Int8,
        ..Setup::builtin(2)
    })
    .await;
}
