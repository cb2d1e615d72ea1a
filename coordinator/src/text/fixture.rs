//! A small byte-level tokenizer with Qwen's pre-tokenizer, and a ChatML template, for tests.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::tokenizer::Tokenizer;
use super::{Text, TextFiles};

/// Logits of the model that goes with it: more than there are tokens, as Qwen has it.
pub const VOCAB_SIZE: usize = 320;
/// `<|endoftext|>`.
pub const END_OF_TEXT: u32 = 264;
/// `<|im_start|>`.
pub const IM_START: u32 = 265;
/// `<|im_end|>`.
pub const IM_END: u32 = 266;
/// `<think>`, added but not special.
pub const THINK: u32 = 267;
/// An id without a token.
pub const UNUSED: u32 = 319;

/// Pieces that are merged, in order.
const MERGES: [(&str, &str); 8] = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("Ġ", "Ġ"),
];

/// ChatML with tools, as short as it gets.
pub const CHAT_TEMPLATE: &str = "{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ 'no thinking' }}{% endif %}
{%- if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}
{%- if messages[0].role == 'endless' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}";

/// GPT-2's alphabet: the character that stands for each byte.
fn alphabet() -> Vec<char> {
    let mut spare = 0x100..;
    (0..=0xff_u32)
        .map(|byte| match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte,
            _ => spare.next().unwrap(),
        })
        .map(|code| char::from_u32(code).unwrap())
        .collect()
}

/// `tokenizer.json`.
pub fn tokenizer_json() -> Json {
    let mut vocab = Map::new();
    for (id, c) in alphabet().into_iter().enumerate() {
        vocab.insert(c.to_string(), json!(id));
    }
    for (at, (left, right)) in MERGES.iter().enumerate() {
        vocab.insert(format!("{left}{right}"), json!(256 + at));
    }
    let mut merges = Vec::new();
    for (left, right) in MERGES {
        let mut merge = String::new();
        write!(merge, "{left} {right}").unwrap();
        merges.push(merge);
    }
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [
            added(END_OF_TEXT, "<|endoftext|>", true),
            added(IM_START, "<|im_start|>", true),
            added(IM_END, "<|im_end|>", true),
            added(THINK, "<think>", false),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
             "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

/// Files of a checkpoint with `template` for its chat template.
pub fn files(template: Option<&str>) -> TextFiles {
    let mut config = json!({"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "bos_token": null});
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
    TextFiles {
        tokenizer_json: tokenizer_json().to_string().into_bytes(),
        tokenizer_config_json: Some(config.to_string().into_bytes()),
        ..TextFiles::default()
    }
}

/// Tokenizer and ChatML template.
pub fn text() -> Text {
    Text::load(&files(Some(CHAT_TEMPLATE)), VOCAB_SIZE).unwrap()
}

/// The tokenizer alone.
pub fn tokenizer() -> Arc<Tokenizer> {
    Arc::clone(text().tokenizer())
}
