use serde_json::json;

use crate::text::fixture::{
    END_OF_TEXT, IM_END, THINK, UNUSED, VOCAB_SIZE, tokenizer, tokenizer_json,
};
use crate::text::tokenizer::{Tokenizer, TokenizerError};

/// What the Python `tokenizers` 0.23.3 gives for the same file.
#[test]
fn encodes_as_the_reference_does() {
    let tokenizer = tokenizer();
    let cases: &[(&str, &[u32])] = &[
        ("hello world", &[259, 262, 108, 100]),
        ("hello  worlds", &[259, 32, 262, 108, 100, 115]),
        (
            "he'LL  \n\n  x",
            &[256, 39, 76, 76, 263, 10, 10, 32, 32, 120],
        ),
        (
            "e\u{0301} \u{6f22}\u{1f600}",
            &[195, 169, 32, 230, 188, 162, 240, 159, 152, 128],
        ),
        (
            "<|im_start|>user\nhello<|im_end|>",
            &[265, 117, 115, 101, 114, 10, 259, 266],
        ),
        (
            "a <think>b</think>",
            &[97, 32, 267, 98, 60, 47, 116, 104, 105, 110, 107, 62],
        ),
        ("12 3!?\n", &[49, 50, 32, 51, 33, 63, 10]),
        ("   ", &[263, 32]),
        ("", &[]),
        (
            "\u{a0}hello\u{2028}hello",
            &[194, 160, 259, 226, 128, 168, 259],
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(
            &tokenizer.encode(text, false).unwrap(),
            expected,
            "{text:?}"
        );
    }
}

#[test]
fn decodes_to_the_byte() {
    let tokenizer = tokenizer();
    for byte in 0..=255_u8 {
        let id = (0..256).find(|&id| tokenizer.decode_token(id) == [byte]);
        assert_eq!(id, Some(u32::from(byte)), "byte {byte}");
    }
    assert_eq!(tokenizer.decode_token(259), b"hello");
    assert_eq!(tokenizer.decode_token(THINK), b"<think>");
    assert_eq!(tokenizer.decode_token(UNUSED), b"");
    assert_eq!(tokenizer.decode_token(u32::MAX), b"");
    assert!(tokenizer.is_special(IM_END) && !tokenizer.is_special(THINK));
    assert_eq!(tokenizer.special_token("<|endoftext|>"), Some(END_OF_TEXT));
    assert_eq!(tokenizer.special_token("<think>"), None);
    assert_eq!(tokenizer.token_text(0xe9), "\u{fffd}");
    assert_eq!(tokenizer.token_count(), 268);
    assert_eq!(tokenizer.max_token_bytes(), 13);

    let text = "hello <think>wörld😀\n";
    let mut ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), text);
    ids.push(IM_END);
    assert_eq!(tokenizer.decode(&ids, true), text);
    assert_eq!(tokenizer.decode(&ids, false), format!("{text}<|im_end|>"));
}

#[test]
fn a_long_run_of_anything_is_encoded_like_a_short_one() {
    let tokenizer = tokenizer();
    for (piece, tail) in [(" ", "x"), ("a", ""), ("\n ", "x"), ("!", "\n"), ("7", "")] {
        let text = piece.repeat(400_000) + tail;
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
        // The last space belongs to the word behind it, however far away the run began.
        let short = tokenizer.encode(&(piece.repeat(40) + tail), false).unwrap();
        assert_eq!(ids[ids.len() - 2..], short[short.len() - 2..], "{piece:?}");
    }
}

#[test]
fn files_that_cannot_be_used_are_refused() {
    let load = |json: &serde_json::Value, vocab_size: usize| {
        Tokenizer::from_json(json.to_string().as_bytes(), vocab_size).map(drop)
    };
    let mut json = tokenizer_json();
    assert_eq!(load(&json, 268), Ok(()));
    assert_eq!(
        load(&json, 267).unwrap_err().to_string(),
        "tokenizer.json has token \"<think>\" with id 267, but the model's vocabulary has 267 tokens"
    );
    json["decoder"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    assert_eq!(
        load(&json, VOCAB_SIZE).unwrap_err().to_string(),
        "tokenizer.json has a Metaspace decoder; only byte-level tokenizers are served"
    );
    json["decoder"] = json!(null);
    assert!(matches!(
        load(&json, VOCAB_SIZE),
        Err(TokenizerError::NotByteLevel { .. })
    ));
    for bytes in [&b""[..], b"{}", b"[]", b"\xff", b"{\"model\": {}}"] {
        let error = Tokenizer::from_json(bytes, VOCAB_SIZE).unwrap_err();
        assert!(matches!(error, TokenizerError::Unusable { .. }), "{error}");
    }
}

#[test]
fn truncation_and_padding_of_the_file_do_not_apply() {
    let mut json = tokenizer_json();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 264, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), VOCAB_SIZE).unwrap();
    assert_eq!(tokenizer.encode("abcd", true).unwrap(), [97, 98, 99, 100]);
}
