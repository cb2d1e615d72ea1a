//! Every configuration key, once: its kind, default and help. The check, the defaults, the flags of
//! `coordinator` and `worker`, their `--help` and the README's table all read this.

use super::kinds::Kind;

/// A table of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// `[coordinator]`: requests, scheduling, the plan.
    Coordinator,
    /// `[worker]`: one device and its shard.
    Worker,
    /// `[log]`: what is logged, and how.
    Log,
}

impl Section {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Worker, Self::Log];

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Log => "log",
        }
    }

    /// Its keys.
    pub fn keys(self) -> impl Iterator<Item = &'static Key> {
        KEYS.iter().filter(move |key| key.section == self)
    }
}

/// One key.
#[derive(Debug)]
pub struct Key {
    /// The table that it stands in.
    pub section: Section,
    /// Its name in that table.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Its value when nobody sets it, as one would write it on the command line.
    pub default: Option<&'static str>,
    /// One sentence.
    pub help: &'static str,
}

impl Key {
    /// `section.name`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section.name(), self.name)
    }

    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        format!("SECONDWIND_{}_{}", self.section.name(), self.name).to_ascii_uppercase()
    }

    /// The flag that sets it, without the dashes.
    pub fn flag(&self) -> String {
        let name = self.name.replace('_', "-");
        match self.section {
            Log => format!("log-{name}"),
            _ => name,
        }
    }
}

/// The key of this path, such as `coordinator.listen`.
pub fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter()
        .find(|key| key.section.name() == section && key.name == name)
}

const fn key(
    section: Section,
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
) -> Key {
    Key {
        section,
        name,
        kind,
        default,
        help,
    }
}

use Section::{Coordinator, Log, Worker};

/// The schema.
#[rustfmt::skip]
pub static KEYS: &[Key] = &[
    key(Coordinator, "model", Kind::Model, None, "Checkpoint folder, or `builtin` for the embedded model"),
    key(Coordinator, "served_name", Kind::Text, None, "What clients call the model [unset: as `model`]"),
    key(Coordinator, "world_size", Kind::Integer { min: 1, max: 1024 }, None, "Number of workers that form the group"),
    key(Coordinator, "listen", Kind::Listen, Some("127.0.0.1:7700"), "Address for clients"),
    key(Coordinator, "cluster_listen", Kind::Listen, Some("127.0.0.1:7701"), "Address that workers dial"),
    key(Coordinator, "insecure", Kind::Bool, Some("false"), "Listen beyond loopback although nothing is encrypted or authenticated"),
    key(Coordinator, "api_keys_file", Kind::Text, None, "File of further `[[api_key]]` tables, such as a systemd credential"),
    key(Coordinator, "max_connections", Kind::Integer { min: 1, max: 1 << 20 }, Some("4096"), "Connections of clients at a time; further ones are told so and closed"),
    key(Coordinator, "idle_timeout", Kind::Duration, Some("10m"), "A client's connection on which nothing is asked for so long is closed"),
    key(Coordinator, "log_prompts", Kind::Bool, Some("false"), "Write what clients ask into the log, word for word"),
    key(Coordinator, "otlp_endpoint", Kind::HostPort, None, "Collector that gets a span of every request, by OTLP over gRPC without TLS"),
    key(Coordinator, "max_context_tokens", Kind::Integer { min: 1, max: 1 << 24 }, None, "Longest sequence, prompt and output together [unset: the checkpoint's own, up to 4096]"),
    key(Coordinator, "max_sequences", Kind::Integer { min: 1, max: 4096 }, Some("8"), "Sequences that may run at once"),
    key(Coordinator, "max_step_tokens", Kind::Integer { min: 1, max: 65536 }, Some("512"), "Tokens of one step, all sequences together"),
    key(Coordinator, "max_prefill_tokens", Kind::Integer { min: 1, max: 65536 }, Some("24"), "Tokens of a step, while others are answered, for each of up to four prompts not computed yet: fewer keep the time between tokens even, more answer new requests sooner"),
    key(Coordinator, "kv_dtype", Kind::Choice(&["f32", "f16", "int8"]), Some("f32"), "Storage type of the KV cache; `int8` keeps an f32 scale per token and head"),
    key(Coordinator, "precision", Kind::Choice(&["fast", "exact"]), Some("fast"), "`fast` lets cards round activations to 8 bits; cpu workers are always exact"),
    key(Coordinator, "lm_head", Kind::Choice(&["fp16", "int8"]), Some("fp16"), "`int8` requantises an unquantised lm_head at load, which halves what it takes and reads; `fp16` holds it as stored"),
    key(Coordinator, "memory_reserve", Kind::Size, Some("256MiB"), "Memory of each device that the plan leaves free"),
    key(Coordinator, "split", Kind::Split, None, "Relative shares of the ranks, such as 3:1 [unset: the planner's own]"),
    key(Coordinator, "max_waiting", Kind::Integer { min: 1, max: 1 << 20 }, Some("256"), "Requests that may wait before further ones are refused"),
    key(Coordinator, "max_waiting_tokens", Kind::Integer { min: 1, max: 1 << 32 }, Some("262144"), "Tokens that all waiting requests may have together; one that would wait alone is always taken"),
    key(Coordinator, "prefix_cache", Kind::Choice(&["on", "off"]), Some("on"), "Keep the KV blocks of past prompts and answers while nothing else needs them, and share them with requests that begin alike"),
    key(Coordinator, "max_drafts", Kind::Integer { min: 0, max: 32 }, Some("4"), "Tokens that a step guesses, at the most, of a text that repeats what came before, in places that no other sequence needs; 0 guesses none"),
    key(Coordinator, "draft_cost", Kind::Integer { min: 0, max: 10_000 }, None, "What each guessed token costs, in percent of a step of one row; dear ones are guessed only where they are almost sure to be right [unset: as the workers measured it]"),
    key(Coordinator, "collective", Kind::Choice(&["auto", "nccl", "grpc"]), Some("auto"), "How ranks exchange partial sums; `auto` takes NCCL if every rank has the same"),
    key(Coordinator, "reasoning", Kind::Choice(&["split", "keep"]), Some("split"), "Whether answers of chats have what stands between <think> and </think> apart (`reasoning_content` over HTTP, `reasoning` over gRPC), or all in the text"),
    key(Coordinator, "strict", Kind::Bool, Some("false"), "Refuse HTTP requests with fields that nobody knows, instead of ignoring those"),
    key(Coordinator, "step_timeout", Kind::Duration, Some("60s"), "A step that takes longer ends the group, which then forms again"),
    key(Coordinator, "stop_timeout", Kind::Duration, Some("30s"), "Time to stop cleanly after SIGTERM or SIGINT"),
    key(Worker, "coordinator", Kind::HostPort, Some("127.0.0.1:7701"), "The coordinator's cluster address"),
    key(Worker, "model", Kind::Model, None, "Checkpoint folder, or `builtin`; the same checkpoint as the coordinator's"),
    key(Worker, "device", Kind::Device, Some("cpu"), "Device that computes"),
    key(Worker, "arch_override", Kind::Choice(&["sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]), None, "Run the code of an older architecture on the card"),
    key(Worker, "kernel_pack", Kind::Text, None, "Kernel pack of `secondwind kernels build` [unset: the installed one, else compiled at first start]"),
    key(Worker, "nvrtc_library", Kind::Text, None, "libnvrtc.so to compile with [unset: libnvrtc.so.12 as the linker finds it]"),
    key(Worker, "nccl_library", Kind::Text, None, "libnccl.so to sum with [unset: libnccl.so.2 as the linker finds it]"),
    key(Worker, "nccl_interface", Kind::Text, None, "Network interface of NCCL's sockets [unset: NCCL_SOCKET_IFNAME, else the one that has peer_listen's address]"),
    key(Worker, "cache_directory", Kind::Text, None, "Where compiled kernels are kept [unset: CACHE_DIRECTORY, else XDG_CACHE_HOME or ~/.cache, in secondwind]"),
    key(Worker, "threads", Kind::Integer { min: 1, max: 1024 }, None, "CPU threads [unset: one per core]"),
    key(Worker, "memory", Kind::Size, None, "Memory that a plan may use [unset: measured]"),
    key(Worker, "peer_listen", Kind::Listen, Some("127.0.0.1:0"), "Address at which other workers reach this one; port 0 takes a free one"),
    key(Worker, "name", Kind::Text, None, "Name in plans and logs [unset: host name and process id]"),
    key(Worker, "linear_path", Kind::LinearPath, None, "Force this kernel path for linear layers"),
    key(Worker, "attention_path", Kind::AttentionPath, None, "Force this kernel path for attention"),
    key(Worker, "insecure", Kind::Bool, Some("false"), "Listen beyond loopback although nothing is encrypted or authenticated"),
    key(Worker, "stop_timeout", Kind::Duration, Some("30s"), "Time to stop cleanly after SIGTERM or SIGINT"),
    key(Log, "level", Kind::LogLevel, Some("info"), "`error`, `warn`, `info`, `debug`, `trace` or RUST_LOG directives; `warn` for one-shot commands"),
    key(Log, "format", Kind::Choice(&["text", "json"]), Some("text"), "Form of log lines on stderr"),
];

/// The schema as the README's table.
#[cfg(test)]
fn markdown() -> String {
    let mut table = String::from("| key | takes | default | what it is |\n|---|---|---|---|\n");
    for key in KEYS {
        let default = key
            .default
            .map_or("-".to_owned(), |default| format!("`{default}`"));
        table += &format!(
            "| `{}` | {} | {default} | {} |\n",
            key.path(),
            key.kind.describe(),
            key.help
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::kinds::Written;

    #[test]
    fn every_default_satisfies_its_own_kind() {
        for key in KEYS {
            if let Some(default) = key.default {
                key.kind
                    .check(&Written::Text(default))
                    .unwrap_or_else(|why| panic!("{}: {why}", key.path()));
            }
        }
    }

    #[test]
    fn the_readme_holds_the_schema() {
        let readme = include_str!("../../README.md");
        assert!(
            readme.contains(&markdown()),
            "README.md's table of keys should be:\n\n{}",
            markdown()
        );
    }
}
