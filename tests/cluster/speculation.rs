//! Guesses change how fast an answer comes, and nothing in it.

use std::sync::Arc;

use secondwind_model::plan::KvDType;
use secondwind_proto::v1::{self, generate_request::Prompt};
use tokio::task::JoinSet;

use crate::harness::{Cluster, Setup};

const OUTPUT_TOKENS: u32 = 64;

/// A prompt that says the same again and again, as the answer then does.
fn request(salt: u32, temperature: f32) -> v1::GenerateRequest {
    let ids = (0..60).map(|at| 40 + (at % 6) * 3 + salt);
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids: ids.collect() })),
        max_tokens: Some(OUTPUT_TOKENS),
        temperature: Some(temperature),
        seed: Some(7),
        logprobs: Some(2),
        ignore_eos: true,
        ..Default::default()
    }
}

/// Tokens with the bits of their log-probabilities.
async fn answer(cluster: &Cluster, request: v1::GenerateRequest) -> Vec<(u32, u32)> {
    let mut client = cluster.client().await;
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        let logprobs = response.logprobs.iter().map(|of| of.logprob.to_bits());
        tokens.extend(response.token_ids.into_iter().zip(logprobs));
    }
    assert_eq!(tokens.len(), OUTPUT_TOKENS as usize);
    tokens
}

/// Answers alone and then together, and how many guesses were right.
async fn serve(setup: Setup) -> (Vec<Vec<(u32, u32)>>, u64) {
    let cluster = Arc::new(Cluster::start(setup).await);
    let requests = || {
        let salts = (0..6).map(|salt| request(salt, if salt % 3 == 2 { 0.7 } else { 0.0 }));
        salts.collect::<Vec<_>>()
    };
    let mut answers = Vec::new();
    for request in requests() {
        answers.push(answer(&cluster, request).await);
    }
    let mut together = JoinSet::new();
    for (index, request) in requests().into_iter().enumerate() {
        let cluster = Arc::clone(&cluster);
        together.spawn(async move { (index, answer(&cluster, request).await) });
    }
    let mut together = together.join_all().await;
    together.sort_by_key(|(index, _)| *index);
    answers.extend(together.into_iter().map(|(_, answer)| answer));
    let right = cluster
        .metric("secondwind_spec_decode_num_accepted_tokens_total")
        .await;
    Arc::into_inner(cluster).unwrap().stop().await;
    (answers, right as u64)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_same_with_guesses_and_without() {
    for setup in [
        Setup::builtin(1),
        Setup {
            kv_dtype: KvDType::Int8,
            // Not by what was measured: where a row is cut is in its bits.
            split: Some(vec![2.0, 1.0]),
            ..Setup::builtin(2)
        },
    ] {
        let plain = Setup {
            max_drafts: 0,
            ..setup.clone()
        };
        let (with, right) = serve(setup).await;
        let (without, none) = serve(plain).await;
        assert_eq!(none, 0);
        assert!(right > 0, "no guess was right: nothing was tried");
        assert_eq!(with, without);
    }
}
