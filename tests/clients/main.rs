//! Clients that are not ours, against `secondwind demo --serve` over the embedded model. What this machine
//! lacks is listed as ignored; `PYTHON_CLIENTS` names a folder with Python packages.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use libtest_mimic::{Arguments, Failed, Trial};

/// Checks of one client, each a function of a script.
struct Client {
    name: &'static str,
    script: &'static str,
    /// Python that fails where the client is missing.
    needs: &'static str,
    checks: &'static [&'static str],
}

const CLIENTS: [Client; 2] = [
    Client {
        name: "openai",
        script: "openai_checks.py",
        needs: "import openai",
        checks: &[
            "models",
            "chat",
            "streaming",
            "logprobs",
            "seeds_and_choices",
            "completions",
            "errors",
        ],
    },
    Client {
        name: "page",
        script: "page_checks.py",
        needs: "import playwright, shutil; assert shutil.which('chromium'), 'chromium is not installed'",
        checks: &[
            "chat",
            "stop",
            "errors",
            "text_is_text",
            "rack",
            "keys",
            "keyboard",
        ],
    },
];

fn main() {
    let arguments = Arguments::from_args();
    let missing = CLIENTS.map(|client| missing(client.needs));
    let some = missing.iter().any(Option::is_none);
    let server = (some && !arguments.list).then(|| Arc::new(Server::start()));
    let mut trials = Vec::new();
    for (client, missing) in CLIENTS.iter().zip(missing) {
        for check in client.checks {
            let server = server.clone();
            let name = format!("{}: {check}", client.name);
            let trial = Trial::test(name, move || match &server {
                Some(server) => run(client.script, check, &server.url),
                None => Err(Failed::from("no client is here")),
            });
            trials.push(match &missing {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            });
        }
    }
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

/// Why a client cannot be used.
fn missing(needs: &str) -> Option<String> {
    match python().args(["-c", needs]).output() {
        Err(error) => Some(format!("python3: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let last = words
                .lines()
                .last()
                .unwrap_or("python3 fails without a word");
            Some(last.to_owned())
        }
    }
}

fn run(script: &str, check: &str, url: &str) -> Result<(), Failed> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/").to_owned() + script;
    let output = python()
        .args([&script, check, url])
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
