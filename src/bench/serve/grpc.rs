//! A coordinator's own API: `Generate` of token ids, whose responses bring token ids.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use hyper::{Uri, header::HeaderValue};
use secondwind_proto::v1::{
    GenerateRequest, GetModelRequest, TokenIdsPrompt, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use super::{
    load::Ask,
    record::{Listener, Usage},
};
use crate::client::error::{RequestError, code_name};

/// Calls of one connection, at the most: servers take no more than a few hundred at a time.
const CALLS: usize = 64;

/// A coordinator, and connections to it.
pub struct Grpc {
    connections: Vec<InferenceClient<Channel>>,
    next: AtomicUsize,
    authorization: Option<AsciiMetadataValue>,
    pub model: String,
}

impl Grpc {
    /// The coordinator at `url`, with connections for this many calls at the same time.
    pub async fn find(url: &Uri, authorization: Option<HeaderValue>, calls: usize) -> Result<Self> {
        let authorization = authorization
            .map(|value| AsciiMetadataValue::try_from(value.as_bytes()))
            .transpose()?;
        let mut connections = Vec::new();
        for _ in 0..calls.div_ceil(CALLS) {
            let endpoint = Endpoint::from(url.clone()).tcp_nodelay(true);
            let channel = endpoint.connect().await;
            let channel = channel.with_context(|| format!("--url: nobody answers at {url}"))?;
            connections.push(InferenceClient::new(channel));
        }
        let mut coordinator = Self {
            connections,
            next: AtomicUsize::new(0),
            authorization,
            model: String::new(),
        };
        let request = coordinator.request(GetModelRequest {});
        let model = coordinator.client().get_model(request).await;
        let model = model.map_err(RequestError::from);
        coordinator.model = model
            .with_context(|| format!("--url: {url}"))?
            .into_inner()
            .name;
        Ok(coordinator)
    }

    /// Connections in turn.
    fn client(&self) -> InferenceClient<Channel> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.connections[turn % self.connections.len()].clone()
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

    /// Asks, and hears the answer to its end or until it is given up. An error's kind.
    pub async fn ask(&self, ask: &Ask, listener: &mut Listener) -> Result<Option<Usage>, String> {
        let request = self.request(GenerateRequest {
            prompt: Some(Prompt::TokenIds(TokenIdsPrompt {
                ids: ask.prompt.clone(),
            })),
            max_tokens: Some(ask.output_tokens),
            temperature: Some(0.0),
            ignore_eos: true,
            ..GenerateRequest::default()
        });
        let kind = |status: Status| code_name(status.code()).to_owned();
        let mut stream = self
            .client()
            .generate(request)
            .await
            .map_err(kind)?
            .into_inner();
        let mut tokens = 0;
        while let Some(piece) = stream.message().await.map_err(kind)? {
            let count = piece.token_ids.len() as u32;
            tokens += u64::from(count);
            if count > 0 && listener.hear(Some(count)).is_break() && piece.finish.is_none() {
                return Ok(None);
            }
            let Some(finish) = piece.finish else {
                continue;
            };
            let usage = finish.usage.unwrap_or_default();
            if u64::from(usage.completion_tokens) != tokens {
                return Err("usage is not the number of token ids".into());
            }
            return Ok(Some(Usage {
                prompt_tokens: usage.prompt_tokens.into(),
                cached_prompt_tokens: usage.cached_prompt_tokens.into(),
                completion_tokens: tokens,
            }));
        }
        Err("the answer broke off".into())
    }
}
