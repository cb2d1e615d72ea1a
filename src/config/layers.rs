//! The layers of the configuration as figment providers that remember where each value was written.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use figment::{
    Metadata, Profile, Provider,
    value::{Dict, Map, Tag, Value},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Problem, api_keys, nearest, schema};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody wrote it.
    Default,
    /// A line of the configuration file.
    File(PathBuf, usize),
    /// An environment variable.
    Variable(String),
    /// A flag, dashes included.
    Flag(String),
}

impl Origin {
    /// The order in which mistakes are told: lines of the file, variables, flags, what is missing.
    pub fn order(&self) -> (u8, usize) {
        match self {
            Self::File(_, line) => (0, *line),
            Self::Variable(_) => (1, 0),
            Self::Flag(_) => (2, 0),
            Self::Default => (3, 0),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "{name}"),
            Self::Flag(name) => write!(f, "{name}"),
        }
    }
}

/// One source of values, such as the file or the flags.
#[derive(Debug)]
pub struct Layer {
    name: &'static str,
    values: Dict,
    /// By section and key; the key is empty for the section itself.
    origins: BTreeMap<(String, String), Origin>,
    /// `[[api_key]]` tables, which are no values of keys: files alone have them.
    pub api_keys: Vec<api_keys::Entry>,
}

impl Layer {
    /// Layer of this name; each name may occur once.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            values: Dict::new(),
            origins: BTreeMap::new(),
            api_keys: Vec::new(),
        }
    }

    /// The name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Sets `section.key` to `text`.
    pub fn set(&mut self, section: &str, key: &str, text: impl Into<String>, origin: Origin) {
        self.insert(section, key, Value::from(text.into()), origin);
    }

    /// The text that [`Self::set`] gave `section.key`.
    pub fn text(&self, section: &str, key: &str) -> Option<&str> {
        self.values.get(section)?.as_dict()?.get(key)?.as_str()
    }

    /// Nothing was set.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Where `section.key` was written, or the section itself where `key` is empty.
    pub fn origin(&self, section: &str, key: &str) -> Option<&Origin> {
        self.origins.get(&(section.to_owned(), key.to_owned()))
    }

    fn insert(&mut self, section: &str, key: &str, value: Value, origin: Origin) {
        let table = self
            .values
            .entry(section.to_owned())
            .or_insert_with(|| Value::Dict(Tag::Default, Dict::new()));
        if let Value::Dict(_, table) = table {
            table.insert(key.to_owned(), value);
        }
        self.origins
            .insert((section.to_owned(), key.to_owned()), origin);
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// The schema's own defaults.
pub fn defaults() -> Layer {
    let mut layer = Layer::new("defaults");
    for key in schema::KEYS {
        if let Some(default) = key.default {
            layer.set(key.section.name(), key.name, default, Origin::Default);
        }
    }
    layer
}

/// The file's values and its syntax errors; what could be read is kept, so that all is reported at once.
pub fn file(path: &Path, text: &str) -> (Layer, Vec<Problem>) {
    let line_of = |offset: usize| {
        1 + text.as_bytes()[..offset.min(text.len())]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    };
    let origin = |span: std::ops::Range<usize>| Origin::File(path.to_owned(), line_of(span.start));
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<Problem> = errors
        .iter()
        .map(|error| Problem::new(origin(error.span().unwrap_or(0..0)), error.message()))
        .collect();
    let mut layer = Layer::new("file");
    for (name, item) in document.get_ref().iter() {
        let section: &str = name.get_ref();
        if section == api_keys::TABLE {
            layer.api_keys = api_keys::read(item, origin, &mut problems);
            continue;
        }
        layer
            .origins
            .insert((section.to_owned(), String::new()), origin(name.span()));
        match item.get_ref() {
            DeValue::Table(table) => {
                layer
                    .values
                    .insert(section.to_owned(), Value::Dict(Tag::Default, Dict::new()));
                for (key, value) in table.iter() {
                    layer.insert(section, key.get_ref(), convert(value), origin(key.span()));
                }
            }
            _ => {
                layer.values.insert(section.to_owned(), convert(item));
            }
        }
    }
    (layer, problems)
}

fn convert(item: &Spanned<DeValue<'_>>) -> Value {
    match item.get_ref() {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::from(number.as_str()), Value::from),
        DeValue::Float(number) => number
            .as_str()
            .parse::<f64>()
            .map_or_else(|_| Value::from(number.as_str()), Value::from),
        DeValue::Boolean(value) => Value::from(*value),
        DeValue::Datetime(value) => Value::from(value.to_string()),
        DeValue::Array(items) => Value::from(items.iter().map(convert).collect::<Vec<_>>()),
        DeValue::Table(table) => Value::from(
            table
                .iter()
                .map(|(key, value)| (key.get_ref().to_string(), convert(value)))
                .collect::<Dict>(),
        ),
    }
}

/// Values of `SECONDWIND_SECTION_KEY` variables. `RUST_LOG` stands for the log level where no variable
/// of ours does.
pub fn environment(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> (Layer, Vec<Problem>) {
    let mut layer = Layer::new("environment");
    let mut problems = Vec::new();
    let mut rust_log = None;
    for (name, value) in variables {
        let Some(name) = name.to_str() else { continue };
        let ours = name.starts_with("SECONDWIND_") && !super::OTHER_VARIABLES.contains(&name);
        if !ours && name != "RUST_LOG" {
            continue;
        }
        let Ok(value) = value.into_string() else {
            problems.push(Problem::new(
                Origin::Variable(name.into()),
                "the value is not UTF-8",
            ));
            continue;
        };
        if !ours {
            rust_log = Some(value).filter(|value| !value.trim().is_empty());
        } else if let Some(key) = schema::KEYS.iter().find(|key| key.variable() == name) {
            layer.set(
                key.section.name(),
                key.name,
                value,
                Origin::Variable(name.into()),
            );
        } else {
            let known = schema::KEYS.iter().map(|key| key.variable());
            let hint = nearest(name, known)
                .map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            problems.push(Problem::new(
                Origin::Variable(name.into()),
                format!("sets no known key{hint}"),
            ));
        }
    }
    if let Some(value) = rust_log.filter(|_| layer.origin("log", "level").is_none()) {
        layer.set("log", "level", value, Origin::Variable("RUST_LOG".into()));
    }
    (layer, problems)
}
