//! The gRPC service `inference.GRPCInferenceService`: KServe's Open Inference Protocol, and Triton's stream.
//!
//! [`tensors`] reads and writes tensors, [`request`] makes a text completion of them.

mod request;
mod tensors;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use secondwind_proto::kserve::grpc_inference_service_server::GrpcInferenceService;
use secondwind_proto::kserve::infer_parameter::ParameterChoice;
use secondwind_proto::kserve::model_metadata_response::TensorMetadata;
use secondwind_proto::kserve::*;
use secondwind_proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use self::request::{Asked, VERSION, check_model};
use super::account::Account;
use super::choices::MAX_CHOICES;
use super::frontend::Frontend;
use super::pace::{PATIENCE, paced};
use super::response::whole;
use super::status::{ApiError, grpc_deadline};
use crate::request::Engine;

/// The service, over what all APIs share.
pub(super) struct KserveService<E> {
    frontend: Arc<Frontend<E>>,
    /// Fields that nobody knows are refused.
    strict: bool,
}

impl<E> Clone for KserveService<E> {
    fn clone(&self) -> Self {
        Self {
            frontend: Arc::clone(&self.frontend),
            strict: self.strict,
        }
    }
}

type Responses = mpsc::Sender<Result<ModelStreamInferResponse, Status>>;

impl<E: Engine> KserveService<E> {
    pub(super) fn new(frontend: Arc<Frontend<E>>, strict: bool) -> Self {
        Self { frontend, strict }
    }

    async fn check(
        &self,
        request: ModelInferRequest,
        deadline: Option<Instant>,
    ) -> Result<Asked, ApiError> {
        let strict = self.strict;
        let work = move |model: &_| request::read(request, strict, model, deadline);
        self.frontend.blocking(deadline, work).await
    }

    /// Serves a stream of requests until there are no more, and all are answered.
    async fn answer_all(
        self,
        mut requests: Streaming<ModelInferRequest>,
        deadline: Option<Instant>,
        account: Arc<Account>,
        responses: Responses,
    ) {
        let mut answers = JoinSet::new();
        let mut more = true;
        while more || !answers.is_empty() {
            tokio::select! {
                request = requests.message(), if more && answers.len() < MAX_CHOICES => match request {
                    Ok(Some(request)) => {
                        let (server, responses) = (self.clone(), responses.clone());
                        let account = Arc::clone(&account);
                        answers.spawn(async move {
                            server.answer(request, deadline, &account, &responses).await;
                        });
                    }
                    Ok(None) => more = false,
                    // What cannot be read ends the stream, and the answers with it.
                    Err(status) => {
                        let _ = responses.send(Err(status)).await;
                        return;
                    }
                },
                Some(_) = answers.join_next() => {}
                () = responses.closed() => return,
            }
        }
    }

    /// Answers one request of a stream.
    async fn answer(
        &self,
        request: ModelInferRequest,
        deadline: Option<Instant>,
        account: &Arc<Account>,
        responses: &Responses,
    ) {
        let head = Head::of(&request);
        let answered = self.try_answer(request, deadline, account, &head, responses);
        if let Err(error) = answered.await {
            let failed = ModelStreamInferResponse {
                error_message: Status::from(error).message().to_owned(),
                infer_response: Some(head.response()),
            };
            // A client that went away is told nothing.
            let _ = responses.send(Ok(failed)).await;
        }
    }

    async fn try_answer(
        &self,
        request: ModelInferRequest,
        deadline: Option<Instant>,
        account: &Arc<Account>,
        head: &Head,
        responses: &Responses,
    ) -> Result<(), ApiError> {
        let Asked { completion, raw } = self.check(request, deadline).await?;
        let mut said = self.frontend.submit(completion.checked, account)?;
        let mut echo = completion.echo;
        let mut send = async |piece: v1::GenerateResponse| {
            let is_final = piece.finish.is_some();
            if !is_final && piece.text.is_empty() {
                return;
            }
            let text = echo.take().as_deref().unwrap_or_default().to_owned() + &piece.text;
            let mut response = head.answer(text, raw, piece.finish);
            let is_final = parameter(ParameterChoice::BoolParam(is_final));
            response
                .parameters
                .insert("triton_final_response".to_owned(), is_final);
            let response = ModelStreamInferResponse {
                error_message: String::new(),
                infer_response: Some(response),
            };
            // The caller sees that nobody listens.
            let _ = responses.send(Ok(response)).await;
        };
        if completion.streams {
            while let Some(piece) = said.next().await {
                send(piece?).await;
            }
        } else {
            send(whole(said).await?).await;
        }
        Ok(())
    }
}

/// What every response to a request says again.
struct Head {
    model_name: String,
    id: String,
}

impl Head {
    fn of(request: &ModelInferRequest) -> Self {
        Self {
            model_name: request.model_name.clone(),
            id: request.id.clone(),
        }
    }

    fn response(&self) -> ModelInferResponse {
        ModelInferResponse {
            model_name: self.model_name.clone(),
            model_version: VERSION.to_owned(),
            id: self.id.clone(),
            ..ModelInferResponse::default()
        }
    }

    fn answer(&self, text: String, raw: bool, finish: Option<v1::Finish>) -> ModelInferResponse {
        let mut response = self.response();
        tensors::put(text, raw, &mut response);
        if let Some(finish) = finish {
            response.parameters = finished(&finish);
        }
        response
    }
}

fn finished(finish: &v1::Finish) -> HashMap<String, InferParameter> {
    let reason = match finish.reason() {
        v1::FinishReason::Stop => "stop",
        v1::FinishReason::Length | v1::FinishReason::Unspecified => "length",
    };
    let usage = finish.usage.unwrap_or_default();
    let count = |tokens: u32| ParameterChoice::Int64Param(tokens.into());
    [
        (
            "finish_reason",
            ParameterChoice::StringParam(reason.to_owned()),
        ),
        ("prompt_tokens", count(usage.prompt_tokens)),
        ("cached_prompt_tokens", count(usage.cached_prompt_tokens)),
        ("completion_tokens", count(usage.completion_tokens)),
    ]
    .into_iter()
    .map(|(name, choice)| (name.to_owned(), parameter(choice)))
    .collect()
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter {
        parameter_choice: Some(choice),
    }
}

#[tonic::async_trait]
impl<E: Engine> GrpcInferenceService for KserveService<E> {
    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send + 'static>>;

    async fn server_live(
        &self,
        _request: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _request: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        let ready = self.frontend.group().is_some();
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        check_model(&name, &version, self.frontend.model())?;
        let ready = self.frontend.group().is_some();
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "secondwind".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: Vec::new(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        check_model(&name, &version, self.frontend.model())?;
        let tensor = |name: &str, datatype: tensors::Datatype| TensorMetadata {
            name: name.to_owned(),
            datatype: datatype.name().to_owned(),
            shape: tensors::SHAPE.to_vec(),
        };
        let inputs = tensors::INPUTS.map(|(name, datatype)| tensor(name, datatype));
        Ok(Response::new(ModelMetadataResponse {
            name,
            versions: vec![VERSION.to_owned()],
            platform: "secondwind".to_owned(),
            inputs: inputs.to_vec(),
            outputs: vec![tensor(tensors::OUTPUT, tensors::Datatype::Bytes)],
        }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let deadline = grpc_deadline(request.metadata(), Instant::now())?;
        let account = Account::of(request.extensions())?;
        let request = request.into_inner();
        let head = Head::of(&request);
        let Asked { completion, raw } = self.check(request, deadline).await?;
        if completion.streams {
            let detail = "an answer as it comes has no place in one response; use ModelStreamInfer";
            return Err(ApiError::value("stream", detail).into());
        }
        let echo = completion.echo;
        let said = whole(self.frontend.submit(completion.checked, &account)?).await?;
        let text = echo.as_deref().unwrap_or_default().to_owned() + &said.text;
        Ok(Response::new(head.answer(text, raw, said.finish)))
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let deadline = grpc_deadline(request.metadata(), Instant::now())?;
        let account = Account::of(request.extensions())?;
        let (sender, receiver) = mpsc::channel(1);
        let requests = request.into_inner();
        tokio::spawn(self.clone().answer_all(requests, deadline, account, sender));
        let responses = paced(ReceiverStream::new(receiver), PATIENCE);
        let responses =
            responses.map(|response| response.map_err(Status::from).and_then(|inner| inner));
        Ok(Response::new(Box::pin(responses)))
    }
}
