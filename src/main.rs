//! `secondwind`: serves Qwen GPTQ models across a rack of old NVIDIA cards, tensor-parallel and uneven.
//!
//! One binary: the two daemons (`coordinator`, `worker`), their clients (`generate`, `chat`), and what
//! helps to decide (`demo`, `plan`, `doctor`, `bench`, `profile`). Each subcommand is a file.
#![forbid(unsafe_code)]

mod bench;
mod card_paths;
mod chat;
mod cli;
mod client;
mod config;
mod coordinator;
mod demo;
mod doctor;
mod exit;
mod generate;
mod kernels;
mod key;
mod local_cluster;
mod logging;
mod open_files;
mod output;
mod plan;
mod profile;
mod ranks;
mod signals;
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cli::Cli::try_parse() {
        Ok(cli) => exit::report(cli.run()),
        Err(error) => exit::report_clap(&error),
    }
}
