//! A long random mix of requests, good and bad, over both APIs; afterwards nothing is left of it.
//!
//! `SOAK_REQUESTS` says how many, `SOAK_SEED` which: what failed is asked again by the seed that it printed.

#[path = "../cluster/harness.rs"]
#[allow(dead_code)]
mod harness;

mod grpc;
mod http;
mod mix;
mod random;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::{runtime::Handle, task::JoinSet, time::sleep};

use crate::{
    grpc::Grpc,
    harness::{Cluster, PATIENCE, Setup},
    http::Http,
    mix::Kind,
    random::Random,
};

/// What CI has the time for; 100,000 by hand.
const REQUESTS: u64 = 2_000;
/// Requests at a time: more than run and wait, so that some are refused.
const LANES: usize = 40;
/// How long who was refused waits before the next request, so that refusals are not most of the answers.
const PAUSE: Duration = Duration::from_millis(100);
const CONTEXT_TOKENS: u32 = 256;
/// The KV cache is written block by block, and what allocators keep differs: growth after the first tenth of the
/// requests stays below this. One leaked kilobyte a request would be 98 MB of 100,000.
const GROWTH_BYTES: u64 = 48 << 20;

fn main() {
    let arguments = Arguments::from_args();
    let requests = number("SOAK_REQUESTS").unwrap_or(REQUESTS);
    let seed = number("SOAK_SEED").unwrap_or_else(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    });
    let trial = Trial::test("requests leave nothing behind", move || {
        // Every thread has an arena of its own, which keeps what it once took: few make the memory's bound tell.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let soaked = runtime.block_on(soak(seed, requests));
        soaked.map_err(|why| Failed::from(format!("SOAK_SEED={seed}: {why}")))
    });
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}: {text:?} is not a number")))
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    tasks: usize,
    descriptors: usize,
}

impl Held {
    fn now() -> Self {
        Self {
            tasks: Handle::current().metrics().num_alive_tasks(),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        }
    }
}

async fn soak(seed: u64, requests: u64) -> Result<(), String> {
    let cluster = Cluster::start(Setup {
        max_sequences: 8,
        max_waiting: 26,
        max_context_tokens: Some(CONTEXT_TOKENS as usize),
        ..Setup::builtin(1)
    })
    .await;
    let address: SocketAddr = cluster.endpoint["http://".len()..].parse().unwrap();
    // The clients that asked whether it serves are gone by then.
    sleep(Duration::from_secs(1)).await;
    let before = Held::now();
    let began = Instant::now();
    let (counts, tenth_bytes) = ask(&cluster.endpoint, address, seed, requests).await?;
    let end_bytes = resident_bytes();
    let took = began.elapsed();
    for ((kind, code), count) in &counts {
        println!("{kind:?} {code}: {count}");
    }
    left_nothing(address, before).await?;
    let growth = end_bytes.saturating_sub(tenth_bytes);
    println!(
        "{requests} requests in {:.0} s; resident {} KiB after a tenth, {} KiB at the end; {before:?} before and after",
        took.as_secs_f64(),
        tenth_bytes >> 10,
        end_bytes >> 10,
    );
    if growth > GROWTH_BYTES {
        return Err(format!(
            "resident memory grew by {growth} bytes after the first tenth"
        ));
    }
    // A mix that met nothing would prove nothing.
    if requests >= REQUESTS {
        for (kind, code) in [
            (Kind::HttpWhole, "200"),
            (Kind::HttpStream, "200"),
            (Kind::HttpDisconnect, "200"),
            (Kind::Grpc, "OK"),
            (Kind::Grpc, "RESOURCE_EXHAUSTED"),
            (Kind::GrpcCancel, "left"),
            (Kind::GrpcDisconnect, "left"),
        ] {
            if !counts.contains_key(&(kind, code.to_owned())) {
                return Err(format!("no {kind:?} got {code}"));
            }
        }
    }
    cluster.stop().await;
    Ok(())
}

type Counts = BTreeMap<(Kind, String), u64>;

/// Makes all requests. How many of each kind got which code, and the resident bytes after a tenth.
async fn ask(
    endpoint: &str,
    address: SocketAddr,
    seed: u64,
    requests: u64,
) -> Result<(Counts, u64), String> {
    let (next, tenth_bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let counts = Arc::new(Mutex::new(Counts::new()));
    let (http, grpc) = (
        Arc::new(Http::new(address)),
        Arc::new(Grpc::connect(endpoint).await),
    );
    let mut lanes = JoinSet::new();
    for _ in 0..LANES {
        let (next, tenth_bytes, counts) = (next.clone(), tenth_bytes.clone(), counts.clone());
        let (http, grpc) = (http.clone(), grpc.clone());
        lanes.spawn(async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= requests {
                    return Ok(());
                }
                if index == requests / 10 {
                    tenth_bytes.store(resident_bytes(), Ordering::Relaxed);
                }
                let mut random = Random::new(seed, index);
                let kind = Kind::draw(&mut random);
                let asked = match kind < Kind::Grpc {
                    true => http.ask(kind, &mut random).await,
                    false => grpc.ask(kind, &mut random).await,
                };
                let code = asked.map_err(|why| format!("request {index}, {kind:?}: {why}"))?;
                if !kind.codes().contains(&code.as_str()) {
                    return Err(format!("request {index}, {kind:?}, got {code}"));
                }
                let refused = code == "429" || code == "RESOURCE_EXHAUSTED";
                *counts.lock().unwrap().entry((kind, code)).or_default() += 1;
                if refused {
                    sleep(PAUSE).await;
                }
            }
        });
    }
    while let Some(lane) = lanes.join_next().await {
        lane.map_err(|error| error.to_string())??;
    }
    let counts = std::mem::take(&mut *counts.lock().unwrap());
    Ok((counts, tenth_bytes.load(Ordering::Relaxed)))
}

/// Waits until nothing is held that was not held before.
async fn left_nothing(address: SocketAddr, before: Held) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = http::metrics(address).await;
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or_else(|| panic!("no {name} in\n{text}"))
        };
        let [running, waiting, blocks] = [
            "secondwind_num_requests_running ",
            "secondwind_num_requests_waiting ",
            "secondwind_kv_cache_usage_perc ",
        ]
        .map(value);
        // The connection that asked needs a moment to go.
        sleep(Duration::from_millis(200)).await;
        let now = Held::now();
        let idle = (running, waiting, blocks) == (0.0, 0.0, 0.0);
        if idle && now.tasks <= before.tasks && now.descriptors <= before.descriptors {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!(
                "still {running} running, {waiting} waiting, {blocks} of the KV blocks, {now:?} of {before:?}"
            ));
        }
    }
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap() << 10
}
