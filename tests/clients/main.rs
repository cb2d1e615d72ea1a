//! Clients that are not ours, against `secondwind demo --serve` over the embedded model. What this machine
//! lacks is listed as ignored; `PYTHON_CLIENTS` names a folder with Python packages.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use libtest_mimic::{Arguments, Failed, Trial};

const OPENAI_CHECKS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/clients/openai_checks.py"
);

const CHECKS: [&str; 8] = [
    "models",
    "chat",
    "streaming",
    "logprobs",
    "seeds_and_choices",
    "completions",
    "shapes",
    "errors",
];

fn main() {
    let arguments = Arguments::from_args();
    let missing = missing();
    let server = match &missing {
        None if !arguments.list => Some(Arc::new(Server::start())),
        _ => None,
    };
    let trials = CHECKS
        .into_iter()
        .map(|check| {
            let server = server.clone();
            let trial = Trial::test(format!("openai: {check}"), move || match &server {
                Some(server) => run(check, &server.url),
                None => Err(Failed::from("the openai package is missing")),
            });
            match &missing {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            }
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(server);
    conclusion.exit();
}

/// Python with the folder of its packages, if one is named.
fn python() -> Command {
    let mut python = Command::new("python3");
    if let Some(folder) = env::var_os("PYTHON_CLIENTS") {
        python.env("PYTHONPATH", folder);
    }
    python
}

/// Why the package cannot be used.
fn missing() -> Option<String> {
    match python().args(["-c", "import openai"]).output() {
        Err(error) => Some(format!("python3: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let last = words
                .lines()
                .last()
                .unwrap_or("python3 cannot import openai");
            Some(last.to_owned())
        }
    }
}

fn run(check: &str, url: &str) -> Result<(), Failed> {
    let output = python()
        .args([OPENAI_CHECKS, check, url])
        .output()
        .map_err(|error| format!("python3: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}

/// A server, until it is dropped.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secondwind"));
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("SECONDWIND_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        let mut child = command
            .args(["demo", "--serve", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let url = loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "demo ended early");
            if let Some(rest) = line.strip_prefix("serving at ") {
                break rest.split(';').next().unwrap().to_owned();
            }
        };
        // Whoever writes to a pipe that nobody reads stops.
        std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
        Self { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
