//! Chat messages.

use secondwind_proto::v1;
use serde_json::Value as Json;

use super::super::status::{ApiError, FieldMistake};
use super::extras;
use super::fields::{Fields, value_error, wrong_kind};

/// Roles, and what the chat template calls them: `developer` is OpenAI's newer word for `system`, and
/// templates leave out roles that they do not know.
const ROLES: [(&str, &str); 5] = [
    ("system", "system"),
    ("developer", "system"),
    ("user", "user"),
    ("assistant", "assistant"),
    ("tool", "tool"),
];

/// The chat of a request: its messages and template variables.
pub(super) fn chat(fields: &mut Fields, strict: bool) -> Result<v1::ChatPrompt, ApiError> {
    let list = fields.list("messages")?;
    let list = list.ok_or_else(|| value_error(fields.name("messages"), "is missing"))?;
    let messages = list
        .into_iter()
        .enumerate()
        .map(|(index, json)| message(&format!("messages[{index}]"), json, strict))
        .collect::<Result<_, _>>()?;
    let mut variables = match fields.any("chat_template_kwargs") {
        None => serde_json::Map::new(),
        Some(Json::Object(variables)) => variables,
        Some(other) => {
            let name = fields.name("chat_template_kwargs");
            return Err(wrong_kind(&name, &other, "an object"));
        }
    };
    if let Some(add) = fields.boolean("add_generation_prompt")? {
        variables.insert("add_generation_prompt".to_owned(), add.into());
    }
    let (tools_json, tool_demand) = tools(fields)?;
    Ok(v1::ChatPrompt {
        messages,
        tools_json,
        tool_demand,
        template_variables_json: match variables.is_empty() {
            true => String::new(),
            false => Json::Object(variables).to_string(),
        },
    })
}

/// The tools that the model is told of, and whether it must call any.
fn tools(fields: &mut Fields) -> Result<(Vec<String>, Option<v1::ToolDemand>), ApiError> {
    let mut tools = Vec::new();
    for (index, tool) in fields.list("tools")?.unwrap_or_default().iter().enumerate() {
        let named = tool.pointer("/function/name").is_some_and(Json::is_string);
        if tool["type"] != "function" || !named {
            let name = format!("{}[{index}]", fields.name("tools"));
            let detail = "is not of type function, with a function that has a name";
            return Err(value_error(name, detail));
        }
        tools.push(tool.to_string());
    }
    let name = fields.name("tool_choice");
    let unsupported = || ApiError::Field {
        field: name.clone(),
        detail: "is none of auto, none, required, and a function by its name".to_owned(),
        kind: FieldMistake::Unsupported,
    };
    let choice = match fields.any("tool_choice") {
        None => return Ok((tools, None)),
        Some(Json::String(choice)) => choice,
        Some(choice @ Json::Object(_)) => {
            let function = choice.pointer("/function/name").and_then(Json::as_str);
            let function = function.filter(|_| choice["type"] == "function");
            let name = function.ok_or_else(unsupported)?.to_owned();
            return Ok((
                tools,
                Some(v1::ToolDemand {
                    name,
                    several: false,
                }),
            ));
        }
        Some(other) => return Err(wrong_kind(&name, &other, "a string or an object")),
    };
    match choice.as_str() {
        "auto" => Ok((tools, None)),
        // It cannot call what it is not told of.
        "none" => Ok((Vec::new(), None)),
        "required" => {
            let several = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
            let name = String::new();
            Ok((tools, Some(v1::ToolDemand { name, several })))
        }
        _ => Err(unsupported()),
    }
}

fn message(name: &str, json: Json, strict: bool) -> Result<v1::ChatMessage, ApiError> {
    let mut fields = Fields::of(name, json)?;
    let role = fields.text("role")?;
    let role = role.ok_or_else(|| value_error(fields.name("role"), "is missing"))?;
    let Some((_, role)) = ROLES.iter().find(|(known, _)| *known == role) else {
        let known = ROLES.map(|(known, _)| known).join(", ");
        let detail = format!("{role:?} is none of {known}");
        return Err(value_error(fields.name("role"), detail));
    };
    let tool_calls = fields.list("tool_calls")?.unwrap_or_default();
    let content = match fields.any("content") {
        Some(json) => content(&fields.name("content"), json, strict)?,
        // What an assistant said may be tool calls alone.
        None if *role == "assistant" => String::new(),
        None => return Err(value_error(fields.name("content"), "is missing")),
    };
    let reasoning_content = fields.text("reasoning_content")?.unwrap_or_default();
    let tool_calls_json = match tool_calls.is_empty() {
        true => String::new(),
        false => Json::from(template_calls(&fields.name("tool_calls"), tool_calls)?).to_string(),
    };
    fields.finish(&extras::MESSAGE, strict)?;
    Ok(v1::ChatMessage {
        role: (*role).to_owned(),
        content,
        tool_calls_json,
        reasoning_content,
    })
}

/// A string, or parts of text, which are lines of it.
fn content(name: &str, json: Json, strict: bool) -> Result<String, ApiError> {
    let parts = match json {
        Json::String(text) => return Ok(text),
        Json::Array(parts) => parts,
        other => return Err(wrong_kind(name, &other, "a string or a list of parts")),
    };
    let mut texts = Vec::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of(&format!("{name}[{index}]"), part)?;
        match part.text("type")?.as_deref() {
            Some("text") => {}
            Some(other) => {
                let detail = format!("{other:?} is not supported; a part is of type text");
                return Err(value_error(part.name("type"), detail));
            }
            None => return Err(value_error(part.name("type"), "is missing")),
        }
        let text = part.text("text")?;
        texts.push(text.ok_or_else(|| value_error(part.name("text"), "is missing"))?);
        part.finish(&extras::PART, strict)?;
    }
    Ok(texts.join("\n"))
}

/// Tool calls as templates expect them: `arguments` as an object, where OpenAI has JSON in a string.
fn template_calls(name: &str, mut calls: Vec<Json>) -> Result<Vec<Json>, ApiError> {
    for (index, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            let name = format!("{name}[{index}]");
            return Err(value_error(name, "has no function with arguments"));
        };
        if let Json::String(text) = arguments {
            *arguments = serde_json::from_str(text).map_err(|error| {
                let name = format!("{name}[{index}].function.arguments");
                value_error(name, format!("is not JSON: {error}"))
            })?;
        }
    }
    Ok(calls)
}
