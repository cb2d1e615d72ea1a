//! What a cluster promises its clients while clients and workers come and go.

use std::time::Duration;

use secondwind_coordinator::Collective;
use secondwind_proto::v1;
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::harness::{Cluster, PATIENCE, Setup, answer, chat};

/// A request that goes on until its tokens or somebody's patience end.
fn endless(question: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        ignore_eos: true,
        ..chat(question, max_tokens)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_answers_as_one_alone_over_every_link() {
    let questions = [
        "What is secondwind?",
        "What is 123 + 456?",
        "Tell me about the Tesla P40.",
    ];
    let mut all = Vec::new();
    for collective in [Collective::Auto, Collective::Grpc] {
        let cluster = Cluster::start(Setup {
            collective,
            ..Setup::builtin(2)
        })
        .await;
        let mut client = cluster.client().await;
        let mut alone = Vec::new();
        for question in questions {
            alone.push(answer(&mut client, chat(question, 48)).await.unwrap().1);
        }
        let together = questions.map(|question| {
            let mut client = client.clone();
            tokio::spawn(async move { answer(&mut client, chat(question, 48)).await.unwrap().1 })
        });
        for (task, alone) in together.into_iter().zip(&alone) {
            assert_eq!(task.await.unwrap(), *alone);
        }
        cluster.stop().await;
        all.push(alone);
    }
    assert_eq!(all[0], all[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_makes_room() {
    // One place to run, none to wait beyond it: whoever comes second is refused until the first goes.
    let setup = Setup {
        max_sequences: 1,
        max_waiting: 0,
        ..Setup::builtin(2)
    };
    let cluster = Cluster::start(setup).await;
    let mut client = cluster.client().await;
    let mut first = client
        .generate(endless("What is secondwind?", 400))
        .await
        .unwrap()
        .into_inner();
    first.message().await.unwrap().expect("a first response");
    let refused = answer(&mut client, chat("What is 1 + 1?", 8))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop(first);
    let accepted = async {
        loop {
            match answer(&mut client, chat("What is 1 + 1?", 8)).await {
                Ok(answer) => return answer,
                Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, accepted)
        .await
        .expect("the place is never freed");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_costs_a_pause_and_no_token() {
    let mut cluster = Cluster::start(Setup {
        collective: Collective::Grpc,
        ..Setup::builtin(2)
    })
    .await;
    let mut client = cluster.client().await;
    let request = endless("Tell me about the Tesla T4.", 300);
    let (_, undisturbed, _) = answer(&mut client, request.clone()).await.unwrap();
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut ids = Vec::new();
    while ids.len() < 20 {
        ids.extend(stream.message().await.unwrap().unwrap().token_ids);
    }
    cluster.kill_worker("worker-1");
    sleep(Duration::from_millis(100)).await;
    cluster.start_worker("worker-1");
    let rest = async {
        while let Some(response) = stream.message().await.unwrap() {
            ids.extend(response.token_ids);
        }
    };
    timeout(PATIENCE, rest)
        .await
        .expect("the stream never ends");
    // The capabilities of the worker that came back are measured anew, so the cut may differ, and with
    // it the last bits; the text of a confident model does not.
    assert_eq!(ids.len(), undisturbed.len());
    assert_eq!(ids[..40], undisturbed[..40]);
    assert!(cluster.until_serving(2).await.epoch >= 2);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_and_output_log_probabilities_agree() {
    let cluster = Cluster::start(Setup::builtin(2)).await;
    let mut client = cluster.client().await;
    let ids = vec![5, 6, 7, 8, 9, 10];
    let request = |ids: Vec<u32>, max_tokens| v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIdsPrompt {
            ids,
        })),
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        logprobs: Some(3),
        prompt_logprobs: true,
        ignore_eos: true,
        ..Default::default()
    };
    let collect = |mut stream: tonic::Streaming<v1::GenerateResponse>| async move {
        let (mut prompt, mut outputs) = (None, Vec::new());
        while let Some(response) = stream.message().await.unwrap() {
            prompt = prompt.or(response.prompt);
            outputs.extend(response.token_ids.into_iter().zip(response.logprobs));
        }
        (prompt.unwrap(), outputs)
    };
    let (prompt, outputs) = collect(
        client
            .generate(request(ids.clone(), 4))
            .await
            .unwrap()
            .into_inner(),
    )
    .await;
    assert_eq!(prompt.token_ids, ids);
    assert_eq!(prompt.logprobs.len(), ids.len() - 1);
    assert_eq!(outputs.len(), 4);
    for (token, output) in &outputs {
        assert_eq!(output.top.len(), 3);
        // Greedy: the sampled token is the most likely one.
        assert_eq!(output.top[0].token_id, *token);
        assert_eq!(output.top[0].logprob.to_bits(), output.logprob.to_bits());
    }
    // The output, given back as a prompt, has the same log-probabilities.
    let longer: Vec<u32> = ids
        .iter()
        .copied()
        .chain(outputs.iter().map(|(token, _)| *token))
        .collect();
    let (prompt, _) = collect(
        client
            .generate(request(longer, 1))
            .await
            .unwrap()
            .into_inner(),
    )
    .await;
    for (got, (_, output)) in prompt.logprobs[ids.len() - 1..].iter().zip(&outputs) {
        assert!(
            (got - output.logprob).abs() < 1e-5,
            "{got} and {}",
            output.logprob
        );
    }
    for (likely, (_, output)) in prompt.top[ids.len() - 1..].iter().zip(&outputs) {
        let top: Vec<u32> = output.top.iter().map(|top| top.token_id).collect();
        assert_eq!(likely.token_ids, top);
        for (got, top) in likely.logprobs.iter().zip(&output.top) {
            assert!(
                (got - top.logprob).abs() < 1e-5,
                "{got} and {}",
                top.logprob
            );
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_repeat_and_differ() {
    let cluster = Cluster::start(Setup::builtin(2)).await;
    let mut client = cluster.client().await;
    let mut sampled = Vec::new();
    for seed in [1, 1, 2, 3] {
        let request = v1::GenerateRequest {
            temperature: Some(3.0),
            seed: Some(seed),
            ..endless("What is secondwind?", 24)
        };
        sampled.push(answer(&mut client, request).await.unwrap().1);
    }
    assert_eq!(sampled[0], sampled[1]);
    assert!(sampled[1] != sampled[2] && sampled[2] != sampled[3]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_are_honoured() {
    let cluster = Cluster::start(Setup::builtin(1)).await;
    let mut client = cluster.client().await;
    let mut request = tonic::Request::new(endless("What is secondwind?", 480));
    request.set_timeout(Duration::from_millis(60));
    let status = match client.generate(request).await {
        Err(status) => status,
        Ok(stream) => {
            let mut stream = stream.into_inner();
            loop {
                match stream.message().await {
                    Err(status) => break status,
                    Ok(Some(response)) => assert!(response.finish.is_none(), "480 tokens in 60 ms"),
                    Ok(None) => panic!("the stream ended without a finish"),
                }
            }
        }
    };
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_version_is_refused() {
    let cluster = Cluster::start(Setup::builtin(1)).await;
    let mut client = v1::cluster_client::ClusterClient::connect(cluster.workers_endpoint())
        .await
        .unwrap();
    let join = v1::Join {
        nccl_version: String::new(),
        version: "0.0.0".into(),
        worker: "old".into(),
        ..Default::default()
    };
    let event = v1::WorkerEvent {
        event: Some(v1::worker_event::Event::Join(join)),
    };
    let refused = client.attach(tokio_stream::once(event)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused
            .message()
            .contains("install the same version on both"),
        "{refused}"
    );
    cluster.stop().await;
}
