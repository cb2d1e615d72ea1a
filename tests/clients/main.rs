//! Clients that are not ours, against `secondwind demo --serve` over the embedded model. What this machine
//! lacks is listed as ignored; `PYTHON_CLIENTS` names a folder with Python packages.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use libtest_mimic::{Arguments, Failed, Trial};

/// Checks of one client, each a function of a Python script.
struct Suite {
    name: &'static str,
    /// Beside this file.
    script: &'static str,
    /// Python that fails where the client is missing.
    needs: &'static str,
    checks: &'static [&'static str],
}

const SUITES: [Suite; 4] = [
    Suite {
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
            "shapes",
            "errors",
        ],
    },
    Suite {
        name: "grpc",
        script: "grpc_checks.py",
        needs: "import grpc, grpc_health.v1, grpc_reflection.v1alpha",
        checks: &[
            "reflection",
            "health",
            "generate",
            "cancel",
            "deadline",
            "vllm",
        ],
    },
    Suite {
        name: "triton",
        script: "triton_checks.py",
        needs: "import tritonclient.grpc",
        checks: &["metadata", "infer", "stream"],
    },
    Suite {
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
    let suites = SUITES.map(|suite| (missing(python().args(["-c", suite.needs])), suite));
    let no_curl = missing(Command::new("curl").arg("--version"));
    let no_grpcurl = missing(Command::new("grpcurl").arg("-version"));
    let absent = suites.iter().map(|(missing, _)| missing);
    let runs = absent.chain([&no_curl, &no_grpcurl]).any(Option::is_none);
    let server = (runs && !arguments.list).then(|| Arc::new(Server::start()));
    let mut trials = Vec::new();
    for (missing, suite) in &suites {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/clients")
            .join(suite.script);
        for &check in suite.checks {
            let script = script.clone();
            trials.push(trial(
                format!("{}: {check}", suite.name),
                &server,
                missing.as_deref(),
                move |url| {
                    run(python().arg(&script).args([check, url]))?;
                    Ok(())
                },
            ));
        }
    }
    for (name, missing, check) in [
        ("curl: streaming", &no_curl, curl_streaming as fn(&str) -> _),
        ("curl: readme", &no_curl, curl_readme),
        ("grpcurl: readme", &no_grpcurl, grpcurl_readme),
    ] {
        trials.push(trial(name.into(), &server, missing.as_deref(), check));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(server);
    conclusion.exit();
}

/// A test over the server, or the reason why it is ignored.
fn trial(
    name: String,
    server: &Option<Arc<Server>>,
    missing: Option<&str>,
    check: impl FnOnce(&str) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    let server = server.clone();
    let trial = Trial::test(name, move || match &server {
        Some(server) => check(&server.url),
        None => Err(Failed::from("there is no client to be served")),
    });
    match missing {
        Some(why) => trial.with_ignored_flag(true).with_kind(why),
        None => trial,
    }
}

/// Python with the folder of its packages, if one is named.
fn python() -> Command {
    let mut python = Command::new("python3");
    if let Some(folder) = env::var_os("PYTHON_CLIENTS") {
        python.env("PYTHONPATH", folder);
    }
    python
}

/// Why `command` cannot be used.
fn missing(command: &mut Command) -> Option<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Err(error) => Some(format!("{name}: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            Some(words.lines().last().unwrap_or("it failed").to_owned())
        }
    }
}

/// What `command` writes.
fn run(command: &mut Command) -> Result<String, Failed> {
    let output = command
        .output()
        .map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}

/// Server-sent events as curl writes them down.
fn curl_streaming(url: &str) -> Result<(), Failed> {
    let ask = r#"{"messages": [{"role": "user", "content": "What is 345 + 278?"}], "temperature": 0, "stream": true}"#;
    let events = run(Command::new("curl").args([
        "-N",
        "--silent",
        "--show-error",
        "--fail",
        &format!("{url}/v1/chat/completions"),
        "-H",
        "Content-Type: application/json",
        "-d",
        ask,
    ]))?;
    let mut datas: Vec<&str> = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    assert_eq!(datas.pop(), Some("[DONE]"), "{events}");
    let text: String = datas
        .into_iter()
        .map(|data| serde_json::from_str::<serde_json::Value>(data).unwrap())
        .filter_map(|chunk| {
            let content = &chunk["choices"][0]["delta"]["content"];
            content.as_str().map(str::to_owned)
        })
        .collect();
    assert_eq!(text, "345 + 278 = 623");
    Ok(())
}

fn curl_readme(url: &str) -> Result<(), Failed> {
    let answer = readme("curl", url)?;
    assert!(answer.contains("345 + 278 = 623"), "{answer}");
    Ok(())
}

fn grpcurl_readme(url: &str) -> Result<(), Failed> {
    let answer = readme("grpcurl", url)?;
    assert!(answer.contains("\"completionTokens\""), "{answer}");
    Ok(())
}

/// What the README's command of this program writes, at another address.
fn readme(program: &str, url: &str) -> Result<String, Failed> {
    let text = include_str!("../../README.md").replace("\\\n", " ");
    let command = text
        .lines()
        .find(|line| line.starts_with(&format!("{program} ")))
        .expect("the README shows it");
    let address = url.trim_start_matches("http://");
    let command = command.replace("127.0.0.1:7700", address);
    run(Command::new("sh").args(["-c", &command]))
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
