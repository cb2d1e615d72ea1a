//! What vLLM's clients may ask and is refused, each by its name.

use super::*;

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let decoding = |decoding| vllm::GenerateRequest {
        decoding: Some(decoding),
        ..hello()
    };
    let structured = |structured| {
        decoding(vllm::DecodingParameters {
            structured_output: Some(structured),
            ..vllm::DecodingParameters::default()
        })
    };
    let sampling = |sampling| vllm::GenerateRequest {
        sampling: Some(sampling),
        ..hello()
    };
    let stopping = |stopping| vllm::GenerateRequest {
        stopping: Some(stopping),
        ..hello()
    };
    let response = |response| vllm::GenerateRequest {
        response: Some(response),
        ..hello()
    };
    let kv = |kv| vllm::GenerateRequest {
        kv: Some(kv),
        ..hello()
    };
    let unsupported = |field: &str| format!("{field}: is not supported; leave it out");
    let select = |select| {
        Some(vllm::CandidateTokens {
            select: Some(select),
        })
    };
    let cases: Vec<(vllm::GenerateRequest, String)> = vec![
        (
            vllm::GenerateRequest::default(),
            "prompt: one of text, chat, token_ids must be set".to_owned(),
        ),
        (
            vllm::GenerateRequest {
                truncate_prompt_tokens: 1,
                ..hello()
            },
            unsupported("truncate_prompt_tokens"),
        ),
        (
            vllm::GenerateRequest {
                priority: -128,
                ..hello()
            },
            "priority: -128 is not from -127 to 127".to_owned(),
        ),
        (
            vllm::GenerateRequest {
                media: vec![vllm::MediaItem::default()],
                ..hello()
            },
            unsupported("media"),
        ),
        (
            vllm::GenerateRequest {
                lora_name: "x".to_owned(),
                ..hello()
            },
            unsupported("lora_name"),
        ),
        (
            decoding(vllm::DecodingParameters {
                allowed_token_ids: vec![1],
                ..vllm::DecodingParameters::default()
            }),
            unsupported("decoding.allowed_token_ids"),
        ),
        (
            decoding(vllm::DecodingParameters {
                logit_bias: HashMap::from([(400, 1.0)]),
                ..vllm::DecodingParameters::default()
            }),
            "decoding.logit_bias[400]: token id 400 is not below the vocabulary size 320"
                .to_owned(),
        ),
        (
            sampling(vllm::RandomSampling {
                top_p: 2.0,
                ..vllm::RandomSampling::default()
            }),
            "sampling.top_p: 2 is not above 0 and at most 1".to_owned(),
        ),
        (
            sampling(vllm::RandomSampling {
                num_sequences: 129,
                ..vllm::RandomSampling::default()
            }),
            "sampling.num_sequences: 129 is not at most 128".to_owned(),
        ),
        (
            stopping(vllm::StoppingCriteria {
                include_stop_strings: true,
                ..vllm::StoppingCriteria::default()
            }),
            unsupported("stopping.include_stop_strings"),
        ),
        (
            stopping(vllm::StoppingCriteria {
                stop_token_ids: vec![1, 320],
                ..vllm::StoppingCriteria::default()
            }),
            "stopping.stop_token_ids[1]: token id 320 is not below the vocabulary size 320"
                .to_owned(),
        ),
        (
            response(vllm::ResponseOptions {
                skip_special_tokens: Some(false),
                ..vllm::ResponseOptions::default()
            }),
            unsupported("response.skip_special_tokens"),
        ),
        (
            response(vllm::ResponseOptions {
                output_candidates: top_n(1),
                ..vllm::ResponseOptions::default()
            }),
            "response.output_candidates: is only for requests with log-probabilities".to_owned(),
        ),
        (
            response(vllm::ResponseOptions {
                output_logprobs: true,
                output_candidates: top_n(21),
                ..vllm::ResponseOptions::default()
            }),
            "response.output_candidates.top_n: 21 is not at most 20".to_owned(),
        ),
        (
            response(vllm::ResponseOptions {
                prompt_logprobs: true,
                prompt_candidates: select(vllm::candidate_tokens::Select::All(true)),
                ..vllm::ResponseOptions::default()
            }),
            unsupported("response.prompt_candidates.all"),
        ),
        (
            kv(vllm::KvCacheParameters {
                bypass_prefix_cache: true,
                ..Default::default()
            }),
            unsupported("kv.bypass_prefix_cache"),
        ),
        (
            kv(vllm::KvCacheParameters {
                cache_salt: "x".repeat(2000),
                ..Default::default()
            }),
            "kv.cache_salt: a text of 2000 bytes is not one of 1 to 1024".to_owned(),
        ),
        (
            kv(vllm::KvCacheParameters {
                kv_transfer_params: Some(Default::default()),
                ..Default::default()
            }),
            unsupported("kv.kv_transfer_params"),
        ),
        (
            kv(vllm::KvCacheParameters {
                ec_transfer_params: Some(Default::default()),
                ..Default::default()
            }),
            unsupported("kv.ec_transfer_params"),
        ),
        (
            structured(StructuredOutput::Json("{".to_owned())),
            "decoding.json: is not JSON: EOF while parsing an object at line 1 column 1".to_owned(),
        ),
        (
            structured(StructuredOutput::Regex(String::new())),
            "decoding.regex: is empty".to_owned(),
        ),
        (
            structured(StructuredOutput::Choice(StringChoices::default())),
            "decoding.choice: has nothing to choose".to_owned(),
        ),
        (
            structured(StructuredOutput::Grammar(String::new())),
            "decoding.grammar: is empty".to_owned(),
        ),
        (
            structured(StructuredOutput::StructuralTag("a".to_owned())),
            unsupported("decoding.structural_tag"),
        ),
    ];
    for (request, message) in cases {
        let status = stream(&served, request).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::InvalidArgument, message.as_str())
        );
    }
    let request = vllm::GenerateRequest {
        model: "other".to_owned(),
        ..hello()
    };
    let status = stream(&served, request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(served.engine.submitted.lock().unwrap().is_empty());
}
