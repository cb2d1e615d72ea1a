mod refused;

use std::collections::HashMap;

use secondwind_model::step::{PromptLogprob, TokenLogprobs};
use secondwind_proto::vllm;
use secondwind_proto::vllm::control_client::ControlClient;
use secondwind_proto::vllm::decoding_parameters::{StringChoices, StructuredOutput};
use secondwind_proto::vllm::finish_info::{FinishReason as Reason, StopReason};
use secondwind_proto::vllm::generate_request::Prompt;
use secondwind_proto::vllm::inference_client::InferenceClient;
use tokio::sync::mpsc::unbounded_channel;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Served, bytes, finished, says, serve, token};
use crate::request::{FinishReason, SequenceEvent};
use crate::text::fixture::IM_END;

fn client(served: &Served) -> InferenceClient<Channel> {
    InferenceClient::new(served.channel.clone())
}

fn hello() -> vllm::GenerateRequest {
    vllm::GenerateRequest {
        prompt: Some(Prompt::Text("hello".to_owned())),
        ..vllm::GenerateRequest::default()
    }
}

fn top_n(count: u32) -> Option<vllm::CandidateTokens> {
    let select = Some(vllm::candidate_tokens::Select::TopN(count));
    Some(vllm::CandidateTokens { select })
}

async fn stream(
    served: &Served,
    request: vllm::GenerateRequest,
) -> Result<Vec<vllm::GenerateResponse>, Status> {
    let mut stream = client(served).generate_stream(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(response) = stream.message().await? {
        all.push(response);
    }
    Ok(all)
}

#[tokio::test]
async fn an_answer_comes_whole_and_as_it_is_said() {
    let mut events = bytes("hi é");
    events.extend([token(IM_END), finished(FinishReason::Stop)]);
    let served = serve(says(events)).await;
    let whole = client(&served)
        .generate(hello())
        .await
        .unwrap()
        .into_inner();
    let prompt = whole.prompt_info.unwrap();
    assert_eq!((prompt.num_prompt_tokens, prompt.token_ids.len()), (1, 0));
    let output = whole.outputs.unwrap();
    assert_eq!((output.text.as_str(), output.num_tokens), ("hi é", 6));
    assert_eq!((output.token_ids.len(), output.logprobs.len()), (0, 0));
    let finish = output.finish_info.unwrap();
    assert_eq!(finish.num_output_tokens, 6);
    assert_eq!(finish.finish_reason(), Reason::Stop);
    assert_eq!(finish.stop_reason, Some(StopReason::EosTokenId(IM_END)));
    {
        let submitted = served.engine.submitted.lock().unwrap();
        assert_eq!(submitted[0].max_tokens, 20);
        assert_eq!(submitted[0].sampling.temperature, 0.0);
    }

    let request = vllm::GenerateRequest {
        response: Some(vllm::ResponseOptions {
            prompt_token_ids: true,
            output_text: Some(false),
            output_token_ids: true,
            ..vllm::ResponseOptions::default()
        }),
        stopping: Some(vllm::StoppingCriteria {
            stop_token_ids: vec![u32::from(b'i')],
            max_new_tokens: 7,
            ..vllm::StoppingCriteria::default()
        }),
        ..hello()
    };
    let responses = stream(&served, request).await.unwrap();
    let prompts: Vec<&vllm::PromptInfo> = responses
        .iter()
        .filter_map(|response| response.prompt_info.as_ref())
        .collect();
    assert_eq!(prompts.len(), 1);
    assert!(responses[0].prompt_info.is_some());
    assert_eq!(prompts[0].token_ids, [259]);
    let outputs: Vec<&vllm::SequenceOutput> = responses
        .iter()
        .filter_map(|response| response.outputs.as_ref())
        .collect();
    assert!(outputs.iter().all(|output| output.text.is_empty()));
    let ids: Vec<u32> = outputs
        .iter()
        .flat_map(|output| output.token_ids.clone())
        .collect();
    assert_eq!(ids.len(), 6);
    assert_eq!(
        outputs.iter().map(|output| output.num_tokens).sum::<u32>(),
        6
    );
    assert_eq!(served.engine.submitted.lock().unwrap()[1].max_tokens, 7);
}

#[tokio::test]
async fn what_ended_an_answer_is_told() {
    let stopping = |stop: &str, token: u32| vllm::StoppingCriteria {
        stop_strings: vec![stop.to_owned()],
        stop_token_ids: vec![token],
        ..vllm::StoppingCriteria::default()
    };
    let mut events = bytes("one");
    events.push(finished(FinishReason::Stop));
    let served = serve(says(events)).await;
    for (stop, token, reason, text) in [
        ("n", 1, StopReason::StopString("n".to_owned()), "o"),
        (
            "x",
            u32::from(b'e'),
            StopReason::StopTokenId(u32::from(b'e')),
            "on",
        ),
    ] {
        let request = vllm::GenerateRequest {
            stopping: Some(stopping(stop, token)),
            ..hello()
        };
        let output = client(&served)
            .generate(request)
            .await
            .unwrap()
            .into_inner()
            .outputs
            .unwrap();
        assert_eq!(output.text, text);
        assert_eq!(output.finish_info.unwrap().stop_reason, Some(reason));
    }
}

#[tokio::test]
async fn log_probabilities_have_ranks_and_rivals() {
    let events = vec![
        SequenceEvent::PromptLogprobs(vec![PromptLogprob {
            logprob: -3.0,
            top: vec![(5, -0.5), (6, -1.5)],
        }]),
        SequenceEvent::Token(TokenLogprobs {
            token: 104,
            logprob: Some(-1.0),
            top: vec![(105, -0.25), (104, -1.0), (106, -2.0)],
        }),
        finished(FinishReason::Length),
    ];
    let served = serve(says(events)).await;
    let request = vllm::GenerateRequest {
        prompt: Some(Prompt::TokenIds(vllm::TokenIds { ids: vec![1, 2] })),
        response: Some(vllm::ResponseOptions {
            prompt_logprobs: true,
            prompt_candidates: top_n(1),
            output_logprobs: true,
            output_candidates: top_n(3),
            ..vllm::ResponseOptions::default()
        }),
        ..hello()
    };
    let whole = client(&served)
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    let info = |id, logprob, rank| vllm::candidate_token_info::TokenInfo { id, logprob, rank };
    let rivals = |of: &vllm::CandidateTokenInfo| of.tokens.clone();
    let prompt = whole.prompt_info.unwrap();
    assert_eq!(
        (prompt.logprobs, prompt.ranks),
        (vec![0.0, -3.0], vec![0, 0])
    );
    let candidates: Vec<_> = prompt.candidate_tokens.iter().map(rivals).collect();
    assert_eq!(candidates, [vec![], vec![info(5, -0.5, 1)]]);
    let output = whole.outputs.unwrap();
    assert_eq!((output.logprobs, output.ranks), (vec![-1.0], vec![2]));
    let candidates: Vec<_> = output.candidate_tokens.iter().map(rivals).collect();
    assert_eq!(candidates, [vec![info(105, -0.25, 1), info(106, -2.0, 3)]]);
}

#[tokio::test]
async fn sequences_of_a_request_have_seeds_of_their_own() {
    let mut events = bytes("a");
    events.push(finished(FinishReason::Length));
    let served = serve(says(events)).await;
    let request = vllm::GenerateRequest {
        sampling: Some(vllm::RandomSampling {
            num_sequences: 3,
            seed: Some(-7),
            ..vllm::RandomSampling::default()
        }),
        ..hello()
    };
    let responses = stream(&served, request.clone()).await.unwrap();
    let mut ended: Vec<u32> = responses
        .iter()
        .filter_map(|response| response.outputs.as_ref())
        .filter(|output| output.finish_info.is_some())
        .map(|output| output.index)
        .collect();
    ended.sort_unstable();
    assert_eq!(ended, [0, 1, 2]);
    let seeds: Vec<u64> = served
        .engine
        .submitted
        .lock()
        .unwrap()
        .iter()
        .map(|sequence| sequence.sampling.seed)
        .collect();
    assert_eq!(seeds[0], (-7_i64).cast_unsigned());
    assert!(seeds[1] != seeds[0] && seeds[2] != seeds[0] && seeds[1] != seeds[2]);
    let status = client(&served).generate(request).await.unwrap_err();
    assert_eq!(
        status.message(),
        "sampling.num_sequences: 3 sequences have no place in one response; use GenerateStream"
    );
}

#[tokio::test]
async fn an_aborted_request_ends_at_once_and_frees_its_id() {
    let (senders, mut sent) = unbounded_channel();
    let served = serve(move |_, sender| {
        let _ = sender.send(token(104));
        senders.send(sender).unwrap();
        Ok(())
    })
    .await;
    let named = || vllm::GenerateRequest {
        request_id: "mine".to_owned(),
        ..hello()
    };
    let mut running = client(&served)
        .generate_stream(named())
        .await
        .unwrap()
        .into_inner();
    let sequence = sent.recv().await.unwrap();
    let mut tokens = 0;
    while tokens == 0 {
        let response = running.message().await.unwrap().unwrap();
        tokens += response.outputs.unwrap().num_tokens;
    }
    let status = client(&served).generate(named()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        status.message(),
        "request_id: \"mine\" names a request that runs; take another id"
    );

    let mut control = ControlClient::new(served.channel.clone());
    let request_ids = vec!["nobody's".to_owned(), "mine".to_owned()];
    control
        .abort(vllm::AbortRequest { request_ids })
        .await
        .unwrap();
    sequence.closed().await;
    let output = running.message().await.unwrap().unwrap().outputs.unwrap();
    let finish = output.finish_info.unwrap();
    assert_eq!(finish.finish_reason(), Reason::Aborted);
    assert_eq!(finish.num_output_tokens, 1);
    assert!(running.message().await.unwrap().is_none());
    drop(running);

    let whole = tokio::spawn({
        let mut client = client(&served);
        async move {
            // The server may not have seen yet that the stream before was given up.
            loop {
                match client.generate(named()).await {
                    Err(status) if status.code() == Code::InvalidArgument => {}
                    other => break other,
                }
            }
        }
    });
    let sequence = sent.recv().await.unwrap();
    let request_ids = vec!["mine".to_owned()];
    control
        .abort(vllm::AbortRequest { request_ids })
        .await
        .unwrap();
    sequence.closed().await;
    let output = whole.await.unwrap().unwrap().into_inner().outputs.unwrap();
    assert_eq!(output.finish_info.unwrap().finish_reason(), Reason::Aborted);
}

#[tokio::test]
async fn an_answer_may_have_a_shape() {
    let served = serve(says(vec![finished(FinishReason::Complete)])).await;
    let structured = |shape| vllm::GenerateRequest {
        decoding: Some(vllm::DecodingParameters {
            structured_output: Some(shape),
            ..vllm::DecodingParameters::default()
        }),
        ..hello()
    };
    let shaped = [
        (StructuredOutput::Regex("[0-9]+".to_owned()), true),
        (StructuredOutput::JsonObject(true), true),
        (StructuredOutput::JsonObject(false), false),
    ];
    for (shape, _) in shaped.clone() {
        let whole = client(&served).generate(structured(shape)).await.unwrap();
        let finish = whole.into_inner().outputs.unwrap().finish_info.unwrap();
        assert_eq!(finish.finish_reason(), Reason::Stop);
        assert_eq!(finish.stop_reason, None);
    }
    let submitted = served.engine.submitted.lock().unwrap();
    let grammars = submitted.iter().map(|sequence| sequence.grammar.is_some());
    assert!(grammars.eq(shaped.map(|(_, expected)| expected)));
}

#[tokio::test]
async fn server_and_model_are_described() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let mut control = ControlClient::new(served.channel.clone());
    let info = control
        .get_server_info(vllm::GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.max_model_len, 64);
    assert!(info.engine_version.starts_with("secondwind "));
    assert!(!info.instance_id.is_empty());
    let model = control
        .get_model_info(vllm::GetModelInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(model.served_model_name, "fixture");
    assert!(model.supports_text_input && model.supports_token_ids_input);
    assert!(!model.supports_lora && !model.supports_multimodal);
}
