use serde_json::{Value as Json, json};

use super::{
    answer, bytes, finished, likely, model, model_with, post, says, serve, serve_model, serve_with,
    token,
};
use crate::api::{HttpSettings, Reasoning};
use crate::request::FinishReason;
use crate::text::Text;
use crate::text::fixture::{IM_END, VOCAB_SIZE, files};

fn hello() -> Json {
    json!({"messages": [{"role": "user", "content": "hello"}]})
}

fn with(mut base: Json, more: Json) -> Json {
    let fields = base.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    base
}

#[tokio::test]
async fn an_answer_comes_whole() {
    let mut events = bytes("hi é");
    events.extend([token(IM_END), finished(FinishReason::Stop)]);
    let served = serve(says(events)).await;
    let reply = post(
        &served,
        "/v1/chat/completions",
        &with(hello(), json!({"model": "fixture"})),
    )
    .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.headers["content-type"], "application/json");
    let json = reply.json();
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "fixture");
    assert!(json["created"].as_u64().unwrap() > 1_600_000_000);
    let id = reply.headers["x-request-id"].to_str().unwrap();
    assert_eq!(json["id"], format!("chatcmpl-{id}"));
    let choice = json!({
        "index": 0,
        "message": {"role": "assistant", "content": "hi é", "refusal": null},
        "logprobs": null,
        "finish_reason": "stop",
    });
    assert_eq!(json["choices"], json!([choice]));
    let prompt = served.engine.submitted.lock().unwrap()[0].prompt.len();
    let usage = json!({
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    });
    assert_eq!(json["usage"], usage);
}

#[tokio::test]
async fn what_a_model_thinks_stands_apart_from_its_answer() {
    let text = "<think>\nhm, a < b\n</think>\n\nfour";
    let served = serve(says(answer(text))).await;
    let json = post(&served, "/v1/chat/completions", &hello()).await.json();
    let message = json!({
        "role": "assistant",
        "content": "four",
        "refusal": null,
        "reasoning_content": "hm, a < b",
    });
    assert_eq!(json["choices"][0]["message"], message);
    let ask = with(hello(), json!({"stream": true}));
    let events = post(&served, "/v1/chat/completions", &ask).await.events();
    let all = |name: &str| -> String {
        let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
        deltas.filter_map(|delta| delta[name].as_str()).collect()
    };
    assert_eq!(all("reasoning_content"), "hm, a < b");
    assert_eq!(all("content"), "four");
    // A text is not a chat.
    let ask = json!({"prompt": "x", "max_tokens": 40});
    let json = post(&served, "/v1/completions", &ask).await.json();
    assert_eq!(json["choices"][0]["text"], text);

    let settings = HttpSettings::default();
    let served = serve_with(model(), Reasoning::Keep, settings, says(answer(text))).await;
    let json = post(&served, "/v1/chat/completions", &hello()).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], text);
}

#[tokio::test]
async fn calls_of_tools_are_read_from_the_answer() {
    let text = "<think>\nhm\n</think>\nI see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let mut events = bytes(text);
    events.extend([token(IM_END), finished(FinishReason::Stop)]);
    let mut wide = model();
    wide.max_context_tokens = 256;
    let served = serve_model(wide, says(events)).await;
    let tool = json!({"type": "function", "function": {"name": "add"}});
    let asking = with(hello(), json!({"tools": [tool], "tool_choice": "auto"}));
    let json = post(&served, "/v1/chat/completions", &asking).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let message = &choice["message"];
    assert_eq!(
        (&message["content"], &message["reasoning_content"]),
        (&json!("I see."), &json!("hm"))
    );
    let call = &message["tool_calls"][0];
    assert_eq!(
        call["function"],
        json!({"name": "add", "arguments": "{\"a\":1}"})
    );
    assert_eq!(call["type"], "function");
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    let prompt = served.engine.submitted.lock().unwrap()[0].prompt.len();

    let ask = with(asking.clone(), json!({"stream": true}));
    let events = post(&served, "/v1/chat/completions", &ask).await.events();
    let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
    let calls: Vec<&Json> = deltas
        .filter_map(|delta| delta["tool_calls"].get(0))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(
        (&calls[0]["index"], &calls[0]["function"]),
        (&json!(0), &call["function"])
    );
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!(last["finish_reason"], "tool_calls");

    let free = served.engine.submitted.lock().unwrap().pop().unwrap();
    assert!(free.grammar.is_none());
    for (choice, several) in [
        (json!("required"), true),
        (json!("required"), false),
        (
            json!({"type": "function", "function": {"name": "add"}}),
            true,
        ),
    ] {
        let changes = json!({"tool_choice": choice, "parallel_tool_calls": several});
        let ask = with(asking.clone(), changes);
        let reply = post(&served, "/v1/chat/completions", &ask).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let sequence = served.engine.submitted.lock().unwrap().pop().unwrap();
        let begins = sequence.grammar.unwrap();
        assert!(begins.mask().contains(u32::from(b'<')));
        assert!(!begins.mask().contains(u32::from(b'I')));
    }
    let custom = with(asking.clone(), json!({"tool_choice": {"type": "custom"}}));
    let reply = post(&served, "/v1/chat/completions", &custom).await;
    assert_eq!(reply.json()["error"]["code"], "unsupported_parameter");
    // A model that is not told of tools calls none.
    for ask in [with(asking, json!({"tool_choice": "none"})), hello()] {
        let json = post(&served, "/v1/chat/completions", &ask).await.json();
        let choice = &json["choices"][0];
        assert_eq!(choice["finish_reason"], "stop");
        assert!(
            choice["message"]["content"]
                .as_str()
                .unwrap()
                .contains("<tool_call>")
        );
        let submitted = served.engine.submitted.lock().unwrap();
        assert!(submitted.last().unwrap().prompt.len() < prompt);
    }
}

#[tokio::test]
async fn a_template_without_tools_takes_none() {
    let files = files(Some("{{ messages[0].content }}"));
    let served = serve_model(
        model_with(Text::load(&files, VOCAB_SIZE).unwrap()),
        says(answer("x")),
    )
    .await;
    let tool = json!({"type": "function", "function": {"name": "add"}});
    for (tools, told) in [
        (json!([tool]), "the model's chat template writes no tools"),
        (json!([{"type": "function"}]), "a function that has a name"),
        (
            json!([{"type": "web", "function": {"name": "add"}}]),
            "is not of type function",
        ),
        (json!("add"), "is a string, not a list"),
    ] {
        let reply = post(
            &served,
            "/v1/chat/completions",
            &with(hello(), json!({"tools": tools})),
        )
        .await;
        assert_eq!(reply.status, 400, "{}", reply.body);
        let message = reply.json()["error"]["message"].to_string();
        assert!(message.contains(told), "{message}");
    }
}

#[tokio::test]
async fn an_answer_streams() {
    let served = serve(says(answer("hi é"))).await;
    let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = post(&served, "/v1/chat/completions", &with(hello(), stream)).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    assert_eq!(reply.headers["cache-control"], "no-cache");
    let events = reply.events();
    let first = &events[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(
        first["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "hi é");
    let [.., finish, usage] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!(finish["usage"], Json::Null);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 5);
    for event in &events {
        assert_eq!(event["id"], first["id"]);
        assert_eq!(event["created"], first["created"]);
    }
    // Without the option nobody hears of usage.
    let reply = post(
        &served,
        "/v1/chat/completions",
        &with(hello(), json!({"stream": true})),
    )
    .await;
    assert!(
        reply
            .events()
            .iter()
            .all(|event| event.get("usage").is_none())
    );
}

#[tokio::test]
async fn log_probabilities_have_tokens_bytes_and_rivals() {
    let events = vec![
        likely(259, -0.25, &[(259, -0.25), (0xc3, -2.0)]),
        finished(FinishReason::Length),
    ];
    let served = serve(says(events)).await;
    let ask = with(hello(), json!({"logprobs": true, "top_logprobs": 2}));
    let hello_token =
        json!({"token": "hello", "logprob": -0.25, "bytes": [104, 101, 108, 108, 111]});
    let half_token = json!({"token": "\u{fffd}", "logprob": -2.0, "bytes": [0xc3]});
    let entry = with(
        hello_token.clone(),
        json!({"top_logprobs": [hello_token, half_token]}),
    );
    let expected = json!({"content": [entry], "refusal": null});
    let reply = post(&served, "/v1/chat/completions", &ask).await;
    assert_eq!(reply.json()["choices"][0]["logprobs"], expected);
    assert_eq!(
        served.engine.submitted.lock().unwrap()[0].sampling.logprobs,
        Some(2)
    );
    let reply = post(
        &served,
        "/v1/chat/completions",
        &with(ask, json!({"stream": true})),
    )
    .await;
    let events = reply.events();
    let of = events.iter().map(|event| &event["choices"][0]["logprobs"]);
    assert_eq!(
        of.filter(|logprobs| !logprobs.is_null())
            .collect::<Vec<_>>(),
        [&expected]
    );
}

#[tokio::test]
async fn several_choices_have_seeds_of_their_own() {
    // Each says its own seed's last digit.
    let served = serve(|sequence, sender| {
        let digit = b'0' + (sequence.sampling.seed % 10) as u8;
        let _ = sender.send(token(digit.into()));
        let _ = sender.send(finished(FinishReason::Length));
        Ok(())
    })
    .await;
    let ask = with(hello(), json!({"n": 3, "seed": 7, "temperature": 1}));
    let json = post(&served, "/v1/chat/completions", &ask).await.json();
    let texts = |json: &Json| -> Vec<String> {
        let of = |choice: &Json| choice["message"]["content"].as_str().unwrap().to_owned();
        json["choices"].as_array().unwrap().iter().map(of).collect()
    };
    let seeds: Vec<u64> = {
        let submitted = served.engine.submitted.lock().unwrap();
        submitted
            .iter()
            .map(|sequence| sequence.sampling.seed)
            .collect()
    };
    assert_eq!((seeds.len(), seeds[0]), (3, 7));
    assert!(seeds[1] != seeds[2] && seeds[1] != 7);
    let digits: Vec<String> = seeds.iter().map(|seed| (seed % 10).to_string()).collect();
    assert_eq!(texts(&json), digits);
    assert_eq!(json["usage"]["completion_tokens"], 3);
    // The same request again, streamed, is the same answer.
    let events = post(
        &served,
        "/v1/chat/completions",
        &with(ask, json!({"stream": true})),
    )
    .await
    .events();
    let mut streamed = vec![String::new(); 3];
    for event in &events {
        let choice = &event["choices"][0];
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        streamed[choice["index"].as_u64().unwrap() as usize] += text;
    }
    assert_eq!(streamed, digits);
}

#[tokio::test]
async fn messages_reach_the_template() {
    let served = serve(says(answer("x"))).await;
    let ask = json!({
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "o"}]},
            {"role": "user", "content": "q", "name": "ann"},
            {"role": "assistant", "content": null, "reasoning_content": "r",
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
        ],
        "chat_template_kwargs": {"enable_thinking": false},
        "add_generation_prompt": false,
        "max_completion_tokens": 3,
    });
    let reply = post(&served, "/v1/chat/completions", &ask).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let sequence = served.engine.submitted.lock().unwrap()[0].clone();
    assert_eq!(sequence.max_tokens, 3);
    // What the template wrote, other endpoints tell.
    let tokens = post(
        &served,
        "/tokenize",
        &json!({
            "messages": ask["messages"], "chat_template_kwargs": ask["chat_template_kwargs"],
            "add_generation_prompt": false,
        }),
    )
    .await
    .json();
    let text = post(&served, "/detokenize", &json!({"tokens": tokens["tokens"]}))
        .await
        .json();
    assert_eq!(
        text["prompt"],
        "<|im_start|>system\nbe\no<|im_end|>\n<|im_start|>user\nq<|im_end|>\n\
         <|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nt<|im_end|>\nno thinking"
    );
}

#[tokio::test]
async fn hints_and_neutral_values_change_nothing() {
    let served = serve(says(answer("x"))).await;
    let more = json!({
        "model": null, "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto",
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "tools": [], "tool_choice": "none", "n": 1, "stop": null, "top_k": -1, "best_of": null,
        "an_unknown_field": 1,
    });
    let reply = post(&served, "/v1/chat/completions", &with(hello(), more)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(served.engine.submitted.lock().unwrap()[0].sampling.top_k, 0);
}
