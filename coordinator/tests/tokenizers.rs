//! Real tokenizers give what the Python `tokenizers` library gives.

use std::fs;
use std::path::{Path, PathBuf};

use secondwind_coordinator::text::decode::StreamDecoder;
use secondwind_coordinator::text::{Text, TextFiles};
use serde_json::Value as Json;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read_json(path: &Path) -> Json {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn load(folder: &Path) -> Text {
    let vocab_size = read_json(&folder.join("config.json"))["vocab_size"].as_u64();
    let files = TextFiles::read(folder).unwrap();
    Text::load(&files, vocab_size.unwrap() as usize).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json["ids"].clone()).unwrap()
}

#[test]
fn texts_and_ids_are_those_of_the_reference() {
    let files = read_json(&root().join("tests/golden/tokenizer_cases.json"));
    let files = files.as_array().unwrap();
    assert!(!files.is_empty());
    for file in files {
        let path = root().join(file["tokenizer"].as_str().unwrap());
        let text = load(path.parent().unwrap());
        let tokenizer = text.tokenizer();
        let cases = file["cases"].as_array().unwrap();
        assert!(!cases.is_empty());
        for case in cases {
            let ids = ids(case);
            let encoded = tokenizer.encode(case["text"].as_str().unwrap(), false);
            assert_eq!(encoded.as_ref(), Ok(&ids), "{case}");
            assert_eq!(case["decoded"], tokenizer.decode(&ids, false), "{case}");
            let without_special = &case["decoded_without_special"];
            assert_eq!(*without_special, tokenizer.decode(&ids, true), "{case}");

            let mut stream = StreamDecoder::new(tokenizer.clone(), Vec::new());
            let pieces: String = ids.iter().map(|&id| stream.push(id).text).collect();
            assert_eq!(*without_special, pieces + &stream.finish().text, "{case}");
        }
        for case in file["partial"].as_array().unwrap() {
            assert_eq!(
                case["decoded"],
                tokenizer.decode(&ids(case), false),
                "{case}"
            );
        }
    }
}

/// Tokenizer and template as GPTQModel writes them.
#[test]
fn text_files_of_real_checkpoints_load() {
    let folder = root().join("tests/golden/checkpoints");
    let mut checkpoints = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let folder = entry.unwrap().path();
        if folder.join("tokenizer.json").exists() {
            checkpoints += 1;
            assert_eq!(
                load(&folder).chat_template_error(),
                None,
                "{}",
                folder.display()
            );
        }
    }
    assert!(checkpoints > 0);
}
