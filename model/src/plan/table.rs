//! The plan as plain text, at most 100 columns wide.

use std::fmt::Write;

use super::shape::channels;
use super::{ModelShape, ShardPlan};

/// Characters of a device's name that are shown.
const DEVICE_WIDTH: usize = 22;

/// Renders who holds what, memory by purpose in GiB, and what is expected of a decode step.
///
/// Ranges are those of the first layer; a line says so when other layers are cut otherwise.
///
/// # Panics
/// When the plan is not one of this model ([`ShardPlan::check`]).
pub fn table(plan: &ShardPlan, shape: &ModelShape) -> String {
    let mut text = String::new();
    shares(&mut text, plan, shape);
    memory(&mut text, plan);
    summary(&mut text, plan, shape);
    text
}

fn shares(text: &mut String, plan: &ShardPlan, shape: &ModelShape) {
    let layer = &plan.layers[0];
    let width = channels(&shape.config.layers[0].mlp) as f64;
    line(
        text,
        format_args!(
            "{:>4}  {:<DEVICE_WIDTH$} {:>6}  {:>9} {:>8} {:>13} {:>15} {:>10}",
            "rank", "device", "share", "q heads", "kv heads", "ffn", "vocabulary", "step ms"
        ),
    );
    for (rank, taken) in plan.ranks.iter().enumerate() {
        let ffn = &layer.ffn[rank];
        line(
            text,
            format_args!(
                "{rank:>4}  {:<DEVICE_WIDTH$} {:>5.1}%  {:>9} {:>8} {:>13} {:>15} {:>10.2}",
                shortened(&taken.device, DEVICE_WIDTH),
                100.0 * ffn.len() as f64 / width,
                span(&layer.query_heads[rank]),
                span(&plan.kv_heads(&shape.config, 0, rank)),
                span(ffn),
                span(&plan.vocab[rank]),
                1e3 * taken.decode_step_seconds,
            ),
        );
    }
    if plan.layers.iter().any(|other| other != layer) {
        line(
            text,
            format_args!("      (heads and ffn of layer 0; other layers are cut otherwise)"),
        );
    }
}

fn memory(text: &mut String, plan: &ShardPlan) {
    line(
        text,
        format_args!(
            "\n{:>4} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
            "rank",
            "weights",
            "padding",
            "scales",
            "kv cache",
            "scratch",
            "buffers",
            "graphs",
            "nccl",
            "total",
            "usable"
        ),
    );
    for (rank, taken) in plan.ranks.iter().enumerate() {
        let mut row = format!("{rank:>4}");
        let purposes = taken.memory.purposes().map(|(_, bytes)| bytes);
        for bytes in purposes
            .into_iter()
            .chain([taken.memory.total(), taken.usable_bytes])
        {
            // Writing to a string does not fail.
            let _ = write!(row, " {:>8.3}", gib(bytes));
        }
        line(text, format_args!("{row}  GiB"));
    }
}

fn summary(text: &mut String, plan: &ShardPlan, shape: &ModelShape) {
    let settings = &plan.settings;
    let slowest = plan
        .ranks
        .iter()
        .map(|rank| rank.decode_step_seconds)
        .fold(0.0, f64::max);
    let tokens = plan
        .kv_blocks
        .saturating_sub(1)
        .saturating_mul(settings.block_tokens);
    let kv = settings.kv_dtype.name();
    line(
        text,
        format_args!(
            "\n{} layers on {} rank{}; kv cache ({kv}) of {} blocks of {} tokens = {tokens} tokens",
            shape.config.layers.len(),
            plan.world_size(),
            if plan.world_size() == 1 { "" } else { "s" },
            plan.kv_blocks,
            settings.block_tokens,
        ),
    );
    line(
        text,
        format_args!(
            "= {:.1} contexts of {} tokens ({} wanted); slowest rank {:.2} ms per token at one row",
            tokens as f64 / settings.max_context_tokens as f64,
            settings.max_context_tokens,
            settings.max_sequences,
            1e3 * slowest,
        ),
    );
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{arguments}");
}

fn span(range: &std::ops::Range<usize>) -> String {
    format!("{}..{}", range.start, range.end)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The first `width` characters, the last of them `~` when there are more.
fn shortened(name: &str, width: usize) -> String {
    if name.chars().count() <= width {
        return name.to_owned();
    }
    name.chars().take(width - 1).chain(['~']).collect()
}
