//! Requests over HTTP: some on connections that are kept, some written out by hand on one that breaks.

use std::{net::SocketAddr, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, body::Bytes, header::CONTENT_TYPE};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{CONTEXT_TOKENS, harness::PATIENCE, mix::Kind, random::Random};

const JSON: &str = "application/json";
const COMPLETIONS: &str = "/v1/completions";

/// Connections to a server.
pub struct Http {
    address: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Http {
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// The code that a request of this kind gets; an error where the answer is not what the code promises.
    pub async fn ask(&self, kind: Kind, random: &mut Random) -> Result<String, String> {
        let tokens = random.between(1, 12);
        let length = random.between(1, 30);
        let request = json!({
            "prompt": random.tokens(length),
            "max_tokens": tokens,
            "ignore_eos": true,
            "temperature": 1.5 * f64::from(random.below(2)),
        });
        match kind {
            Kind::HttpWhole => {
                let (status, body) = self.post(COMPLETIONS, JSON, request.to_string()).await?;
                if status == "200" {
                    let answer: Value = serde_json::from_slice(&body).map_err(told)?;
                    counts(&answer["usage"], length, tokens)?;
                }
                Ok(status)
            }
            Kind::HttpStream => {
                let mut request = request;
                request["stream"] = true.into();
                request["stream_options"] = json!({"include_usage": true});
                let (status, body) = self.post(COMPLETIONS, JSON, request.to_string()).await?;
                if status == "200" {
                    let text = String::from_utf8(body.into()).map_err(told)?;
                    let events: Vec<&str> = text.split("\n\n").collect();
                    let [.., usage, "data: [DONE]", ""] = events[..] else {
                        return Err(format!("a stream without its end: {text}"));
                    };
                    let usage = usage.strip_prefix("data: ").unwrap_or_default();
                    let chunk: Value = serde_json::from_str(usage).map_err(told)?;
                    counts(&chunk["usage"], length, tokens)?;
                }
                Ok(status)
            }
            Kind::HttpChat => {
                let (a, b) = (random.below(500), random.below(500));
                let request = json!({
                    "messages": [{"role": "user", "content": format!("What is {a} + {b}?")}],
                    "temperature": 0,
                });
                let body = request.to_string();
                let (status, body) = self.post("/v1/chat/completions", JSON, body).await?;
                if status == "200" {
                    let answer: Value = serde_json::from_slice(&body).map_err(told)?;
                    let text = &answer["choices"][0]["message"]["content"];
                    // What the embedded model says is another test's matter; that it is about this sum is ours.
                    let begins = format!("{a} + {b} = ");
                    if !text.as_str().is_some_and(|text| text.starts_with(&begins)) {
                        return Err(format!("an answer to something else: {answer}"));
                    }
                }
                Ok(status)
            }
            Kind::HttpDisconnect => {
                let mut request = request;
                request["stream"] = true.into();
                request["max_tokens"] = 200.into();
                let mut stream = self.begin(&request.to_string(), usize::MAX).await?;
                let mut some = vec![0; random.between(1, 2000) as usize];
                match timeout(PATIENCE, stream.read(&mut some)).await {
                    Ok(Ok(read)) if read > 12 => {
                        Ok(String::from_utf8_lossy(&some[9..12]).into_owned())
                    }
                    Ok(Ok(_)) => Ok("left".into()),
                    Ok(Err(error)) => Err(told(error)),
                    Err(_) => Err("no answer".into()),
                }
            }
            Kind::HttpHalfBody => {
                let body = request.to_string();
                let some = random.below(body.len() as u32) as usize;
                self.begin(&body, some).await?;
                Ok("left".into())
            }
            Kind::HttpNotHttp => {
                let mut stream = TcpStream::connect(self.address).await.map_err(told)?;
                let bytes: Vec<u8> = (0..64).map(|_| random.between(128, 255) as u8).collect();
                stream.write_all(&bytes).await.map_err(told)?;
                let mut reply = [0; 12];
                match timeout(PATIENCE, stream.read_exact(&mut reply)).await {
                    Ok(Ok(_)) => Ok(String::from_utf8_lossy(&reply[9..]).into_owned()),
                    Ok(Err(_)) => Ok("closed".into()),
                    Err(_) => Err("no answer".into()),
                }
            }
            Kind::HttpBrokenJson => {
                let body = request.to_string();
                let cut = random.below(body.len() as u32) as usize;
                self.status(COMPLETIONS, JSON, body[..cut].to_owned()).await
            }
            Kind::HttpNotUtf8 => {
                let mut body = json!({"prompt": "a-"}).to_string().into_bytes();
                let at = body.iter().position(|byte| *byte == b'-').unwrap_or(0);
                body[at] = random.between(128, 255) as u8;
                self.status(COMPLETIONS, JSON, body).await
            }
            Kind::HttpNotObject => {
                let bodies = ["[]", "3", "null", "\"prompt\"", "[[[[[["];
                let body = bodies[random.below(bodies.len() as u32) as usize];
                self.status(COMPLETIONS, JSON, body).await
            }
            Kind::HttpWrongType => {
                let fields = [
                    "prompt",
                    "max_tokens",
                    "temperature",
                    "stream",
                    "stop",
                    "seed",
                ];
                let field = fields[random.below(fields.len() as u32) as usize];
                let mut request = request;
                request[field] = json!({"a": [1]});
                self.status(COMPLETIONS, JSON, request.to_string()).await
            }
            Kind::HttpMediaType => {
                let body = request.to_string();
                self.status(COMPLETIONS, "text/plain", body).await
            }
            Kind::HttpOverLong => {
                let body = vec![b' '; 5 << 20];
                self.status(COMPLETIONS, JSON, body).await
            }
            Kind::HttpPromptTooLong => {
                let mut request = request;
                let length = random.between(CONTEXT_TOKENS, 4 * CONTEXT_TOKENS);
                request["prompt"] = random.tokens(length).into();
                self.status(COMPLETIONS, JSON, request.to_string()).await
            }
            Kind::HttpOtherModel => {
                let mut request = request;
                request["model"] = "another".into();
                self.status(COMPLETIONS, JSON, request.to_string()).await
            }
            Kind::HttpNoPath => self.status("/v1/nothing", JSON, request.to_string()).await,
            Kind::HttpMethod => {
                let (status, _) = self.send(Method::PUT, COMPLETIONS, JSON, "{}").await?;
                Ok(status)
            }
            other => Err(format!("{other:?} is not asked over HTTP")),
        }
    }

    async fn status(
        &self,
        path: &str,
        kind: &str,
        body: impl Into<Bytes>,
    ) -> Result<String, String> {
        Ok(self.post(path, kind, body).await?.0)
    }

    async fn post(
        &self,
        path: &str,
        kind: &str,
        body: impl Into<Bytes>,
    ) -> Result<(String, Bytes), String> {
        self.send(Method::POST, path, kind, body).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: impl Into<Bytes>,
    ) -> Result<(String, Bytes), String> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header(CONTENT_TYPE, kind)
            .body(Full::new(body.into()))
            .map_err(told)?;
        let asking = async {
            let answer = self.client.request(request).await.map_err(told)?;
            let status = answer.status().as_str().to_owned();
            let body = answer.into_body().collect().await.map_err(told)?;
            Ok((status, body.to_bytes()))
        };
        let answer = timeout(PATIENCE, asking).await;
        answer.unwrap_or_else(|_| Err("no answer".into()))
    }

    /// A request of which only so many bytes of the body are sent.
    async fn begin(&self, body: &str, bytes: usize) -> Result<TcpStream, String> {
        let mut stream = TcpStream::connect(self.address).await.map_err(told)?;
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nHost: here\r\nContent-Type: {JSON}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.map_err(told)?;
        let some = &body.as_bytes()[..bytes.min(body.len())];
        stream.write_all(some).await.map_err(told)?;
        Ok(stream)
    }
}

/// The figures of `/metrics`, over a connection that is closed when they are read.
pub async fn metrics(address: SocketAddr) -> String {
    let reading = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = b"GET /metrics HTTP/1.0\r\nHost: here\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    let read = timeout(PATIENCE.max(Duration::from_secs(1)), reading).await;
    read.expect("/metrics answers")
}

fn counts(usage: &Value, prompt: u32, completion: u32) -> Result<(), String> {
    let right = usage["prompt_tokens"] == prompt && usage["completion_tokens"] == completion;
    match right {
        true => Ok(()),
        false => Err(format!(
            "{prompt} and {completion} tokens are due, usage says {usage}"
        )),
    }
}

fn told(error: impl std::fmt::Display + std::fmt::Debug) -> String {
    format!("{error:?}")
}
