//! Mistakes in flags, environment and file, and commands that need no cluster.

use std::fs;

use crate::{CHECKPOINT, USAGE, refuses, run, secondwind, stderr, stdout};

#[test]
fn help_and_version_are_answers() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["demo", "--help"],
        &["coordinator", "--help"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("secondwind"), "{arguments:?}");
    }
    let help = stdout(&run(&["coordinator", "--help"]));
    for flag in [
        "--world-size <N>",
        "--cluster-listen",
        "[default: 127.0.0.1:7700]",
        "--insecure",
    ] {
        assert!(help.contains(flag), "{flag} is not in:\n{help}");
    }
}

#[test]
fn the_command_line_is_checked() {
    refuses(&[], USAGE, &["Usage"]);
    refuses(&["sreve"], USAGE, &["sreve"]);
    refuses(&["demo", "--promt", "x"], USAGE, &["--promt", "--prompt"]);
    refuses(
        &["demo", "--prompt", "x", "--token-ids", "1"],
        USAGE,
        &["cannot be used with"],
    );
    refuses(&["demo", "--token-ids", "1,two"], USAGE, &["two"]);
    refuses(&["demo", "--max-tokens", "-1"], USAGE, &["--max-tokens"]);
    for wrong in ["5", "x=1", "5=y", "-1=2"] {
        refuses(&["demo", "--logit-bias", wrong], USAGE, &["--logit-bias"]);
    }
    refuses(
        &["demo", "--workers", "0"],
        USAGE,
        &["--workers", "from 1 to 1024"],
    );
    refuses(
        &["demo", "--workers", "2", "--split", "3:1:1"],
        USAGE,
        &["3 shares for a world size of 2"],
    );
    refuses(&["demo", "--split", "3:x"], USAGE, &["--split", "3:x"]);
    refuses(
        &["demo", "--model", "/nowhere/at/all"],
        USAGE,
        &["/nowhere/at/all", "builtin"],
    );
    refuses(&["generate"], USAGE, &["--prompt", "--token-ids"]);
    refuses(
        &["generate", "--prompt", "x", "--endpoint", "https://x:1"],
        USAGE,
        &["TLS"],
    );
    refuses(
        &["generate", "--prompt", "x", "--endpoint", "::"],
        USAGE,
        &["http://HOST:PORT"],
    );
    refuses(
        &["bench", "kernels", "--device", "cuda"],
        USAGE,
        &["cuda:N"],
    );
}

#[test]
fn every_mistake_of_a_daemon_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    fs::write(
        &file,
        "[coordinator]\nmax_wating = 3\n\n[worker]\nmemory = 1.5\n",
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let mut command = secondwind(&[
        "coordinator",
        "--world-size",
        "0",
        "--listen",
        "0.0.0.0:0",
        "--config",
        file,
    ]);
    let output = command
        .env("SECONDWIND_COORDINATOR_KV_DTYPE", "fp8")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(USAGE));
    let told = stderr(&output);
    for line in [
        &format!("{file}:2: unknown key `coordinator.max_wating`; did you mean `max_waiting`?"),
        &format!("{file}:5: worker.memory: `1.5` is not a size"),
        "SECONDWIND_COORDINATOR_KV_DTYPE: coordinator.kv_dtype: `fp8` is not f32 or f16 or int8",
        "--world-size: coordinator.world_size: `0` is not a whole number from 1 to 1024",
        "--listen: coordinator.listen: 0.0.0.0:0 is reachable from other machines",
        "coordinator.model is not set",
    ] {
        assert!(told.contains(line), "missing: {line}\nin:\n{told}");
    }
}

#[test]
fn daemons_check_device_address_and_model() {
    refuses(
        &["worker", "--model", "builtin", "--device", "cuda"],
        USAGE,
        &["`cuda` is not cpu or cuda:N"],
    );
    // No machine has as many cards, and most have no driver.
    let output = run(&["worker", "--model", "builtin", "--device", "cuda:99"]);
    assert_eq!(output.status.code(), Some(1));
    let told = stderr(&output);
    let known = ["install the driver", "there is no device cuda:99"];
    assert!(known.iter().any(|words| told.contains(words)), "{told}");
    refuses(
        &["worker", "--model", "builtin", "--device", "tpu"],
        USAGE,
        &["`tpu` is not cpu"],
    );
    refuses(
        &["worker", "--model", "builtin", "--coordinator", "nowhere"],
        USAGE,
        &["HOST:PORT"],
    );
    refuses(
        &["worker", "--model", "builtin", "--linear-path", "dp4a"],
        USAGE,
        &["cpu_portable"],
    );
    refuses(
        &[
            "worker",
            "--model",
            "builtin",
            "--peer-listen",
            "192.0.2.1:0",
        ],
        USAGE,
        &["--insecure"],
    );
    refuses(
        &["worker", "--model", "/nowhere"],
        USAGE,
        &["--model", "/nowhere"],
    );
    refuses(
        &["coordinator", "--world-size", "2"],
        USAGE,
        &["coordinator.model is not set"],
    );
}

#[test]
fn nobody_at_the_endpoint_says_how_to_start_somebody() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    for command in [&["generate", "--prompt", "x"][..], &["chat"]] {
        refuses(
            &[command, &["--endpoint", &endpoint]].concat(),
            1,
            &[&endpoint, "secondwind coordinator --model"],
        );
    }
}

#[test]
fn plan_splits_a_model_over_absent_cards() {
    let cards = ["--worker", "p40", "--worker", "2080ti:22GiB"];
    let output = run(&[&["plan", "--model", CHECKPOINT], &cards[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    for word in [
        "Tesla P40",
        "2080 Ti",
        "q heads",
        "kv cache",
        "a8_dp4a_gemv",
        "a8_mma",
    ] {
        assert!(
            stdout(&output).contains(word),
            "`{word}` is not in:\n{}",
            stdout(&output)
        );
    }
    let output = run(&[&["plan", "--model", CHECKPOINT, "--json"], &cards[..]].concat());
    let plan: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(plan["ranks"].as_array().map(Vec::len), Some(2));

    let plan = |more: &[&'static str]| [&["plan", "--model", CHECKPOINT], more].concat();
    refuses(&["plan", "--model", CHECKPOINT], USAGE, &["--worker"]);
    refuses(
        &plan(&["--worker", "p41", "--worker", "t4:x"]),
        USAGE,
        &["2 mistakes", "p41", "p40", "t4:x"],
    );
    refuses(
        &plan(&["--worker", "t4", "--max-context-tokens", "99999999"]),
        USAGE,
        &["--max-context-tokens"],
    );
    refuses(&plan(&["--worker", "t4:1MiB"]), 1, &["does not fit"]);
}

#[test]
fn bench_model_times_steps_and_draws_them() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("roofline.svg");
    let small = ["--batch", "1,2", "--prompt", "16", "--svg"];
    let output = run(&[
        &["bench", "model", "--model", CHECKPOINT, "--device", "cpu"],
        &small[..],
        &[picture.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("byte times"));
    let picture = fs::read_to_string(picture).unwrap();
    for point in [
        "a prompt of 16 tokens",
        "a decoding step of 1 tokens",
        "a decoding step of 2 tokens",
    ] {
        assert!(picture.contains(point), "{point} is not in the picture");
    }
}

#[test]
fn bench_serve_loads_a_server_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("serve.svg");
    let load = |more: &[&'static str]| {
        [
            &["bench", "serve", "--model", CHECKPOINT, "--threads", "1"][..],
            &["--prompt-tokens", "fixed:3", "--vocab", "100"],
            &["--output-tokens", "fixed:5", "--requests", "6"],
            more,
        ]
        .concat()
    };
    for api in ["openai", "grpc"] {
        let mut arguments = load(&["--concurrency", "1,3", "--shared-prefix", "17", "--json"]);
        arguments.extend(["--api", api, "--svg", picture.to_str().unwrap()]);
        let output = run(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        let levels = report["levels"].as_array().unwrap();
        assert_eq!(levels.len(), 2);
        for (level, concurrency) in levels.iter().zip([1, 3]) {
            assert_eq!(level["concurrency"], concurrency, "{report}");
            assert_eq!((&level["done"], &level["failed"]), (&6.into(), &0.into()));
            let seconds = level["seconds"].as_f64().unwrap();
            for (name, tokens) in [
                ("output_tokens_per_second", 30.0),
                ("prompt_tokens_per_second", 120.0),
            ] {
                let counted = level[name].as_f64().unwrap() * seconds;
                assert!((counted - tokens).abs() < 1e-6, "{name}: {report}");
            }
            // The block that all prompts begin with was computed while the server was warmed up.
            let share = level["cached_prompt_share"].as_f64().unwrap();
            assert!((share - 16.0 / 20.0).abs() < 1e-9, "{report}");
        }
        let picture = fs::read_to_string(&picture).unwrap();
        assert!(picture.contains("3: p99 "), "{picture}");
    }
    // A request that no model can take ends the command, with the server's word.
    let too_long = ["--shared-prefix", "100000"];
    refuses(&load(&too_long), 1, &["HTTP 400", "--prompt-tokens"]);
    let nobody = ["bench", "serve", "--url", "127.0.0.1:1"];
    refuses(&nobody, 1, &["--url", "nobody answers"]);
    refuses(
        &[&nobody[..], &["--workers", "2"]].concat(),
        USAGE,
        &["--url", "--workers"],
    );
    refuses(
        &["bench", "serve", "--prompt-tokens", "normal:3"],
        USAGE,
        &["--prompt-tokens", "uniform:A..B"],
    );
}

#[test]
fn profile_shows_where_time_and_memory_go() {
    let profile = |more: &[&'static str]| [&["profile", "--model", CHECKPOINT], more].concat();
    let small = ["--batch", "2", "--context", "9", "--prompt", "17"];
    let output = run(&profile(&[&["--device", "cpu"], &small[..]].concat()));
    assert!(output.status.success(), "{}", stderr(&output));
    for word in [
        "as served",
        "rope_kv_write",
        "gate_up",
        "sampling",
        "GB/s",
        "kv cache",
    ] {
        let told = stdout(&output);
        assert!(told.contains(word), "`{word}` is not in:\n{told}");
    }

    let ranks = ["--device", "cpu,cpu", "--layers", "--json"];
    let output = run(&profile(&[&ranks[..], &small].concat()));
    assert!(output.status.success(), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let ranks = report["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 2);
    for rank in ranks {
        for (step, rows) in [("decode", 2), ("prefill", 17)] {
            let step = &rank[step];
            let seconds = |name: &str| step[name].as_f64().unwrap();
            assert!(seconds("plain_seconds") > 0.0);
            assert!(seconds("all_reduce_seconds") > 0.0);
            let parts = seconds("device_seconds");
            assert!((seconds("wall_seconds") - parts - seconds("gap_seconds")).abs() < 1e-9);
            let tree = &step["tree"];
            let child = |node: &serde_json::Value, name: &str| {
                let children = node["children"].as_array().unwrap();
                let found = children.iter().find(|child| child["name"] == name);
                found
                    .unwrap_or_else(|| panic!("no {name} in {node}"))
                    .clone()
            };
            let layer = child(&child(tree, "layers"), "layer 1");
            let qkv = child(&child(&layer, "attention"), "qkv");
            assert_eq!(qkv["linear"]["rows"], rows);
            assert!(qkv["linear"]["read_bytes"].as_u64().unwrap() > 0);
            assert!((tree["seconds"].as_f64().unwrap() - parts).abs() < 1e-9);
        }
        let memory = rank["memory"].as_array().unwrap();
        let weights = memory.iter().find(|row| row["purpose"] == "weights");
        assert!(weights.unwrap()["planned_bytes"].as_u64().unwrap() > 0);
    }

    refuses(&["profile"], USAGE, &["--model DIR", "--shape"]);
    refuses(
        &["profile", "--model", "/nowhere/at/all"],
        USAGE,
        &["/nowhere/at/all", "builtin"],
    );
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    refuses(&["profile", "--model", empty], 1, &["config.json"]);
    refuses(
        &["profile", "--shape", "qwen2.5-7b", "--device", "cpu"],
        USAGE,
        &["on cards only", "--model DIR"],
    );
    refuses(
        &["profile", "--shape", "qwen9", "--device", "cuda:0"],
        USAGE,
        &["qwen9", "qwen2.5-72b"],
    );
    refuses(&profile(&["--device", "cuda"]), USAGE, &["cuda:N"]);
    refuses(
        &profile(&["--device", "cpu", "--prompt", "99999"]),
        USAGE,
        &["--prompt 99999", "holds"],
    );
    // No machine has as many cards, and most have no driver.
    let output = run(&profile(&["--device", "cuda:99"]));
    assert_eq!(output.status.code(), Some(1));
    let told = stderr(&output);
    let known = ["install the driver", "there is no device cuda:99"];
    assert!(known.iter().any(|words| told.contains(words)), "{told}");
}

#[test]
fn what_no_group_could_honour_is_told_at_start() {
    for (flags, words) in [
        (["--workers", "9"], "largest legal world size is 8"),
        (["--max-context-tokens", "100000"], "512 positions"),
        (["--split", "1e308:1e308"], "too large to add up"),
        (["--prompt", ""], "--prompt is empty"),
    ] {
        let output = run(&[&["demo"], &flags[..]].concat());
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(64), "{flags:?}: {told}");
        assert!(told.contains(words), "{flags:?}: {told}");
    }
    let world = ["coordinator", "--model", "builtin", "--world-size", "9"];
    let ports = ["--listen", "127.0.0.1:0", "--cluster-listen", "127.0.0.1:0"];
    refuses(
        &[&world[..], &ports].concat(),
        64,
        &["largest legal world size is 8"],
    );
    // Each word once: the error and its cause say the same.
    let output = run(&["demo", "--memory-reserve", "10000GiB"]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{told}");
    let last = told
        .lines()
        .rev()
        .find(|line| line.starts_with("error: "))
        .unwrap();
    assert_eq!(last.matches("does not fit").count(), 1, "{told}");
}
