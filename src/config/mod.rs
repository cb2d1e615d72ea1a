//! Configuration: defaults < TOML file < `SECONDWIND_SECTION_KEY` environment < flags, merged by
//! figment into a tree and checked as a whole, so that one start reports every mistake.
//!
//! [`schema`] says what there is, [`kinds`] what a value may be, [`layers`] where values come from,
//! [`check`] walks the merged tree, [`flags`] makes clap arguments of a section.

mod api_keys;
mod check;
pub mod flags;
mod kinds;
mod layers;
mod schema;

use std::{
    ffi::OsString,
    fs,
    io::ErrorKind,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use secondwind_coordinator::ApiKey;
use secondwind_model::{
    checkpoint::{BUILTIN, Checkpoint},
    config::CONFIG_FILE,
};

pub use self::{
    kinds::Meant,
    layers::{Layer, Origin},
    schema::Section,
};
use crate::exit::UsageError;

/// Names the configuration file.
pub const FILE_VARIABLE: &str = "SECONDWIND_CONFIG";
/// What clients of a coordinator show it: an API key.
pub const KEY_VARIABLE: &str = "SECONDWIND_API_KEY";
/// Variables that set no key.
const OTHER_VARIABLES: [&str; 2] = [FILE_VARIABLE, KEY_VARIABLE];
/// Read by the daemons when it exists.
const DEFAULT_FILE: &str = "/etc/secondwind/config.toml";

/// One mistake and where it was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    origin: Origin,
    message: String,
}

impl Problem {
    /// A mistake.
    pub fn new(origin: Origin, message: impl Into<String>) -> Self {
        Self {
            origin,
            message: message.into(),
        }
    }
}

/// What a command asks for.
#[derive(Debug)]
pub struct Request {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// Read the default file when none is named.
    pub daemon: bool,
    /// Sections that the command uses; what is required in them must be set.
    pub sections: &'static [Section],
    /// The command's own defaults, stronger than the schema's.
    pub defaults: Layer,
    /// What was typed.
    pub flags: Layer,
}

/// A checked configuration.
#[derive(Debug)]
pub struct Config {
    values: check::Values,
    api_keys: Vec<ApiKey>,
}

/// Reads, merges and checks; the error carries every mistake.
pub fn load(request: Request) -> Result<Config> {
    load_from(request, std::env::vars_os())
}

fn load_from(
    request: Request,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config> {
    let variables: Vec<_> = variables.into_iter().collect();
    let mut problems = Vec::new();
    let mut layers = vec![layers::defaults(), request.defaults];
    let named = request
        .file
        .map(|path| (path, Origin::Flag("--config".into())))
        .or_else(|| {
            let (_, path) = variables
                .iter()
                .find(|(name, path)| name == FILE_VARIABLE && !path.is_empty())?;
            Some((path.into(), Origin::Variable(FILE_VARIABLE.into())))
        });
    let default = request
        .daemon
        .then(|| (PathBuf::from(DEFAULT_FILE), Origin::Default));
    if let Some((path, origin)) = named.or(default) {
        match fs::read_to_string(&path) {
            Ok(text) => {
                let (layer, mistakes) = layers::file(&path, &text);
                layers.push(layer);
                problems.extend(mistakes);
            }
            Err(error) if error.kind() == ErrorKind::NotFound && origin == Origin::Default => {}
            Err(error) => problems.push(Problem::new(
                origin,
                format!("cannot read {}: {error}", path.display()),
            )),
        }
    }
    let (environment, mistakes) = layers::environment(variables);
    problems.extend(mistakes);
    layers.extend([environment, request.flags]);

    let values = check::merge(&layers, &mut problems);
    check::paths(&values, request.sections, &mut problems);
    check::relations(&values, request.sections, &mut problems);
    missing(&values, request.sections, &mut problems);
    let mut entries: Vec<_> = layers.into_iter().flat_map(|it| it.api_keys).collect();
    if request.sections.contains(&Section::Coordinator) {
        entries.extend(keys_file(&values, &mut problems));
    }
    api_keys::distinct(&entries, &mut problems);
    if problems.is_empty() {
        let api_keys = entries.into_iter().map(|(key, _)| key).collect();
        return Ok(Config { values, api_keys });
    }
    problems.sort_by_key(|problem| problem.origin.order());
    let lines = problems
        .iter()
        .map(|Problem { origin, message }| match origin {
            Origin::Default => message.clone(),
            _ => format!("{origin}: {message}"),
        });
    Err(UsageError::new(lines).into())
}

/// The tables of `coordinator.api_keys_file`.
fn keys_file(values: &check::Values, problems: &mut Vec<Problem>) -> Vec<api_keys::Entry> {
    let Some((Meant::Text(path), origin)) = values.get("coordinator.api_keys_file") else {
        return Vec::new();
    };
    match fs::read_to_string(path) {
        Ok(text) => {
            let (layer, mistakes) = layers::file(Path::new(path), &text);
            problems.extend(mistakes);
            if !layer.is_empty() {
                let message = format!("{path} holds more than `[[{}]]` tables", api_keys::TABLE);
                problems.push(Problem::new(origin.clone(), message));
            }
            if layer.api_keys.is_empty() {
                let table = api_keys::TABLE;
                let message =
                    format!("{path} holds no `[[{table}]]` table, and would lock nobody out");
                problems.push(Problem::new(origin.clone(), message));
            }
            layer.api_keys
        }
        Err(error) => {
            let message = format!("coordinator.api_keys_file: cannot read {path}: {error}");
            problems.push(Problem::new(origin.clone(), message));
            Vec::new()
        }
    }
}

/// Keys without which a section means nothing.
fn missing(values: &check::Values, sections: &[Section], problems: &mut Vec<Problem>) {
    for path in [
        "coordinator.model",
        "coordinator.world_size",
        "worker.model",
    ] {
        let Some(key) = path
            .split_once('.')
            .and_then(|(section, name)| schema::find(section, name))
        else {
            continue;
        };
        let reported = problems
            .iter()
            .any(|problem| problem.message.contains(path));
        if sections.contains(&key.section) && !values.contains_key(path) && !reported {
            let message = format!(
                "{path} is not set: give --{}, {} or `{}` under `[{}]` in the configuration file",
                key.flag(),
                key.variable(),
                key.name,
                key.section.name()
            );
            problems.push(Problem::new(Origin::Default, message));
        }
    }
}

impl Config {
    fn get(&self, path: &str) -> Option<&Meant> {
        self.values.get(path).map(|(meant, _)| meant)
    }

    /// All `[[api_key]]` tables.
    pub fn api_keys(&self) -> &[ApiKey] {
        &self.api_keys
    }

    /// A key of kind text, model, device, choice, host and port or log level.
    pub fn text(&self, path: &str) -> Option<String> {
        match self.get(path) {
            Some(Meant::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// A whole number.
    pub fn integer(&self, path: &str) -> Option<usize> {
        match self.get(path) {
            Some(Meant::Integer(value)) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// True if it is set and true.
    pub fn boolean(&self, path: &str) -> bool {
        matches!(self.get(path), Some(Meant::Bool(true)))
    }

    /// A size.
    pub fn bytes(&self, path: &str) -> Option<u64> {
        match self.get(path) {
            Some(Meant::Bytes(bytes)) => Some(*bytes),
            _ => None,
        }
    }

    /// A listening address.
    pub fn address(&self, path: &str) -> Option<SocketAddr> {
        match self.get(path) {
            Some(Meant::Address(address)) => Some(*address),
            _ => None,
        }
    }

    /// A duration.
    pub fn duration(&self, path: &str) -> Option<Duration> {
        match self.get(path) {
            Some(Meant::Duration(duration)) => Some(*duration),
            _ => None,
        }
    }

    /// Shares of a split.
    pub fn shares(&self, path: &str) -> Option<Vec<f64>> {
        match self.get(path) {
            Some(Meant::Shares(shares)) => Some(shares.clone()),
            _ => None,
        }
    }
}

/// Says why `model` cannot be a checkpoint folder, as far as a look at the folder tells.
pub fn checkpoint_folder(model: &str) -> Result<(), String> {
    if model == BUILTIN || Path::new(model).join(CONFIG_FILE).is_file() {
        return Ok(());
    }
    // Opening says it best, and fails before it reads anything.
    let reason = Checkpoint::open_named(model)
        .err()
        .map_or("cannot be opened".into(), |error| error.to_string());
    Err(format!(
        "model `{model}`: {reason}; give a checkpoint folder, or `builtin` for the embedded model"
    ))
}

/// The known word that `word` was probably meant to be.
fn nearest(word: &str, known: impl IntoIterator<Item = String>) -> Option<String> {
    let word = word.to_ascii_lowercase();
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::damerau_levenshtein(&word, &candidate.to_ascii_lowercase()),
                candidate,
            )
        })
        .filter(|(distance, candidate)| {
            let within = word.len() > 2
                && (word.starts_with(candidate.as_str()) || candidate.starts_with(&word));
            within || *distance <= (candidate.len() / 3).clamp(1, 5)
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests;
