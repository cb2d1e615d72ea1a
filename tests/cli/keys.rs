//! API keys from their making to their use, and what the log says of their users.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
};

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{USAGE, daemons::Guard, http::http_with, refuses, run, secondwind, stderr, stdout};

/// Draws a key; itself and its table.
fn new_key(arguments: &[&str]) -> (String, String) {
    let output = run(&[&["key", "new"], arguments].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let told = stdout(&output);
    let (key, table) = told.split_once("\n\n").unwrap();
    assert!(!table.contains(key), "{told}");
    (key.to_owned(), table.to_owned())
}

fn write(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

fn with_key(address: &str, method: &str, path: &str, key: &str, body: &str) -> (u16, String) {
    let header = format!("Authorization: Bearer {key}\r\n");
    http_with(address, method, path, &header, body)
}

#[test]
fn a_key_that_was_made_opens_a_coordinator_that_has_its_table() {
    let (ann, table) = new_key(&["ann"]);
    let (root, of_root) = new_key(&["root", "--role", "admin"]);
    let more = write(&of_root);
    let file = write(&format!(
        "[coordinator]\nmodel = \"builtin\"\nworld_size = 1\nlisten = \"127.0.0.1:0\"\n\
         cluster_listen = \"127.0.0.1:0\"\napi_keys_file = {:?}\n\n{table}",
        more.path()
    ));
    let config = file.path().to_str().unwrap();
    let mut coordinator = Guard::start(&["coordinator", "--config", config]);
    let line = coordinator.first_line();
    let addresses = line.strip_prefix("listening client=").unwrap();
    let (client, _) = addresses.split_once(" cluster=").unwrap();

    assert_eq!(http_with(client, "GET", "/health", "", "").0, 200);
    let (status, body) = http_with(client, "GET", "/v1/models", "", "");
    assert_eq!(status, 401, "{body}");
    for (key, models, metrics) in [
        (ann.as_str(), 200, 403),
        (&root, 200, 200),
        ("none", 401, 401),
    ] {
        assert_eq!(with_key(client, "GET", "/v1/models", key, "").0, models);
        assert_eq!(with_key(client, "GET", "/metrics", key, "").0, metrics);
    }
    let generate = |key: &str| {
        let arguments = ["generate", "--endpoint", client, "--prompt", "a"];
        let output = secondwind(&arguments)
            .env("SECONDWIND_API_KEY", key)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    assert!(generate("").contains("UNAUTHENTICATED"));
    // Let in, and no worker is there.
    assert!(generate(&ann).contains("UNAVAILABLE"));

    let mut stderr = coordinator.0.stderr.take().unwrap();
    assert_eq!(coordinator.end("-TERM"), Some(0));
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    assert!(
        log.contains("tenant=\"ann\"") && log.contains("status=401"),
        "{log}"
    );
    for key in [&ann, &root] {
        assert!(!log.contains(key.as_str()), "a key stands in the log");
    }
}

#[test]
fn one_request_can_be_followed_and_nobodys_words_are_in_the_log() {
    for log_prompts in [false, true] {
        let (ann, table) = new_key(&["ann"]);
        let settings = format!("[coordinator]\nlog_prompts = {log_prompts}\n\n{table}");
        let file = write(&settings);
        let config = file.path().to_str().unwrap();
        let arguments = [
            "demo",
            "--serve",
            "--listen",
            "127.0.0.1:0",
            "--threads",
            "1",
        ];
        let more = ["--prompt", "Hi", "--max-tokens", "1", "--config", config];
        let log = ["--log-level", "debug", "--log-format", "json"];
        let mut command = secondwind(&[&arguments[..], &more, &log].concat());
        let command = command.env("SECONDWIND_API_KEY", &ann);
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut demo = Guard(command.spawn().unwrap());
        let mut stderr = demo.0.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            stderr.read_to_string(&mut log).unwrap();
            log
        });
        let mut lines = BufReader::new(demo.0.stdout.take().unwrap()).lines();
        let line = lines
            .find_map(|line| Some(line.unwrap().strip_prefix("serving at ")?.to_owned()))
            .expect("the demo serves");
        let (endpoint, _) = line.split_once(';').unwrap();

        let words = "What is 345 + 278?";
        let messages = json!([{"role": "user", "content": words}]);
        let ask = json!({"messages": messages, "temperature": 0, "n": 2}).to_string();
        let headers = format!("Authorization: Bearer {ann}\r\nX-Request-Id: call-7\r\n");
        let path = "/v1/chat/completions";
        let (status, answer) = http_with(endpoint, "POST", path, &headers, &ask);
        assert_eq!(status, 200, "{answer}");
        let usage: Value = serde_json::from_str(&answer).unwrap();
        let usage = &usage["usage"];
        assert_eq!(demo.end("-TERM"), Some(0));
        let log = log.join().unwrap();
        let lines: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let find = |message: &str| {
            let of = |line: &&Value| {
                let fields = &line["fields"];
                fields["request_id"] == "call-7" && fields["message"] == message
            };
            lines
                .iter()
                .filter(of)
                .map(|it| &it["fields"])
                .collect::<Vec<_>>()
        };
        let [line] = find("request")[..] else {
            panic!("not one line:\n{log}");
        };
        assert_eq!(line["tenant"], "ann");
        assert_eq!(
            (&line["status"], &line["end"]),
            (&json!(200), &json!("complete"))
        );
        assert_eq!(line["model"], "builtin");
        assert_eq!(line["completion_tokens"], usage["completion_tokens"]);
        assert_eq!(line["finish"], "stop");
        for field in ["queue_ms", "first_token_ms", "ms", "cached_prompt_tokens"] {
            assert!(line[field].is_u64(), "{field}: {line}");
        }
        // The sequences' numbers, by which step loop and workers call them.
        let queued: Vec<String> = find("queued")
            .iter()
            .map(|it| it["sequence"].to_string())
            .collect();
        assert_eq!(
            (queued.len(), line["sequences"].as_str()),
            (2, Some(queued.join(",").as_str()))
        );
        assert_eq!(log.contains(words), log_prompts, "{log}");
        assert_eq!(log.contains("log_prompts is on"), log_prompts);
        assert!(!log.contains("345 + 278 = 623"), "{log}");
    }
}

#[test]
fn every_mistake_in_a_table_of_a_key_is_told() {
    let hash = format!("sha256:{}", "0".repeat(64));
    let file = write(&format!(
        "[coordinator]\nmodel = \"builtin\"\nworld_size = 1\n\
         [[api_key]]\nname = \"ann\"\nhash = \"{hash}\"\n\
         [[api_key]]\nname = \"ann\"\nhash = \"{hash}\"\nrole = \"boss\"\n\
         [[api_key]]\nkey = \"secret-of-bob\"\nnmae = \"bob\"\n\
         [[api_key]]\nname = \"a b\"\nhash = \"secret-of-ann\"\nrole = 1\n\
         [[api_key]]\nname = \"eve\"\nhash = \"{hash}\"\n"
    ));
    let config = file.path().to_str().unwrap();
    let at = |line: usize| format!("{config}:{line}: api_key");
    let words = [
        format!("{}[1].role: \"boss\" is not user or admin", at(10)),
        format!("{}[2].key: keys do not stand in files", at(12)),
        format!("{}[2].nmae: is unknown; did you mean `name`?", at(13)),
        format!("{}[2]: `hash` is missing", at(11)),
        format!("{}[3].name: \"a b\" is not 1 to 64", at(15)),
        format!("{}[3].hash: is not `sha256:` and 64 hex digits", at(16)),
        format!("{}[3].role: is not text", at(17)),
        format!("{} \"eve\": its hash stands at {config}:4 already", at(18)),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    refuses(&["coordinator", "--config", config], USAGE, &words);
    let told = stderr(&run(&["coordinator", "--config", config]));
    assert!(!told.contains("secret-of"), "{told}");

    let one = write("[api_key]\nname = \"ann\"\n");
    let config = one.path().to_str().unwrap();
    refuses(
        &["demo", "--config", config],
        USAGE,
        &["write `[[api_key]]`"],
    );
    refuses(&["key", "new", "a b"], USAGE, &["NAME \"a b\""]);
    refuses(&["key", "new", "ann", "--role", "boss"], USAGE, &["boss"]);
    let more = write("[log]\nlevel = \"info\"\n");
    let path = more.path().to_str().unwrap();
    let base = [
        "coordinator",
        "--model",
        "builtin",
        "--world-size",
        "1",
        "--api-keys-file",
    ];
    refuses(
        &[&base[..], &[path]].concat(),
        USAGE,
        &["holds more than `[[api_key]]`"],
    );
    refuses(
        &[&base[..], &["/no/such"]].concat(),
        USAGE,
        &["cannot read /no/such"],
    );
}
