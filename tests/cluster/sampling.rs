//! What a request says of sampling, honoured by real workers, alone and together.

use std::time::Duration;

use secondwind_proto::v1::{self, inference_client::InferenceClient};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use crate::harness::{Cluster, PATIENCE, Setup, answer, chat};

const PROMPT: [u32; 6] = [5, 6, 7, 8, 9, 10];

/// A greedy continuation of [`PROMPT`] that no end-of-sequence token ends.
fn request(max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIdsPrompt {
            ids: PROMPT.to_vec(),
        })),
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        logprobs: Some(20),
        ..Default::default()
    }
}

/// (token, its log-probability, the most likely ones).
type Output = Vec<(u32, f32, Vec<(u32, f32)>)>;

async fn outputs(client: &mut InferenceClient<Channel>, request: v1::GenerateRequest) -> Output {
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut outputs = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        for (token, logprob) in response.token_ids.into_iter().zip(response.logprobs) {
            let top = logprob.top.iter().map(|top| (top.token_id, top.logprob));
            outputs.push((token, logprob.logprob, top.collect()));
        }
    }
    outputs
}

/// The log-probabilities of these outputs as a prompt's.
async fn scores(
    client: &mut InferenceClient<Channel>,
    outputs: &Output,
    repetition_penalty: f32,
) -> Vec<f32> {
    let ids = [PROMPT.as_slice(), &tokens(outputs)].concat();
    let scored = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIdsPrompt {
            ids,
        })),
        prompt_logprobs: true,
        repetition_penalty: Some(repetition_penalty),
        ..request(1)
    };
    let mut stream = client.generate(scored).await.unwrap().into_inner();
    let mut prompt = None;
    while let Some(response) = stream.message().await.unwrap() {
        prompt = prompt.or(response.prompt);
    }
    prompt.unwrap().logprobs[PROMPT.len() - 1..].to_vec()
}

fn tokens(outputs: &Output) -> Vec<u32> {
    outputs.iter().map(|(token, ..)| *token).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn biases_and_penalties_are_honoured_and_reported_of_the_models_own_logits() {
    let mut worlds = Vec::new();
    for world in [1, 2] {
        let cluster = Cluster::start(Setup::builtin(world)).await;
        let mut client = cluster.client().await;
        let plain = outputs(&mut client, request(1)).await;
        let (best, _, top) = plain[0].clone();

        // A banned token gives way to the next, and is still reported as what the model thinks of it.
        let banned = v1::GenerateRequest {
            logit_bias: [(best, -100.0)].into(),
            ..request(1)
        };
        let banned = outputs(&mut client, banned).await;
        assert_eq!((banned[0].0, banned[0].2.clone()), (top[1].0, top.clone()));
        assert_eq!(banned[0].1.to_bits(), top[1].1.to_bits());

        // A token far down: its own log-probability is not among the reported.
        let raised = (0..1400).find(|token| top.iter().all(|(other, _)| other != token));
        let raised = raised.unwrap();
        let forced = v1::GenerateRequest {
            logit_bias: [(raised, 100.0)].into(),
            ..request(3)
        };
        let forced = outputs(&mut client, forced).await;
        assert_eq!(tokens(&forced), [raised; 3]);
        assert_eq!(forced[0].2, top);
        assert!(forced[0].1 < top[19].1 && forced[0].1.is_finite());
        // It is what the prompt's log-probabilities say of it, which nothing changes.
        let scored = scores(&mut client, &forced, 1.3).await;
        assert!((scored[0] - forced[0].1).abs() < 1e-4, "{scored:?}");

        // So hot that most draws need the whole row, where the changed tokens are looked up anew.
        let hot = v1::GenerateRequest {
            temperature: Some(20.0),
            seed: Some(1),
            repetition_penalty: Some(3.0),
            presence_penalty: Some(2.0),
            logit_bias: [(raised, 20.0)].into(),
            ..request(40)
        };
        let hot = outputs(&mut client, hot).await;
        let scored = scores(&mut client, &hot, 1.0).await;
        for (scored, (token, logprob, _)) in scored.iter().zip(&hot) {
            assert!(
                (scored - logprob).abs() < 1e-4,
                "token {token}: {logprob} {scored}"
            );
        }

        // OpenAI's definitions hold at each token, over those that are reported.
        let (presence, frequency) = (0.7_f32, 1.9_f32);
        let penalised = v1::GenerateRequest {
            presence_penalty: Some(presence),
            frequency_penalty: Some(frequency),
            ..request(80)
        };
        let penalised = outputs(&mut client, penalised).await;
        let mut decided = 0;
        for (index, (token, logprob, top)) in penalised.iter().enumerate() {
            let before = &penalised[..index];
            let adjusted = |token: u32, logprob: f32| {
                let times = before.iter().filter(|(other, ..)| *other == token).count() as f32;
                logprob - frequency * times - if times > 0.0 { presence } else { 0.0 }
            };
            let own = adjusted(*token, *logprob);
            for &(other, logprob) in top {
                assert!(adjusted(other, logprob) <= own + 1e-4, "position {index}");
            }
            decided += usize::from(top[0].0 != *token);
        }
        assert!(decided > 5, "penalties decided {decided} of 80 tokens");

        // A penalty that leaves next to nothing of a positive logit: nothing comes twice.
        let once = v1::GenerateRequest {
            repetition_penalty: Some(100.0),
            ..request(40)
        };
        let once = tokens(&outputs(&mut client, once).await);
        let mut all = [PROMPT.as_slice(), &once].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), PROMPT.len() + 40);

        let typical = |typical_p| v1::GenerateRequest {
            temperature: Some(1.5),
            typical_p: Some(typical_p),
            repetition_penalty: Some(1.1),
            seed: Some(3),
            ..request(60)
        };
        let sampled = tokens(&outputs(&mut client, typical(0.3)).await);
        assert_eq!(tokens(&outputs(&mut client, typical(0.3)).await), sampled);
        assert_ne!(tokens(&outputs(&mut client, typical(1.0)).await), sampled);
        cluster.stop().await;
        worlds.push((tokens(&hot), tokens(&penalised), once, sampled));
    }
    assert_eq!(worlds[0], worlds[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_min_tokens_before_it_may_stop() {
    for world in [1, 2] {
        let cluster = Cluster::start(Setup::builtin(world)).await;
        let mut client = cluster.client().await;
        let (_, short, finish) = answer(&mut client, chat("What is 1 + 1?", 64))
            .await
            .unwrap();
        assert_eq!(finish.reason(), v1::FinishReason::Stop);
        let end = *short.last().unwrap();
        let least = short.len() as u32 + 10;
        let longer = v1::GenerateRequest {
            min_tokens: Some(least),
            logprobs: Some(5),
            ..chat("What is 1 + 1?", 200)
        };
        let (_, long, _) = answer(&mut client, longer).await.unwrap();
        assert_eq!(long[..short.len() - 1], short[..short.len() - 1]);
        assert!(long.len() > least as usize, "{} tokens", long.len());
        assert!(!long[..least as usize].contains(&end));
        // At least as many as it has anyway changes nothing.
        let same = v1::GenerateRequest {
            min_tokens: Some(short.len() as u32 - 1),
            ..chat("What is 1 + 1?", 64)
        };
        assert_eq!(answer(&mut client, same).await.unwrap().1, short);
        cluster.stop().await;
    }
}

/// Penalised, sampled and long enough to depend on what came before.
fn lasting(seed: u64, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        temperature: Some(1.2),
        top_p: Some(0.97),
        seed: Some(seed),
        repetition_penalty: Some(1.15),
        presence_penalty: Some(0.2),
        frequency_penalty: Some(0.1),
        logit_bias: [(12, 0.5)].into(),
        min_tokens: Some(20),
        ignore_eos: true,
        ..chat("Tell me about the Tesla T4.", max_tokens)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_tokens_in_any_company() {
    let cluster = Cluster::start(Setup::builtin(2)).await;
    let mut client = cluster.client().await;
    let mut alone = Vec::new();
    for seed in 0..4 {
        alone.push(answer(&mut client, lasting(seed, 60)).await.unwrap().1);
    }
    assert!(alone[0] != alone[1] && alone[2] != alone[3]);
    let together = [0, 1, 2, 3].map(|seed| {
        let mut client = client.clone();
        tokio::spawn(async move { answer(&mut client, lasting(seed, 60)).await.unwrap().1 })
    });
    for (task, alone) in together.into_iter().zip(&alone) {
        assert_eq!(task.await.unwrap(), *alone);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_tokens_when_blocks_run_out() {
    const REQUESTS: u64 = 6;
    let roomy = Cluster::start(Setup::builtin(1)).await;
    let mut client = roomy.client().await;
    let mut alone = Vec::new();
    for seed in 0..REQUESTS {
        alone.push(answer(&mut client, lasting(seed, 300)).await.unwrap().1);
    }
    let group = roomy.until_serving(1).await;
    roomy.stop().await;

    // Keys and values of a token: 6 layers, 2 KV heads of 32 channels, in f32. All requests fit at first, and
    // a third of them at their full length.
    let block_bytes = group.block_tokens * 6 * 2 * 2 * 32 * 4;
    let blocks = 2 * 300_u64.div_ceil(group.block_tokens) + 8;
    let spare = group.kv_blocks - blocks;
    let setup = Setup {
        max_context_tokens: Some(400),
        memory_bytes: group.ranks[0].planned_bytes - spare * block_bytes,
        ..Setup::builtin(1)
    };
    let tight = Cluster::start(setup).await;
    let held = tight.until_serving(1).await;
    let capacity = held.kv_blocks * held.block_tokens;
    assert!(
        (400..REQUESTS * 300).contains(&capacity),
        "room for {capacity} tokens"
    );
    let client = tight.client().await;
    let together: Vec<_> = (0..REQUESTS)
        .map(|seed| {
            let mut client = client.clone();
            tokio::spawn(async move { answer(&mut client, lasting(seed, 300)).await.unwrap().1 })
        })
        .collect();
    for (task, alone) in together.into_iter().zip(&alone) {
        assert_eq!(task.await.unwrap(), *alone);
    }
    tight.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_hold_on_after_an_epoch_is_lost() {
    let mut cluster = Cluster::start(Setup::builtin(1)).await;
    let mut client = cluster.client().await;
    let undisturbed = answer(&mut client, lasting(5, 300)).await.unwrap().1;
    let mut stream = client.generate(lasting(5, 300)).await.unwrap().into_inner();
    let mut ids = Vec::new();
    while ids.len() < 40 {
        ids.extend(stream.message().await.unwrap().unwrap().token_ids);
    }
    cluster.kill_worker("worker-0");
    sleep(Duration::from_millis(100)).await;
    cluster.start_worker("worker-0");
    let rest = async {
        while let Some(response) = stream.message().await.unwrap() {
            ids.extend(response.token_ids);
        }
    };
    timeout(PATIENCE, rest)
        .await
        .expect("the stream never ends");
    // One rank has no cut that could move: the same bits, and with them the same tokens.
    assert_eq!(ids, undisturbed);
    assert!(cluster.until_serving(2).await.epoch >= 2);
    cluster.stop().await;
}
