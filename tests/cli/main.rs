//! The binary as its users meet it: exit codes and words.
//!
//! [`usage`] makes mistakes, [`daemons`] starts real processes, [`demo`] asks for answers, [`http`] over HTTP, [`keys`]
//! as somebody, [`traces`] collects spans.

mod daemons;
mod demo;
mod http;
mod keys;
mod traces;
mod usage;

use std::process::{Command, Output, Stdio};

const CHECKPOINT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/golden/checkpoints/qwen2_4bit_g128"
);
const USAGE: i32 = 64;

/// The binary, away from this machine's configuration.
fn secondwind(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secondwind"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SECONDWIND_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    secondwind(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Ends with this code and tells all of these words on standard error, without a panic.
#[track_caller]
fn refuses(arguments: &[&str], code: i32, words: &[&str]) {
    let output = run(arguments);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
    assert!(!told.contains("panicked"), "{told}");
    assert_eq!(
        stdout(&output),
        "",
        "{arguments:?} wrote to standard output"
    );
    for word in words {
        assert!(
            told.contains(word),
            "{arguments:?} does not say `{word}`:\n{told}"
        );
    }
}
