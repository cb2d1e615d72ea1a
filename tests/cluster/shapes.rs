//! Answers that must have a shape have it, on any number of ranks, alone and among others.

use std::sync::Arc;

use secondwind_proto::v1::{self, generate_request::Shape};
use serde_json::Value as Json;
use tokio::task::JoinSet;

use crate::harness::{Cluster, Setup, chat};

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "card": {"enum": ["P40", "T4"]},
        "gigabytes": {"type": "integer", "minimum": 1, "maximum": 99}
    },
    "required": ["card", "gigabytes"],
    "additionalProperties": false
}"#;

/// What is said, its tokens with the bits of their log-probabilities, and how it ends.
type Answer = (String, Vec<(u32, u32)>, v1::Finish);

async fn answer(cluster: &Cluster, request: v1::GenerateRequest) -> Answer {
    let mut client = cluster.client().await;
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), None);
    while let Some(response) = stream.message().await.unwrap() {
        text += &response.text;
        let logprobs = response.logprobs.iter();
        let logprobs = logprobs.map(|of| of.logprob.to_bits());
        tokens.extend(response.token_ids.into_iter().zip(logprobs));
        finish = finish.or(response.finish);
    }
    (text, tokens, finish.unwrap())
}

fn shaped(question: &str, seed: u64, shape: Shape) -> v1::GenerateRequest {
    v1::GenerateRequest {
        temperature: Some(if seed == 0 { 0.0 } else { 1.5 }),
        seed: Some(seed),
        logprobs: Some(3),
        shape: Some(shape),
        ..chat(question, 200)
    }
}

fn requests() -> Vec<v1::GenerateRequest> {
    let mut requests = Vec::new();
    for seed in 0..3 {
        let question = "What is a P40?";
        requests.push(shaped(question, seed, Shape::JsonSchema(SCHEMA.into())));
        requests.push(shaped(
            question,
            seed,
            Shape::Regex("[a-f]{3}-[0-9]{4}".into()),
        ));
        let choices = ["yes", "no", "perhaps"].map(str::to_owned).to_vec();
        requests.push(shaped(
            question,
            seed,
            Shape::Choice(v1::Choices { choices }),
        ));
        // Free ones beside them.
        requests.push(v1::GenerateRequest {
            shape: None,
            ..shaped("What is 345 + 278?", 0, Shape::JsonObject(true))
        });
    }
    requests
}

fn check(request: &v1::GenerateRequest, (text, _, finish): &Answer) {
    assert_eq!(finish.reason(), v1::FinishReason::Stop, "{text}");
    match request.shape.as_ref() {
        Some(Shape::JsonSchema(_)) => {
            let json: Json = serde_json::from_str(text).unwrap();
            assert!(
                ["P40", "T4"].contains(&json["card"].as_str().unwrap()),
                "{json}"
            );
            assert!(
                (1..=99).contains(&json["gigabytes"].as_i64().unwrap()),
                "{json}"
            );
        }
        Some(Shape::Regex(_)) => {
            let (letters, digits) = text.split_once('-').unwrap();
            assert!(letters.len() == 3 && letters.chars().all(|c| ('a'..='f').contains(&c)));
            assert!(digits.len() == 4 && digits.chars().all(|c| c.is_ascii_digit()));
            // Nothing can follow, so no end-of-sequence token was drawn, and none is told.
            assert_eq!(finish.stop, "");
        }
        Some(Shape::Choice(choices)) => assert!(choices.choices.contains(text), "{text}"),
        _ => assert_eq!(text, "345 + 278 = 623"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_their_shape_alone_and_among_others() {
    let mut worlds = Vec::new();
    for world in [1, 2] {
        let cluster = Arc::new(Cluster::start(Setup::builtin(world)).await);
        let mut alone = Vec::new();
        for request in requests() {
            let answer = answer(&cluster, request.clone()).await;
            check(&request, &answer);
            alone.push(answer);
        }
        let mut together = JoinSet::new();
        for (index, request) in requests().into_iter().enumerate() {
            let cluster = Arc::clone(&cluster);
            together.spawn(async move { (index, answer(&cluster, request).await) });
        }
        for (index, answer) in together.join_all().await {
            let (text, tokens, _) = &answer;
            assert_eq!((text, tokens), (&alone[index].0, &alone[index].1));
        }
        // What is told of a token is the model's own, whatever the mask left.
        let free = v1::GenerateRequest {
            shape: None,
            ..shaped("What is a P40?", 0, Shape::JsonObject(true))
        };
        let mut client = cluster.client().await;
        let mut tops = Vec::new();
        for request in [free, requests()[0].clone()] {
            let mut stream = client.generate(request).await.unwrap().into_inner();
            let top = loop {
                let response = stream.message().await.unwrap().unwrap();
                if let Some(first) = response.logprobs.first() {
                    let top = first.top.iter();
                    break top
                        .map(|of| (of.token_id, of.logprob.to_bits()))
                        .collect::<Vec<_>>();
                }
            };
            tops.push(top);
        }
        assert_eq!(tops[0], tops[1]);
        worlds.push(alone.into_iter().map(|(text, ..)| text).collect::<Vec<_>>());
        Arc::into_inner(cluster).unwrap().stop().await;
    }
    assert_eq!(worlds[0], worlds[1]);
}
