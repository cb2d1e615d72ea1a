//! A coordinator's life: open the checkpoint, listen for workers and clients, step until told to stop.

use std::{sync::Arc, time::Duration};

use secondwind_model::{
    checkpoint::Checkpoint,
    config::Architecture,
    error::CheckpointError,
    plan::{self, KvDType, LmHead, ModelShape, PlanSettings, Precision},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    api::{
        self, ApiKey, ApiKeys, ConnectionLimits, Connections, Frontend, HttpSettings, Reasoning,
        SamplingDefaults, ServedModel, ServingHandle,
    },
    cluster::{ClusterService, Collective, Identity, Membership, MembershipSettings, State},
    metrics::Metrics,
    step_loop::{LoopSettings, StepLoop},
    text::{Text, TextError, TextFiles},
};

/// Workers say that they live at this interval.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// A worker that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(10);

/// Largest sum between ranks: what their gRPC messages hold, with room for the message around it.
const MAX_PEER_BYTES: usize = 500 << 20;

/// How long streams may take to end once all sequences have.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Context of a model whose own is longer, when nobody asks for more: what small cards can hold.
const DEFAULT_CONTEXT_TOKENS: usize = 4096;

/// Everything a coordinator is told.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// `builtin` or a folder.
    pub model: String,
    /// What clients call it; `None` is `model`.
    pub served_name: Option<String>,
    /// Ranks of the group.
    pub world_size: usize,
    /// What the plan is made for.
    pub settings: Settings,
    /// Sequences that may wait for a place.
    pub max_waiting: usize,
    /// Tokens that they may have, all together.
    pub max_waiting_tokens: usize,
    /// Tokens of a step, while others decode, for each of up to four prompts that are not computed yet.
    pub max_prefill_tokens: usize,
    /// Requests share the KV of prompts that begin alike.
    pub prefix_cache: bool,
    /// Tokens that a step guesses of a text that repeats itself, at the most; 0 guesses none.
    pub max_drafts: usize,
    /// What each of them costs, in percent of a step of one row; as the plan measured it if absent.
    pub draft_cost_percent: Option<u32>,
    /// How ranks meet.
    pub collective: Collective,
    /// A step that takes longer ends the epoch.
    pub step_deadline: Duration,
    /// What becomes of the reasoning in the answers of chats.
    pub reasoning: Reasoning,
    /// How the HTTP API behaves.
    pub http: HttpSettings,
    /// Who may ask, and how many at a time.
    pub clients: ClientSettings,
    /// End when the workers that came cannot serve the model, instead of waiting for others.
    pub exit_without_plan: bool,
}

/// What holds for clients of either API.
#[derive(Clone, Debug, Default)]
pub struct ClientSettings {
    /// Without any, whoever reaches the listener is served.
    pub keys: Vec<ApiKey>,
    /// Of the listener.
    pub connections: ConnectionLimits,
    /// The log has what clients ask, word for word.
    pub log_prompts: bool,
}

/// The operator's part of a plan's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Longest sequence; `None` is the model's own, up to 4096 tokens.
    pub max_context_tokens: Option<usize>,
    /// Sequences that may run at once.
    pub max_sequences: usize,
    /// Tokens of one step.
    pub max_step_tokens: usize,
    /// KV cache type.
    pub kv_dtype: KvDType,
    /// Family of arithmetic.
    pub precision: Precision,
    /// How `lm_head` is held.
    pub lm_head: LmHead,
    /// Bytes of each device that stay free.
    pub memory_reserve_bytes: u64,
    /// Relative shares instead of the planner's own.
    pub split: Option<Vec<f64>>,
}

/// Why a coordinator could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its tokenizer cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A setting that no plan could honour.
    #[error("{0}")]
    Settings(String),
    /// A listener failed.
    #[error("the {listener} service ended: {source}")]
    Serve {
        /// Which listener.
        listener: &'static str,
        /// The transport's word.
        source: tonic::transport::Error,
    },
    /// A part of the coordinator ended by itself.
    #[error("internal: {0}")]
    Internal(String),
}

/// The plan's settings for a model.
pub fn plan_settings(settings: &Settings, shape: &ModelShape) -> PlanSettings {
    let own = shape.context_limit().min(DEFAULT_CONTEXT_TOKENS);
    PlanSettings {
        max_context_tokens: settings.max_context_tokens.unwrap_or(own),
        max_sequences: settings.max_sequences,
        max_step_tokens: settings.max_step_tokens,
        max_logit_rows: settings.max_sequences.max(64).min(settings.max_step_tokens),
        block_tokens: 16,
        kv_dtype: settings.kv_dtype,
        precision: settings.precision,
        lm_head: settings.lm_head,
        memory_reserve_bytes: settings.memory_reserve_bytes,
        forced_split: settings.split.clone(),
    }
}

/// A coordinator that has everything but its listeners.
pub struct Coordinator {
    config: CoordinatorConfig,
    shape: ModelShape,
    settings: PlanSettings,
    served: ServedModel,
}

impl Coordinator {
    /// Opens the checkpoint and checks all that can be known before any worker comes.
    ///
    /// # Errors
    /// Of the checkpoint, its tokenizer, or settings that no group could honour.
    pub fn prepare(config: CoordinatorConfig) -> Result<Self, CoordinatorError> {
        let checkpoint = Checkpoint::open_named(&config.model)?;
        for warning in checkpoint.warnings() {
            tracing::warn!("{warning}");
        }
        let shape = checkpoint.shape()?.with_lm_head(config.settings.lm_head);
        let settings = plan_settings(&config.settings, &shape);
        plan::check_settings(&shape, &settings, config.world_size)
            .map_err(|error| CoordinatorError::Settings(error.to_string()))?;
        let message_bytes = settings.max_step_tokens * shape.config.hidden_size * size_of::<f32>();
        if message_bytes > MAX_PEER_BYTES {
            return Err(CoordinatorError::Settings(format!(
                "max_step_tokens {} makes sums of {} MiB between ranks, more than {} MiB: lower it",
                settings.max_step_tokens,
                message_bytes >> 20,
                MAX_PEER_BYTES >> 20
            )));
        }
        let name = config.served_name.as_ref().unwrap_or(&config.model);
        let served = served_model(name, &checkpoint, settings.max_context_tokens)?;
        Ok(Self {
            config,
            shape,
            settings,
            served,
        })
    }

    /// Serves on bound listeners until `shutdown`.
    ///
    /// # Errors
    /// What no retry can mend.
    pub async fn run(
        self,
        clients: TcpListener,
        cluster: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), CoordinatorError> {
        let Self {
            config,
            shape,
            settings,
            served,
        } = self;
        let (groups, formed) = mpsc::unbounded_channel();
        let settings = MembershipSettings {
            world_size: config.world_size,
            plan: settings,
            checkpoint_digest: served.checkpoint_digest.clone(),
            silence: SILENCE,
            collective: config.collective,
        };
        let (membership, messages, state) = Membership::new(settings, shape, groups);
        let identity = Identity {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            checkpoint_digest: served.checkpoint_digest.clone(),
            heartbeat_ms: HEARTBEAT.as_millis() as u32,
        };
        let loop_settings = LoopSettings {
            max_waiting: config.max_waiting,
            max_waiting_tokens: config.max_waiting_tokens,
            max_prefill_tokens: config.max_prefill_tokens,
            step_deadline: config.step_deadline,
            prefix_cache: config.prefix_cache,
            max_drafts: config.max_drafts,
            draft_cost_percent: config.draft_cost_percent,
        };
        let (step_loop, engine) = StepLoop::new(
            loop_settings,
            formed,
            state.clone(),
            Metrics::new(&served.name),
        );
        let (serving, health) = api::health().await;
        let ClientSettings {
            keys,
            connections,
            log_prompts,
        } = config.clients;
        if log_prompts {
            tracing::warn!("log_prompts is on: what clients ask stands in this log, word for word");
        }
        let frontend =
            Frontend::new(engine, Arc::new(served), config.reasoning).log_prompts(log_prompts);
        let keys = ApiKeys::new(&keys);
        let client_router = api::router(Arc::new(frontend), health, config.http, keys)
            .map_err(|error| CoordinatorError::Internal(error.to_string()))?;
        let cluster_router = Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .max_concurrent_streams(256)
            .add_service(ClusterService::new(identity, messages).server());

        // Everything is told to stop at once; the servers wait for their streams, which end with the loop.
        let (stop, stopped) = watch::channel(false);
        let until = |mut stopped: watch::Receiver<bool>| async move {
            // A dropped sender means that `run` is gone.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let mut parts = tokio::task::JoinSet::new();
        parts.spawn({
            let until = until(stopped.clone());
            async move {
                step_loop.run(until).await;
                Ok(())
            }
        });
        parts.spawn({
            let until = until(stopped.clone());
            async move {
                membership.run(until).await;
                Ok(())
            }
        });
        let watched = state.clone();
        parts.spawn({
            let until = until(stopped.clone());
            async move {
                report_health(serving, watched, until).await;
                Ok(())
            }
        });
        parts.spawn({
            let serve = client_router.serve_with_incoming_shutdown(
                Connections::new(clients, connections),
                until(stopped.clone()),
            );
            async move {
                serve.await.map_err(|source| CoordinatorError::Serve {
                    listener: "client",
                    source,
                })
            }
        });
        parts.spawn({
            let serve = cluster_router.serve_with_incoming_shutdown(
                TcpIncoming::from(cluster).with_nodelay(Some(true)),
                until(stopped),
            );
            async move {
                serve.await.map_err(|source| CoordinatorError::Serve {
                    listener: "cluster",
                    source,
                })
            }
        });

        let mut state = state;
        let without_plan = async {
            let no_plan = |state: &State| matches!(state, State::NoPlan { .. });
            let reason = state
                .wait_for(no_plan)
                .await
                .ok()
                .map(|state| state.to_string());
            match reason.filter(|_| config.exit_without_plan) {
                Some(reason) => reason,
                None => std::future::pending().await,
            }
        };
        let early = tokio::select! {
            () = shutdown => Ok(()),
            reason = without_plan => Err(CoordinatorError::Settings(reason)),
            part = parts.join_next() => match part {
                Some(Ok(Err(error))) => Err(error),
                Some(Err(error)) => Err(CoordinatorError::Internal(error.to_string())),
                Some(Ok(Ok(()))) | None => Err(CoordinatorError::Internal("a part ended early".into())),
            },
        };
        stop.send_replace(true);
        let mut outcome = early;
        // Health watches, which clients keep open, would hold a server for ever.
        let grace = Instant::now() + STOP_GRACE;
        while let Ok(Some(part)) = timeout_at(grace, parts.join_next()).await {
            let part =
                part.unwrap_or_else(|error| Err(CoordinatorError::Internal(error.to_string())));
            outcome = outcome.and(part);
        }
        outcome
    }
}

/// Keeps health checks in step with the group.
async fn report_health(
    serving: ServingHandle,
    mut state: watch::Receiver<State>,
    until: impl Future<Output = ()>,
) {
    tokio::pin!(until);
    loop {
        let now = matches!(&*state.borrow_and_update(), State::Serving(_));
        serving.set_serving(now).await;
        tokio::select! {
            () = &mut until => break,
            changed = state.changed() => if changed.is_err() { break },
        }
    }
    serving.set_serving(false).await;
}

fn served_model(
    name: &str,
    checkpoint: &Checkpoint,
    max_context_tokens: usize,
) -> Result<ServedModel, CoordinatorError> {
    let config = checkpoint.config();
    let file =
        |name: &str| Ok::<_, CheckpointError>(checkpoint.text_file(name)?.map(String::into_bytes));
    let files = TextFiles {
        tokenizer_json: file("tokenizer.json")?.ok_or_else(|| TextError::Missing {
            file: format!("{}/tokenizer.json", checkpoint.name()),
        })?,
        tokenizer_config_json: file("tokenizer_config.json")?,
        chat_template_jinja: file("chat_template.jinja")?,
        chat_template_json: file("chat_template.json")?,
    };
    let (sampling, _) = SamplingDefaults::new(&config.generation);
    let mut served = ServedModel {
        name: name.to_owned(),
        architecture: match config.architecture {
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
        .to_owned(),
        checkpoint_digest: checkpoint.digest_hex(),
        max_context_tokens,
        vocab_size: config.vocab_size,
        eos_token_ids: config.eos_token_ids.clone(),
        sampling,
        text: Text::load(&files, config.vocab_size)?,
    };
    for warning in served.apply_generation(&config.generation) {
        tracing::warn!("{warning}");
    }
    Ok(served)
}
