//! The HTTP API of real processes, by requests written out by hand.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{daemons::Guard, run, stdout};

/// Status and body of a request. By HTTP/1.0, so that the body is all that comes until the end.
fn http(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    http_with(address, method, path, "", body)
}

/// The same with further headers, each ended by a new line.
pub fn http_with(
    address: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (u16, String) {
    let (head, body) = raw_with(address, method, path, headers, body);
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body)
}

fn raw(address: &str, method: &str, path: &str, body: &str) -> (String, String) {
    raw_with(address, method, path, "", body)
}

fn raw_with(
    address: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (String, String) {
    let address = address.strip_prefix("http://").unwrap_or(address);
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn post(address: &str, path: &str, body: &Value) -> (u16, Value) {
    let (status, body) = http(address, "POST", path, &body.to_string());
    (status, serde_json::from_str(&body).unwrap())
}

#[test]
fn a_demo_that_stays_up_serves_http_and_grpc_at_one_address() {
    let mut demo = Guard::start(&[
        "demo",
        "--serve",
        "--listen",
        "127.0.0.1:0",
        "--threads",
        "1",
    ]);
    let mut lines = BufReader::new(demo.0.stdout.take().unwrap()).lines();
    let line = lines
        .find_map(|line| Some(line.unwrap().strip_prefix("serving at ")?.to_owned()))
        .expect("the demo serves");
    let (endpoint, _) = line.split_once(';').unwrap();

    assert_eq!(http(endpoint, "GET", "/health", "").0, 200);
    assert_eq!(http(endpoint, "GET", "/ready", "").0, 200);
    let (status, models) = http(endpoint, "GET", "/v1/models", "");
    assert_eq!(status, 200);
    assert!(models.contains("\"builtin\""), "{models}");

    let question = "What is 345 + 278?";
    let messages = json!([{"role": "user", "content": question}]);
    let ask = json!({"messages": messages, "temperature": 0});
    let (status, answer) = post(endpoint, "/v1/chat/completions", &ask);
    assert_eq!(status, 200, "{answer}");
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(text, "345 + 278 = 623");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let output = run(&[
        "generate",
        "--endpoint",
        endpoint,
        "--prompt",
        question,
        "--temperature",
        "0",
    ]);
    assert_eq!(stdout(&output).trim_end(), text);

    let ask = json!({"messages": messages, "temperature": 0, "stream": true});
    let (status, body) = http(endpoint, "POST", "/v1/chat/completions", &ask.to_string());
    assert_eq!(status, 200);
    let mut events: Vec<&str> = body
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    let streamed: String = events
        .iter()
        .filter_map(|event| {
            let event: Value = serde_json::from_str(event).unwrap();
            Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())
        })
        .collect();
    assert_eq!(streamed, text);

    // The log-probabilities of a text, as evaluation harnesses ask for them.
    let ask = json!({"prompt": [[5, 6, 7]], "max_tokens": 0, "echo": true, "logprobs": 0});
    let (status, answer) = post(endpoint, "/v1/completions", &ask);
    assert_eq!(status, 200, "{answer}");
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap();
    assert!(
        logprobs[0].is_null() && logprobs[1].as_f64() < Some(0.0),
        "{answer}"
    );
    assert_eq!(
        (logprobs.len(), &answer["usage"]["completion_tokens"]),
        (3, &json!(0))
    );

    let ask = json!({"prompt": [5, 6, 7], "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0});
    let (status, answer) = post(endpoint, "/v1/completions", &ask);
    assert_eq!(status, 200, "{answer}");
    let logprobs = &answer["choices"][0]["logprobs"];
    for at in 1..4 {
        let own = logprobs["token_logprobs"][at].as_f64().unwrap();
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        let best = top.values().map(|value| value.as_f64().unwrap());
        // The token that was generated is the likeliest.
        let best = best.fold(f64::NEG_INFINITY, f64::max);
        assert!(if at == 3 { best == own } else { best >= own }, "{answer}");
    }

    let (status, metrics) = http(endpoint, "GET", "/metrics", "");
    assert_eq!(status, 200);
    let value = |name: &str| -> f64 {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        let value = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        value.parse().unwrap()
    };
    assert!(value("secondwind_generation_tokens_total") > 2.0);
    assert!(value("secondwind_prompt_tokens_total") > 6.0);
    assert!(value("secondwind_computed_tokens_total") > 8.0);
    // The demo's own question, and four of ours that have an answer.
    assert_eq!(value("secondwind_time_to_first_token_seconds_count"), 5.0);
    assert!(value("secondwind_step_time_seconds_count") > 0.0);
    assert_eq!(value("secondwind_num_requests_waiting"), 0.0);
    // Both workers told how long they computed and how long they were in collectives.
    for rank in 0..2 {
        for part in ["compute", "exchange"] {
            let labels = format!("{{rank=\"{rank}\",part=\"{part}\"}}");
            assert!(value(&format!("secondwind_rank_step_seconds_total{labels}")) > 0.0);
        }
    }
    let (status, page) = http(endpoint, "GET", "/", "");
    assert_eq!((status, page.starts_with("<!doctype html>")), (200, true));

    // A connection that is kept open and a client that stalls do not keep it from stopping.
    let _idle = TcpStream::connect(endpoint.strip_prefix("http://").unwrap()).unwrap();
    assert_eq!(demo.end("-TERM"), Some(0));
}

#[test]
fn a_coordinator_without_workers_lives_and_is_not_ready() {
    let mut coordinator = Guard::start(&[
        "coordinator",
        "--model",
        "builtin",
        "--world-size",
        "1",
        "--strict",
        "--served-name",
        "little",
        "--listen",
        "127.0.0.1:0",
        "--cluster-listen",
        "127.0.0.1:0",
    ]);
    let line = coordinator.first_line();
    let addresses = line.strip_prefix("listening client=").unwrap();
    let (client, _) = addresses.split_once(" cluster=").unwrap();
    assert_eq!(http(client, "GET", "/health", "").0, 200);
    let (head, body) = raw(client, "GET", "/ready", "");
    assert!(
        head.contains(" 503 ") && head.contains("retry-after: "),
        "{head}"
    );
    let error: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(error["error"]["code"], "not_ready");
    let (status, error) = post(client, "/v1/completions", &json!({"prompt": "a"}));
    assert_eq!(status, 503, "{error}");
    let (status, error) = post(
        client,
        "/v1/completions",
        &json!({"prompt": "a", "promt": "b"}),
    );
    assert_eq!((status, &error["error"]["param"]), (400, &json!("promt")));
    // Texts need no worker.
    let (status, tokens) = post(client, "/tokenize", &json!({"prompt": "What is 1 + 1?"}));
    assert_eq!(status, 200, "{tokens}");
    let (_, text) = post(client, "/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert_eq!(text["prompt"], "What is 1 + 1?");
    let (_, models) = http(client, "GET", "/v1/models", "");
    assert!(models.contains("\"little\""), "{models}");
    let (status, error) = post(
        client,
        "/tokenize",
        &json!({"prompt": "a", "model": "builtin"}),
    );
    assert_eq!(status, 404, "{error}");

    // The log has a line for each, and no word of what was asked.
    let mut stderr = coordinator.0.stderr.take().unwrap();
    assert_eq!(coordinator.end("-TERM"), Some(0));
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("request_id="))
        .collect();
    assert_eq!(lines.len(), 6, "{log}");
    for word in [
        "method=POST",
        "path=\"/v1/completions\"",
        "status=503",
        " ms=",
        "end=\"complete\"",
    ] {
        assert!(lines[0].contains(word), "{word}: {}", lines[0]);
    }
    assert!(!log.contains("What is"), "{log}");
}
