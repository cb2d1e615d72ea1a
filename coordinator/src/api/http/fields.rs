//! A JSON object, taken field by field. What has a wrong type is named; what nobody took is left over and
//! judged at the end.

use std::ops::RangeInclusive;

use serde_json::{Map, Value as Json};

use super::super::status::{ApiError, FieldMistake};
use super::HttpError;
use super::extras::Extras;

/// The fields of an object that are not taken yet.
#[derive(Debug)]
pub(super) struct Fields {
    /// The object's own name and a dot; empty for the body.
    path: String,
    map: Map<String, Json>,
}

impl Fields {
    /// The body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Json::Object(map)) => Ok(Self {
                path: String::new(),
                map,
            }),
            Ok(other) => Err(HttpError::NotObject {
                found: kind_of(&other),
            }
            .into()),
            Err(error) => Err(HttpError::Json {
                detail: error.to_string(),
            }
            .into()),
        }
    }

    /// The fields of a body that came another way.
    pub(super) fn body(map: Map<String, Json>) -> Self {
        Self {
            path: String::new(),
            map,
        }
    }

    /// The object `json`, which is called `name`.
    pub(super) fn of(name: &str, json: Json) -> Result<Self, ApiError> {
        match json {
            Json::Object(map) => Ok(Self {
                path: format!("{name}."),
                map,
            }),
            other => Err(wrong_kind(name, &other, "an object")),
        }
    }

    /// The full name of `field`.
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// Whatever is there; null is nothing.
    pub(super) fn any(&mut self, field: &str) -> Option<Json> {
        self.map.shift_remove(field).filter(|json| !json.is_null())
    }

    pub(super) fn boolean(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        self.typed(field, "true or false", Json::as_bool)
    }

    pub(super) fn text(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        self.typed(field, "a string", |json| json.as_str().map(str::to_owned))
    }

    /// A number; what is too large for f32 is infinite, and refused by whoever knows its range.
    pub(super) fn number(&mut self, field: &str) -> Result<Option<f32>, ApiError> {
        self.typed(field, "a number", |json| {
            json.as_f64().map(|value| value as f32)
        })
    }

    pub(super) fn integer(
        &mut self,
        field: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(json) = self.any(field) else {
            return Ok(None);
        };
        match json.as_i64() {
            Some(value) if range.contains(&value) => Ok(Some(value)),
            _ if json.is_number() => {
                let (low, high) = (range.start(), range.end());
                let detail = format!("{json} is not a whole number from {low} to {high}");
                Err(value_error(self.name(field), detail))
            }
            _ => Err(wrong_kind(&self.name(field), &json, "a whole number")),
        }
    }

    pub(super) fn list(&mut self, field: &str) -> Result<Option<Vec<Json>>, ApiError> {
        match self.any(field) {
            None => Ok(None),
            Some(Json::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong_kind(&self.name(field), &other, "a list")),
        }
    }

    fn typed<T>(
        &mut self,
        field: &str,
        wanted: &str,
        read: impl Fn(&Json) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(json) = self.any(field) else {
            return Ok(None);
        };
        match read(&json) {
            Some(value) => Ok(Some(value)),
            None => Err(wrong_kind(&self.name(field), &json, wanted)),
        }
    }

    /// Judges what nobody took.
    pub(super) fn finish(mut self, extras: &Extras, strict: bool) -> Result<(), ApiError> {
        for (field, neutral) in extras.unsupported {
            let Some(json) = self.any(field) else {
                continue;
            };
            if !neutral.iter().any(|neutral| is_same(&json, neutral)) {
                return Err(ApiError::Field {
                    field: self.name(field),
                    detail: "is not supported; leave it out".to_owned(),
                    kind: FieldMistake::Unsupported,
                });
            }
        }
        for hint in extras.hints {
            self.any(hint);
        }
        self.map.retain(|_, json| !json.is_null());
        let unknown: Vec<String> = self.map.keys().map(|field| self.name(field)).collect();
        if strict && !unknown.is_empty() {
            return Err(ApiError::Field {
                field: unknown.join(", "),
                detail: "nobody knows this; strict servers take known fields only".to_owned(),
                kind: FieldMistake::Unknown,
            });
        }
        Ok(())
    }
}

/// The values are the same, however a number is written.
fn is_same(json: &Json, neutral: &str) -> bool {
    let Ok(neutral) = serde_json::from_str::<Json>(neutral) else {
        return false;
    };
    match (json.as_f64(), neutral.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => *json == neutral,
    }
}

/// `field` cannot have this value.
pub(super) fn value_error(field: String, detail: impl Into<String>) -> ApiError {
    ApiError::Field {
        field,
        detail: detail.into(),
        kind: FieldMistake::Value,
    }
}

/// `field` is of another kind.
pub(super) fn wrong_kind(field: &str, json: &Json, wanted: &str) -> ApiError {
    value_error(
        field.to_owned(),
        format!("is {}, not {wanted}", kind_of(json)),
    )
}

fn kind_of(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
