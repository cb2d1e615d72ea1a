//! What the embedded model is asked, and what it should say.

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

/// The questions' answers by a cluster.
pub struct Examined {
    /// Of [`SUMS`] sums, those that were right.
    pub sums: usize,
    /// (question, answer, what it should hold) of facts about cards that were wrong.
    pub wrong_facts: Vec<(String, String, String)>,
}

/// How many sums are asked for.
pub const SUMS: usize = 200;

/// Asks everything of a cluster of this kind.
pub async fn examine(setup: Setup) -> Examined {
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
    assert_eq!(sums.len(), SUMS);
    let right = list("sums", "answer");
    let asked = list("card_facts", "question").into_iter();
    let facts = asked.zip(facts).zip(list("card_facts", "expected"));
    Examined {
        sums: sums
            .iter()
            .zip(right)
            .filter(|(got, right)| *got == right)
            .count(),
        wrong_facts: facts
            .filter(|((_, got), expected)| !got.contains(expected))
            .map(|((question, got), expected)| (question, got, expected))
            .collect(),
    }
}
