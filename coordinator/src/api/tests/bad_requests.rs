//! Requests that are wrong as a whole.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use secondwind_proto::v1;
use secondwind_proto::v1::inference_server::Inference;
use tonic::{Code, Request};

use super::{
    ScriptedEngine, chat_request, finished, generate, model, model_with, says, serve, serve_model,
    text_request,
};
use crate::api::account::Account;
use crate::api::{Frontend, InferenceService, Reasoning, ServedModel};
use crate::metrics::Metrics;
use crate::request::FinishReason;
use crate::text::Text;
use crate::text::fixture::{VOCAB_SIZE, files};

#[tokio::test]
async fn something_must_be_left_to_draw_before_min_tokens() {
    // The fixture has more tokens than a request may name stop tokens, so the model ends at any of them.
    let model = ServedModel {
        eos_token_ids: (0..VOCAB_SIZE as u32).collect(),
        ..model()
    };
    let served = serve_model(model, says(vec![finished(FinishReason::Length)])).await;
    let request = v1::GenerateRequest {
        min_tokens: Some(1),
        ..text_request("hello")
    };
    let status = generate(&served, request.clone()).await.error.unwrap();
    assert_eq!(
        (status.code(), status.message()),
        (
            Code::InvalidArgument,
            "min_tokens: 1 is not possible where every token of the vocabulary is a stop token"
        )
    );
    let request = v1::GenerateRequest {
        ignore_eos: true,
        ..request
    };
    assert!(generate(&served, request).await.error.is_none());
}

#[tokio::test]
async fn a_chat_without_a_template_is_a_failed_precondition() {
    for (template, message) in [
        (
            None,
            "chat: the model fixture has no chat template; send a text or token ids",
        ),
        (
            Some("{% if %}"),
            "chat: chat template tokenizer_config.json does not parse: syntax error: unexpected end of block (line 1)",
        ),
    ] {
        let text = Text::load(&files(template), VOCAB_SIZE).unwrap();
        let served =
            serve_model(model_with(text), says(vec![finished(FinishReason::Length)])).await;
        let status = generate(&served, chat_request(&[("user", "hi")]))
            .await
            .error
            .unwrap();
        assert_eq!(
            (status.code(), status.message()),
            (Code::FailedPrecondition, message)
        );
        assert!(generate(&served, text_request("hi")).await.error.is_none());
    }
}

#[tokio::test]
async fn a_timeout_that_is_none_is_refused() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let mut request = Request::new(text_request("hello"));
    let header = "12x".parse().unwrap();
    request.metadata_mut().insert("grpc-timeout", header);
    let status = served.client.clone().generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_prompt_that_takes_longer_than_the_deadline_is_given_up() {
    let engine = Arc::new(ScriptedEngine {
        script: Box::new(says(vec![finished(FinishReason::Length)])),
        submitted: Mutex::default(),
        no_group: false.into(),
        metrics: Metrics::new("fixture"),
    });
    let frontend = Frontend::new(Arc::clone(&engine), Arc::new(model()), Reasoning::Split);
    let service = InferenceService::new(Arc::new(frontend));
    let mut request = Request::new(chat_request(&[("endless", "hi")]));
    request.set_timeout(Duration::from_millis(20));
    request.extensions_mut().insert(Account::of_nobody());
    let Err(status) = service.generate(request).await else {
        panic!("was not refused");
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(engine.submitted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_request_over_the_size_limit_is_refused() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let status = generate(&served, text_request(&"x".repeat(5 << 20)))
        .await
        .error
        .unwrap();
    assert_eq!(status.code(), Code::OutOfRange);
}
