//! `secondwind key`: keys for clients of a coordinator.

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use secondwind_coordinator::{KeyHash, Role, draw_key, is_key_name};

use crate::{cli::Common, exit::UsageError, output};

/// Flags of `key`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Draw a key, and print it with the table for the configuration, which has only its hash
    New(NewFlags),
}

#[derive(Args, Debug)]
struct NewFlags {
    /// Names its user in logs and metrics: letters, digits and `-_.@`
    name: String,
    /// What it is good for: `user` asks the model, `admin` also reads `/metrics`
    #[arg(long, value_name = "ROLE", default_value = "user")]
    role: RoleName,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    User,
    Admin,
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    let What::New(NewFlags { name, role }) = flags.what;
    if !is_key_name(&name) {
        let message = format!("NAME {name:?} is not 1 to 64 letters, digits and `-_.@`");
        return Err(UsageError::one(message).into());
    }
    let role = match role {
        RoleName::User => Role::User,
        RoleName::Admin => Role::Admin,
    };
    let key = draw_key().context("the system gives no random numbers")?;
    output::note("the key is the first line, and shown this once; the coordinator gets the table");
    output::print_line(&format!(
        "{key}\n\n[[api_key]]\nname = \"{name}\"\nhash = \"{}\"\nrole = \"{}\"",
        KeyHash::of(&key),
        role.name()
    ))
}
