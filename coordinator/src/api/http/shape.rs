//! The shape of an answer: OpenAI's `response_format` and vLLM's `structured_outputs`.

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Shape;
use serde_json::Value as Json;

use super::super::status::ApiError;
use super::extras;
use super::fields::{Fields, value_error, wrong_kind};

/// A shape, and what the request calls it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Named {
    pub shape: Shape,
    pub field: String,
}

/// What either of the fields asks.
pub(super) fn read(fields: &mut Fields, strict: bool) -> Result<Option<Named>, ApiError> {
    let format = match fields.any("response_format") {
        Some(json) => response_format(&fields.name("response_format"), json, strict)?,
        None => None,
    };
    let name = fields.name("structured_outputs");
    let structured = match fields.any("structured_outputs") {
        Some(json) => Some(structured_outputs(&name, json, strict)?),
        None => None,
    };
    match (format, structured) {
        (Some(format), Some(_)) => {
            let detail = format!("cannot be had together with {}", format.field);
            Err(value_error(name, detail))
        }
        (format, structured) => Ok(format.or(structured)),
    }
}

fn response_format(name: &str, json: Json, strict: bool) -> Result<Option<Named>, ApiError> {
    let mut fields = Fields::of(name, json)?;
    let kind = fields.text("type")?;
    let named = match kind.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(Named {
            shape: Shape::JsonObject(true),
            field: name.to_owned(),
        }),
        Some("json_schema") => {
            let inner_name = fields.name("json_schema");
            let inner = fields.any("json_schema");
            let inner = inner.ok_or_else(|| value_error(inner_name.clone(), "is missing"))?;
            let mut inner = Fields::of(&inner_name, inner)?;
            let field = inner.name("schema");
            let schema = inner.any("schema");
            let schema = schema.ok_or_else(|| value_error(field.clone(), "is missing"))?;
            inner.finish(&extras::JSON_SCHEMA, strict)?;
            Some(Named {
                shape: Shape::JsonSchema(schema.to_string()),
                field,
            })
        }
        other => {
            let detail = match other {
                Some(other) => format!("{other:?} is none of text, json_object, json_schema"),
                None => "is missing".to_owned(),
            };
            return Err(value_error(fields.name("type"), detail));
        }
    };
    fields.finish(&extras::RESPONSE_FORMAT, strict)?;
    Ok(named)
}

fn structured_outputs(name: &str, json: Json, strict: bool) -> Result<Named, ApiError> {
    let mut fields = Fields::of(name, json)?;
    let mut found = Vec::new();
    let mut take = |field: String, shape| found.push(Named { shape, field });
    let json_name = fields.name("json");
    match fields.any("json") {
        None => {}
        // A schema, or the text of one.
        Some(Json::String(schema)) => take(json_name, Shape::JsonSchema(schema)),
        Some(schema) => take(json_name, Shape::JsonSchema(schema.to_string())),
    }
    if let Some(regex) = fields.text("regex")? {
        take(fields.name("regex"), Shape::Regex(regex));
    }
    if let Some(grammar) = fields.text("grammar")? {
        take(fields.name("grammar"), Shape::Grammar(grammar));
    }
    if fields.boolean("json_object")? == Some(true) {
        take(fields.name("json_object"), Shape::JsonObject(true));
    }
    if let Some(choices) = fields.list("choice")? {
        let name = fields.name("choice");
        let choices = choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| match choice {
                Json::String(choice) => Ok(choice),
                other => Err(wrong_kind(&format!("{name}[{index}]"), &other, "a string")),
            });
        let choices = choices.collect::<Result<_, _>>()?;
        take(name.clone(), Shape::Choice(v1::Choices { choices }));
    }
    fields.finish(&extras::STRUCTURED_OUTPUTS, strict)?;
    match (found.pop(), found.pop()) {
        (Some(named), None) => Ok(named),
        (None, _) => {
            let detail = "has none of json, json_object, regex, choice, grammar";
            Err(value_error(name.to_owned(), detail))
        }
        (Some(one), Some(other)) => {
            let detail = format!("cannot be had together with {}", other.field);
            Err(value_error(one.field, detail))
        }
    }
}
