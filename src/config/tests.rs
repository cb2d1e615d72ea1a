//! Layers against each other, and many mistakes at once.

use std::{fs, path::Path};

use super::*;

fn request(file: Option<&Path>, flags: &[(&str, &str, &str)]) -> Request {
    let mut layer = Layer::new("flags");
    for (section, key, value) in flags {
        layer.set(
            section,
            key,
            *value,
            Origin::Flag(format!("--{}", key.replace('_', "-"))),
        );
    }
    Request {
        file: file.map(Into::into),
        daemon: false,
        sections: &[Section::Coordinator],
        defaults: Layer::new("command"),
        flags: layer,
    }
}

fn variables(list: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    list.iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

fn write(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

const NEEDED: [(&str, &str, &str); 2] = [
    ("coordinator", "model", "builtin"),
    ("coordinator", "world_size", "2"),
];

#[test]
fn later_layers_win() {
    let file = write("[coordinator]\nmax_waiting = 1\nmax_sequences = 1\nmax_step_tokens = 1\n");
    let mut flags = NEEDED.to_vec();
    flags.push(("coordinator", "max_step_tokens", "3"));
    let environment = variables(&[
        ("SECONDWIND_COORDINATOR_MAX_SEQUENCES", "2"),
        ("SECONDWIND_COORDINATOR_MAX_STEP_TOKENS", "2"),
    ]);
    let config = load_from(request(Some(file.path()), &flags), environment).unwrap();
    assert_eq!(
        config.integer("coordinator.max_waiting"),
        Some(1),
        "the file beats the default"
    );
    assert_eq!(
        config.integer("coordinator.max_sequences"),
        Some(2),
        "the environment beats the file"
    );
    assert_eq!(
        config.integer("coordinator.max_step_tokens"),
        Some(3),
        "the flag beats the environment"
    );
    assert_eq!(
        config.text("coordinator.kv_dtype").as_deref(),
        Some("f32"),
        "the default stays"
    );
}

#[test]
fn a_file_alone_suffices() {
    let file = write(
        "[coordinator]\nmodel = \"builtin\"\nworld_size = 2\nsplit = [3, 1.5]\nmemory_reserve = \"2GiB\"\n\
         stop_timeout = \"5s\"\n[log]\nlevel = \"debug\"\n",
    );
    let config = load_from(request(Some(file.path()), &[]), []).unwrap();
    assert_eq!(config.shares("coordinator.split"), Some(vec![3.0, 1.5]));
    assert_eq!(config.bytes("coordinator.memory_reserve"), Some(2 << 30));
    assert_eq!(
        config.duration("coordinator.stop_timeout"),
        Some(Duration::from_secs(5))
    );
    assert_eq!(config.text("log.level").as_deref(), Some("debug"));
}

#[test]
fn every_mistake_is_named_with_its_source() {
    let file = write(concat!(
        "listen = \"127.0.0.1:1\"\n",
        "[coordinator]\n",
        "word_size = 2\n",
        "max_waiting = \"many\"\n",
        "threads = 2\n",
        "[worker]\n",
        "memory = \"2G\"\n",
        "[loging]\n",
        "level = \"info\"\n",
    ));
    let environment = variables(&[
        ("SECONDWIND_COORDINATOR_LISTN", "127.0.0.1:0"),
        ("SECONDWIND_WORKER_THREADS", "all"),
    ]);
    let flags = [
        ("coordinator", "world_size", "0"),
        ("coordinator", "model", "/nowhere/at/all"),
    ];
    let error = load_from(request(Some(file.path()), &flags), environment).unwrap_err();
    let text = format!("{error}");
    let at = |line: usize, words: &str| format!("{}:{line}: {words}", file.path().display());
    for expected in [
        at(1, "`listen` stands outside a table; it belongs under `[coordinator]`"),
        at(3, "unknown key `coordinator.word_size`; did you mean `world_size`?"),
        at(4, "coordinator.max_waiting: \"many\" is not a whole number"),
        at(5, "unknown key `coordinator.threads`; it belongs under `[worker]`"),
        at(7, "worker.memory: \"2G\" is not a size"),
        at(8, "unknown table `[loging]`; did you mean `[log]`?"),
        "SECONDWIND_COORDINATOR_LISTN: sets no known key; did you mean `SECONDWIND_COORDINATOR_LISTEN`?".into(),
        "SECONDWIND_WORKER_THREADS: worker.threads: `all` is not a whole number from 1 to 1024".into(),
        "--world-size: coordinator.world_size: `0` is not a whole number from 1 to 1024".into(),
        "--model: model `/nowhere/at/all`: ".into(),
    ] {
        assert!(text.contains(&expected), "missing: {expected}\nin:\n{text}");
    }
    assert!(text.contains("10 mistakes"), "{text}");
}

#[test]
fn syntax_errors_carry_their_line_and_hide_nothing() {
    let file = write("[coordinator]\nmodel = builtin\nworld_size = 0\n");
    let text = load_from(request(Some(file.path()), &[]), [])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains(&format!("{}:2: ", file.path().display())),
        "{text}"
    );
    assert!(
        text.contains(&format!(
            "{}:3: coordinator.world_size",
            file.path().display()
        )),
        "{text}"
    );
}

#[test]
fn what_is_required_is_asked_for() {
    let text = load_from(request(None, &[]), []).unwrap_err().to_string();
    assert!(
        text.contains("coordinator.model is not set: give --model, SECONDWIND_COORDINATOR_MODEL"),
        "{text}"
    );
    assert!(text.contains("coordinator.world_size is not set"), "{text}");
    assert!(!text.contains("worker.model"), "{text}");
}

#[test]
fn open_listeners_are_refused_until_accepted() {
    let mut flags = NEEDED.to_vec();
    flags.push(("coordinator", "listen", "0.0.0.0:7700"));
    let text = load_from(request(None, &flags), [])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("--listen") && text.contains("--insecure"),
        "{text}"
    );
    flags.push(("coordinator", "insecure", "true"));
    load_from(request(None, &flags), []).unwrap();
}

#[test]
fn a_split_fits_its_world() {
    let mut flags = NEEDED.to_vec();
    flags.push(("coordinator", "split", "3:1:1"));
    let text = load_from(request(None, &flags), [])
        .unwrap_err()
        .to_string();
    assert!(text.contains("3 shares for a world size of 2"), "{text}");
}

#[test]
fn rust_log_stands_in_for_the_level() {
    let level = |list: &[(&str, &str)]| {
        load_from(request(None, &NEEDED), variables(list))
            .unwrap()
            .text("log.level")
            .unwrap()
    };
    assert_eq!(level(&[]), "info");
    assert_eq!(level(&[("RUST_LOG", "trace")]), "trace");
    assert_eq!(
        level(&[("RUST_LOG", "trace"), ("SECONDWIND_LOG_LEVEL", "warn")]),
        "warn"
    );
}

#[test]
fn an_unreadable_file_is_a_mistake() {
    let text = load_from(
        request(Some(Path::new("/nowhere/config.toml")), &NEEDED),
        [],
    )
    .unwrap_err()
    .to_string();
    assert!(
        text.contains("--config: cannot read /nowhere/config.toml"),
        "{text}"
    );
}

/// A file that lost its keys would open the door to everybody.
#[test]
fn a_file_of_keys_holds_some() {
    for text in ["", "# none yet\n"] {
        let file = write(text);
        let path = file.path().to_str().unwrap();
        let mut flags = NEEDED.to_vec();
        flags.push(("coordinator", "api_keys_file", path));
        let error = load_from(request(None, &flags), []).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("holds no `[[api_key]]` table"), "{error}");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,80}|(\\[?\\[?(coordinator|worker|log|api_key)\\]?\\]?|split|model|name|hash|role|=|\\n|\\[|\\]|\"|[0-9.]){0,20}") {
        let file = write(&text);
        let _ = load_from(request(Some(file.path()), &[]), []);
    }
}
