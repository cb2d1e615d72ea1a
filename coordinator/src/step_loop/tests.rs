//! The loop over scripted ranks.

mod rack;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use secondwind_model::{
    plan::{KvDType, LmHead, PlanSettings, Precision, ShardPlan},
    step::{RowResult, Sampling, Step, StepResult, TokenLogprobs},
};
use secondwind_proto::v1;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::*;
use crate::{
    cluster::{StepTime, WorkerLink},
    metrics::Metrics,
    request::{Engine, EventStream, FinishReason, NewSequence, Origin},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// A rank that finishes a step as soon as it gets it; its tokens count up from 100 by position.
struct Prompt {
    rank: usize,
    events: UnboundedSender<RankEvent>,
}

impl WorkerLink for Prompt {
    fn step(&mut self, step: &Step) {
        let rows = step
            .rows
            .iter()
            .enumerate()
            .filter(|(_, row)| row.sample.is_some());
        let result = StepResult {
            number: step.number,
            rows: match self.rank {
                0 => rows
                    .map(|(index, row)| RowResult {
                        row: index,
                        tokens: vec![TokenLogprobs {
                            token: 100 + (row.position + row.input.len()) as u32,
                            logprob: None,
                            top: Vec::new(),
                        }],
                        prompt_logprobs: Vec::new(),
                    })
                    .collect(),
                _ => Vec::new(),
            },
            gathered_rows: 0,
        };
        let _ = self.events.send(RankEvent::StepDone {
            rank: self.rank,
            result,
            time: StepTime {
                took: Duration::from_micros(10),
                collectives: Some(vec![Duration::from_micros(2 + 3 * self.rank as u64)]),
            },
        });
    }
}

/// A rank that fails the steps that carry more than a given number of tokens before them.
struct FailsFrom {
    position: usize,
    failures: Arc<AtomicUsize>,
    prompt: Prompt,
}

impl WorkerLink for FailsFrom {
    fn step(&mut self, step: &Step) {
        if step.rows.iter().any(|row| row.position >= self.position) {
            self.failures.fetch_add(1, Ordering::Relaxed);
            let _ = self.prompt.events.send(RankEvent::StepFailed {
                rank: self.prompt.rank,
                number: step.number,
                message: "layer 3, mlp.down: not finite".into(),
                peer_lost: false,
                sequence: None,
            });
            return;
        }
        self.prompt.step(step);
    }
}

/// A rank that never answers.
struct Hangs;

impl WorkerLink for Hangs {
    fn step(&mut self, _: &Step) {}
}

fn plan(kv_blocks: usize) -> Arc<ShardPlan> {
    Arc::new(ShardPlan {
        settings: PlanSettings {
            max_context_tokens: 256,
            max_sequences: 4,
            max_step_tokens: 64,
            max_logit_rows: 64,
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
        kv_blocks,
        ranks: Vec::new(),
    })
}

/// What a test holds of a running loop.
struct Harness {
    engine: Arc<EngineHandle>,
    groups: UnboundedSender<Group>,
    ends: UnboundedReceiver<EndEpoch>,
    end: UnboundedSender<EndEpoch>,
    state: watch::Sender<State>,
    _stop: watch::Sender<bool>,
}

impl Harness {
    fn start(step_deadline: Duration) -> Self {
        let (groups, formed) = mpsc::unbounded_channel();
        let (state, watched) = watch::channel(State::Gathering {
            attached: 0,
            needed: 2,
        });
        let settings = LoopSettings {
            max_waiting: 8,
            max_waiting_tokens: 100_000,
            max_prefill_tokens: 24,
            step_deadline,
            prefix_cache: true,
            max_drafts: 0,
            draft_cost_percent: None,
        };
        let (step_loop, engine) = StepLoop::new(settings, formed, watched, Metrics::new("m"));
        let (stop, mut stopped) = watch::channel(false);
        tokio::spawn(step_loop.run(async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));
        let (end, ends) = mpsc::unbounded_channel();
        Self {
            engine,
            groups,
            ends,
            end,
            state,
            _stop: stop,
        }
    }

    /// Hands over an epoch whose ranks `make` makes.
    fn form(
        &self,
        epoch: u64,
        make: impl Fn(usize, UnboundedSender<RankEvent>) -> Box<dyn WorkerLink>,
    ) -> UnboundedSender<RankEvent> {
        let (events, receiver) = mpsc::unbounded_channel();
        let group = Group {
            epoch,
            plan: plan(64),
            info: v1::Group::default(),
            links: (0..2).map(|rank| make(rank, events.clone())).collect(),
            events: receiver,
            end: self.end.clone(),
        };
        assert!(self.groups.send(group).is_ok());
        events
    }

    async fn submit(&self, prompt: usize, max_tokens: usize) -> EventStream {
        let sequence = sequence(prompt, max_tokens);
        // The loop opens once it has adopted its first group.
        loop {
            match self.engine.submit(sequence.clone()) {
                Ok(stream) => return stream,
                Err(SubmitError::NoGroup { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn sequence(prompt: usize, max_tokens: usize) -> NewSequence {
    NewSequence {
        prompt: vec![1; prompt],
        sampling: Sampling::default(),
        max_tokens,
        stop_token_ids: Vec::new(),
        prompt_logprobs: false,
        grammar: None,
        deadline: None,
        origin: Origin::default(),
    }
}

fn prompt(rank: usize, events: UnboundedSender<RankEvent>) -> Box<dyn WorkerLink> {
    Box::new(Prompt { rank, events })
}

/// Tokens until the sequence ends, and how it ends.
async fn drain(stream: &mut EventStream) -> (Vec<u32>, SequenceEvent) {
    let mut tokens = Vec::new();
    loop {
        let event = timeout(PATIENCE, stream.recv())
            .await
            .expect("no event")
            .expect("no end");
        match event {
            SequenceEvent::Token(token) => tokens.push(token.token),
            SequenceEvent::Queued { .. }
            | SequenceEvent::Started { .. }
            | SequenceEvent::PromptLogprobs(_) => {}
            end => return (tokens, end),
        }
    }
}

#[tokio::test]
async fn whoever_hears_that_a_group_serves_is_served() {
    let harness = Harness::start(PATIENCE);
    // The loop has had no chance to take the group up yet.
    harness.form(1, prompt);
    let serving = State::Serving(v1::Group::default());
    harness.state.send_replace(serving);
    let mut stream = harness.engine.submit(sequence(100, 2)).unwrap();
    assert_eq!(drain(&mut stream).await.0, [200, 201]);
}

#[tokio::test]
async fn tokens_come_in_order_and_end() {
    let harness = Harness::start(PATIENCE);
    harness.form(1, prompt);
    let mut stream = harness.submit(100, 5).await;
    let (tokens, end) = drain(&mut stream).await;
    assert_eq!(tokens, [200, 201, 202, 203, 204]);
    assert!(matches!(
        end,
        SequenceEvent::Finished {
            reason: FinishReason::Length,
            ..
        }
    ));
}

#[tokio::test]
async fn a_client_is_told_what_was_cached() {
    let harness = Harness::start(PATIENCE);
    harness.form(1, prompt);
    for cached_prompt_tokens in [0, 96] {
        let mut stream = harness.submit(100, 5).await;
        let started = SequenceEvent::Started {
            cached_prompt_tokens,
        };
        assert!(matches!(
            stream.recv().await,
            Some(SequenceEvent::Queued { .. })
        ));
        assert_eq!(stream.recv().await, Some(started));
        assert_eq!(drain(&mut stream).await.0, [200, 201, 202, 203, 204]);
    }
}

#[tokio::test]
async fn before_the_first_group_nothing_is_accepted() {
    let harness = Harness::start(PATIENCE);
    let sequence = NewSequence {
        prompt: vec![1],
        sampling: Sampling::default(),
        max_tokens: 1,
        stop_token_ids: Vec::new(),
        prompt_logprobs: false,
        grammar: None,
        deadline: None,
        origin: Origin::default(),
    };
    let refused = harness.engine.submit(sequence).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no group is serving yet: 0 of 2 workers are attached"
    );
}

#[tokio::test]
async fn a_lost_rank_ends_the_epoch_and_the_next_goes_on() {
    let mut harness = Harness::start(PATIENCE);
    // Rank 1 never answers, so nothing is committed before it is lost.
    let events = harness.form(1, |rank, events| match rank {
        0 => prompt(rank, events),
        _ => Box::new(Hangs),
    });
    let mut stream = harness.submit(10, 6).await;
    assert!(matches!(
        stream.recv().await,
        Some(SequenceEvent::Queued { .. })
    ));
    let started = SequenceEvent::Started {
        cached_prompt_tokens: 0,
    };
    assert_eq!(stream.recv().await, Some(started));
    let reason = "rank 1 is gone".to_owned();
    events.send(RankEvent::Lost { rank: 1, reason }).unwrap();
    let end = harness.ends.recv().await.unwrap();
    assert_eq!((end.epoch, end.expel), (1, None));
    harness.form(2, prompt);
    let (tokens, end) = drain(&mut stream).await;
    assert_eq!(tokens, [110, 111, 112, 113, 114, 115]);
    assert!(matches!(end, SequenceEvent::Finished { .. }));
}

#[tokio::test]
async fn a_hung_rank_is_expelled() {
    let mut harness = Harness::start(Duration::from_millis(50));
    harness.form(1, |rank, events| match rank {
        0 => prompt(rank, events),
        _ => Box::new(Hangs),
    });
    let _stream = harness.submit(10, 6).await;
    let end = timeout(PATIENCE, harness.ends.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(end.expel, Some(1));
    assert!(end.reason.contains("rank(s) [1]"), "{}", end.reason);
}

#[tokio::test]
async fn a_sequence_that_fails_its_steps_twice_is_given_up_and_others_are_not() {
    let mut harness = Harness::start(PATIENCE);
    let failures = Arc::new(AtomicUsize::new(0));
    let fails = |rank, events| -> Box<dyn WorkerLink> {
        Box::new(FailsFrom {
            position: 40,
            failures: failures.clone(),
            prompt: Prompt { rank, events },
        })
    };
    harness.form(1, fails);
    let mut good = harness.submit(4, 3).await;
    assert_eq!(drain(&mut good).await.0.len(), 3);
    let mut poison = harness.submit(38, 30).await;
    for epoch in 1..=2 {
        let end = timeout(PATIENCE, harness.ends.recv())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(end.epoch, epoch);
        assert!(end.reason.contains("mlp.down"), "{}", end.reason);
        harness.form(epoch + 1, fails);
    }
    let (tokens, end) = drain(&mut poison).await;
    // Position 40 fails; the recomputation starts at 0 and brings one token more before it fails again.
    assert_eq!(tokens, [138, 139, 140, 141]);
    assert!(
        matches!(end, SequenceEvent::Failed(SubmitError::Internal { .. })),
        "{end:?}"
    );
    let mut after = harness.submit(4, 3).await;
    assert_eq!(drain(&mut after).await.0.len(), 3);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let harness = Harness::start(PATIENCE);
    // Nothing is ever finished, so places are freed by leaving only.
    harness.form(1, |rank, events| match rank {
        0 => prompt(rank, events),
        _ => Box::new(Hangs),
    });
    let mut streams = Vec::new();
    loop {
        let mut stream = harness.submit(200, 50).await;
        match timeout(Duration::from_millis(50), stream.recv()).await {
            Ok(Some(SequenceEvent::Failed(SubmitError::QueueFull { .. }))) => break,
            _ => streams.push(stream),
        }
        assert!(streams.len() < 100, "the queue never fills");
    }
    streams.pop();
    let freed = async {
        loop {
            let mut stream = harness.submit(200, 50).await;
            match timeout(Duration::from_millis(20), stream.recv()).await {
                Ok(Some(SequenceEvent::Failed(_))) => continue,
                _ => return,
            }
        }
    };
    timeout(PATIENCE, freed)
        .await
        .expect("leaving freed nothing");
}
