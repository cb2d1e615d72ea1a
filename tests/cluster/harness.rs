//! A coordinator and workers in this process, over loopback sockets.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use secondwind_coordinator::{
    ClientSettings, Collective, Coordinator, CoordinatorConfig, HttpSettings, Reasoning, Settings,
};
use secondwind_kernels::cuda::{Arch, PackSource};
use secondwind_model::plan::{KvDType, LmHead, Precision};
use secondwind_proto::v1::{self, inference_client::InferenceClient};
use secondwind_worker::{Device, LocalHub, WorkerConfig};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::transport::Channel;

/// Anything takes less than this, or hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How a test wants its cluster.
#[derive(Clone)]
pub struct Setup {
    pub model: String,
    pub world: usize,
    pub collective: Collective,
    pub max_sequences: usize,
    pub max_waiting: usize,
    pub max_context_tokens: Option<usize>,
    pub kv_dtype: KvDType,
    pub precision: Precision,
    pub device: Device,
    /// Whose code a card runs, instead of its own.
    pub arch: Option<Arch>,
    /// Of each worker.
    pub memory_bytes: u64,
    pub prefix_cache: bool,
    pub max_drafts: usize,
    pub split: Option<Vec<f64>>,
}

impl Setup {
    pub fn builtin(world: usize) -> Self {
        Self {
            model: "builtin".into(),
            world,
            collective: Collective::Auto,
            max_sequences: 16,
            max_waiting: 1024,
            max_context_tokens: None,
            kv_dtype: KvDType::F32,
            precision: Precision::Exact,
            device: Device::Cpu,
            arch: None,
            memory_bytes: 1 << 30,
            prefix_cache: true,
            max_drafts: 4,
            split: None,
        }
    }
}

pub struct Cluster {
    pub endpoint: String,
    cluster: SocketAddr,
    setup: Setup,
    hub: Option<Arc<LocalHub>>,
    stop: watch::Sender<bool>,
    coordinator: JoinHandle<()>,
    workers: HashMap<String, JoinHandle<()>>,
}

impl Cluster {
    /// Starts everything and waits until it serves.
    pub async fn start(setup: Setup) -> Self {
        let clients = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cluster = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", clients.local_addr().unwrap());
        let cluster_address = cluster.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let config = CoordinatorConfig {
            model: setup.model.clone(),
            served_name: None,
            world_size: setup.world,
            settings: Settings {
                max_context_tokens: setup.max_context_tokens,
                max_sequences: setup.max_sequences,
                max_step_tokens: 256,
                kv_dtype: setup.kv_dtype,
                precision: setup.precision,
                lm_head: LmHead::Fp16,
                memory_reserve_bytes: 0,
                split: setup.split.clone(),
            },
            max_waiting: setup.max_waiting,
            max_waiting_tokens: 1 << 20,
            max_prefill_tokens: 24,
            prefix_cache: setup.prefix_cache,
            max_drafts: setup.max_drafts,
            // Not as measured: a busy machine would not guess.
            draft_cost_percent: Some(5),
            collective: setup.collective,
            step_deadline: PATIENCE,
            reasoning: Reasoning::default(),
            clients: ClientSettings::default(),
            http: HttpSettings::default(),
            exit_without_plan: false,
        };
        let coordinator = Coordinator::prepare(config).unwrap();
        let coordinator = tokio::spawn(async move {
            coordinator
                .run(clients, cluster, until(stopped))
                .await
                .unwrap();
        });
        let hub = (setup.collective == Collective::Auto).then(|| Arc::new(LocalHub::default()));
        let mut this = Self {
            endpoint,
            cluster: cluster_address,
            setup,
            hub,
            stop,
            coordinator,
            workers: HashMap::new(),
        };
        for rank in 0..this.setup.world {
            this.start_worker(&format!("worker-{rank}"));
        }
        this.until_serving(1).await;
        this
    }

    pub fn start_worker(&mut self, name: &str) {
        let config = WorkerConfig {
            coordinator: format!("http://{}", self.cluster),
            model: self.setup.model.clone(),
            device: self.setup.device,
            kernels: PackSource {
                pack: std::env::var_os("SECONDWIND_WORKER_KERNEL_PACK").map(Into::into),
                ..PackSource::default()
            },
            arch_override: self.setup.arch,
            nccl_library: None,
            nccl_interface: None,
            threads: Some(1),
            memory_bytes: Some(self.setup.memory_bytes),
            peer_listen: "127.0.0.1:0".parse().unwrap(),
            name: name.to_owned(),
            linear_path: None,
            attention_path: None,
            local_hub: self.hub.clone(),
            capabilities: None,
            progress: false,
        };
        let stopped = self.stop.subscribe();
        let worker = tokio::spawn(async move {
            secondwind_worker::run(config, until(stopped))
                .await
                .unwrap();
        });
        self.workers.insert(name.to_owned(), worker);
    }

    /// Where workers attach.
    pub fn workers_endpoint(&self) -> String {
        format!("http://{}", self.cluster)
    }

    /// Ends a worker without a word, as a crash does.
    pub fn kill_worker(&mut self, name: &str) {
        self.workers.remove(name).unwrap().abort();
    }

    pub async fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(self.endpoint.clone())
            .await
            .unwrap()
    }

    /// A figure of `/metrics`.
    pub async fn metric(&self, name: &str) -> f64 {
        let address = self.endpoint.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let figure = text.lines().find_map(|line| line.strip_prefix(name));
        figure.unwrap().trim().parse().unwrap()
    }

    /// The group that serves, once its epoch is at least `epoch`.
    pub async fn until_serving(&self, epoch: u64) -> v1::Group {
        let waiting = async {
            loop {
                if let Ok(mut client) = InferenceClient::connect(self.endpoint.clone()).await
                    && let Ok(model) = client.get_model(v1::GetModelRequest {}).await
                    && let Some(group) = model.into_inner().group
                    && group.epoch >= epoch
                {
                    return group;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, waiting)
            .await
            .expect("the group does not form")
    }

    pub async fn stop(self) {
        self.stop.send_replace(true);
        timeout(PATIENCE, self.coordinator)
            .await
            .expect("the coordinator hangs")
            .unwrap();
        for (name, worker) in self.workers {
            timeout(PATIENCE, worker)
                .await
                .unwrap_or_else(|_| panic!("{name} hangs"))
                .unwrap();
        }
    }
}

async fn until(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// A greedy chat request of one user message.
pub fn chat(question: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Chat(v1::ChatPrompt {
            messages: vec![v1::ChatMessage {
                role: "user".into(),
                content: question.into(),
                ..Default::default()
            }],
            ..Default::default()
        })),
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ..Default::default()
    }
}

/// The whole answer of one request.
pub async fn answer(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
) -> Result<(String, Vec<u32>, v1::Finish), tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let (mut text, mut ids, mut finish) = (String::new(), Vec::new(), None);
    while let Some(response) = stream.message().await? {
        text += &response.text;
        ids.extend(response.token_ids);
        finish = finish.or(response.finish);
    }
    Ok((text, ids, finish.expect("a stream ends with its finish")))
}
