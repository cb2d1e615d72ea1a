//! Typed access to the fields of a JSON object, with errors that name file and field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ConfigError;

/// Parses a file that must be one JSON object.
///
/// # Errors
/// [`ConfigError::Json`].
pub(crate) fn object(file: &str, text: &str) -> Result<Map<String, Value>, ConfigError> {
    let invalid = |reason: String| ConfigError::Json {
        file: file.to_owned(),
        reason,
    };
    match serde_json::from_str(text).map_err(|error| invalid(error.to_string()))? {
        Value::Object(map) => Ok(map),
        _ => Err(invalid("the top level is something else".to_owned())),
    }
}

/// A value as an error message shows it: JSON, cut at 80 characters.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// One object of a file. A null field counts as absent.
#[derive(Clone)]
pub(crate) struct Fields<'a> {
    file: &'a str,
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: &'a str, map: &'a Map<String, Value>) -> Self {
        Self {
            file,
            prefix: String::new(),
            map,
        }
    }

    pub(crate) fn file(&self) -> &'a str {
        self.file
    }

    pub(crate) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    pub(crate) fn path(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing {
            file: self.file.to_owned(),
            field: self.path(field),
        }
    }

    pub(crate) fn invalid(
        &self,
        field: &str,
        found: &Value,
        expected: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Invalid {
            file: self.file.to_owned(),
            field: self.path(field),
            found: shown(found),
            expected: expected.into(),
        }
    }

    pub(crate) fn unsupported(
        &self,
        field: &str,
        found: &Value,
        remedy: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file.to_owned(),
            field: self.path(field),
            found: shown(found),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                file: self.file,
                prefix: format!("{}.", self.path(field)),
                map,
            })),
            Some(other) => Err(self.invalid(field, other, "an object")),
        }
    }

    pub(crate) fn integer(
        &self,
        field: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let expected = format!("an integer from {} to {}", range.start(), range.end());
                Err(self.invalid(field, value, expected))
            }
        }
    }

    /// A size of at least 1.
    pub(crate) fn size(&self, field: &str, most: usize) -> Result<Option<usize>, ConfigError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        Ok(self
            .integer(field, 1..=most)?
            .and_then(|number| usize::try_from(number).ok()))
    }

    pub(crate) fn required_size(&self, field: &str, most: usize) -> Result<usize, ConfigError> {
        self.size(field, most)?.ok_or_else(|| self.missing(field))
    }

    pub(crate) fn number(
        &self,
        field: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(self.invalid(field, value, expected))
            }
        }
    }

    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.invalid(field, other, "true or false")),
        }
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(field, other, "a string")),
        }
    }

    pub(crate) fn list(&self, field: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.invalid(field, other, "a list")),
        }
    }
}
