//! Whatever else goes on, a request gets the bits that it gets alone: long prompts in chunks, blocks that run
//! out, prefixes that are cached, guesses, masks, rules, and neighbours that go away.

use std::{sync::Arc, time::Duration};

use secondwind_proto::v1::{
    self,
    generate_request::{Prompt, Shape},
};
use tokio::{task::JoinSet, time::sleep};

use crate::harness::{Cluster, Setup};

const REQUESTS: u32 = 24;
/// Of the crowded group: all requests that run at once begin, and not all come to their end.
const KV_BLOCKS: u64 = 34;

/// The request of this number: each is of another kind, and many begin alike.
fn request(number: u32) -> v1::GenerateRequest {
    let length = [60, 90, 300, 45][number as usize % 4];
    let shared = |at: u32| 40 + at * 7 % 90;
    let own = |at: u32| 40 + (at * 11 + number * 13) % 90;
    let ids = (0..length).map(|at| match (number % 3, at < length - 8) {
        // One that repeats itself.
        (0, _) => 40 + (at % 6) * 3 + number % 2,
        (_, true) => shared(at),
        (_, false) => own(at),
    });
    let words = ["one", "two", "three"].map(str::to_owned).to_vec();
    let shaped = number % 6 == 5;
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids: ids.collect() })),
        max_tokens: Some(16 + number % 5 * 20),
        temperature: Some(if number % 4 == 1 { 1.2 } else { 0.0 }),
        seed: Some(number.into()),
        logprobs: Some(2),
        ignore_eos: !shaped,
        frequency_penalty: (number % 6 == 4).then_some(0.7),
        prompt_logprobs: number % 8 == 6,
        shape: shaped.then_some(Shape::Choice(v1::Choices { choices: words })),
        ..Default::default()
    }
}

/// Tokens with the bits of their log-probabilities.
async fn answer(cluster: &Cluster, number: u32) -> Vec<(u32, u32)> {
    let mut client = cluster.client().await;
    let mut stream = client.generate(request(number)).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        let logprobs = response.logprobs.iter().map(|of| of.logprob.to_bits());
        tokens.extend(response.token_ids.into_iter().zip(logprobs));
    }
    assert!(!tokens.is_empty());
    tokens
}

/// Asks, and goes away in the midst of the answer.
async fn leave(cluster: &Cluster, number: u32) {
    let mut client = cluster.client().await;
    let mut stream = client.generate(request(number)).await.unwrap().into_inner();
    for _ in 0..number % 3 {
        let _ = stream.message().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_gets_the_bits_it_gets_alone() {
    let plain = Setup {
        prefix_cache: false,
        max_drafts: 0,
        max_sequences: 6,
        ..Setup::builtin(1)
    };
    let cluster = Cluster::start(plain.clone()).await;
    let mut alone = Vec::new();
    for number in 0..REQUESTS {
        alone.push(answer(&cluster, number).await);
    }
    let group = cluster.until_serving(1).await;
    cluster.stop().await;

    // Keys and values of a token: 6 layers, 2 KV heads of 32 channels, in f32.
    let block_bytes = group.block_tokens * 6 * 2 * 2 * 32 * 4;
    let spare = group.kv_blocks - KV_BLOCKS;
    let crowded = Setup {
        prefix_cache: true,
        max_drafts: 4,
        memory_bytes: group.ranks[0].planned_bytes - spare * block_bytes,
        max_context_tokens: Some(400),
        ..plain
    };
    let cluster = Arc::new(Cluster::start(crowded).await);
    let mut together = JoinSet::new();
    for number in 0..REQUESTS {
        let (here, there) = (Arc::clone(&cluster), Arc::clone(&cluster));
        together.spawn(async move { Some((number, answer(&here, number).await)) });
        together.spawn(async move {
            sleep(Duration::from_millis(u64::from(number) * 3)).await;
            leave(&there, number).await;
            None
        });
    }
    for (number, answer) in together.join_all().await.into_iter().flatten() {
        assert_eq!(answer, alone[number as usize], "request {number}");
    }
    // Guesses need a place that nobody waits for.
    assert_eq!(answer(&cluster, 12).await, alone[12]);
    for figure in [
        "num_preemptions_total",
        "prefix_cache_hits_total",
        "spec_decode_num_accepted_tokens_total",
    ] {
        let counted = cluster.metric(&format!("secondwind_{figure}")).await;
        assert!(counted > 0.0, "{figure}: the load does not try it");
    }
    Arc::into_inner(cluster).unwrap().stop().await;
}
