//! `coordinator` and `worker` as processes on port 0.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{CHECKPOINT, run, secondwind, stderr, stdout};

/// Kills its process when a test gives up.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guard {
    pub fn start(arguments: &[&str]) -> Self {
        Self(
            secondwind(arguments)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    pub fn first_line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        line.trim_end().to_owned()
    }

    /// Sends a signal and awaits the exit code.
    pub fn end(mut self, signal: &str) -> Option<i32> {
        let sent = Command::new("kill")
            .args([signal, &self.0.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(30) {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("still runs 30 s after {signal}");
    }
}

#[test]
fn daemons_tell_their_addresses_and_stop_on_signals() {
    for signal in ["-TERM", "-INT"] {
        let arguments = ["coordinator", "--model", CHECKPOINT, "--world-size", "1"];
        let ports = ["--listen", "127.0.0.1:0", "--cluster-listen", "127.0.0.1:0"];
        let mut coordinator = Guard::start(&[&arguments[..], &ports].concat());
        let line = coordinator.first_line();
        let addresses = line
            .strip_prefix("listening client=127.0.0.1:")
            .unwrap_or_else(|| panic!("{line}"));
        let (_, cluster) = addresses.split_once(" cluster=").unwrap();
        let mut worker = Guard::start(&[
            "worker",
            "--model",
            CHECKPOINT,
            "--coordinator",
            cluster,
            "--threads",
            "1",
        ]);
        assert!(
            worker
                .first_line()
                .starts_with(&format!("joining coordinator=http://{cluster} "))
        );
        assert_eq!(worker.end(signal), Some(0), "worker, {signal}");
        assert_eq!(coordinator.end(signal), Some(0), "coordinator, {signal}");
    }
}

#[test]
fn coordinator_worker_and_generate_meet_over_sockets() {
    let ports = ["--listen", "127.0.0.1:0", "--cluster-listen", "127.0.0.1:0"];
    let mut coordinator = Guard::start(
        &[
            &["coordinator", "--model", CHECKPOINT, "--world-size", "2"],
            &ports[..],
        ]
        .concat(),
    );
    let line = coordinator.first_line();
    let (client, cluster) = line
        .strip_prefix("listening client=")
        .unwrap()
        .split_once(" cluster=")
        .unwrap();
    let dial = ["--coordinator", cluster, "--threads", "1"];
    let workers = ["a", "b"].map(|name| {
        Guard::start(
            &[
                &["worker", "--model", CHECKPOINT, "--name", name],
                &dial[..],
            ]
            .concat(),
        )
    });
    let ids = [
        "--token-ids",
        "1,2,3",
        "--max-tokens",
        "3",
        "--ignore-eos",
        "--json",
    ];
    let begin = Instant::now();
    let output = loop {
        let output = run(&[&["generate", "--endpoint", client], &ids[..]].concat());
        if output.status.success() || begin.elapsed() > Duration::from_secs(120) {
            break output;
        }
        // Until both have joined, and no longer, the coordinator has nothing to serve with.
        assert!(
            stderr(&output).contains("UNAVAILABLE"),
            "{}",
            stderr(&output)
        );
        std::thread::sleep(Duration::from_millis(200));
    };
    assert!(output.status.success(), "{}", stderr(&output));
    let answer: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    let names: Vec<_> = answer["plan"]["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| &rank["worker"])
        .collect();
    assert_eq!(names, ["a", "b"]);
    for worker in workers {
        assert_eq!(worker.end("-TERM"), Some(0));
    }
    assert_eq!(coordinator.end("-TERM"), Some(0));
}

/// A coordinator for `model` and the addresses for clients and for workers.
fn coordinator(model: &str, world_size: &str) -> (Guard, String, String) {
    let mut coordinator = Guard::start(&[
        "coordinator",
        "--model",
        model,
        "--world-size",
        world_size,
        "--listen",
        "127.0.0.1:0",
        "--cluster-listen",
        "127.0.0.1:0",
    ]);
    let line = coordinator.first_line();
    let addresses = line.strip_prefix("listening client=").unwrap();
    let (client, cluster) = addresses.split_once(" cluster=").unwrap();
    (coordinator, client.to_owned(), cluster.to_owned())
}

fn worker(cluster: &str, name: &str) -> Guard {
    Guard::start(&[
        "worker",
        "--model",
        "builtin",
        "--coordinator",
        cluster,
        "--name",
        name,
        "--threads",
        "1",
    ])
}

#[test]
fn a_killed_worker_costs_a_pause_and_no_token() {
    let (coordinator, client, cluster) = coordinator("builtin", "2");
    let first = worker(&cluster, "a");
    let second = worker(&cluster, "b");
    let tokens = "420";
    let generate = [
        "generate",
        "--endpoint",
        &client,
        "--prompt",
        "What is secondwind?",
        "--max-tokens",
        tokens,
        "--ignore-eos",
        "--json",
    ];
    let begin = Instant::now();
    while !run(&[&generate[..5], &["--max-tokens", "1"]].concat())
        .status
        .success()
    {
        assert!(
            begin.elapsed() < Duration::from_secs(120),
            "the group does not form"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let answering = Guard::start(&generate);
    std::thread::sleep(Duration::from_millis(150));
    drop(second);
    let third = worker(&cluster, "b");
    let mut answering = answering;
    let mut answer = String::new();
    let mut stdout = answering.0.stdout.take().unwrap();
    std::io::Read::read_to_string(&mut stdout, &mut answer).unwrap();
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"].to_string(), tokens);
    for guard in [first, third, coordinator] {
        assert_eq!(guard.end("-TERM"), Some(0));
    }
}

#[test]
fn a_worker_with_another_checkpoint_is_refused() {
    let (_coordinator, _, cluster) = coordinator(CHECKPOINT, "1");
    let output = run(&[
        "worker",
        "--model",
        "builtin",
        "--coordinator",
        &cluster,
        "--threads",
        "1",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let words = stderr(&output);
    assert!(words.contains("holds another checkpoint"), "{words}");
    assert!(words.contains("give both the same files"), "{words}");
}
