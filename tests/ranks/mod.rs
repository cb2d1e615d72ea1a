//! Ranks of one epoch as engine threads of this process, driven step by step without a coordinator.
#![allow(dead_code)] // Every test program uses a part.

pub mod oracle;

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::Duration,
};

use secondwind_kernels::{
    cuda,
    select::{AttentionPath, LinearPath},
};
use secondwind_model::{
    capabilities::{Capabilities, LinearCapability, Recordings, WeightKind},
    checkpoint::Checkpoint,
    plan::{self, KvDType, LmHead, PlanSettings, Precision, ShardPlan},
    step::{RowInput, Sampling, SequenceId, Step, StepResult, StepRow},
};
use secondwind_worker::{
    backend::{Backend, CpuBackend, CudaBackend},
    collective::{
        Collective, Solo,
        grpc::{Meeting, PeerHub},
        local,
        nccl::Nccl,
    },
    engine::{self, Event, Formation, Order},
};

pub const DEADLINE: Duration = Duration::from_secs(60);

/// How the ranks meet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Via {
    Memory,
    Grpc,
    /// In memory, and sums over NCCL.
    Nccl,
}

/// What every rank computes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum On {
    /// This machine's processor.
    Cpu,
    /// Card `rank`, or the only one, with the code of this architecture or its own.
    Card(Option<cuda::Arch>),
    /// Rank 0 a card like this, the others the processor.
    CardAndCpu(Option<cuda::Arch>),
}

/// How a test wants its ranks.
#[derive(Clone, Debug)]
pub struct Setup {
    pub world: usize,
    pub split: Option<Vec<f64>>,
    pub via: Via,
    pub on: On,
    pub threads: usize,
    pub linear_path: Option<LinearPath>,
    pub attention_path: Option<AttentionPath>,
    pub kv_dtype: KvDType,
    pub precision: Precision,
    pub lm_head: LmHead,
    /// Tokens and rows of logits of a step.
    pub step_tokens: usize,
    /// Instead of the plan's own.
    pub plan_digest: Option<String>,
}

impl Setup {
    pub fn world(world: usize) -> Self {
        Self {
            world,
            split: None,
            via: Via::Memory,
            on: On::Cpu,
            threads: 1,
            linear_path: None,
            attention_path: None,
            kv_dtype: KvDType::F32,
            precision: Precision::Exact,
            lm_head: LmHead::Fp16,
            step_tokens: 256,
            plan_digest: None,
        }
    }
}

pub const BLOCK_TOKENS: usize = 16;

/// Settings of a small plan with a context of `max_context_tokens`.
pub fn settings(max_context_tokens: usize, setup: &Setup) -> PlanSettings {
    PlanSettings {
        max_context_tokens,
        max_sequences: 4,
        max_step_tokens: setup.step_tokens,
        max_logit_rows: setup.step_tokens,
        block_tokens: BLOCK_TOKENS,
        kv_dtype: setup.kv_dtype,
        precision: setup.precision,
        lm_head: setup.lm_head,
        memory_reserve_bytes: 0,
        forced_split: setup.split.clone(),
    }
}

/// A worker with plenty of memory for every kind of weights.
pub fn capabilities() -> Capabilities {
    let kinds = [2, 3, 4, 8].map(|bits| (WeightKind::Gptq { bits }, f64::from(bits) / 8.0));
    let dense = [(WeightKind::Dense16, 2.0), (WeightKind::Dense32, 4.0)];
    Capabilities {
        device: "test".into(),
        usable_bytes: 1 << 30,
        read_bytes_per_second: 1.0e10,
        all_reduce_latency_seconds: 1.0e-5,
        op_latency_seconds: 1.0e-6,
        linears: kinds
            .into_iter()
            .chain(dense)
            .map(|(weights, bytes_per_weight)| LinearCapability {
                weights,
                max_rows: 512,
                path: "test".into(),
                bytes_per_weight,
                column_multiple: 16,
                row_multiple: 8,
                scale_rows: 0,
                bytes_per_scale: 4.0,
                scratch_bytes_per_row: 0.0,
                scratch_bytes: 0.0,
                seconds_per_byte: 1.0e-10,
            })
            .collect(),
        recordings: Recordings::default(),
    }
}

fn spawn<B: Backend + Send + 'static>(
    backend: B,
    checkpoint: Arc<Checkpoint>,
    queue: Receiver<Order>,
    tell: impl FnMut(Event) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || engine::run(backend, &checkpoint, &queue, tell))
}

fn nccl(setup: &Setup) -> Option<Arc<Nccl>> {
    (setup.via == Via::Nccl).then(|| Arc::new(Nccl::open(None).unwrap()))
}

/// The card of a rank; ranks beyond the last card share it.
pub fn card(rank: usize, arch: Option<cuda::Arch>) -> cuda::Device {
    let count = cuda::device_count().unwrap();
    let source = cuda::PackSource {
        pack: std::env::var_os("SECONDWIND_WORKER_KERNEL_PACK").map(Into::into),
        ..cuda::PackSource::default()
    };
    cuda::Device::open(rank.min(count - 1), arch, &source, |_| {}).unwrap()
}

/// Loaded ranks, ready for steps.
pub struct Ranks {
    pub plan: ShardPlan,
    orders: Vec<Sender<Order>>,
    events: Receiver<(usize, Event)>,
    threads: Vec<JoinHandle<()>>,
    next_step: u64,
    next_sequence: SequenceId,
    next_block: u32,
    _runtime: Option<tokio::runtime::Runtime>,
}

impl Ranks {
    /// Loads a checkpoint folder into the ranks of a setup.
    pub fn load(folder: &Path, max_context_tokens: usize, setup: &Setup) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
        Self::new(checkpoint, max_context_tokens, setup)
    }

    pub fn new(checkpoint: Arc<Checkpoint>, max_context_tokens: usize, setup: &Setup) -> Self {
        let workers = vec![capabilities(); setup.world];
        let settings = settings(max_context_tokens, setup);
        let shape = checkpoint.shape().unwrap().with_lm_head(setup.lm_head);
        let plan = plan::plan(&shape, &settings, &workers).unwrap();
        let (collectives, runtime) = collectives(setup);
        let (emit, events) = mpsc::channel();
        let version = env!("CARGO_PKG_VERSION");
        let own_digest = plan::digest(&plan, &checkpoint.digest_hex(), version);
        let plan_digest = setup.plan_digest.clone().unwrap_or(own_digest);
        let mut orders = Vec::new();
        let mut threads = Vec::new();
        for (rank, collective) in collectives.into_iter().enumerate() {
            let (order, queue) = mpsc::channel();
            let (checkpoint, emit) = (checkpoint.clone(), emit.clone());
            let tell = move |event| {
                let _ = emit.send((rank, event));
            };
            let (linear, attention) = (setup.linear_path, setup.attention_path);
            threads.push(match (setup.on, rank) {
                (On::Cpu, _) | (On::CardAndCpu(_), 1..) => {
                    let backend = CpuBackend::new(setup.threads, linear, attention).unwrap();
                    spawn(backend, checkpoint, queue, tell)
                }
                (On::Card(arch), _) | (On::CardAndCpu(arch), 0) => {
                    let backend =
                        CudaBackend::new(card(rank, arch), linear, attention, nccl(setup)).unwrap();
                    spawn(backend, checkpoint, queue, tell)
                }
            });
            let formation = Formation {
                epoch: 1,
                rank,
                plan: plan.clone(),
                plan_digest: plan_digest.clone(),
                collective,
                nccl: setup.via == Via::Nccl,
                cancelled: Arc::default(),
            };
            order.send(Order::Form(Box::new(formation))).unwrap();
            orders.push(order);
        }
        let mut ready = 0;
        while ready < setup.world {
            match events.recv_timeout(DEADLINE).unwrap() {
                (_, Event::Ready { .. }) => ready += 1,
                (_, Event::LoadProgress { .. }) => {}
                (rank, event) => panic!("rank {rank} said {event:?}"),
            }
        }
        Self {
            plan,
            orders,
            events,
            threads,
            next_step: 0,
            next_sequence: 1,
            next_block: 1,
            _runtime: runtime,
        }
    }

    /// Runs one step on every rank; returns rank 0's result.
    pub fn step(&mut self, rows: Vec<StepRow>, ended: Vec<SequenceId>) -> StepResult {
        let step = Step {
            number: self.next_step,
            rows,
            ended,
        };
        self.next_step += 1;
        for order in &self.orders {
            let step = step.clone();
            order.send(Order::Step { epoch: 1, step }).unwrap();
        }
        let mut root = None;
        for _ in 0..self.orders.len() {
            match self.events.recv_timeout(DEADLINE).unwrap() {
                (rank, Event::StepDone { result, .. }) => {
                    assert_eq!(result.number, step.number);
                    if rank == 0 {
                        root = Some(result);
                    }
                }
                (rank, event) => panic!("rank {rank} said {event:?}"),
            }
        }
        root.unwrap()
    }

    /// A new sequence with blocks for `tokens` tokens.
    pub fn sequence(&mut self, tokens: usize) -> Sequence {
        let blocks = tokens.div_ceil(BLOCK_TOKENS) as u32;
        let first = self.next_block;
        self.next_block += blocks;
        assert!(
            self.next_block as usize <= self.plan.kv_blocks,
            "too few blocks"
        );
        let id = self.next_sequence;
        self.next_sequence += 1;
        Sequence {
            id,
            blocks: first..first + blocks,
            position: 0,
        }
    }

    /// Forgets all sequences.
    pub fn clear(&mut self) {
        let ended = (1..self.next_sequence).collect();
        self.step(Vec::new(), ended);
        self.next_block = 1;
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.orders.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One sequence of a test.
pub struct Sequence {
    id: SequenceId,
    blocks: Range<u32>,
    position: usize,
}

impl Sequence {
    /// Its next tokens as a row; the first row brings all blocks.
    pub fn row(
        &mut self,
        tokens: &[u32],
        prompt_targets: &[u32],
        sample: Option<Sampling>,
    ) -> StepRow {
        let row = StepRow {
            sequence: self.id,
            position: self.position,
            input: RowInput::Tokens(tokens.to_vec()),
            new_blocks: if self.position == 0 {
                self.blocks.clone().collect()
            } else {
                Vec::new()
            },
            sample,
            prompt_targets: prompt_targets.to_vec(),
            mask: None,
            drafts: 0,
        };
        self.position += tokens.len();
        row
    }

    /// Its next token and guesses of those behind it, as a row that decodes; so many of them are right.
    pub fn guessing(&mut self, tokens: &[u32], right: usize) -> StepRow {
        let row = self.row(tokens, &[], greedy(None));
        let drafts = tokens.len() - 1;
        self.position -= drafts - right;
        StepRow { drafts, ..row }
    }
}

pub fn greedy(logprobs: Option<u32>) -> Option<Sampling> {
    Some(Sampling {
        logprobs,
        ..Sampling::default()
    })
}

fn collectives(setup: &Setup) -> (Vec<Box<dyn Collective>>, Option<tokio::runtime::Runtime>) {
    match (setup.world, setup.via) {
        (1, _) => (vec![Box::new(Solo)], None),
        (world, Via::Memory | Via::Nccl) => {
            let boxed = |mesh| Box::new(mesh) as Box<dyn Collective>;
            (
                local::meshes(world, DEADLINE)
                    .into_iter()
                    .map(boxed)
                    .collect(),
                None,
            )
        }
        (world, Via::Grpc) => {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let meshes = runtime.block_on(grpc_meshes(world));
            (meshes, Some(runtime))
        }
    }
}

async fn grpc_meshes(world: usize) -> Vec<Box<dyn Collective>> {
    let mut hubs = Vec::new();
    let mut peers = Vec::new();
    for _ in 0..world {
        let hub = PeerHub::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        peers.push(format!("http://{}", listener.local_addr().unwrap()));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(hub.service())
                .serve_with_incoming(incoming),
        );
        hubs.push(hub);
    }
    let mut meeting = Vec::new();
    for (rank, hub) in hubs.into_iter().enumerate() {
        let peers = peers.clone();
        meeting.push(tokio::spawn(async move {
            hub.meet(Meeting {
                epoch: 1,
                token: "test",
                rank,
                peers: &peers,
                timeout: DEADLINE,
                deadline: DEADLINE,
            })
            .await
            .unwrap()
        }));
    }
    let mut meshes: Vec<Box<dyn Collective>> = Vec::new();
    for mesh in meeting {
        meshes.push(Box::new(mesh.await.unwrap()));
    }
    meshes
}
