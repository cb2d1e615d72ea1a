//! Chat templates render byte for byte as `transformers` renders them.

use std::fs;
use std::path::{Path, PathBuf};

use secondwind_coordinator::text::template::{
    ChatInput, ChatTemplate, Limits, TemplateError, fuzz,
};
use serde_json::{Map, Value as Json, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    entries
}

fn object(json: &Json) -> Map<String, Json> {
    json.as_object().cloned().unwrap_or_default()
}

/// Real templates over chats with system prompts, tools, tool results and reasoning.
#[test]
fn real_templates_render_as_transformers_does() {
    let folder = root().join("tests/golden/chat_templates");
    let cases = fs::read_to_string(folder.join("cases.json"))
        .unwrap_or_else(|error| panic!("{}/cases.json: {error}", folder.display()));
    let cases: Json = serde_json::from_str(&cases).unwrap();
    let cases = cases.as_array().expect("cases.json is a list");
    assert!(!cases.is_empty());

    // Those of the tokenizer that the cases were made with.
    let special_tokens = object(&json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}));
    let mut rendered = Vec::new();
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let file = match name.strip_suffix(".jinja") {
            Some(_) => folder.join(name),
            None => folder.join(format!("{name}.jinja")),
        };
        let source = fs::read_to_string(&file).unwrap();
        let template = ChatTemplate::compile(name, &source, Limits::default()).unwrap();
        let input = ChatInput {
            messages: case["messages"].as_array().unwrap().clone(),
            tools: case["tools"].as_array().cloned(),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(false),
            variables: object(&case["kwargs"]),
        };
        let text = template.render(&special_tokens, &input);
        rendered.push(file);
        let expected = case.get("expected").unwrap_or(&case["error"]);
        let refused = case.get("error").is_some();
        match (&text, expected.as_str()) {
            (Ok(text), Some(expected)) if !refused && text == expected => {}
            (Err(TemplateError::Raised { message, .. }), Some(expected))
                if refused && message == expected => {}
            _ => wrong.push(format!(
                "{case}\n  rendered {text:?}\n  expected {expected}"
            )),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let untested = entries(&folder)
        .into_iter()
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jinja")
        })
        .find(|path| !rendered.contains(path));
    assert_eq!(untested, None, "a template without a case");
}

/// What the fuzz target does, over its committed seeds.
#[test]
fn fuzz_seeds_end_with_a_text_or_an_error() {
    let seeds = entries(&root().join("fuzz/seeds/chat_template"));
    assert!(!seeds.is_empty());
    for seed in seeds {
        fuzz(&fs::read(seed).unwrap());
    }
}
