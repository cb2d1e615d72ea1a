mod refused;

use std::collections::HashMap;

use secondwind_proto::kserve::grpc_inference_service_client::GrpcInferenceServiceClient;
use secondwind_proto::kserve::infer_parameter::ParameterChoice;
use secondwind_proto::kserve::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use secondwind_proto::kserve::*;
use tokio::sync::mpsc::{channel, unbounded_channel};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;

use super::{Served, bytes, finished, says, serve, token};
use crate::request::FinishReason;
use crate::text::fixture::IM_END;

fn client(served: &Served) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(served.channel.clone())
}

fn texts(name: &str, text: &str) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![1],
        contents: Some(InferTensorContents {
            bytes_contents: vec![text.as_bytes().to_vec()],
            ..InferTensorContents::default()
        }),
        ..InferInputTensor::default()
    }
}

fn truth(name: &str, value: bool) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: "BOOL".to_owned(),
        shape: vec![1],
        contents: Some(InferTensorContents {
            bool_contents: vec![value],
            ..InferTensorContents::default()
        }),
        ..InferInputTensor::default()
    }
}

fn ask(inputs: Vec<InferInputTensor>) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "fixture".to_owned(),
        id: "7".to_owned(),
        inputs,
        ..ModelInferRequest::default()
    }
}

fn hello() -> ModelInferRequest {
    ask(vec![texts("text_input", "hello")])
}

/// The same with its contents apart.
fn raw(mut request: ModelInferRequest, contents: Vec<Vec<u8>>) -> ModelInferRequest {
    for input in &mut request.inputs {
        input.contents = None;
    }
    request.raw_input_contents = contents;
    request
}

fn parameters<const N: usize>(
    given: [(&str, ParameterChoice); N],
) -> HashMap<String, InferParameter> {
    let parameter = |choice| InferParameter {
        parameter_choice: Some(choice),
    };
    given
        .map(|(name, choice)| (name.to_owned(), parameter(choice)))
        .into()
}

fn text(response: &ModelInferResponse) -> String {
    let output = &response.outputs[0];
    assert_eq!(
        (output.name.as_str(), output.datatype.as_str()),
        ("text_output", "BYTES")
    );
    assert_eq!(output.shape, [1]);
    let bytes = match response.raw_output_contents.first() {
        Some(raw) => raw[4..].to_vec(),
        None => output.contents.as_ref().unwrap().bytes_contents[0].clone(),
    };
    String::from_utf8(bytes).unwrap()
}

async fn served() -> Served {
    let mut events = bytes("hi é");
    events.extend([token(IM_END), finished(FinishReason::Stop)]);
    serve(says(events)).await
}

#[tokio::test]
async fn texts_go_in_and_out_as_tensors() {
    let served = served().await;
    let mut request = hello();
    request.parameters = parameters([
        ("max_tokens", ParameterChoice::Int64Param(9)),
        ("temperature", ParameterChoice::DoubleParam(0.5)),
        ("seed", ParameterChoice::Uint64Param(3)),
        ("timeout", ParameterChoice::Int64Param(60_000_000)),
    ]);
    let answer = client(&served)
        .model_infer(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (answer.id.as_str(), answer.model_version.as_str()),
        ("7", "1")
    );
    assert_eq!(text(&answer), "hi é");
    assert!(answer.raw_output_contents.is_empty());
    let expected = parameters([
        (
            "finish_reason",
            ParameterChoice::StringParam("stop".to_owned()),
        ),
        ("prompt_tokens", ParameterChoice::Int64Param(1)),
        ("cached_prompt_tokens", ParameterChoice::Int64Param(0)),
        ("completion_tokens", ParameterChoice::Int64Param(6)),
    ]);
    assert_eq!(answer.parameters, expected);
    {
        let submitted = served.engine.submitted.lock().unwrap();
        assert_eq!(submitted[0].max_tokens, 9);
        assert_eq!(
            (
                submitted[0].sampling.temperature,
                submitted[0].sampling.seed
            ),
            (0.5, 3)
        );
        assert!(submitted[0].deadline.is_some());
    }

    // Raw, with numbers as the clients of vLLM's backend write them, and the prompt before the answer.
    let sampling = r#"{"temperature": "0", "max_tokens": "5", "ignore_eos": "true", "stop": "1"}"#;
    let request = ask(vec![
        texts("sampling_parameters", ""),
        texts("text_input", ""),
        truth("exclude_input_in_output", false),
    ]);
    let prefixed = |text: &str| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let mut request = raw(
        request,
        vec![prefixed(sampling), prefixed("hello"), vec![0]],
    );
    request.parameters = parameters([("timeout", ParameterChoice::Int64Param(0))]);
    let answer = client(&served)
        .model_infer(request)
        .await
        .unwrap()
        .into_inner();
    assert!(text(&answer).starts_with("hellohi é"), "{answer:?}");
    assert_eq!(
        answer.raw_output_contents[0][..4],
        (text(&answer).len() as u32).to_le_bytes()
    );
    let submitted = served.engine.submitted.lock().unwrap();
    assert_eq!(
        (submitted[1].max_tokens, submitted[1].stop_token_ids.len()),
        (5, 0)
    );
    assert_eq!(submitted[1].sampling.temperature, 0.0);
    assert!(submitted[1].deadline.is_none());
}

#[tokio::test]
async fn a_stream_answers_all_its_requests() {
    let served = served().await;
    let mut streamed = ask(vec![texts("text_input", "hello"), truth("stream", true)]);
    streamed.id = "streamed".to_owned();
    let mut wrong = hello();
    wrong.id = "wrong".to_owned();
    wrong.model_name = "other".to_owned();
    let requests = tokio_stream::iter(vec![streamed, wrong, hello()]);
    let mut responses = client(&served)
        .model_stream_infer(requests)
        .await
        .unwrap()
        .into_inner();
    let mut said: HashMap<String, (String, Vec<bool>, String)> = HashMap::new();
    while let Some(response) = responses.message().await.unwrap() {
        let inner = response.infer_response.unwrap();
        let (all, finals, error) = said.entry(inner.id.clone()).or_default();
        *error += &response.error_message;
        if response.error_message.is_empty() {
            *all += &text(&inner);
            let choice = &inner.parameters["triton_final_response"].parameter_choice;
            finals.push(*choice == Some(ParameterChoice::BoolParam(true)));
        }
    }
    assert_eq!(said.len(), 3);
    for id in ["streamed", "7"] {
        let (all, finals, _) = &said[id];
        assert_eq!(all, "hi é");
        assert_eq!(finals.iter().filter(|last| **last).count(), 1);
        assert_eq!(finals.last(), Some(&true));
    }
    assert!(said["wrong"].2.contains("other"), "{said:?}");
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_what_runs() {
    let (senders, mut sent) = unbounded_channel();
    let served = serve(move |_, sender| {
        let _ = sender.send(token(104));
        senders.send(sender).unwrap();
        Ok(())
    })
    .await;
    let request = ask(vec![texts("text_input", "hello"), truth("stream", true)]);
    let (asking, requests) = channel(2);
    for request in [request.clone(), request] {
        asking.send(request).await.unwrap();
    }
    let requests = ReceiverStream::new(requests);
    let mut responses = client(&served)
        .model_stream_infer(requests)
        .await
        .unwrap()
        .into_inner();
    responses.message().await.unwrap().unwrap();
    let running = [sent.recv().await.unwrap(), sent.recv().await.unwrap()];
    drop((responses, asking));
    for sequence in running {
        sequence.closed().await;
    }
}

#[tokio::test]
async fn server_and_model_are_described() {
    let served = served().await;
    let mut client = client(&served);
    assert!(
        client
            .server_live(ServerLiveRequest {})
            .await
            .unwrap()
            .into_inner()
            .live
    );
    let server = client
        .server_metadata(ServerMetadataRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (server.name.as_str(), server.version.as_str()),
        ("secondwind", env!("CARGO_PKG_VERSION"))
    );
    let named = |name: &str, version: &str| ModelMetadataRequest {
        name: name.to_owned(),
        version: version.to_owned(),
    };
    let model = client
        .model_metadata(named("fixture", ""))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(model.versions, ["1"]);
    let inputs: Vec<&str> = model
        .inputs
        .iter()
        .map(|input| input.name.as_str())
        .collect();
    assert_eq!(
        inputs,
        [
            "text_input",
            "stream",
            "sampling_parameters",
            "exclude_input_in_output"
        ]
    );
    assert_eq!(model.outputs[0].name, "text_output");
    for (name, version) in [("other", ""), ("fixture", "2")] {
        let status = client
            .model_metadata(named(name, version))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
    }
    let ready = || ModelReadyRequest {
        name: "fixture".to_owned(),
        version: "1".to_owned(),
    };
    for no_group in [false, true] {
        served
            .engine
            .no_group
            .store(no_group, std::sync::atomic::Ordering::Relaxed);
        let model = client
            .model_ready(ready())
            .await
            .unwrap()
            .into_inner()
            .ready;
        let server = client
            .server_ready(ServerReadyRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready;
        assert_eq!((model, server), (!no_group, !no_group));
    }
}
