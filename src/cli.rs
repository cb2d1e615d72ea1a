//! The command line as a whole: subcommands, the flags of all of them, and how each is started.

use std::{future::Future, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::{
    bench, chat,
    config::{self, Config, Layer, Origin, Request, Section},
    coordinator, demo, doctor, generate, kernels, key, logging, plan, profile, worker,
};

/// Serves Qwen GPTQ models across a rack of old NVIDIA cards.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every subcommand.
#[derive(Args, Debug)]
pub struct Common {
    /// Configuration file [default: /etc/secondwind/config.toml if it exists, for coordinator and worker]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// `error`, `warn`, `info`, `debug`, `trace` or RUST_LOG directives
    #[arg(long, value_name = "LEVEL", global = true)]
    log_level: Option<String>,
    /// `text` or `json`
    #[arg(long, value_name = "WORD", global = true)]
    log_format: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a coordinator and CPU workers in this process and answer a prompt
    Demo(demo::Flags),
    /// Serve a model: own requests, tokens, scheduling and the plan
    Coordinator(coordinator::Flags),
    /// Join a coordinator with one device
    Worker(worker::Flags),
    /// Get one answer from a running coordinator
    Generate(generate::Flags),
    /// Talk to a running coordinator
    Chat(chat::Flags),
    /// Show how a model would be split over cards that need not be there
    Plan(plan::Flags),
    /// Say what this host has and lacks, and which paths its cards take
    Doctor(doctor::Flags),
    /// Measure this machine
    Bench(bench::Flags),
    /// Show where a model's step spends its time, and memory planned against measured
    Profile(profile::Flags),
    /// Make keys for a coordinator's clients
    Key(key::Flags),
    /// Compile the CUDA kernels, and see what they take
    Kernels(kernels::Flags),
}

impl Cli {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let common = self.common;
        match self.command {
            Command::Demo(flags) => block_on(demo::run(flags, common)),
            Command::Coordinator(flags) => block_on(coordinator::run(flags, common)),
            Command::Worker(flags) => block_on(worker::run(flags, common)),
            Command::Generate(flags) => block_on(generate::run(flags, common)),
            Command::Chat(flags) => block_on(chat::run(flags, common)),
            Command::Plan(flags) => plan::run(flags, common),
            Command::Doctor(flags) => doctor::run(flags, common),
            Command::Bench(flags) => bench::run(flags, common),
            Command::Profile(flags) => profile::run(flags, common),
            Command::Key(flags) => key::run(flags, common),
            Command::Kernels(flags) => kernels::run(flags, common),
        }
    }
}

impl Common {
    /// Loads the configuration of a daemon, which reads the default file too.
    pub fn load_daemon(self, section: &'static [Section], flags: Layer) -> Result<Config> {
        self.load(true, section, Layer::new("command"), flags)
    }

    /// Loads the configuration of a one-shot command, which is quiet unless told otherwise.
    pub fn load_quiet(
        self,
        sections: &'static [Section],
        mut defaults: Layer,
        flags: Layer,
    ) -> Result<Config> {
        defaults.set("log", "level", "warn", Origin::Default);
        self.load(false, sections, defaults, flags)
    }

    /// Starts logging for a command that needs nothing else of the configuration.
    pub fn start_logging(self) -> Result<()> {
        logging::start(&self.load_quiet(&[], Layer::new("command"), Layer::new("flags"))?)
    }

    fn load(
        self,
        daemon: bool,
        sections: &'static [Section],
        defaults: Layer,
        mut flags: Layer,
    ) -> Result<Config> {
        for (key, value) in [("level", self.log_level), ("format", self.log_format)] {
            if let Some(value) = value {
                flags.set("log", key, value, Origin::Flag(format!("--log-{key}")));
            }
        }
        config::load(Request {
            file: self.config,
            daemon,
            sections,
            defaults,
            flags,
        })
    }
}

/// Runs `work` on a runtime of its own. A thread that is still blocked at the end, such as one that reads
/// a terminal, is left behind.
pub fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome
}
