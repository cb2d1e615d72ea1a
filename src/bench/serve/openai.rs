//! A server of OpenAI's API, over HTTP/1.1: `POST /v1/completions` with token ids, streamed, with usage.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode, Uri,
    body::{Bytes, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    load::Ask,
    record::{Listener, Usage},
};

/// A server, and connections to it that are kept.
pub struct OpenAi {
    client: Client<HttpConnector, Full<Bytes>>,
    base: Uri,
    authorization: Option<HeaderValue>,
    pub model: String,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<WireUsage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
struct WireUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

impl OpenAi {
    /// The server at `base`, and the first model that it lists.
    pub async fn find(base: Uri, authorization: Option<HeaderValue>) -> Result<Self> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let mut server = Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            base,
            authorization,
            model: String::new(),
        };
        let request = server.request(Method::GET, "/v1/models", Bytes::new())?;
        let url = request.uri().to_string();
        let answer = server.client.request(request).await;
        let answer = answer.with_context(|| format!("--url: nobody answers at {url}"))?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        if status != StatusCode::OK {
            let words = String::from_utf8_lossy(&body);
            bail!("--url: {url} answers {status}: {}", words.trim());
        }
        let models: Value = serde_json::from_slice(&body)
            .with_context(|| format!("--url: {url} does not answer in JSON"))?;
        let model = models["data"][0]["id"].as_str();
        server.model = model
            .with_context(|| format!("--url: {url} lists no model"))?
            .to_owned();
        Ok(server)
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let base = self.base.path().trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let uri = Uri::builder()
            .scheme("http")
            .authority(self.base.authority().context("--url has no host")?.clone())
            .path_and_query(format!("{base}{path}"))
            .build()?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(value) = &self.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        Ok(request)
    }

    /// Asks, and hears the answer to its end or until it is given up. An error's kind.
    pub async fn ask(&self, ask: &Ask, listener: &mut Listener) -> Result<Option<Usage>, String> {
        let body = json!({
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let request = self
            .request(Method::POST, "/v1/completions", body.to_string().into())
            .map_err(|error| error.to_string())?;
        let answer = self.client.request(request).await;
        let answer = answer.map_err(|_| "no connection".to_owned())?;
        if answer.status() != StatusCode::OK {
            let status = answer.status();
            // The connection is used again once the body is read.
            let _ = answer.into_body().collect().await;
            return Err(format!("HTTP {}", status.as_u16()));
        }
        let mut events = Events::new(answer.into_body());
        let mut usage = None;
        while let Some(data) = events.next().await? {
            if data == "[DONE]" {
                return match usage {
                    Some(usage) => Ok(Some(usage)),
                    None => Err("no usage in the stream".into()),
                };
            }
            let chunk: Chunk =
                serde_json::from_str(&data).map_err(|_| "not a chunk of an answer".to_owned())?;
            if chunk.error.is_some() {
                return Err("error in the stream".into());
            }
            if let Some(told) = chunk.usage {
                usage = Some(Usage {
                    prompt_tokens: told.prompt_tokens,
                    cached_prompt_tokens: told
                        .prompt_tokens_details
                        .and_then(|details| details.cached_tokens)
                        .unwrap_or(0),
                    completion_tokens: told.completion_tokens,
                });
            }
            let has_text = chunk.choices.iter().any(|choice| !choice.text.is_empty());
            if has_text && listener.hear(None).is_break() {
                return Ok(None);
            }
        }
        Err("the answer broke off".into())
    }
}

/// The data of server-sent events.
struct Events {
    body: Incoming,
    /// What came and is not read yet, from `at` on.
    bytes: Vec<u8>,
    at: usize,
}

impl Events {
    fn new(body: Incoming) -> Self {
        Self {
            body,
            bytes: Vec::new(),
            at: 0,
        }
    }

    /// The next one; each is a line here. None at the end.
    async fn next(&mut self) -> Result<Option<String>, String> {
        loop {
            while let Some(length) = self.bytes[self.at..].iter().position(|it| *it == b'\n') {
                let line = self.bytes[self.at..self.at + length].to_vec();
                self.at += length + 1;
                let line = String::from_utf8(line).map_err(|_| "not UTF-8".to_owned())?;
                if let Some(data) = line.trim_end().strip_prefix("data:") {
                    return Ok(Some(data.trim_start().to_owned()));
                }
            }
            self.bytes.drain(..self.at);
            self.at = 0;
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.bytes.extend_from_slice(&data);
                    }
                }
                Some(Err(_)) => return Err("the answer broke off".into()),
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests;
