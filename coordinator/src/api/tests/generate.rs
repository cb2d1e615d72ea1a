use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use secondwind_model::step::TokenLogprobs;
use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;
use tokio::sync::oneshot;
use tonic::{Code, Request};

use super::{
    bytes, chat_request, finished, generate, model, says, serve, serve_model, serve_with,
    text_request, token,
};
use crate::api::{HttpSettings, Reasoning, ServedModel};
use crate::request::{FinishReason, SequenceEvent, SequenceTimings};
use crate::text::fixture::{IM_END, THINK};

#[tokio::test]
async fn tokens_stream_as_they_come() {
    let (gate, opened) = oneshot::channel::<()>();
    let opened = Mutex::new(Some(opened));
    let served = serve(move |_, sender| {
        let opened = opened.lock().unwrap().take().unwrap();
        tokio::spawn(async move {
            let _ = sender.send(SequenceEvent::Started {
                cached_prompt_tokens: 16,
            });
            let _ = sender.send(token(259));
            let _ = opened.await;
            let _ = sender.send(token(262));
            let _ = sender.send(token(IM_END));
            let _ = sender.send(SequenceEvent::Finished {
                reason: FinishReason::Stop,
                timings: SequenceTimings {
                    queue: Duration::from_millis(1),
                    prefill: Duration::from_micros(2500),
                    decode: Duration::from_secs(3),
                },
            });
        });
        Ok(())
    })
    .await;
    let mut stream = served
        .client
        .clone()
        .generate(text_request("hello"))
        .await
        .unwrap()
        .into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.prompt.unwrap().token_ids, [259]);
    let mut text = first.text;
    while text != "hello" {
        text.push_str(&stream.message().await.unwrap().unwrap().text);
    }
    gate.send(()).unwrap();
    let (mut token_ids, mut finish) = (Vec::new(), None);
    while let Some(response) = stream.message().await.unwrap() {
        assert!(response.prompt.is_none());
        text.push_str(&response.text);
        token_ids.extend(response.token_ids);
        finish = response.finish;
    }
    assert_eq!(text, "hello wor");
    assert_eq!(token_ids, [262, IM_END]);
    let finish = finish.unwrap();
    assert_eq!(finish.reason(), v1::FinishReason::Stop);
    assert_eq!(finish.stop, "<|im_end|>");
    let usage = v1::Usage {
        prompt_tokens: 1,
        completion_tokens: 3,
        cached_prompt_tokens: 16,
    };
    assert_eq!(finish.usage, Some(usage));
    let timings = v1::Timings {
        queue_ms: 1.0,
        prefill_ms: 2.5,
        decode_ms: 3000.0,
    };
    assert_eq!(finish.timings, Some(timings));
}

#[tokio::test]
async fn characters_are_whole_in_every_response() {
    let (sender_out, mut sender_in) = tokio::sync::mpsc::unbounded_channel();
    let served = serve(move |_, sender| {
        sender_out.send(sender).unwrap();
        Ok(())
    })
    .await;
    let mut stream = served
        .client
        .clone()
        .generate(text_request("hello"))
        .await
        .unwrap()
        .into_inner();
    let sender = sender_in.recv().await.unwrap();
    stream.message().await.unwrap().unwrap();
    let mut texts = Vec::new();
    for byte in "a😀".bytes() {
        sender.send(token(byte.into())).unwrap();
        let response = stream.message().await.unwrap().unwrap();
        assert_eq!(response.token_ids, [u32::from(byte)]);
        texts.push(response.text);
    }
    assert_eq!(texts, ["a", "", "", "", "😀"]);
    sender.send(token(0xf0)).unwrap();
    sender.send(finished(FinishReason::Length)).unwrap();
    let mut rest = String::new();
    while let Some(response) = stream.message().await.unwrap() {
        rest.push_str(&response.text);
    }
    assert_eq!(rest, "\u{fffd}");
}

#[tokio::test]
async fn a_stop_string_ends_the_text_and_cancels_the_sequence() {
    let (closed, was_closed) = oneshot::channel::<()>();
    let closed = Mutex::new(Some(closed));
    let served = serve(move |_, sender| {
        for event in bytes("one, two, three") {
            let _ = sender.send(event);
        }
        let closed = closed.lock().unwrap().take().unwrap();
        tokio::spawn(async move {
            sender.closed().await;
            closed.send(()).unwrap();
        });
        Ok(())
    })
    .await;
    let request = v1::GenerateRequest {
        stop: vec![b"three".to_vec(), b", tw".to_vec()],
        ..text_request("hello")
    };
    let answer = generate(&served, request).await;
    assert!(answer.error.is_none(), "{answer:?}");
    assert_eq!(answer.text, "one");
    assert_eq!(answer.token_ids, b"one, tw".map(u32::from));
    let finish = answer.finish.unwrap();
    assert_eq!(finish.reason(), v1::FinishReason::Stop);
    assert_eq!(finish.stop, ", tw");
    assert_eq!(finish.usage.unwrap().completion_tokens, 7);
    was_closed.await.unwrap();
}

#[tokio::test]
async fn stop_strings_are_not_looked_for_within_min_tokens() {
    let mut events = bytes("one two one");
    events.push(finished(FinishReason::Length));
    let served = serve(says(events)).await;
    let request = v1::GenerateRequest {
        stop: vec![b"one".to_vec()],
        min_tokens: Some(5),
        ..text_request("hello")
    };
    let answer = generate(&served, request).await;
    assert_eq!(answer.text, "one two ");
    assert_eq!(answer.finish.unwrap().stop, "one");
}

#[tokio::test]
async fn text_held_for_a_stop_string_comes_at_the_end() {
    let mut events = bytes("and thr");
    events.push(finished(FinishReason::Length));
    let served = serve(says(events)).await;
    let request = v1::GenerateRequest {
        stop: vec![b"three".to_vec()],
        ..text_request("hello")
    };
    let answer = generate(&served, request).await;
    assert_eq!(answer.text, "and thr");
    let finish = answer.finish.unwrap();
    assert_eq!(finish.reason(), v1::FinishReason::Length);
    assert_eq!(finish.stop, "");
}

#[tokio::test]
async fn a_stop_token_is_reported_but_is_no_text() {
    let events = vec![
        token(259),
        token(THINK),
        token(u32::from(b'!')),
        finished(FinishReason::Stop),
    ];
    let served = serve(says(events)).await;
    let request = v1::GenerateRequest {
        stop_token_ids: vec![u32::from(b'!')],
        ..text_request("hello")
    };
    let answer = generate(&served, request).await;
    assert_eq!(answer.text, "hello<think>");
    assert_eq!(answer.token_ids, [259, THINK, 33]);
    assert_eq!(answer.finish.unwrap().stop, "!");
}

#[tokio::test]
async fn a_client_that_goes_away_closes_the_sequence() {
    let (closed, was_closed) = oneshot::channel::<()>();
    let closed = Mutex::new(Some(closed));
    let served = serve(move |_, sender| {
        let closed = closed.lock().unwrap().take().unwrap();
        let _ = sender.send(token(259));
        tokio::spawn(async move {
            sender.closed().await;
            closed.send(()).unwrap();
        });
        Ok(())
    })
    .await;
    let mut stream = served
        .client
        .clone()
        .generate(text_request("hello"))
        .await
        .unwrap()
        .into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), was_closed)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn the_deadline_ends_a_stream() {
    let (closed, was_closed) = oneshot::channel::<()>();
    let closed = Mutex::new(Some(closed));
    let served = serve(move |sequence, sender| {
        assert!(sequence.deadline.unwrap() > Instant::now());
        let closed = closed.lock().unwrap().take().unwrap();
        let _ = sender.send(token(259));
        tokio::spawn(async move {
            sender.closed().await;
            closed.send(()).unwrap();
        });
        Ok(())
    })
    .await;
    let mut request = Request::new(text_request("hello"));
    request.set_timeout(Duration::from_millis(300));
    let mut stream = served
        .client
        .clone()
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    let error = loop {
        match stream.message().await {
            Ok(response) => assert!(response.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert_eq!(error.message(), "the deadline has passed");
    was_closed.await.unwrap();
}

#[tokio::test]
async fn logprobs_of_prompt_and_output_are_passed_on() {
    let events = vec![
        SequenceEvent::Started {
            cached_prompt_tokens: 0,
        },
        SequenceEvent::PromptLogprobs(vec![(-0.5).into(), (-1.5).into()]),
        SequenceEvent::Token(TokenLogprobs {
            token: 259,
            logprob: Some(-0.25),
            top: vec![(259, -0.25), (0xc3, -2.0)],
        }),
        finished(FinishReason::Length),
    ];
    let served = serve(says(events)).await;
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids: vec![1, 2, 3] })),
        prompt_logprobs: true,
        logprobs: Some(2),
        max_tokens: Some(1),
        ..v1::GenerateRequest::default()
    };
    let answer = generate(&served, request).await;
    let prompt = answer.responses[0].prompt.clone().unwrap();
    assert_eq!(prompt.token_ids, [1, 2, 3]);
    assert_eq!(prompt.logprobs, [-0.5, -1.5]);
    assert_eq!(answer.logprobs.len(), 1);
    assert_eq!(answer.logprobs[0].logprob, -0.25);
    let top: Vec<(u32, &str)> = answer.logprobs[0]
        .top
        .iter()
        .map(|candidate| (candidate.token_id, candidate.text.as_str()))
        .collect();
    assert_eq!(top, [(259, "hello"), (0xc3, "\u{fffd}")]);
    let submitted = served.engine.submitted.lock().unwrap();
    assert!(submitted[0].prompt_logprobs);
    assert_eq!(submitted[0].sampling.logprobs, Some(2));
}

#[tokio::test]
async fn a_prompt_given_as_ids_is_not_told_again() {
    let served = serve(says(vec![token(259), finished(FinishReason::Length)])).await;
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids: vec![1] })),
        ..v1::GenerateRequest::default()
    };
    let answer = generate(&served, request).await;
    assert!(
        answer
            .responses
            .iter()
            .all(|response| response.prompt.is_none())
    );
}

#[tokio::test]
async fn a_chat_goes_through_the_template() {
    let served = serve(says(vec![finished(FinishReason::Length)])).await;
    let answer = generate(&served, chat_request(&[("user", "hello")])).await;
    assert!(answer.error.is_none(), "{answer:?}");
    let submitted = served.engine.submitted.lock().unwrap();
    let text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    let tokenizer = crate::text::fixture::tokenizer();
    assert_eq!(tokenizer.decode(&submitted[0].prompt, false), text);
}

#[tokio::test]
async fn a_slow_client_gets_tokens_in_fewer_responses_and_loses_none() {
    let mut events: Vec<SequenceEvent> = (0..1000).map(|_| token(259)).collect();
    events.push(finished(FinishReason::Length));
    let served = serve(says(events)).await;
    let answer = generate(&served, text_request("hello")).await;
    assert_eq!(answer.token_ids.len(), 1000);
    assert_eq!(answer.text, "hello".repeat(1000));
    assert!(answer.responses.len() < 100, "{}", answer.responses.len());
}

#[tokio::test]
async fn many_streams_at_once_do_not_mix() {
    let served = Arc::new(
        serve(|sequence, sender| {
            let id = sequence.prompt[0];
            for _ in 0..10 {
                let _ = sender.send(token(id));
            }
            let _ = sender.send(finished(FinishReason::Length));
            Ok(())
        })
        .await,
    );
    let calls = (97..123_u32).map(|id| {
        let served = Arc::clone(&served);
        tokio::spawn(async move {
            let request = v1::GenerateRequest {
                prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids: vec![id] })),
                ..v1::GenerateRequest::default()
            };
            (id, generate(&served, request).await)
        })
    });
    for call in calls.collect::<Vec<_>>() {
        let (id, answer) = call.await.unwrap();
        assert_eq!(answer.token_ids, [id; 10]);
    }
}

#[tokio::test]
async fn reasoning_and_calls_of_a_chat_stand_apart() {
    let text = "<think>\nhm\n</think>\nI see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let events = || {
        let mut events = bytes(text);
        events.extend([token(IM_END), finished(FinishReason::Stop)]);
        events
    };
    let wide = || ServedModel {
        max_context_tokens: 256,
        ..model()
    };
    let mut asking = chat_request(&[("user", "hello")]);
    let Some(Prompt::Chat(chat)) = &mut asking.prompt else {
        panic!("{asking:?}");
    };
    chat.tools_json = vec![r#"{"type": "function", "function": {"name": "add"}}"#.to_owned()];
    let call = v1::ToolCall {
        name: "add".to_owned(),
        arguments_json: r#"{"a":1}"#.to_owned(),
    };
    let whole = |answer: &super::Answer| {
        let all = |of: fn(&v1::GenerateResponse) -> &str| answer.responses.iter().map(of).collect();
        let calls = answer
            .responses
            .iter()
            .flat_map(|response| response.tool_calls.clone());
        let [reasoning, text]: [String; 2] = [
            all(|response| &response.reasoning),
            all(|response| &response.text),
        ];
        (reasoning, text, calls.collect::<Vec<_>>())
    };

    let served = serve_model(wide(), says(events())).await;
    let answer = generate(&served, asking.clone()).await;
    assert_eq!(
        whole(&answer),
        ("hm".into(), "I see.".into(), vec![call.clone()])
    );
    assert_eq!(answer.token_ids.len(), text.len() + 1);
    // A model that is not told of tools calls none, and a text is not a chat.
    let (reasoning, said, calls) =
        whole(&generate(&served, chat_request(&[("user", "hello")])).await);
    assert_eq!((reasoning.as_str(), calls.len()), ("hm", 0));
    assert!(said.contains("<tool_call>"), "{said}");
    assert_eq!(
        whole(&generate(&served, text_request("hello")).await),
        (String::new(), text.into(), vec![])
    );

    let settings = HttpSettings::default();
    let served = serve_with(wide(), Reasoning::Keep, settings, says(events())).await;
    let (reasoning, said, calls) = whole(&generate(&served, asking).await);
    assert_eq!((reasoning.as_str(), calls), ("", vec![call]));
    assert_eq!(said, "<think>\nhm\n</think>\nI see.");
}
