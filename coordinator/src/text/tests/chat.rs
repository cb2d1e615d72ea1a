use std::fs;

use serde_json::json;

use crate::text::fixture::{VOCAB_SIZE, files, tokenizer_json};
use crate::text::template::{ChatInput, TemplateError};
use crate::text::{Text, TextError, TextFiles};

fn input() -> ChatInput {
    ChatInput {
        messages: vec![json!({"role": "user", "content": "Hi"})],
        ..ChatInput::default()
    }
}

fn load(files: &TextFiles) -> Text {
    Text::load(files, VOCAB_SIZE).unwrap()
}

#[test]
fn without_a_template_there_is_no_chat() {
    let text = load(&files(None));
    assert!(!text.has_chat_template());
    assert!(text.render_chat(&input()).is_none());
}

#[test]
fn a_template_of_its_own_file_wins() {
    let mut files = files(Some("config"));
    files.chat_template_json = Some(br#"{"chat_template": "json"}"#.to_vec());
    assert_eq!(
        load(&files).render_chat(&input()).unwrap().unwrap(),
        "config"
    );
    files.chat_template_jinja =
        Some(b"file {{ eos_token }}{{ pad_token }}{{ bos_token is defined }}".to_vec());
    assert_eq!(
        load(&files).render_chat(&input()).unwrap().unwrap(),
        "file <|im_end|><|endoftext|>False"
    );
    files.chat_template_jinja = None;
    files.tokenizer_config_json = None;
    assert_eq!(load(&files).render_chat(&input()).unwrap().unwrap(), "json");
}

#[test]
fn tools_choose_the_template_for_tools() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
        {"name": "rag", "template": "{% broken"},
    ]});
    let mut files = files(None);
    files.tokenizer_config_json = Some(config.to_string().into_bytes());
    let text = load(&files);
    assert_eq!(text.render_chat(&input()).unwrap().unwrap(), "plain");
    let with_tools = ChatInput {
        tools: Some(vec![json!({})]),
        ..input()
    };
    assert_eq!(text.render_chat(&with_tools).unwrap().unwrap(), "tools 1");
}

#[test]
fn a_broken_template_leaves_the_rest_usable() {
    let text = load(&files(Some("{% if %}")));
    assert!(text.has_chat_template());
    let error = text.chat_template_error().unwrap();
    assert!(
        error
            .to_string()
            .starts_with("chat template tokenizer_config.json does not parse: "),
        "{error}"
    );
    assert_eq!(&text.render_chat(&input()).unwrap().unwrap_err(), error);

    let config = json!({"chat_template": [{"name": "a", "template": "x"}]});
    let mut named = files(None);
    named.tokenizer_config_json = Some(config.to_string().into_bytes());
    assert_eq!(
        load(&named).chat_template_error(),
        Some(&TemplateError::NoDefault {
            file: "tokenizer_config.json".to_owned(),
            names: vec!["a".to_owned()],
        })
    );
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let with_config = |config: &[u8]| {
        let mut files = files(None);
        files.tokenizer_config_json = Some(config.to_vec());
        Text::load(&files, VOCAB_SIZE).unwrap_err().to_string()
    };
    assert!(with_config(b"{").starts_with("tokenizer_config.json: not JSON: "));
    assert_eq!(
        with_config(b"[]"),
        "tokenizer_config.json: not a JSON object"
    );
    for wrong in ["1", "[1]", r#"[{"name": "default"}]"#] {
        assert_eq!(
            with_config(format!(r#"{{"chat_template": {wrong}}}"#).as_bytes()),
            "tokenizer_config.json: chat_template is neither a text nor a list of {name, template}"
        );
    }
    let mut files = files(None);
    files.chat_template_jinja = Some(b"\xff".to_vec());
    let error = Text::load(&files, VOCAB_SIZE).unwrap_err().to_string();
    assert!(
        error.starts_with("chat_template.jinja: not UTF-8: "),
        "{error}"
    );
}

#[test]
fn reads_a_folder() {
    let folder = std::env::temp_dir().join(format!("secondwind-text-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let missing = TextFiles::read(&folder).unwrap_err();
    assert!(matches!(missing, TextError::Missing { .. }), "{missing}");
    fs::write(folder.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ 'x' }}").unwrap();
    let files = TextFiles::read(&folder).unwrap();
    assert_eq!(load(&files).render_chat(&input()).unwrap().unwrap(), "x");
    let huge = fs::File::create(folder.join("tokenizer.json")).unwrap();
    huge.set_len((64 << 20) + 1).unwrap();
    let too_large = TextFiles::read(&folder).unwrap_err().to_string();
    assert!(
        too_large.ends_with("tokenizer.json is larger than 67108864 bytes"),
        "{too_large}"
    );
    fs::remove_dir_all(&folder).unwrap();
}
