//! The gRPC client: what `demo`, `generate` and `chat` say to a coordinator, and what they make of the
//! answer.
//!
//! [`flags`] become a request, [`answer`] receives the stream, [`show`] shows it, [`group`] shows who serves, [`error`]
//! names what went wrong.

pub mod answer;
pub mod error;
pub mod flags;
pub mod group;
pub mod show;

use std::time::Duration;

use anyhow::Result;
use secondwind_proto::v1::{
    GenerateRequest, GenerateResponse, GetModelRequest, GetModelResponse,
    inference_client::InferenceClient,
};
use tonic::{
    Request, Streaming,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use self::error::{RequestError, Unreachable};
use crate::{config::KEY_VARIABLE, exit::UsageError};

/// Where a coordinator listens when nobody says otherwise.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:7700";
/// Log-probabilities of a long prompt arrive in one message.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A connection to a coordinator.
#[derive(Clone, Debug)]
pub struct Client {
    inference: InferenceClient<Channel>,
    /// `Bearer KEY`, of [`KEY_VARIABLE`].
    authorization: Option<AsciiMetadataValue>,
}

impl Client {
    /// Connects to `http://HOST:PORT`.
    pub async fn connect(endpoint: &str) -> Result<Self> {
        let channel = channel(endpoint).await?;
        let inference = InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let key = std::env::var(KEY_VARIABLE).ok().filter(|it| !it.is_empty());
        let authorization = key.map(|key| format!("Bearer {key}").parse()).transpose();
        let authorization = authorization.map_err(|_| {
            UsageError::one(format!("{KEY_VARIABLE} holds what no API key has in it"))
        })?;
        Ok(Self {
            inference,
            authorization,
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        request
    }

    /// The model and the group that serve.
    pub async fn model(&mut self) -> Result<GetModelResponse> {
        let answer = self
            .inference
            .get_model(self.request(GetModelRequest {}))
            .await;
        Ok(answer.map_err(RequestError::from)?.into_inner())
    }

    /// Starts a generation; dropping the stream cancels it.
    pub async fn generate(
        &mut self,
        request: GenerateRequest,
    ) -> Result<Streaming<GenerateResponse>> {
        let answer = self.inference.generate(self.request(request)).await;
        Ok(answer.map_err(RequestError::from)?.into_inner())
    }
}

/// A channel to `endpoint`, which may lack its `http://`.
pub async fn channel(endpoint: &str) -> Result<Channel> {
    if endpoint.starts_with("https://") {
        return Err(UsageError::one(format!(
            "--endpoint {endpoint}: TLS is not built yet; use http://"
        ))
        .into());
    }
    let uri = if endpoint.contains("://") {
        endpoint.to_owned()
    } else {
        format!("http://{endpoint}")
    };
    let parsed = Endpoint::from_shared(uri.clone()).ok().filter(|parsed| {
        parsed.uri().scheme_str() == Some("http")
            && parsed.uri().host().is_some()
            && parsed.uri().port_u16() != Some(0)
    });
    let Some(parsed) = parsed else {
        return Err(UsageError::one(format!(
            "--endpoint {endpoint} is not of the form http://HOST:PORT"
        ))
        .into());
    };
    let parsed = parsed
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true);
    parsed
        .connect()
        .await
        .map_err(|error| Unreachable::new(uri, &error).into())
}
