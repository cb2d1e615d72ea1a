//! Every field of a request over gRPC, wrong in every way.

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;
use tonic::Code;

use super::{chat_request, finished, generate, model, says, serve, text_request};
use crate::api::check_generate;
use crate::request::FinishReason;

fn ids(ids: Vec<u32>) -> Option<Prompt> {
    Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids }))
}

fn chat(change: impl Fn(&mut v1::ChatPrompt)) -> v1::GenerateRequest {
    let mut request = chat_request(&[("user", "hi")]);
    if let Some(Prompt::Chat(chat)) = &mut request.prompt {
        change(chat);
    }
    request
}

#[tokio::test]
async fn every_bad_field_is_named() {
    let base = || text_request("hello");
    let cases: Vec<(v1::GenerateRequest, Code, &str)> = vec![
        (
            v1::GenerateRequest::default(),
            Code::InvalidArgument,
            "prompt: one of text, chat, token_ids must be set",
        ),
        (
            text_request(""),
            Code::InvalidArgument,
            "text: the prompt is empty",
        ),
        (
            v1::GenerateRequest {
                prompt: ids(vec![]),
                ..base()
            },
            Code::InvalidArgument,
            "token_ids.ids: the prompt is empty",
        ),
        (
            v1::GenerateRequest {
                prompt: ids(vec![1, 320]),
                ..base()
            },
            Code::InvalidArgument,
            "token_ids.ids[1]: token id 320 is not below the vocabulary size 320",
        ),
        (
            v1::GenerateRequest {
                priority: Some(-128),
                ..base()
            },
            Code::InvalidArgument,
            "priority: -128 is not from -127 to 127",
        ),
        (
            v1::GenerateRequest {
                cache_salt: Some(String::new()),
                ..base()
            },
            Code::InvalidArgument,
            "cache_salt: a text of 0 bytes is not one of 1 to 1024",
        ),
        (
            v1::GenerateRequest {
                prompt: ids(vec![1; 64]),
                ..base()
            },
            Code::InvalidArgument,
            "token_ids.ids: the prompt has 64 tokens, but the context of 64 tokens must also hold at least one token of output",
        ),
        (
            text_request(&"x".repeat(65)),
            Code::InvalidArgument,
            "text: the prompt has 65 tokens, but the context of 64 tokens must also hold at least one token of output",
        ),
        (
            text_request(&"x".repeat(100_000)),
            Code::InvalidArgument,
            "text: the prompt has more than 64 tokens, but the context of 64 tokens must also hold at least one token of output",
        ),
        (
            v1::GenerateRequest {
                max_tokens: Some(0),
                ..base()
            },
            Code::InvalidArgument,
            "max_tokens: 0 is not at least 1, which only prompt_logprobs can do without",
        ),
        (
            v1::GenerateRequest {
                temperature: Some(-0.5),
                ..base()
            },
            Code::InvalidArgument,
            "temperature: -0.5 is not between 0 and 100",
        ),
        (
            v1::GenerateRequest {
                temperature: Some(f32::NAN),
                ..base()
            },
            Code::InvalidArgument,
            "temperature: NaN is not between 0 and 100",
        ),
        (
            v1::GenerateRequest {
                temperature: Some(f32::INFINITY),
                ..base()
            },
            Code::InvalidArgument,
            "temperature: inf is not between 0 and 100",
        ),
        (
            v1::GenerateRequest {
                top_p: Some(0.0),
                ..base()
            },
            Code::InvalidArgument,
            "top_p: 0 is not above 0 and at most 1",
        ),
        (
            v1::GenerateRequest {
                top_p: Some(1.5),
                ..base()
            },
            Code::InvalidArgument,
            "top_p: 1.5 is not above 0 and at most 1",
        ),
        (
            v1::GenerateRequest {
                top_p: Some(f32::NAN),
                ..base()
            },
            Code::InvalidArgument,
            "top_p: NaN is not above 0 and at most 1",
        ),
        (
            v1::GenerateRequest {
                min_p: Some(-0.1),
                ..base()
            },
            Code::InvalidArgument,
            "min_p: -0.1 is not between 0 and 1",
        ),
        (
            v1::GenerateRequest {
                typical_p: Some(0.0),
                ..base()
            },
            Code::InvalidArgument,
            "typical_p: 0 is not above 0 and at most 1",
        ),
        (
            v1::GenerateRequest {
                typical_p: Some(f32::NAN),
                ..base()
            },
            Code::InvalidArgument,
            "typical_p: NaN is not above 0 and at most 1",
        ),
        (
            v1::GenerateRequest {
                repetition_penalty: Some(0.0),
                ..base()
            },
            Code::InvalidArgument,
            "repetition_penalty: 0 is not between 0.01 and 100",
        ),
        (
            v1::GenerateRequest {
                repetition_penalty: Some(f32::INFINITY),
                ..base()
            },
            Code::InvalidArgument,
            "repetition_penalty: inf is not between 0.01 and 100",
        ),
        (
            v1::GenerateRequest {
                presence_penalty: Some(2.5),
                ..base()
            },
            Code::InvalidArgument,
            "presence_penalty: 2.5 is not between -2 and 2",
        ),
        (
            v1::GenerateRequest {
                presence_penalty: Some(f32::NAN),
                ..base()
            },
            Code::InvalidArgument,
            "presence_penalty: NaN is not between -2 and 2",
        ),
        (
            v1::GenerateRequest {
                frequency_penalty: Some(-3.0),
                ..base()
            },
            Code::InvalidArgument,
            "frequency_penalty: -3 is not between -2 and 2",
        ),
        (
            v1::GenerateRequest {
                logit_bias: [(5, 1.0), (320, 1.0)].into(),
                ..base()
            },
            Code::InvalidArgument,
            "logit_bias[320]: token id 320 is not below the vocabulary size 320",
        ),
        (
            v1::GenerateRequest {
                logit_bias: [(5, 101.0)].into(),
                ..base()
            },
            Code::InvalidArgument,
            "logit_bias: 101 for token 5 is not between -100 and 100",
        ),
        (
            v1::GenerateRequest {
                logit_bias: [(5, f32::NAN)].into(),
                ..base()
            },
            Code::InvalidArgument,
            "logit_bias: NaN for token 5 is not between -100 and 100",
        ),
        (
            v1::GenerateRequest {
                logit_bias: (0..1025).map(|token| (token, 0.0)).collect(),
                ..base()
            },
            Code::InvalidArgument,
            "logit_bias: 1025 entries; at most 1024 are taken",
        ),
        (
            v1::GenerateRequest {
                min_tokens: Some(6),
                max_tokens: Some(5),
                ..base()
            },
            Code::InvalidArgument,
            "min_tokens: 6 is not at most max_tokens, which is 5",
        ),
        (
            v1::GenerateRequest {
                min_tokens: Some(64),
                ..base()
            },
            Code::InvalidArgument,
            "min_tokens: 64 is not at most 63, for which the context has room after the prompt",
        ),
        (
            v1::GenerateRequest {
                n: Some(2),
                ..base()
            },
            Code::InvalidArgument,
            "n: 2 is not 1; send a request for each answer that is wanted",
        ),
        (
            v1::GenerateRequest {
                n: Some(0),
                ..base()
            },
            Code::InvalidArgument,
            "n: 0 is not 1; send a request for each answer that is wanted",
        ),
        (
            v1::GenerateRequest {
                best_of: Some(4),
                ..base()
            },
            Code::InvalidArgument,
            "best_of: 4 is not 1; no answers are drawn to be thrown away",
        ),
        (
            v1::GenerateRequest {
                logprobs: Some(21),
                ..base()
            },
            Code::InvalidArgument,
            "logprobs: 21 is not at most 20",
        ),
        (
            v1::GenerateRequest {
                stop: vec![b"a".to_vec(), b"ab\xff".to_vec()],
                ..base()
            },
            Code::InvalidArgument,
            "stop[1]: not UTF-8 from byte 2 on",
        ),
        (
            v1::GenerateRequest {
                stop: vec![vec![]],
                ..base()
            },
            Code::InvalidArgument,
            "stop[0]: the stop string is empty",
        ),
        (
            v1::GenerateRequest {
                stop: vec![vec![b'a'; 1025]],
                ..base()
            },
            Code::InvalidArgument,
            "stop[0]: 1025 bytes; at most 1024 are taken",
        ),
        (
            v1::GenerateRequest {
                stop: vec![b"a".to_vec(); 17],
                ..base()
            },
            Code::InvalidArgument,
            "stop: 17 entries; at most 16 are taken",
        ),
        (
            v1::GenerateRequest {
                stop_token_ids: vec![0, 1, 999],
                ..base()
            },
            Code::InvalidArgument,
            "stop_token_ids[2]: token id 999 is not below the vocabulary size 320",
        ),
        (
            v1::GenerateRequest {
                stop_token_ids: vec![0; 257],
                ..base()
            },
            Code::InvalidArgument,
            "stop_token_ids: 257 entries; at most 256 are taken",
        ),
        (
            chat(|chat| chat.messages.clear()),
            Code::InvalidArgument,
            "chat.messages: is empty",
        ),
        (
            chat_request(&[("user", "a"), ("", "b")]),
            Code::InvalidArgument,
            "chat.messages[1].role: is empty",
        ),
        (
            chat(|chat| chat.tools_json = vec!["{}".to_owned(), "[]".to_owned()]),
            Code::InvalidArgument,
            "chat.tools_json[1]: is not a JSON object",
        ),
        (
            chat(|chat| chat.tools_json = vec!["{".to_owned()]),
            Code::InvalidArgument,
            "chat.tools_json[0]: is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            chat(|chat| chat.template_variables_json = "3".to_owned()),
            Code::InvalidArgument,
            "chat.template_variables_json: is not a JSON object",
        ),
        (
            chat(|chat| chat.template_variables_json = r#"{"messages": []}"#.to_owned()),
            Code::InvalidArgument,
            "chat.template_variables_json: \"messages\" cannot be set; use the messages of the chat",
        ),
        (
            chat(|chat| {
                chat.template_variables_json = r#"{"add_generation_prompt": 1}"#.to_owned()
            }),
            Code::InvalidArgument,
            "chat.template_variables_json: add_generation_prompt is neither true nor false",
        ),
        (
            chat(|chat| chat.messages[0].tool_calls_json = "{}".to_owned()),
            Code::InvalidArgument,
            "chat.messages[0].tool_calls_json: is not a JSON array",
        ),
        (
            chat(|chat| {
                chat.messages[0].tool_calls_json = format!("{}{}", "[".repeat(200), "]".repeat(200))
            }),
            Code::InvalidArgument,
            "chat.messages[0].tool_calls_json: is not JSON: recursion limit exceeded at line 1 column 128",
        ),
        (
            chat_request(&[("robot", "hi")]),
            Code::InvalidArgument,
            "chat: the chat template refuses the messages: no robots",
        ),
        (
            chat_request(&[("endless", "hi")]),
            Code::FailedPrecondition,
            "chat: chat template tokenizer_config.json did not end within 4000000 instructions",
        ),
    ];
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    for (request, code, message) in cases {
        let answer = generate(&served, request.clone()).await;
        let Some(status) = answer.error else {
            panic!("was not refused: {message}");
        };
        assert_eq!((status.code(), status.message()), (code, message));
        // The other API says the same of a field that it may call otherwise.
        let error = check_generate(request, &model(), None).unwrap_err();
        assert_eq!(message, format!("{}: {}", error.field(), error.detail()));
    }
    assert!(served.engine.submitted.lock().unwrap().is_empty());
}
