//! The gRPC services `vllm.Inference` and `vllm.Control`, for what drives vLLM's engines.
//!
//! [`request`] and [`response`] translate, [`running`] knows what can be aborted.

mod request;
mod response;
mod running;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use secondwind_proto::vllm;
use secondwind_proto::vllm::control_server::Control;
use secondwind_proto::vllm::inference_server::Inference;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use self::response::{Report, aborted, append};
use self::running::{Run, Running, Sequences};
use super::access::drawn;
use super::account::Account;
use super::frontend::Frontend;
use super::pace::{PATIENCE, paced};
use super::status::{ApiError, grpc_deadline};
use crate::request::{Engine, SubmitError};

/// Both services, over what all APIs share.
pub(super) struct VllmService<E> {
    frontend: Arc<Frontend<E>>,
    running: Arc<Running>,
    instance_id: String,
}

impl<E: Engine> VllmService<E> {
    pub(super) fn new(frontend: Arc<Frontend<E>>) -> Self {
        Self {
            frontend,
            running: Arc::default(),
            instance_id: drawn(),
        }
    }

    async fn start(
        &self,
        request: Request<vllm::GenerateRequest>,
        streams: bool,
    ) -> Result<Answer, ApiError> {
        let deadline = grpc_deadline(request.metadata(), Instant::now())?;
        let account = Account::of(request.extensions())?;
        let request = request.into_inner();
        let mut run = self.running.enter(account.tenant(), &request.request_id)?;
        let asked = self
            .frontend
            .blocking(deadline, move |model| {
                request::read(request, streams, model, deadline)
            })
            .await?;
        let tokens = vec![Some(0); asked.choices.len()];
        let newest = vec![None; asked.choices.len()];
        let mut sequences = Sequences::with_capacity(asked.choices.len());
        // If one is not taken, those before it are dropped, which cancels them.
        for (index, checked) in asked.choices.into_iter().enumerate() {
            sequences.insert(index, self.frontend.submit(checked, &account)?);
        }
        run.answer(sequences);
        Ok(Answer {
            run: Some(run),
            report: asked.report,
            tokens,
            newest,
            told_prompt: false,
            last: VecDeque::new(),
        })
    }
}

/// The responses to one request. Dropping it cancels all sequences.
struct Answer {
    /// None once nothing more is awaited.
    run: Option<Run>,
    report: Report,
    /// Of each sequence, as long as it runs.
    tokens: Vec<Option<u32>>,
    /// Of each sequence, its last token so far; its end may come without one.
    newest: Vec<Option<u32>>,
    told_prompt: bool,
    /// Sent after all else.
    last: VecDeque<vllm::SequenceOutput>,
}

impl Stream for Answer {
    type Item = Result<vllm::GenerateResponse, ApiError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut response = vllm::GenerateResponse::default();
        let mut prompt = None;
        if let Some(run) = &mut this.run {
            match ready!(Pin::new(run).poll_next(cx)) {
                Some((index, Ok(mut said))) => {
                    prompt = said.prompt.take();
                    if let Some(&token) = said.token_ids.last() {
                        this.newest[index] = Some(token);
                    }
                    let tokens = said.token_ids.len() as u32;
                    this.tokens[index] = match said.finish {
                        Some(_) => None,
                        None => this.tokens[index].map(|before| before + tokens),
                    };
                    let output = this.report.output(index as u32, said, this.newest[index]);
                    response.outputs = Some(output);
                }
                Some((_, Err(error))) => {
                    this.run = None;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    this.run = None;
                    let running = this.tokens.iter().enumerate();
                    this.last = running
                        .filter_map(|(index, tokens)| Some(aborted(index as u32, (*tokens)?)))
                        .collect();
                }
            }
        }
        if response.outputs.is_none() {
            response.outputs = this.last.pop_front();
        }
        if response.outputs.is_none() {
            return Poll::Ready(None);
        }
        if !std::mem::replace(&mut this.told_prompt, true) {
            response.prompt_info = Some(this.report.prompt(prompt.as_ref()));
        }
        Poll::Ready(Some(Ok(response)))
    }
}

#[tonic::async_trait]
impl<E: Engine> Inference for VllmService<E> {
    type GenerateStreamStream =
        Pin<Box<dyn Stream<Item = Result<vllm::GenerateResponse, Status>> + Send + 'static>>;

    async fn generate(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<vllm::GenerateResponse>, Status> {
        let mut answer = self.start(request, false).await?;
        let mut whole = vllm::GenerateResponse::default();
        while let Some(response) = answer.next().await {
            append(&mut whole, response?);
        }
        Ok(Response::new(whole))
    }

    async fn generate_stream(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let answer = paced(self.start(request, true).await?, PATIENCE);
        let responses =
            answer.map(|response| response.and_then(|inner| inner).map_err(Status::from));
        Ok(Response::new(Box::pin(responses)))
    }
}

#[tonic::async_trait]
impl<E: Engine> Control for VllmService<E> {
    async fn get_server_info(
        &self,
        _request: Request<vllm::GetServerInfoRequest>,
    ) -> Result<Response<vllm::ServerInfo>, Status> {
        let group = self.frontend.group().ok_or_else(|| {
            let detail = "ask again when the server is ready".to_owned();
            ApiError::from(SubmitError::NoGroup { detail })
        })?;
        let ranks = group.ranks.len() as u32;
        Ok(Response::new(vllm::ServerInfo {
            engine_version: format!("secondwind {}", env!("CARGO_PKG_VERSION")),
            api_version: "vllm".to_owned(),
            instance_id: self.instance_id.clone(),
            parallelism: Some(vllm::ParallelismInfo {
                tensor_parallel_size: ranks,
                pipeline_parallel_size: 1,
                data_parallel_size: 1,
                data_parallel_rank: 0,
                decode_context_parallel_size: 1,
                world_size: ranks.into(),
                data_parallel_size_local: 1,
            }),
            max_model_len: self.frontend.model().max_context_tokens as u32,
            kv_block_size: group.block_tokens as u32,
            total_kv_blocks: group.kv_blocks,
            max_running_requests: group.max_sequences,
            max_batched_tokens: group.max_step_tokens,
            max_loras: 0,
            rl_capabilities: Some(vllm::RlCapabilities::default()),
            effective_attention_block_size: Some(group.block_tokens),
        }))
    }

    async fn get_model_info(
        &self,
        _request: Request<vllm::GetModelInfoRequest>,
    ) -> Result<Response<vllm::ModelInfo>, Status> {
        let name = &self.frontend.model().name;
        Ok(Response::new(vllm::ModelInfo {
            model_id: name.clone(),
            served_model_name: name.clone(),
            supports_text_input: true,
            supports_token_ids_input: true,
            ..vllm::ModelInfo::default()
        }))
    }

    async fn abort(
        &self,
        request: Request<vllm::AbortRequest>,
    ) -> Result<Response<vllm::AbortResponse>, Status> {
        let tenant = Account::of(request.extensions())?.tenant();
        for id in request.into_inner().request_ids {
            self.running.abort(tenant, id);
        }
        Ok(Response::new(vllm::AbortResponse {}))
    }
}
