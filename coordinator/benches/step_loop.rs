//! Microseconds of coordinator work per step: scheduling, the messages to every rank, committing, and the
//! events to every client. Ranks answer at once, so nothing else is in the figure.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use secondwind_coordinator::{
    cluster::{Group, RankEvent, State, StepTime, WorkerLink},
    metrics::Metrics,
    request::{Engine, NewSequence, Origin, SequenceEvent},
    step_loop::{LoopSettings, StepLoop},
};
use secondwind_model::{
    plan::{KvDType, LmHead, PlanSettings, Precision, ShardPlan},
    step::{RowResult, Sampling, Step, StepResult, TokenLogprobs},
};
use secondwind_proto::{step_to_wire, v1};
use tokio::sync::{mpsc, watch};

const TOKENS: usize = 500;

struct Instantly {
    rank: usize,
    events: mpsc::UnboundedSender<RankEvent>,
}

impl WorkerLink for Instantly {
    fn step(&mut self, step: &Step) {
        std::hint::black_box(step_to_wire(1, step).encode_to_vec());
        let rows = step
            .rows
            .iter()
            .enumerate()
            .filter(|(_, row)| row.sample.is_some());
        let token = || TokenLogprobs {
            token: 7,
            logprob: None,
            top: Vec::new(),
        };
        let result = StepResult {
            number: step.number,
            rows: rows
                .filter(|_| self.rank == 0)
                .map(|(row, _)| RowResult {
                    row,
                    tokens: vec![token()],
                    prompt_logprobs: Vec::new(),
                })
                .collect(),
            gathered_rows: 0,
        };
        let _ = self.events.send(RankEvent::StepDone {
            rank: self.rank,
            result,
            time: StepTime::default(),
        });
    }
}

fn plan(sequences: usize) -> ShardPlan {
    ShardPlan {
        settings: PlanSettings {
            max_context_tokens: 1024,
            max_sequences: sequences,
            max_step_tokens: 512,
            max_logit_rows: 256,
            block_tokens: 16,
            kv_dtype: KvDType::F32,
            precision: Precision::Exact,
            lm_head: LmHead::Fp16,
            memory_reserve_bytes: 0,
            forced_split: None,
        },
        layer_ranges: Vec::new(),
        layers: Vec::new(),
        vocab: Vec::new(),
        kv_blocks: 64 * sequences + 1,
        ranks: Vec::new(),
    }
}

async fn measure(sequences: usize, world: usize) -> Duration {
    let (groups, formed) = mpsc::unbounded_channel();
    let (_state, watched) = watch::channel(State::Gathering {
        attached: 0,
        needed: world,
    });
    let settings = LoopSettings {
        max_waiting: sequences,
        max_waiting_tokens: usize::MAX,
        max_prefill_tokens: 24,
        step_deadline: Duration::from_secs(60),
        prefix_cache: true,
        max_drafts: 0,
        draft_cost_percent: None,
    };
    let (step_loop, engine) = StepLoop::new(settings, formed, watched, Metrics::new("m"));
    let (_stop, mut stopped) = watch::channel(false);
    tokio::spawn(step_loop.run(async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    }));
    let (events, receiver) = mpsc::unbounded_channel();
    let link = |rank| {
        Box::new(Instantly {
            rank,
            events: events.clone(),
        }) as Box<dyn WorkerLink>
    };
    let group = Group {
        epoch: 1,
        plan: Arc::new(plan(sequences)),
        info: v1::Group::default(),
        links: (0..world).map(link).collect(),
        events: receiver,
        end: mpsc::unbounded_channel().0,
    };
    assert!(groups.send(group).is_ok());
    let sequence = NewSequence {
        prompt: vec![1; 8],
        sampling: Sampling {
            temperature: 1.0,
            ..Sampling::default()
        },
        max_tokens: TOKENS,
        stop_token_ids: vec![0],
        prompt_logprobs: false,
        grammar: None,
        deadline: None,
        origin: Origin::default(),
    };
    let start = Instant::now();
    let mut streams = Vec::new();
    while streams.len() < sequences {
        match engine.submit(sequence.clone()) {
            Ok(stream) => streams.push(stream),
            Err(_) => tokio::task::yield_now().await,
        }
    }
    for mut stream in streams {
        while let Some(event) = stream.recv().await {
            if matches!(event, SequenceEvent::Finished { .. }) {
                break;
            }
        }
    }
    start.elapsed() / TOKENS as u32
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    println!("sequences  ranks  microseconds per step");
    for world in [1, 3] {
        for sequences in [1, 8, 64] {
            let best = (0..3)
                .map(|_| runtime.block_on(measure(sequences, world)))
                .min();
            let best = best.unwrap_or_default();
            println!(
                "{sequences:>9}  {world:>5}  {:>21.1}",
                best.as_secs_f64() * 1e6
            );
        }
    }
}
