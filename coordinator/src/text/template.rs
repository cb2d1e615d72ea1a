//! The checkpoint's own chat template, rendered byte for byte as `transformers` renders it.
//!
//! A template is a program from a stranger's file. It gets no loader and no file system; instructions,
//! recursion, output and time are limited. What is not limited is the memory of values it builds on the
//! way (a text doubled forty times), for the engine has no hook there: take checkpoints from people you trust.

mod environment;
mod error;
mod methods;
mod python;
#[cfg(test)]
mod tests;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

pub use self::error::TemplateError;

/// Bounds of one rendering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Template instructions.
    pub fuel: u64,
    /// Nested blocks; a macro call counts as four.
    pub recursion: usize,
    /// Rendered text.
    pub output_bytes: usize,
    /// From start to end.
    pub time: Duration,
}

impl Default for Limits {
    /// Far above what a chat of thousands of messages needs.
    fn default() -> Self {
        Self {
            fuel: 4_000_000,
            recursion: 400,
            output_bytes: 16 << 20,
            time: Duration::from_secs(10),
        }
    }
}

/// Stack of the thread that renders, touched only as far as it is used. Large, because a template may
/// nest values as deep as its fuel reaches, and they are freed recursively.
const RENDER_STACK_BYTES: usize = 512 << 20;

/// Largest template source.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// What a chat template is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatInput {
    /// Each an object with `role`, `content` and whatever else the template reads.
    pub messages: Vec<Json>,
    /// Tool schemas; `None` is Python's `None`.
    pub tools: Option<Vec<Json>>,
    /// End with the head of the answer.
    pub add_generation_prompt: bool,
    /// Further variables; they win over the special tokens of the same name.
    pub variables: Map<String, Json>,
}

/// Renders what a fuzzer made up: a template, a NUL byte, and JSON with `messages`, `tools` and `variables`.
/// Whatever it is, it ends soon, with a text or an error.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let limits = Limits {
        fuel: 20_000,
        output_bytes: 1 << 20,
        ..Limits::default()
    };
    let mut parts = data.splitn(2, |&byte| byte == 0);
    let source = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let input: Json = parts
        .next()
        .and_then(|json| serde_json::from_slice(json).ok())
        .unwrap_or_default();
    let input = ChatInput {
        messages: input["messages"].as_array().cloned().unwrap_or_default(),
        tools: input["tools"].as_array().cloned(),
        add_generation_prompt: true,
        variables: input["variables"].as_object().cloned().unwrap_or_default(),
    };
    if let Ok(template) = ChatTemplate::compile("fuzz", &source, limits)
        && let Ok(text) = template.render(&Map::new(), &input)
    {
        assert!(text.len() <= limits.output_bytes);
    }
}

/// Marks an error as the template's own refusal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Marks an error as too much output.
#[derive(Debug, thiserror::Error)]
#[error("more than {0} bytes of text")]
struct LimitExceeded(usize);

/// One compiled template.
#[derive(Clone)]
pub struct ChatTemplate {
    name: Arc<str>,
    env: Arc<Environment<'static>>,
    limits: Limits,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`; `name` is what errors call it.
    pub fn compile(name: &str, source: &str, limits: Limits) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::SourceTooLong {
                template: name.to_owned(),
                bytes: source.len(),
            });
        }
        let compiled = catch_unwind(AssertUnwindSafe(|| {
            environment::compile(name, source, limits)
        }));
        let syntax = |detail: String| TemplateError::Syntax {
            template: name.to_owned(),
            detail,
        };
        let env = compiled
            .map_err(|_| syntax("the template engine gave up".to_owned()))?
            .map_err(|error| syntax(describe(&error)))?;
        Ok(Self {
            name: name.into(),
            env: Arc::new(env),
            limits,
        })
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The template reads this variable.
    pub fn reads(&self, variable: &str) -> bool {
        let template = self.env.get_template(&self.name);
        template.is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }

    /// The prompt for `input`. Blocks until it is rendered or a limit is reached.
    pub fn render(
        &self,
        special_tokens: &Map<String, Json>,
        input: &ChatInput,
    ) -> Result<String, TemplateError> {
        let context = context(special_tokens, input);
        let (sender, receiver) = mpsc::sync_channel(1);
        let template = self.clone();
        thread::Builder::new()
            .name("chat-template".to_owned())
            .stack_size(RENDER_STACK_BYTES)
            .spawn(move || {
                // The receiver is gone once the time is up; the fuel ends this thread then.
                let _ = sender.send(template.render_here(&context));
            })
            .map_err(|error| TemplateError::Thread {
                template: self.name.to_string(),
                detail: error.to_string(),
            })?;
        receiver.recv_timeout(self.limits.time).unwrap_or_else(|_| {
            Err(TemplateError::TimedOut {
                template: self.name.to_string(),
                limit: self.limits.time,
            })
        })
    }

    fn render_here(&self, context: &Json) -> Result<String, TemplateError> {
        let mut out = LimitedText {
            text: Vec::new(),
            limit_bytes: self.limits.output_bytes,
        };
        // The engine has slices that index past the end; a template must not take the coordinator down.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            let template = self.env.get_template(&self.name)?;
            template
                .render_captured_to(engine_value(context), &mut out)
                .map(drop)
        }));
        match rendered {
            Ok(Ok(())) => {
                String::from_utf8(out.text).map_err(|error| self.failed(error.to_string()))
            }
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(self.failed("the template engine gave up".to_owned())),
        }
    }

    fn failed(&self, detail: String) -> TemplateError {
        TemplateError::Failed {
            template: self.name.to_string(),
            detail,
        }
    }

    fn explain(&self, error: &minijinja::Error) -> TemplateError {
        let template = self.name.to_string();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(Raised(message)) = error.downcast_ref() {
                let message = message.clone();
                return TemplateError::Raised { template, message };
            }
            let too_long = error.downcast_ref::<LimitExceeded>().is_some()
                || error
                    .downcast_ref::<io::Error>()
                    .is_some_and(|error| error.kind() == io::ErrorKind::StorageFull);
            if too_long {
                return TemplateError::OutputTooLong {
                    template,
                    limit_bytes: self.limits.output_bytes,
                };
            }
            if let Some(error) = error.downcast_ref::<minijinja::Error>()
                && error.kind() == ErrorKind::OutOfFuel
            {
                return TemplateError::Endless {
                    template,
                    fuel: self.limits.fuel,
                };
            }
            cause = error.source();
        }
        self.failed(describe(error))
    }
}

/// The engine's words on one line, with the line of the template.
fn describe(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// The template's variables, as `apply_chat_template` passes them.
fn context(special_tokens: &Map<String, Json>, input: &ChatInput) -> Json {
    let mut context = special_tokens.clone();
    context.extend(input.variables.clone());
    let messages = input.messages.iter().cloned().map(reference_message);
    context.insert("messages".to_owned(), messages.collect());
    context.insert("tools".to_owned(), Json::from(input.tools.clone()));
    if !input.variables.contains_key("documents") {
        context.insert("documents".to_owned(), Json::Null);
    }
    let add_generation_prompt = Json::Bool(input.add_generation_prompt);
    context.insert("add_generation_prompt".to_owned(), add_generation_prompt);
    Json::Object(context)
}

/// A message without its nulls, its reasoning under every name that templates read it by.
fn reference_message(message: Json) -> Json {
    let Json::Object(mut message) = message else {
        return message;
    };
    message.retain(|_, value| !value.is_null());
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| message.get(*name).cloned());
    let Some(reasoning) = reasoning else {
        return Json::Object(message);
    };
    let mut renamed = Map::from_iter([("thinking".to_owned(), reasoning.clone())]);
    renamed.extend(message);
    renamed.insert("reasoning_content".to_owned(), reasoning);
    Json::Object(renamed)
}

/// JSON as the template sees it.
fn engine_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from_iter(items.iter().map(engine_value)),
        Json::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(name, value)| (name.as_str(), engine_value(value))),
        ),
    }
}

/// Text up to a limit; more is an error of kind `StorageFull`.
struct LimitedText {
    text: Vec<u8>,
    limit_bytes: usize,
}

impl io::Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit_bytes.saturating_sub(self.text.len()) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
