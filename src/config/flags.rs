//! Clap arguments made of the schema's keys, so that flags and file cannot disagree. Values stay text
//! here: the check of the merged tree judges them together with all others.

use std::marker::PhantomData;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::{
    kinds::Kind,
    layers::{Layer, Origin},
    schema::{Key, Section},
};

/// A choice of keys that a command takes as flags.
pub trait KeySet: std::fmt::Debug {
    /// The choice.
    fn keys() -> impl Iterator<Item = &'static Key>;
}

/// All of `[coordinator]`.
#[derive(Debug)]
pub struct CoordinatorKeys;

impl KeySet for CoordinatorKeys {
    fn keys() -> impl Iterator<Item = &'static Key> {
        Section::Coordinator.keys()
    }
}

/// All of `[worker]`.
#[derive(Debug)]
pub struct WorkerKeys;

impl KeySet for WorkerKeys {
    fn keys() -> impl Iterator<Item = &'static Key> {
        Section::Worker.keys()
    }
}

/// Those of `[coordinator]` that a plan depends on.
#[derive(Debug)]
pub struct PlanningKeys;

impl KeySet for PlanningKeys {
    fn keys() -> impl Iterator<Item = &'static Key> {
        const NAMES: [&str; 9] = [
            "model",
            "split",
            "max_context_tokens",
            "max_sequences",
            "max_step_tokens",
            "kv_dtype",
            "precision",
            "lm_head",
            "memory_reserve",
        ];
        Section::Coordinator
            .keys()
            .filter(|key| NAMES.contains(&key.name))
    }
}

/// The flags of a choice of keys.
#[derive(Debug)]
pub struct KeyFlags<S: KeySet> {
    /// What was typed.
    pub layer: Layer,
    keys: PhantomData<S>,
}

impl<S: KeySet> Args for KeyFlags<S> {
    fn augment_args(command: Command) -> Command {
        command.args(S::keys().map(argument))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: KeySet> FromArgMatches for KeyFlags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut layer = Layer::new("flags");
        for key in S::keys() {
            let origin = || Origin::Flag(format!("--{}", key.flag()));
            if key.kind == Kind::Bool {
                if matches.get_flag(key.name) {
                    layer.set(key.section.name(), key.name, "true", origin());
                }
            } else if let Some(text) = matches.get_one::<String>(key.name) {
                layer.set(key.section.name(), key.name, text, origin());
            }
        }
        Ok(Self {
            layer,
            keys: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn argument(key: &Key) -> Arg {
    let argument = Arg::new(key.name).long(key.flag());
    if key.kind == Kind::Bool {
        return argument.help(key.help).action(ArgAction::SetTrue);
    }
    let help = match key.default {
        Some(default) => format!("{} [default: {default}]", key.help),
        None => key.help.to_owned(),
    };
    argument
        .help(help)
        .value_name(value_name(key.kind))
        .allow_negative_numbers(true)
}

fn value_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Integer { .. } => "N",
        Kind::Bool => "BOOL",
        Kind::Text | Kind::LinearPath | Kind::AttentionPath => "NAME",
        Kind::Model => "DIR",
        Kind::Device => "DEVICE",
        Kind::Size => "SIZE",
        Kind::Duration => "TIME",
        Kind::Choice(_) => "WORD",
        Kind::Listen => "ADDRESS",
        Kind::HostPort => "HOST:PORT",
        Kind::Split => "A:B:...",
        Kind::LogLevel => "LEVEL",
    }
}
