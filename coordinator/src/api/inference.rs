//! The gRPC service `secondwind.v1.Inference`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use secondwind_proto::v1;
use secondwind_proto::v1::inference_server::Inference;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::account::Account;
use super::frontend::Frontend;
use super::pace::{PATIENCE, paced};
use super::request::{check_generate, check_ids};
use super::status::{ApiError, grpc_deadline};
use crate::request::Engine;

/// The service, over what both APIs share.
pub struct InferenceService<E> {
    frontend: Arc<Frontend<E>>,
}

impl<E: Engine> InferenceService<E> {
    /// Serves what `frontend` does.
    pub fn new(frontend: Arc<Frontend<E>>) -> Self {
        Self { frontend }
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
        let account = Account::of(request.extensions())?;
        let request = request.into_inner();
        let checked = self
            .frontend
            .blocking(deadline, move |model| {
                Ok(check_generate(request, model, deadline)?)
            })
            .await?;
        let responses = paced(self.frontend.submit(checked, &account)?, PATIENCE);
        let responses =
            responses.map(|response| response.and_then(|inner| inner).map_err(Status::from));
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
            .frontend
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
        let model = self.frontend.model();
        check_ids("token_ids", &token_ids, model.vocab_size).map_err(ApiError::from)?;
        let tokenizer = model.text.tokenizer();
        let text = tokenizer.decode(&token_ids, skip_special_tokens);
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let model = self.frontend.model();
        Ok(Response::new(v1::GetModelResponse {
            name: model.name.clone(),
            architecture: model.architecture.clone(),
            checkpoint_digest: model.checkpoint_digest.clone(),
            max_context_tokens: model.max_context_tokens as u64,
            vocab_size: model.vocab_size as u64,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            group: self.frontend.group(),
            has_chat_template: model.text.has_chat_template(),
        }))
    }
}
