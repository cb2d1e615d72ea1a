//! What stands behind both APIs: one check, one way into the step loop, one way out of it.

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use secondwind_model::config::GenerationDefaults;
use secondwind_proto::v1;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::account::Account;
use super::defaults::SamplingDefaults;
use super::request::{AnswerKind, CheckedRequest};
use super::response::Responses;
use super::status::ApiError;
use crate::metrics::Metrics;
use crate::rack::Rack;
use crate::request::{Engine, NewSequence, SubmitError};
use crate::text::Text;
use crate::text::answer::AnswerSplitter;

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

/// What becomes of what a model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reasoning {
    /// It stands apart from the answer.
    #[default]
    Split,
    /// It stays in the answer, tags included.
    Keep,
}

/// Tokens at the end of a prompt that hold an opening tag, if a template wrote one there.
const OPENING_TOKENS: usize = 16;

/// Model and step loop, as gRPC and HTTP both reach them.
pub struct Frontend<E> {
    engine: Arc<E>,
    model: Arc<ServedModel>,
    reasoning: Reasoning,
    /// Requests that are being read, rendered and tokenized at the same time.
    checks: Arc<Semaphore>,
    log_prompts: bool,
}

impl<E: Engine> Frontend<E> {
    /// Serves `model` through `engine`.
    pub fn new(engine: Arc<E>, model: Arc<ServedModel>, reasoning: Reasoning) -> Self {
        let threads = available_parallelism().map_or(1, usize::from);
        Self {
            engine,
            model,
            reasoning,
            checks: Arc::new(Semaphore::new(2 * threads)),
            log_prompts: false,
        }
    }

    /// Whether the log has what clients ask, word for word.
    #[must_use]
    pub fn log_prompts(self, log_prompts: bool) -> Self {
        Self {
            log_prompts,
            ..self
        }
    }

    /// The model that is served.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }

    /// The group that serves; `None` while there is none.
    pub fn group(&self) -> Option<v1::Group> {
        self.engine.group()
    }

    /// How the rack does at the moment.
    pub fn rack(&self) -> Rack {
        self.engine.rack()
    }

    /// What is counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        self.engine.metrics()
    }

    /// Runs `work`, which blocks, beside the async threads; gives up at the deadline.
    pub(super) async fn blocking<T: Send + 'static>(
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

    /// Hands a checked request to the step loop. Dropping the responses cancels it.
    pub(super) fn submit(
        &self,
        mut checked: CheckedRequest,
        account: &Arc<Account>,
    ) -> Result<Responses, ApiError> {
        let metrics = self.engine.metrics();
        let origin = &mut checked.sequence.origin;
        origin.request_id = Arc::clone(account.request_id());
        origin.tenant = account.tenant();
        if self.log_prompts {
            let tokenizer = self.model.text.tokenizer();
            let prompt = tokenizer.decode(&checked.sequence.prompt, false);
            tracing::info!(parent: None, request_id = %account.request_id(), prompt, "prompt");
        }
        let grammar = checked.sequence.grammar.take();
        let submitted = self.engine.submit(NewSequence {
            grammar,
            ..checked.sequence.clone()
        });
        let events = submitted.inspect_err(|error| metrics.failed(Some(error)))?;
        let prompt_token_ids = std::mem::take(&mut checked.sequence.prompt);
        let tokenizer = Arc::clone(self.model.text.tokenizer());
        let splitter = self.splitter(checked.kind, &prompt_token_ids);
        Ok(Responses::new(
            &checked,
            prompt_token_ids,
            events,
            tokenizer,
            splitter,
            Arc::clone(metrics),
            Arc::clone(account),
        ))
    }

    fn splitter(&self, kind: AnswerKind, prompt: &[u32]) -> AnswerSplitter {
        let mut splitter = AnswerSplitter::default();
        let AnswerKind::Chat { may_call } = kind else {
            return splitter;
        };
        if self.reasoning == Reasoning::Split {
            let end = &prompt[prompt.len().saturating_sub(OPENING_TOKENS)..];
            splitter = splitter.with_reasoning(&self.model.text.tokenizer().decode(end, false));
        }
        if may_call {
            splitter = splitter.with_calls();
        }
        splitter
    }
}
