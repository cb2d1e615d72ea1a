//! Exit codes: 0 done, 64 usage or configuration, 1 everything else.

use std::{fmt, io::Write, process::ExitCode};

use secondwind_coordinator::CoordinatorError;

/// `EX_USAGE` of sysexits.h.
pub const USAGE: u8 = 64;

/// Mistakes in flags, environment or configuration file; all of them.
#[derive(Debug)]
pub struct UsageError {
    mistakes: Vec<String>,
}

impl UsageError {
    /// One line each.
    pub fn new(mistakes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            mistakes: mistakes.into_iter().map(Into::into).collect(),
        }
    }

    /// A single mistake.
    pub fn one(mistake: impl Into<String>) -> Self {
        Self::new([mistake])
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mistakes.as_slice() {
            [one] => f.write_str(one),
            many => {
                write!(f, "{} mistakes", many.len())?;
                many.iter()
                    .try_for_each(|mistake| write!(f, "\n  {mistake}"))
            }
        }
    }
}

impl std::error::Error for UsageError {}

/// The reader of standard output went away, as `head` does: no failure.
#[derive(Debug)]
pub struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// Says on standard error what went wrong, and with which code to end.
pub fn report(outcome: anyhow::Result<()>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    if error.is::<StdoutClosed>() {
        return ExitCode::SUCCESS;
    }
    // Nothing is left to tell when standard error is gone too.
    let _ = writeln!(std::io::stderr(), "error: {}", told_once(&error));
    if is_usage(&error) {
        ExitCode::from(USAGE)
    } else {
        ExitCode::FAILURE
    }
}

/// Mistakes in flags or configuration, whoever noticed them.
fn is_usage(error: &anyhow::Error) -> bool {
    let settings = error.downcast_ref::<CoordinatorError>();
    error.is::<UsageError>() || matches!(settings, Some(CoordinatorError::Settings(_)))
}

/// The error with its causes, each told once: some errors already name their cause.
fn told_once(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .fold(String::new(), |told, cause| {
            if told.contains(&cause) {
                told
            } else if told.is_empty() {
                cause
            } else {
                format!("{told}: {cause}")
            }
        })
}

/// What clap has to say: help and version are answers, the rest are usage errors.
pub fn report_clap(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() {
        ExitCode::from(USAGE)
    } else {
        ExitCode::SUCCESS
    }
}
