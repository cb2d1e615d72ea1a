//! The service over a real socket, with a step loop that follows a script.

mod bad_fields;
mod bad_requests;
mod failures;
mod generate;
mod http;
mod keys;
mod kserve;
mod requests;
mod service;
mod vllm;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use secondwind_model::config::GenerationDefaults;
use secondwind_model::step::TokenLogprobs;
use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;
use secondwind_proto::v1::inference_client::InferenceClient;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::Channel;

use super::{
    ApiKeys, ConnectionLimits, Connections, Frontend, HttpSettings, Reasoning, SamplingDefaults,
    ServedModel, ServingHandle, health, router,
};
use crate::cluster::State;
use crate::metrics::Metrics;
use crate::rack::{Load, Rack};
use crate::request::{
    Engine, EventStream, FinishReason, NewSequence, SequenceEvent, SequenceTimings, SubmitError,
};
use crate::scheduler::Counters;
use crate::text::Text;
use crate::text::fixture::{self, IM_END, VOCAB_SIZE};

/// Context of the model that is served in tests.
const CONTEXT: usize = 64;

type Sender = mpsc::UnboundedSender<SequenceEvent>;
type Script = Box<dyn Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync>;

/// Does with each sequence what the test says, and remembers what it was given.
struct ScriptedEngine {
    script: Script,
    submitted: Mutex<Vec<NewSequence>>,
    no_group: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Engine for ScriptedEngine {
    fn submit(&self, sequence: NewSequence) -> Result<EventStream, SubmitError> {
        self.submitted.lock().unwrap().push(sequence.clone());
        let (sender, receiver) = mpsc::unbounded_channel();
        (self.script)(sequence, sender)?;
        Ok(receiver)
    }

    fn group(&self) -> Option<v1::Group> {
        let group = v1::Group {
            epoch: 7,
            ..v1::Group::default()
        };
        (!self.no_group.load(Ordering::Relaxed)).then_some(group)
    }

    fn rack(&self) -> Rack {
        let state = match self.group() {
            Some(group) => State::Serving(group),
            None => State::Gathering {
                attached: 1,
                needed: 2,
            },
        };
        Rack {
            state,
            counters: Counters::default(),
            load: Load::default(),
        }
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

fn model_with(text: Text) -> ServedModel {
    ServedModel {
        name: "fixture".to_owned(),
        architecture: "Qwen2ForCausalLM".to_owned(),
        checkpoint_digest: "abc".to_owned(),
        max_context_tokens: CONTEXT,
        vocab_size: VOCAB_SIZE,
        eos_token_ids: vec![IM_END],
        sampling: SamplingDefaults::new(&GenerationDefaults::default()).0,
        text,
    }
}

fn model() -> ServedModel {
    model_with(fixture::text())
}

/// A server on a port of its own; it ends with the runtime.
struct Served {
    client: InferenceClient<Channel>,
    channel: Channel,
    address: SocketAddr,
    engine: Arc<ScriptedEngine>,
    serving: ServingHandle,
}

async fn serve_model(
    model: ServedModel,
    script: impl Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync + 'static,
) -> Served {
    serve_with(model, Reasoning::Split, HttpSettings::default(), script).await
}

async fn serve_with(
    model: ServedModel,
    reasoning: Reasoning,
    settings: HttpSettings,
    script: impl Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync + 'static,
) -> Served {
    let (keys, limits) = Default::default();
    serve_behind(model, reasoning, settings, keys, limits, script).await
}

/// As [`serve_with`], for those who have keys, and within limits.
async fn serve_behind(
    model: ServedModel,
    reasoning: Reasoning,
    settings: HttpSettings,
    keys: ApiKeys,
    limits: ConnectionLimits,
    script: impl Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync + 'static,
) -> Served {
    let engine = Arc::new(ScriptedEngine {
        script: Box::new(script),
        submitted: Mutex::default(),
        no_group: AtomicBool::new(false),
        metrics: Metrics::new("fixture"),
    });
    let (serving, health) = health().await;
    let frontend = Frontend::new(Arc::clone(&engine), Arc::new(model), reasoning);
    let router = router(Arc::new(frontend), health, settings, keys).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(router.serve_with_incoming(Connections::new(listener, limits)));
    let channel = Channel::from_shared(format!("http://{address}"))
        .unwrap()
        .connect()
        .await
        .unwrap();
    Served {
        client: InferenceClient::new(channel.clone()),
        channel,
        address,
        engine,
        serving,
    }
}

async fn serve(
    script: impl Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync + 'static,
) -> Served {
    serve_model(model(), script).await
}

fn token(id: u32) -> SequenceEvent {
    SequenceEvent::Token(TokenLogprobs {
        token: id,
        logprob: None,
        top: Vec::new(),
    })
}

fn finished(reason: FinishReason) -> SequenceEvent {
    SequenceEvent::Finished {
        reason,
        timings: SequenceTimings::default(),
    }
}

/// A script that sends these events at once.
fn says(
    events: Vec<SequenceEvent>,
) -> impl Fn(NewSequence, Sender) -> Result<(), SubmitError> + Send + Sync + 'static {
    move |_, sender| {
        for event in &events {
            let _ = sender.send(event.clone());
        }
        // A sequence whose script does not end it stays open.
        if !matches!(
            events.last(),
            Some(SequenceEvent::Finished { .. } | SequenceEvent::Failed(_))
        ) {
            tokio::spawn(async move { sender.closed().await });
        }
        Ok(())
    }
}

/// The fixture's tokens for the bytes of `text`.
fn bytes(text: &str) -> Vec<SequenceEvent> {
    text.bytes().map(|byte| token(byte.into())).collect()
}

fn text_request(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::Text(text.to_owned())),
        ..v1::GenerateRequest::default()
    }
}

fn chat_request(messages: &[(&str, &str)]) -> v1::GenerateRequest {
    let messages = messages.iter().map(|(role, content)| v1::ChatMessage {
        role: (*role).to_owned(),
        content: (*content).to_owned(),
        ..v1::ChatMessage::default()
    });
    v1::GenerateRequest {
        prompt: Some(Prompt::Chat(v1::ChatPrompt {
            messages: messages.collect(),
            ..v1::ChatPrompt::default()
        })),
        ..v1::GenerateRequest::default()
    }
}

/// What a client has when the stream has ended.
#[derive(Debug, Default)]
struct Answer {
    responses: Vec<v1::GenerateResponse>,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<v1::OutputLogprob>,
    finish: Option<v1::Finish>,
    error: Option<Status>,
}

async fn generate(served: &Served, request: v1::GenerateRequest) -> Answer {
    let mut answer = Answer::default();
    let mut stream = match served.client.clone().generate(request).await {
        Ok(stream) => stream.into_inner(),
        Err(error) => {
            answer.error = Some(error);
            return answer;
        }
    };
    loop {
        match stream.message().await {
            Ok(Some(response)) => {
                assert!(answer.finish.is_none(), "nothing comes after the finish");
                answer.text.push_str(&response.text);
                answer.token_ids.extend(&response.token_ids);
                answer.logprobs.extend(response.logprobs.clone());
                answer.finish = response.finish.clone();
                answer.responses.push(response);
            }
            Ok(None) => return answer,
            Err(error) => {
                answer.error = Some(error);
                return answer;
            }
        }
    }
}
