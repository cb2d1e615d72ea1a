//! Requests that begin alike share what was computed, and answer as if they did not.

use secondwind_model::plan::KvDType;
use secondwind_proto::v1::{self, generate_request::Prompt};
use tokio::task::JoinSet;

use crate::harness::{Cluster, Setup};

/// Tokens that all prompts share, not a whole number of blocks.
const SHARED_TOKENS: u32 = 100;
const OUTPUT_TOKENS: u32 = 24;
/// The coordinator's.
const BLOCK_TOKENS: u32 = 16;

fn prompt(salt: u32) -> Vec<u32> {
    let shared = (0..SHARED_TOKENS).map(|at| 5 + at * 7 % 200);
    let own = (0..7 + salt % 5).map(|at| 5 + (at * 11 + salt * 31) % 200);
    shared.chain(own).collect()
}

fn greedy(ids: Vec<u32>) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids })),
        max_tokens: Some(OUTPUT_TOKENS),
        temperature: Some(0.0),
        logprobs: Some(2),
        ignore_eos: true,
        ..Default::default()
    }
}

/// Tokens with the bits of their log-probabilities, and how many prompt tokens were cached.
async fn answer(cluster: &Cluster, request: v1::GenerateRequest) -> (Vec<(u32, u32)>, u32) {
    let mut client = cluster.client().await;
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let (mut tokens, mut cached) = (Vec::new(), None);
    while let Some(response) = stream.message().await.unwrap() {
        let logprobs = response.logprobs.iter().map(|logprob| logprob.logprob);
        tokens.extend(
            response
                .token_ids
                .into_iter()
                .zip(logprobs.map(f32::to_bits)),
        );
        if let Some(usage) = response.finish.and_then(|finish| finish.usage) {
            cached = Some(usage.cached_prompt_tokens);
        }
    }
    assert_eq!(tokens.len(), OUTPUT_TOKENS as usize);
    (tokens, cached.unwrap())
}

/// The answers of eight requests, one after the other, then all at once, then with their answers as part
/// of the prompt; and the cached tokens of each.
async fn serve(setup: Setup) -> (Vec<Vec<(u32, u32)>>, Vec<u32>) {
    let cluster = Cluster::start(setup).await;
    let mut all = Vec::new();
    for salt in 0..8 {
        all.push(answer(&cluster, greedy(prompt(salt))).await);
    }
    let cluster = std::sync::Arc::new(cluster);
    let mut together = JoinSet::new();
    for salt in 0..8 {
        // Half are new, half were asked before.
        let (cluster, salt) = (cluster.clone(), salt + 4);
        together.spawn(async move { (salt, answer(&cluster, greedy(prompt(salt))).await) });
    }
    let mut together = together.join_all().await;
    together.sort_by_key(|(salt, _)| *salt);
    all.extend(together.into_iter().map(|(_, answer)| answer));
    for salt in 0..2 {
        let said = all[salt as usize].0.iter().map(|(token, _)| *token);
        let next = prompt(salt).into_iter().chain(said).chain([9, 10, 11]);
        all.push(answer(&cluster, greedy(next.collect())).await);
    }
    std::sync::Arc::into_inner(cluster).unwrap().stop().await;
    all.into_iter().unzip()
}

async fn compare(setup: Setup) {
    let off = Setup {
        prefix_cache: false,
        ..setup.clone()
    };
    let ((with, cached), (without, none)) = (serve(setup).await, serve(off).await);
    assert_eq!(with, without);
    assert_eq!(none, [0; 18]);
    assert_eq!(cached[0], 0);
    let shared = SHARED_TOKENS / BLOCK_TOKENS * BLOCK_TOKENS;
    assert!(
        cached[1..16].iter().all(|&tokens| tokens >= shared),
        "{cached:?}"
    );
    // A conversation goes on after what was said: all but the token that was sampled last was computed.
    for salt in 0..2 {
        let computed = prompt(salt).len() as u32 + OUTPUT_TOKENS - 1;
        assert_eq!(
            cached[16 + salt as usize],
            computed / BLOCK_TOKENS * BLOCK_TOKENS
        );
    }
    // The same request, alone and among others.
    assert_eq!(with[4..8], with[8..12]);
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_prefixes_change_no_bit_of_an_answer() {
    compare(Setup::builtin(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_over_several_ranks_and_an_int8_cache() {
    compare(Setup {
        kv_dtype: KvDType::Int8,
        // The bits of a sum over ranks follow from the cut.
        split: Some(vec![2.0, 1.0]),
        ..Setup::builtin(2)
    })
    .await;
}
