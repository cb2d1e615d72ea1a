//! Log lines go to standard error, as text or JSON.

use anyhow::{Result, anyhow};
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::Config;

/// Starts logging as `[log]` says. Once per process.
pub fn start(config: &Config) -> Result<()> {
    let level = config.text("log.level").unwrap_or_else(|| "info".into());
    let filter = EnvFilter::try_new(&level)?;
    let subscriber = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match config.text("log.format").as_deref() {
        Some("json") => subscriber.json().try_init(),
        _ => subscriber
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
    };
    started.map_err(|error| anyhow!("cannot start logging: {error}"))
}
