//! Makes the requests of one level, and notes what came of each.

use std::{
    io::{IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    task::JoinSet,
    time::{interval, sleep_until, timeout},
};

use super::{
    grpc::Grpc,
    load::Load,
    openai::OpenAi,
    record::{Listener, Outcome, Record},
};

/// Whom requests go to.
pub enum Server {
    OpenAi(Box<OpenAi>),
    Grpc(Grpc),
}

/// When requests are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// As many at a time: each end begins the next.
    Closed { concurrency: u32 },
    /// As many per second, whatever became of those before.
    Open { rate: f64 },
}

/// How long a level goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    Requests(u32),
    /// No request begins later.
    Seconds(f64),
}

/// One setting of a sweep.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Levels have different requests.
    pub number: u32,
    pub pace: Pace,
    pub until: Until,
    /// A request that takes longer fails.
    pub patience: Duration,
}

/// What one request needs.
struct Work {
    server: Arc<Server>,
    load: Load,
    level: Level,
    began: Instant,
    /// Next of a closed loop.
    next: AtomicU32,
    progress: Progress,
}

/// Makes the level's requests and awaits them all.
pub async fn drive(server: &Arc<Server>, load: &Load, level: Level) -> Result<Vec<Record>> {
    let work = Arc::new(Work {
        server: Arc::clone(server),
        load: load.clone(),
        level,
        began: Instant::now(),
        next: AtomicU32::new(0),
        progress: Progress::default(),
    });
    let showing = tokio::spawn(show(Arc::clone(&work)));
    let records = match level.pace {
        Pace::Closed { concurrency } => closed(&work, concurrency).await,
        Pace::Open { rate } => open(&work, rate).await,
    };
    showing.abort();
    clear_line();
    records
}

async fn closed(work: &Arc<Work>, concurrency: u32) -> Result<Vec<Record>> {
    let mut lanes = JoinSet::new();
    for _ in 0..concurrency {
        let work = Arc::clone(work);
        lanes.spawn(async move {
            let mut records = Vec::new();
            loop {
                let start = work.began.elapsed().as_secs_f64();
                let index = work.next.fetch_add(1, Ordering::Relaxed);
                if work.is_over(index, start) {
                    return records;
                }
                records.push(work.one(index, start).await);
            }
        });
    }
    let mut records = Vec::new();
    while let Some(lane) = lanes.join_next().await {
        records.extend(lane?);
    }
    Ok(records)
}

async fn open(work: &Arc<Work>, rate: f64) -> Result<Vec<Record>> {
    let mut requests = JoinSet::new();
    for (index, at) in (0..).zip(work.load.arrivals(work.level.number, rate)) {
        if work.is_over(index, at) {
            break;
        }
        sleep_until((work.began + Duration::from_secs_f64(at)).into()).await;
        let work = Arc::clone(work);
        // The start is when it was due: what delays us delays its answer.
        requests.spawn(async move { work.one(index, at).await });
    }
    let mut records = Vec::new();
    while let Some(record) = requests.join_next().await {
        records.push(record?);
    }
    Ok(records)
}

impl Work {
    fn is_over(&self, index: u32, start: f64) -> bool {
        match self.level.until {
            Until::Requests(count) => index >= count,
            Until::Seconds(seconds) => start >= seconds,
        }
    }

    async fn one(&self, index: u32, start: f64) -> Record {
        let ask = self.load.ask(self.level.number, index);
        let mut listener = Listener::new(self.began, &ask);
        let asking = async {
            match &*self.server {
                Server::OpenAi(server) => server.ask(&ask, &mut listener).await,
                Server::Grpc(server) => server.ask(&ask, &mut listener).await,
            }
        };
        let ended = timeout(self.level.patience, asking).await;
        let record = listener.end(start, ended.unwrap_or_else(|_| Err("timeout".into())));
        self.progress.count(&record);
        record
    }
}

/// How far a level is.
#[derive(Default)]
struct Progress {
    ended: AtomicU64,
    failed: AtomicU64,
    tokens: AtomicU64,
}

impl Progress {
    fn count(&self, record: &Record) {
        self.ended.fetch_add(1, Ordering::Relaxed);
        match &record.outcome {
            Outcome::Done(usage) => {
                self.tokens
                    .fetch_add(usage.completion_tokens, Ordering::Relaxed);
            }
            Outcome::Failed(_) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::Cancelled => {}
        }
    }
}

/// One line on a terminal, until it is aborted.
async fn show(work: Arc<Work>) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let mut ticks = interval(Duration::from_millis(250));
    loop {
        ticks.tick().await;
        let seconds = work.began.elapsed().as_secs_f64();
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let progress = &work.progress;
        let of = match work.level.until {
            Until::Requests(count) => format!(" of {count}"),
            Until::Seconds(until) => format!(" in {seconds:.0} of {until:.0} s"),
        };
        // Progress that cannot be shown is no failure.
        let _ = write!(
            std::io::stderr(),
            "\r\x1b[K{}: {}{of} requests ended, {} failed, {:.0} tokens/s",
            work.level.pace,
            get(&progress.ended),
            get(&progress.failed),
            get(&progress.tokens) as f64 / seconds.max(1e-3),
        );
    }
}

fn clear_line() {
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
}

impl std::fmt::Display for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "{concurrency} at a time"),
            Self::Open { rate } => write!(f, "{rate} per second"),
        }
    }
}
