//! The gRPC service `secondwind.v1.Inference`.

use std::pin::Pin;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use secondwind_model::config::GenerationDefaults;
use secondwind_proto::v1;
use secondwind_proto::v1::inference_server::Inference;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::defaults::SamplingDefaults;
use super::request::{check_generate, check_ids};
use super::response::Responses;
use super::status::{ApiError, grpc_deadline};
use crate::request::{Engine, SubmitError};
use crate::text::Text;

/// How much earlier than a deadline an unanswered call is given up, so that the client reads our
/// DEADLINE_EXCEEDED and not the transport's own CANCELLED.
const DEADLINE_MARGIN: Duration = Duration::from_millis(5);

/// The model that is served, as the API needs to know it.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    /// Its class in `config.json`.
    pub architecture: String,
    /// Digest of the checkpoint, in hex.
    pub checkpoint_digest: String,
    /// Prompt and output together.
    pub max_context_tokens: usize,
    /// Logits.
    pub vocab_size: usize,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Sampling of a request that sets none.
    pub sampling: SamplingDefaults,
    /// Tokenizer and chat templates.
    pub text: Text,
}

impl ServedModel {
    /// What is worth a warning at start: settings of the checkpoint that are not applied. Also applies
    /// `generation` to `sampling`.
    pub fn apply_generation(&mut self, generation: &GenerationDefaults) -> Vec<String> {
        let (sampling, mut warnings) = SamplingDefaults::new(generation);
        self.sampling = sampling;
        if let Some(error) = self.text.chat_template_error() {
            warnings.push(format!("{error}; chat requests are refused"));
        }
        warnings
    }
}

/// The service, over the step loop.
pub struct InferenceService<E> {
    engine: Arc<E>,
    model: Arc<ServedModel>,
    /// Requests that are being rendered and tokenized at the same time.
    checks: Arc<Semaphore>,
}

impl<E: Engine> InferenceService<E> {
    /// Serves `model` through `engine`.
    pub fn new(engine: Arc<E>, model: Arc<ServedModel>) -> Self {
        let threads = available_parallelism().map_or(1, usize::from);
        Self {
            engine,
            model,
            checks: Arc::new(Semaphore::new(2 * threads)),
        }
    }

    /// Runs `work`, which blocks, beside the async threads; gives up at the deadline.
    async fn blocking<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        work: impl FnOnce(&ServedModel) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let model = Arc::clone(&self.model);
        let checks = Arc::clone(&self.checks);
        let internal = |detail: String| ApiError::Submit(SubmitError::Internal { detail });
        let run = async move {
            let permit = checks
                .acquire_owned()
                .await
                .map_err(|error| internal(error.to_string()))?;
            spawn_blocking(move || {
                let result = work(&model);
                drop(permit);
                result
            })
            .await
            .map_err(|error| internal(error.to_string()))?
        };
        match deadline.map(|deadline| deadline.checked_sub(DEADLINE_MARGIN).unwrap_or(deadline)) {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), run)
                .await
                .unwrap_or(Err(SubmitError::DeadlineExceeded.into())),
            None => run.await,
        }
    }
}

#[tonic::async_trait]
impl<E: Engine> Inference for InferenceService<E> {
    type GenerateStream =
        Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send + 'static>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = grpc_deadline(request.metadata(), Instant::now())?;
        let request = request.into_inner();
        let mut checked = self
            .blocking(deadline, move |model| {
                Ok(check_generate(request, model, deadline)?)
            })
            .await?;
        let prompt_token_ids = checked.sequence.prompt.clone();
        let events = self
            .engine
            .submit(checked.sequence.clone())
            .map_err(ApiError::from)?;
        checked.sequence.prompt.clear();
        let tokenizer = Arc::clone(self.model.text.tokenizer());
        let responses = Responses::new(&checked, prompt_token_ids, events, tokenizer);
        Ok(Response::new(Box::pin(responses)))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let deadline = grpc_deadline(request.metadata(), Instant::now())?;
        let v1::TokenizeRequest {
            text,
            add_special_tokens,
        } = request.into_inner();
        let token_ids = self
            .blocking(deadline, move |model| {
                let tokenizer = model.text.tokenizer();
                Ok(tokenizer.encode(&text, add_special_tokens)?)
            })
            .await?;
        Ok(Response::new(v1::TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let v1::DetokenizeRequest {
            token_ids,
            skip_special_tokens,
        } = request.into_inner();
        check_ids("token_ids", &token_ids, self.model.vocab_size).map_err(ApiError::from)?;
        let tokenizer = self.model.text.tokenizer();
        let text = tokenizer.decode(&token_ids, skip_special_tokens);
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let model = &self.model;
        Ok(Response::new(v1::GetModelResponse {
            name: model.name.clone(),
            architecture: model.architecture.clone(),
            checkpoint_digest: model.checkpoint_digest.clone(),
            max_context_tokens: model.max_context_tokens as u64,
            vocab_size: model.vocab_size as u64,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            group: self.engine.group(),
            has_chat_template: model.text.has_chat_template(),
        }))
    }
}
