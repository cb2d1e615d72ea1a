//! Requests over gRPC.

use std::time::Duration;

use secondwind_proto::v1::{
    GenerateRequest, TokenIdsPrompt, generate_request::Prompt, inference_client::InferenceClient,
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{CONTEXT_TOKENS, harness::PATIENCE, mix::Kind, random::Random};

/// Beyond the largest request that is taken, at five bytes a token.
const OVER_LONG_TOKENS: usize = 1 << 20;

/// A connection that is kept, and where it goes.
pub struct Grpc {
    endpoint: String,
    client: InferenceClient<Channel>,
}

impl Grpc {
    pub async fn connect(endpoint: &str) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            client: InferenceClient::connect(endpoint.to_owned()).await.unwrap(),
        }
    }

    /// The code that a request of this kind gets; an error where the answer is not what the code promises.
    pub async fn ask(&self, kind: Kind, random: &mut Random) -> Result<String, String> {
        let max_tokens = random.between(1, 12);
        let length = random.between(1, 30);
        let mut request = GenerateRequest {
            prompt: Some(token_ids(random.tokens(length))),
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            temperature: Some(1.5 * random.below(2) as f32),
            ..GenerateRequest::default()
        };
        let mut client = self.client.clone();
        let mut leave_after = None;
        let mut deadline = None;
        match kind {
            Kind::Grpc => {}
            Kind::GrpcConnect | Kind::GrpcDisconnect => {
                let connecting = InferenceClient::connect(self.endpoint.clone());
                client = connecting.await.map_err(|error| error.to_string())?;
                if kind == Kind::GrpcDisconnect {
                    request.max_tokens = Some(200);
                    leave_after = Some(random.between(1, 60));
                }
            }
            Kind::GrpcCancel => {
                request.max_tokens = Some(200);
                // 0 does not even await the first response.
                leave_after = Some(random.between(0, 60));
            }
            Kind::GrpcDeadline => {
                request.max_tokens = Some(random.between(1, 40));
                deadline = Some(Duration::from_millis(random.between(0, 1000).into()));
            }
            Kind::GrpcPromptTooLong => {
                let length = random.between(CONTEXT_TOKENS, 4 * CONTEXT_TOKENS);
                request.prompt = Some(token_ids(random.tokens(length)));
            }
            Kind::GrpcOtherToken => request.prompt = Some(token_ids(vec![3, u32::MAX])),
            Kind::GrpcTemperature => {
                let values = [f32::NAN, f32::INFINITY, -1.0];
                request.temperature = Some(values[random.below(3) as usize]);
            }
            Kind::GrpcStopNotUtf8 => request.stop = vec![vec![random.between(128, 255) as u8]],
            Kind::GrpcNoPrompt => request.prompt = None,
            Kind::GrpcOverLong => {
                request.prompt = Some(token_ids(vec![u32::MAX; OVER_LONG_TOKENS]))
            }
            other => return Err(format!("{other:?} is not asked over gRPC")),
        }
        let due = request.max_tokens.unwrap_or(0) as usize;
        let mut request = Request::new(request);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        let hearing = hear(&mut client, request, leave_after);
        match timeout(PATIENCE, hearing).await {
            Err(_) => Err("no answer".into()),
            Ok(Ok(Heard::Left)) => Ok("left".into()),
            Ok(Ok(Heard::Whole { tokens, usage })) if tokens == due && usage == due => {
                Ok("OK".into())
            }
            Ok(Ok(Heard::Whole { tokens, usage })) => Err(format!(
                "{due} tokens are due, {tokens} came, usage says {usage}"
            )),
            Ok(Err(status)) => Ok(name(&status)),
        }
    }
}

/// What came of an answer.
enum Heard {
    Whole { tokens: usize, usage: usize },
    Left,
}

async fn hear(
    client: &mut InferenceClient<Channel>,
    request: Request<GenerateRequest>,
    leave_after: Option<u32>,
) -> Result<Heard, Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut tokens = 0;
    if leave_after == Some(0) {
        return Ok(Heard::Left);
    }
    while let Some(response) = stream.message().await? {
        tokens += response.token_ids.len();
        if let Some(finish) = response.finish {
            let usage = finish.usage.unwrap_or_default().completion_tokens as usize;
            return Ok(Heard::Whole { tokens, usage });
        }
        if leave_after.is_some_and(|after| tokens >= after as usize) {
            return Ok(Heard::Left);
        }
    }
    Err(Status::data_loss("the stream ended without a finish"))
}

fn token_ids(ids: Vec<u32>) -> Prompt {
    Prompt::TokenIds(TokenIdsPrompt { ids })
}

fn name(status: &Status) -> String {
    let name = match status.code() {
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::Cancelled => "CANCELLED",
        Code::OutOfRange => "OUT_OF_RANGE",
        _ => return status.to_string(),
    };
    name.to_owned()
}
