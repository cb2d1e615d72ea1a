//! What a request says of the shape of its answer, and the grammar of that.

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::{Prompt, Shape as Wire};
use serde_json::{Value as Json, json};

use super::frontend::ServedModel;
use super::request::{RequestError, out_of_range, within};
use crate::text::grammar::{Grammar, MAX_GRAMMAR_BYTES, Shape, Thinking, Tool};

/// The field that demands calls.
pub(super) const DEMAND: &str = "chat.tool_demand";
/// Answers of a choice.
const MAX_CHOICES: usize = 4096;
/// Tokens of a prompt's end that are read for an opening or closing tag of thoughts.
const PROMPT_END_TOKENS: usize = 16;

/// The shape that a request asks for, and the field that does.
pub(super) struct Asked {
    shape: Shape,
    field: &'static str,
    chat: bool,
}

/// What `request` asks; cheap to find out.
pub(super) fn asked(request: &v1::GenerateRequest) -> Result<Option<Asked>, RequestError> {
    let chat = match &request.prompt {
        Some(Prompt::Chat(chat)) => Some(chat),
        _ => None,
    };
    let demand = chat.and_then(|chat| Some((chat, chat.tool_demand.as_ref()?)));
    let (field, shape) = match (&request.shape, demand) {
        (None | Some(Wire::JsonObject(false)), None) => return Ok(None),
        (None | Some(Wire::JsonObject(false)), Some((chat, demand))) => {
            (DEMAND, calls(chat, demand)?)
        }
        (Some(_), Some(_)) => {
            let detail = "cannot be met by an answer that has another shape; ask for one of them";
            return Err(wrong(DEMAND, detail));
        }
        (Some(wire), None) => shape(wire)?,
    };
    if request.min_tokens.unwrap_or(0) > 0 {
        let range =
            "0, which is all that an answer with a shape can take: the shape says when it may end";
        let min_tokens = request.min_tokens.unwrap_or(0);
        return Err(out_of_range("min_tokens", min_tokens, range));
    }
    Ok(Some(Asked {
        shape,
        field,
        chat: chat.is_some(),
    }))
}

fn shape(wire: &Wire) -> Result<(&'static str, Shape), RequestError> {
    let text = |field, text: &str| match text.len() {
        0 => Err(wrong(field, "is empty")),
        ..=MAX_GRAMMAR_BYTES => Ok(text.to_owned()),
        bytes => Err(too_long(field, bytes)),
    };
    Ok(match wire {
        Wire::JsonSchema(schema) => {
            let field = "json_schema";
            let schema = serde_json::from_str(&text(field, schema)?)
                .map_err(|error| wrong(field, format!("is not JSON: {error}")))?;
            (field, Shape::JsonSchema(schema))
        }
        Wire::JsonObject(_) => ("json_object", Shape::JsonObject),
        Wire::Regex(regex) => ("regex", Shape::Regex(text("regex", regex)?)),
        Wire::Grammar(lark) => ("grammar", Shape::Lark(text("grammar", lark)?)),
        Wire::Choice(v1::Choices { choices }) => {
            let field = "choice";
            within(field, choices.len(), MAX_CHOICES)?;
            let bytes = choices.iter().map(String::len).sum();
            if bytes > MAX_GRAMMAR_BYTES {
                return Err(too_long(field, bytes));
            }
            if bytes == 0 {
                return Err(wrong(field, "has nothing to choose"));
            }
            (field, Shape::Choice(choices.clone()))
        }
    })
}

/// Calls of one of the chat's tools, or of any.
fn calls(chat: &v1::ChatPrompt, demand: &v1::ToolDemand) -> Result<Shape, RequestError> {
    let bytes = chat.tools_json.iter().map(String::len).sum();
    if bytes > MAX_GRAMMAR_BYTES {
        return Err(too_long("chat.tools_json", bytes));
    }
    let mut tools = Vec::new();
    for (index, text) in chat.tools_json.iter().enumerate() {
        let wrong = |detail| RequestError::Json {
            field: format!("chat.tools_json[{index}]"),
            detail,
        };
        let tool: Json =
            serde_json::from_str(text).map_err(|error| wrong(format!("is not JSON: {error}")))?;
        let function = tool.get("function").unwrap_or(&tool);
        let name = function["name"].as_str();
        let name = name.ok_or_else(|| wrong("has no name to be called by".to_owned()))?;
        if demand.name.is_empty() || demand.name == name {
            tools.push(Tool {
                name: name.to_owned(),
                parameters: match &function["parameters"] {
                    Json::Null => json!({"type": "object"}),
                    schema => schema.clone(),
                },
            });
        }
    }
    match (tools.is_empty(), demand.name.as_str()) {
        (false, _) => Ok(Shape::ToolCalls {
            tools,
            several: demand.several,
        }),
        (true, "") => Err(wrong(DEMAND, "there are no tools to call")),
        (true, name) => Err(wrong(DEMAND, format!("no tool is called {name:?}"))),
    }
}

impl Asked {
    /// The grammar of the answer to `prompt`. Takes a while.
    pub(super) fn grammar(
        &self,
        prompt: &[u32],
        model: &ServedModel,
    ) -> Result<Grammar, RequestError> {
        let grammars = model.text.grammars(model.vocab_size, &model.eos_token_ids);
        let grammars = grammars.map_err(|detail| wrong(self.field, detail))?;
        let tokenizer = model.text.tokenizer();
        let end = &prompt[prompt.len().saturating_sub(PROMPT_END_TOKENS)..];
        let thinking = match self.chat {
            true => Thinking::after(&tokenizer.decode(end, false), tokenizer),
            false => Thinking::No,
        };
        let compiled = grammars.compile(&self.shape, thinking);
        compiled.map_err(|detail| wrong(self.field, detail))
    }
}

fn wrong(field: &'static str, detail: impl Into<String>) -> RequestError {
    RequestError::Shape {
        field,
        detail: detail.into(),
    }
}

fn too_long(field: &'static str, bytes: usize) -> RequestError {
    let detail = format!("has {bytes} bytes; at most {MAX_GRAMMAR_BYTES} are taken");
    wrong(field, detail)
}
