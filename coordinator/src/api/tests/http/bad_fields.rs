//! Every field of a request, wrong in every way.

use serde_json::{Value as Json, json};

use super::errors::{CHAT, TEXT, asking};
use super::{answer, post, says, serve};

#[tokio::test]
async fn every_bad_field_is_named() {
    let chat = |changes| (CHAT, asking(CHAT, changes));
    let text = |changes| (TEXT, asking(TEXT, changes));
    let message =
        |message: Json| chat(json!({"messages": [{"role": "user", "content": "a"}, message]}));
    let cases = [
        (chat(json!({"messages": null})), "messages: is missing"),
        (chat(json!({"messages": []})), "messages: is empty"),
        (
            chat(json!({"messages": "hi"})),
            "messages: is a string, not a list",
        ),
        (
            message(json!("hi")),
            "messages[1]: is a string, not an object",
        ),
        (
            message(json!({"content": "b"})),
            "messages[1].role: is missing",
        ),
        (
            message(json!({"role": "robot", "content": "b"})),
            "messages[1].role: \"robot\" is none of system, developer, user, assistant, tool",
        ),
        (
            message(json!({"role": "user"})),
            "messages[1].content: is missing",
        ),
        (
            message(json!({"role": "user", "content": 1})),
            "messages[1].content: is a number, not a string or a list of parts",
        ),
        (
            message(
                json!({"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {}}]}),
            ),
            "messages[1].content[1].type: \"image_url\" is not supported; a part is of type text",
        ),
        (
            message(json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]})),
            "messages[1].tool_calls[0].function.arguments: is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            message(json!({"role": "assistant", "tool_calls": [{}]})),
            "messages[1].tool_calls[0]: has no function with arguments",
        ),
        (
            chat(json!({"chat_template_kwargs": {"messages": []}})),
            "chat_template_kwargs: \"messages\" cannot be set; use the messages of the chat",
        ),
        (
            chat(json!({"response_format": "json"})),
            "response_format: is a string, not an object",
        ),
        (
            chat(json!({"response_format": {}})),
            "response_format.type: is missing",
        ),
        (
            chat(json!({"response_format": {"type": "yaml"}})),
            "response_format.type: \"yaml\" is none of text, json_object, json_schema",
        ),
        (
            chat(json!({"response_format": {"type": "json_schema"}})),
            "response_format.json_schema: is missing",
        ),
        (
            chat(json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}})),
            "response_format.json_schema.schema: is missing",
        ),
        (
            chat(
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
            ),
            "response_format.json_schema.schema: Invalid type: x",
        ),
        (
            chat(
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
            ),
            "structured_outputs: cannot be had together with response_format",
        ),
        (
            text(json!({"structured_outputs": {}})),
            "structured_outputs: has none of json, json_object, regex, choice, grammar",
        ),
        (
            text(json!({"structured_outputs": {"regex": "a", "choice": ["b"]}})),
            "structured_outputs.choice: cannot be had together with structured_outputs.regex",
        ),
        (
            text(json!({"structured_outputs": {"choice": ["b", 1]}})),
            "structured_outputs.choice[1]: is a number, not a string",
        ),
        (
            text(json!({"structured_outputs": {"choice": []}})),
            "structured_outputs.choice: has nothing to choose",
        ),
        (
            text(json!({"structured_outputs": {"regex": "a".repeat(200_000)}})),
            "structured_outputs.regex: has 200000 bytes; at most 131072 are taken",
        ),
        (
            text(json!({"structured_outputs": {"json": "{"}})),
            "structured_outputs.json: is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            text(json!({"structured_outputs": {"json_object": true}, "min_tokens": 2})),
            "min_tokens: 2 is not 0, which is all that an answer with a shape can take: the shape says when it may end",
        ),
        (
            chat(json!({"tool_choice": "required"})),
            "tool_choice: there are no tools to call",
        ),
        (
            chat(json!({
                "tool_choice": {"type": "function", "function": {"name": "g"}},
                "tools": [{"type": "function", "function": {"name": "f"}}],
            })),
            "tool_choice: no tool is called \"g\"",
        ),
        (
            chat(json!({"tool_choice": 1})),
            "tool_choice: is a number, not a string or an object",
        ),
        (
            chat(json!({"chat_template_kwargs": 1})),
            "chat_template_kwargs: is a number, not an object",
        ),
        (
            chat(json!({"temperature": "hot"})),
            "temperature: is a string, not a number",
        ),
        (
            chat(json!({"temperature": -0.5})),
            "temperature: -0.5 is not between 0 and 100",
        ),
        (
            chat(json!({"temperature": 1e300})),
            "temperature: inf is not between 0 and 100",
        ),
        (
            chat(json!({"top_p": 0})),
            "top_p: 0 is not above 0 and at most 1",
        ),
        (
            chat(json!({"top_p": true})),
            "top_p: is true or false, not a number",
        ),
        (chat(json!({"min_p": 2})), "min_p: 2 is not between 0 and 1"),
        (
            chat(json!({"top_k": -2})),
            "top_k: -2 is not a whole number from -1 to 4294967295",
        ),
        (
            chat(json!({"top_k": 1.5})),
            "top_k: 1.5 is not a whole number from -1 to 4294967295",
        ),
        (
            chat(json!({"seed": 1e30})),
            "seed: 1e+30 is not a whole number from -9223372036854775808 to 9223372036854775807",
        ),
        (
            chat(json!({"max_tokens": -1})),
            "max_tokens: -1 is not a whole number from 0 to 4294967295",
        ),
        (
            chat(json!({"max_tokens": 0})),
            "max_tokens: 0 is not at least 1, which only prompt_logprobs can do without",
        ),
        (
            chat(json!({"max_tokens": 1, "max_completion_tokens": 2})),
            "max_tokens: differs from max_completion_tokens; give one of them",
        ),
        (
            chat(json!({"timeout": 0})),
            "timeout: 0 is not a number of seconds above 0",
        ),
        (
            chat(json!({"timeout": 1e300})),
            "timeout: inf is not a number of seconds above 0",
        ),
        (
            text(json!({"priority": 128})),
            "priority: 128 is not from -127 to 127",
        ),
        (
            chat(json!({"priority": "high"})),
            "priority: is a string, not a whole number",
        ),
        (
            chat(json!({"cache_salt": ""})),
            "cache_salt: a text of 0 bytes is not one of 1 to 1024",
        ),
        (
            chat(json!({"n": 0})),
            "n: 0 is not a whole number from 1 to 128",
        ),
        (
            chat(json!({"n": 1000000000})),
            "n: 1000000000 is not a whole number from 1 to 128",
        ),
        (
            chat(json!({"stop": [1]})),
            "stop[0]: is a number, not a string",
        ),
        (
            chat(json!({"stop": {}})),
            "stop: is an object, not a string or a list of strings",
        ),
        (
            chat(json!({"stop": ["a", ""]})),
            "stop[1]: the stop string is empty",
        ),
        (
            chat(json!({"stop": vec!["a"; 17]})),
            "stop: 17 entries; at most 16 are taken",
        ),
        (
            chat(json!({"stop_token_ids": [0, 320]})),
            "stop_token_ids[1]: token id 320 is not below the vocabulary size 320",
        ),
        (
            chat(json!({"stop_token_ids": [-1]})),
            "stop_token_ids[0]: -1 is not a token id",
        ),
        (
            chat(json!({"presence_penalty": 3})),
            "presence_penalty: 3 is not between -2 and 2",
        ),
        (
            chat(json!({"repetition_penalty": 0})),
            "repetition_penalty: 0 is not between 0.01 and 100",
        ),
        (
            chat(json!({"typical_p": 0})),
            "typical_p: 0 is not above 0 and at most 1",
        ),
        (
            chat(json!({"min_tokens": 2, "max_tokens": 1})),
            "min_tokens: 2 is not at most max_tokens, which is 1",
        ),
        (
            chat(json!({"logit_bias": [1]})),
            "logit_bias: is a list, not an object",
        ),
        (
            chat(json!({"logit_bias": {"a": 1}})),
            "logit_bias.a: is not named by a token id",
        ),
        (
            chat(json!({"logit_bias": {"1": "x"}})),
            "logit_bias.1: is a string, not a number",
        ),
        (
            chat(json!({"logit_bias": {"320": 1}})),
            "logit_bias[320]: token id 320 is not below the vocabulary size 320",
        ),
        (
            chat(json!({"logprobs": 1})),
            "logprobs: is a number, not true or false",
        ),
        (
            chat(json!({"top_logprobs": 1})),
            "top_logprobs: is only for requests with logprobs",
        ),
        (
            chat(json!({"logprobs": true, "top_logprobs": 21})),
            "top_logprobs: 21 is not at most 20",
        ),
        (
            chat(json!({"stream": "yes"})),
            "stream: is a string, not true or false",
        ),
        (
            chat(json!({"stream_options": {"include_usage": true}})),
            "stream_options: is only for requests with stream",
        ),
        (
            chat(json!({"stream": true, "stream_options": {"include_usage": 1}})),
            "stream_options.include_usage: is a number, not true or false",
        ),
        (
            chat(json!({"model": 1})),
            "model: is a number, not a string",
        ),
        (text(json!({"prompt": null})), "prompt: is missing"),
        (text(json!({"prompt": ""})), "prompt: the prompt is empty"),
        (text(json!({"prompt": []})), "prompt: is empty"),
        (
            text(json!({"prompt": [[]]})),
            "prompt[0]: the prompt is empty",
        ),
        (
            text(json!({"prompt": ["a", ""]})),
            "prompt[1]: the prompt is empty",
        ),
        (
            text(json!({"prompt": {}})),
            "prompt: is an object, not a string, a list of strings, token ids, or a list of lists of them",
        ),
        (
            text(json!({"prompt": ["a", 1]})),
            "prompt[1]: is a number, not a string like the first",
        ),
        (
            text(json!({"prompt": [[1], "a"]})),
            "prompt[1]: is a string, not a list of token ids",
        ),
        (
            text(json!({"prompt": [1, -2]})),
            "prompt[1]: -2 is not a token id",
        ),
        (
            text(json!({"prompt": [1, 2.5]})),
            "prompt[1]: 2.5 is not a token id",
        ),
        (
            text(json!({"prompt": [1, "a"]})),
            "prompt[1]: is a string, not a token id",
        ),
        (
            text(json!({"prompt": [1, 320]})),
            "prompt[1]: token id 320 is not below the vocabulary size 320",
        ),
        (
            text(json!({"prompt": [[1], [2, 4294967295_u32]]})),
            "prompt[1][1]: token id 4294967295 is not below the vocabulary size 320",
        ),
        (
            text(json!({"prompt": vec!["a"; 65], "n": 2})),
            "prompt: 65 prompts with n = 2 are 130 answers; at most 128 are given at once",
        ),
        (
            text(json!({"max_tokens": 0})),
            "max_tokens: 0 is only for requests with echo",
        ),
        (
            text(json!({"logprobs": true})),
            "logprobs: is true or false, not a whole number",
        ),
        (
            text(json!({"logprobs": 21})),
            "logprobs: 21 is not at most 20",
        ),
        (
            ("/tokenize", json!({"prompt": 1})),
            "prompt: is a number, not a string",
        ),
        (("/tokenize", json!({"messages": []})), "messages: is empty"),
        (("/detokenize", json!({})), "tokens: is missing"),
        (
            ("/detokenize", json!({"tokens": [320]})),
            "tokens[0]: token id 320 is not below the vocabulary size 320",
        ),
    ];
    let served = serve(says(answer("x"))).await;
    for ((path, ask), message) in cases {
        let reply = post(&served, path, &ask).await;
        assert_eq!(reply.status, 400, "{message}: {}", reply.body);
        let error = &reply.json()["error"];
        assert_eq!(error["message"], message);
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"].as_str(), message.split(": ").next());
        assert_eq!(error["code"], "invalid_value");
    }
    assert!(served.engine.submitted.lock().unwrap().is_empty());
}
