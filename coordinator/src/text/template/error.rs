//! Why a chat template gives no prompt.

use std::time::Duration;

use super::MAX_SOURCE_BYTES;

/// Why a chat could not be rendered. `template` says which template of which file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The file names several templates, and none of them is `default`.
    #[error("{file} has chat templates {names:?} but none named \"default\"")]
    NoDefault {
        /// Where they stand.
        file: String,
        /// Their names.
        names: Vec<String>,
    },
    /// The source is too long to be a template.
    #[error("chat template {template} is {bytes} bytes long; at most {MAX_SOURCE_BYTES} are read")]
    SourceTooLong {
        /// Which one.
        template: String,
        /// Its length.
        bytes: usize,
    },
    /// It does not parse.
    #[error("chat template {template} does not parse: {detail}")]
    Syntax {
        /// Which one.
        template: String,
        /// The engine's words, with the line.
        detail: String,
    },
    /// The template itself refused the messages, with `raise_exception`.
    #[error("the chat template refuses the messages: {message}")]
    Raised {
        /// Which one.
        template: String,
        /// The template's words.
        message: String,
    },
    /// It stopped at an operation that these messages do not allow.
    #[error("chat template {template} failed on these messages: {detail}")]
    Failed {
        /// Which one.
        template: String,
        /// The engine's words, with the line.
        detail: String,
    },
    /// It did not end.
    #[error("chat template {template} did not end within {fuel} instructions")]
    Endless {
        /// Which one.
        template: String,
        /// The limit.
        fuel: u64,
    },
    /// It took too long.
    #[error("chat template {template} did not end within {} ms", .limit.as_millis())]
    TimedOut {
        /// Which one.
        template: String,
        /// The limit.
        limit: Duration,
    },
    /// It wrote too much.
    #[error("chat template {template} rendered more than {limit_bytes} bytes")]
    OutputTooLong {
        /// Which one.
        template: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// No thread to render on.
    #[error("no thread for chat template {template}: {detail}")]
    Thread {
        /// Which one.
        template: String,
        /// The system's words.
        detail: String,
    },
}
