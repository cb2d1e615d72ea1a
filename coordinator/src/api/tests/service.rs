use secondwind_proto::v1;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1 as reflection, v1alpha};

use super::{finished, says, serve};
use crate::api::SERVICE_NAMES;
use crate::request::FinishReason;
use crate::text::fixture::IM_END;

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let mut client = served.client.clone();
    let request = v1::TokenizeRequest {
        text: "hello<|im_end|>é".to_owned(),
        add_special_tokens: true,
    };
    let token_ids = client
        .tokenize(request)
        .await
        .unwrap()
        .into_inner()
        .token_ids;
    assert_eq!(token_ids, [259, IM_END, 0xc3, 0xa9]);
    for (skip_special_tokens, expected) in [(true, "helloé"), (false, "hello<|im_end|>é")] {
        let request = v1::DetokenizeRequest {
            token_ids: token_ids.clone(),
            skip_special_tokens,
        };
        let text = client.detokenize(request).await.unwrap().into_inner().text;
        assert_eq!(text, expected);
    }
    let request = v1::DetokenizeRequest {
        token_ids: vec![1, 320],
        skip_special_tokens: false,
    };
    let status = client.detokenize(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        status.message(),
        "token_ids[1]: token id 320 is not below the vocabulary size 320"
    );
}

#[tokio::test]
async fn the_model_is_described() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let model = served
        .client
        .clone()
        .get_model(v1::GetModelRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(model.name, "fixture");
    assert_eq!(model.architecture, "Qwen2ForCausalLM");
    assert_eq!((model.max_context_tokens, model.vocab_size), (64, 320));
    assert_eq!(model.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(model.group.unwrap().epoch, 7);
    assert!(model.has_chat_template);
}

#[tokio::test]
async fn health_follows_the_group() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let mut health = HealthClient::new(served.channel.clone());
    for (serving, expected) in [
        (None, ServingStatus::NotServing),
        (Some(true), ServingStatus::Serving),
        (Some(false), ServingStatus::NotServing),
    ] {
        if let Some(serving) = serving {
            served.serving.set_serving(serving).await;
        }
        for service in SERVICE_NAMES.into_iter().chain([""]) {
            let request = HealthCheckRequest {
                service: service.to_owned(),
            };
            let status = health.check(request).await.unwrap().into_inner().status();
            assert_eq!(status, expected, "{service:?}");
        }
    }
}

#[tokio::test]
async fn reflection_lists_what_is_served_in_both_versions() {
    use reflection::server_reflection_client::ServerReflectionClient;
    use reflection::server_reflection_request::MessageRequest;
    use reflection::server_reflection_response::MessageResponse;
    use v1alpha::server_reflection_client::ServerReflectionClient as AlphaClient;

    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let request = reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(served.channel.clone());
    let mut replies = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let reply = replies.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else {
        panic!("{reply:?}");
    };
    let mut names: Vec<String> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    names.retain(|name| !name.starts_with("grpc.reflection."));
    names.sort();
    let mut expected = SERVICE_NAMES.to_vec();
    expected.push("grpc.health.v1.Health");
    expected.sort_unstable();
    assert_eq!(names, expected);

    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
                SERVICE_NAMES[0].to_owned(),
            ),
        ),
    };
    let mut client = AlphaClient::new(served.channel.clone());
    let mut replies = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    assert!(
        replies
            .message()
            .await
            .unwrap()
            .unwrap()
            .message_response
            .is_some()
    );
}
