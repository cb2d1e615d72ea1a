//! Refuses settings, capabilities and plans that make no sense, by name.

use std::ops::Range;

use super::shape::{attention, channels};
use super::{ModelShape, PlanError, PlanSettings, ShardPlan};
use crate::capabilities::Capabilities;

/// Checks everything that [`super::plan`] reads, cheapest first.
pub(super) fn input(
    shape: &ModelShape,
    settings: &PlanSettings,
    workers: &[Capabilities],
) -> Result<(), PlanError> {
    check_settings(shape, settings, workers.len())?;
    workers
        .iter()
        .enumerate()
        .try_for_each(|(rank, worker)| capabilities(rank, worker))
}

/// Checks what can be known before any worker is: `settings` for a group of `world` ranks.
///
/// # Errors
/// A world without ranks or with more of them than query heads, settings out of range, a context that the
/// model does not reach, or a forced split that fits no such world.
pub fn check_settings(
    shape: &ModelShape,
    settings: &PlanSettings,
    world: usize,
) -> Result<(), PlanError> {
    if world == 0 {
        return Err(PlanError::NoWorkers);
    }
    shape.check()?;
    let (largest, axis, units) = shape.largest_world();
    if world > largest {
        return Err(PlanError::WorldTooLarge {
            world,
            largest,
            axis,
            units,
        });
    }
    sizes(settings)?;
    let limit = shape.context_limit();
    if settings.max_context_tokens > limit {
        return Err(PlanError::ContextTooLong {
            max_context_tokens: settings.max_context_tokens,
            limit,
        });
    }
    match &settings.forced_split {
        Some(shares) => split(shares, world),
        None => Ok(()),
    }
}

fn sizes(settings: &PlanSettings) -> Result<(), PlanError> {
    let limits = [
        ("max_context_tokens", settings.max_context_tokens, 1 << 24),
        ("max_sequences", settings.max_sequences, 1 << 16),
        ("max_step_tokens", settings.max_step_tokens, 1 << 20),
        ("max_logit_rows", settings.max_logit_rows, 1 << 20),
        ("block_tokens", settings.block_tokens, 1 << 12),
    ];
    for (field, value, most) in limits {
        if !(1..=most).contains(&value) {
            return Err(PlanError::BadSetting {
                field,
                value,
                least: 1,
                most,
            });
        }
    }
    Ok(())
}

fn split(shares: &[f64], world: usize) -> Result<(), PlanError> {
    let bad = |why: String| {
        Err(PlanError::BadSplit {
            split: shares.to_vec(),
            why,
        })
    };
    if shares.len() != world {
        return bad(format!("{} shares for {world} workers", shares.len()));
    }
    if let Some(share) = shares
        .iter()
        .find(|share| !share.is_finite() || **share <= 0.0)
    {
        return bad(format!("{share} is not a positive number"));
    }
    if !shares.iter().sum::<f64>().is_finite() {
        return bad("the shares are too large to add up".to_owned());
    }
    Ok(())
}

fn capabilities(rank: usize, worker: &Capabilities) -> Result<(), PlanError> {
    let bad = |field: String, value: String, why: &'static str| {
        Err(PlanError::BadCapability {
            rank,
            device: worker.device.clone(),
            field,
            value,
            why,
        })
    };
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let not_negative = |value: f64| value.is_finite() && value >= 0.0;
    if !positive(worker.read_bytes_per_second) {
        let value = worker.read_bytes_per_second.to_string();
        return bad(
            "read_bytes_per_second".to_owned(),
            value,
            "is not a positive rate",
        );
    }
    let latencies = [
        (
            "all_reduce_latency_seconds",
            worker.all_reduce_latency_seconds,
        ),
        ("op_latency_seconds", worker.op_latency_seconds),
    ];
    for (field, value) in latencies {
        if !not_negative(value) {
            return bad(field.to_owned(), value.to_string(), "is not a latency");
        }
    }
    for entry in &worker.linears {
        let field = |name: &str| {
            format!(
                "{name} of {} ({}, {} rows)",
                entry.path, entry.weights, entry.max_rows
            )
        };
        let sizes = [
            ("max_rows", entry.max_rows, usize::MAX),
            ("column_multiple", entry.column_multiple, 1 << 16),
            ("row_multiple", entry.row_multiple, 1 << 16),
        ];
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                return bad(field(name), value.to_string(), "is zero or absurd");
            }
        }
        if !entry.scale_rows.is_multiple_of(4) || entry.scale_rows > 1 << 16 {
            return bad(
                field("scale_rows"),
                entry.scale_rows.to_string(),
                "is no multiple of 4, or absurd",
            );
        }
        if !positive(entry.bytes_per_weight) || entry.bytes_per_weight > 64.0 {
            return bad(
                field("bytes_per_weight"),
                entry.bytes_per_weight.to_string(),
                "is not a size",
            );
        }
        if !positive(entry.seconds_per_byte) {
            return bad(
                field("seconds_per_byte"),
                entry.seconds_per_byte.to_string(),
                "is not a time",
            );
        }
        let rest = [
            ("bytes_per_scale", entry.bytes_per_scale),
            ("scratch_bytes_per_row", entry.scratch_bytes_per_row),
            ("scratch_bytes", entry.scratch_bytes),
        ];
        for (name, value) in rest {
            if !not_negative(value) {
                return bad(field(name), value.to_string(), "is not a size");
            }
        }
        let first = worker
            .linears
            .iter()
            .find(|other| other.weights == entry.weights);
        if first.is_some_and(|first| first.layout() != entry.layout()) {
            let value = format!("{:?}", entry.layout());
            return bad(
                field("layout"),
                value,
                "differs between row buckets, though weights are stored once",
            );
        }
    }
    Ok(())
}

impl ShardPlan {
    /// Checks that this plan is one of `shape`: every axis of every layer is tiled by one range per
    /// rank, and the group can hold at least one context. A worker calls it on a plan from the wire.
    ///
    /// # Errors
    /// [`PlanError::BadShape`] naming the axis, or [`PlanError::BadSetting`].
    pub fn check(&self, shape: &ModelShape) -> Result<(), PlanError> {
        let bad = |module: String, why: String| Err(PlanError::BadShape { module, why });
        shape.check()?;
        sizes(&self.settings)?;
        let world = self.ranks.len();
        let layers = shape.config.layers.len();
        if world == 0 {
            return Err(PlanError::NoWorkers);
        }
        if self.layers.len() != layers {
            return bad(
                "layers".to_owned(),
                format!("the plan has {}, the model {layers}", self.layers.len()),
            );
        }
        if self.layer_ranges != vec![0..layers; world] {
            return bad(
                "layer_ranges".to_owned(),
                "not all ranks run all layers".to_owned(),
            );
        }
        let least = super::least_blocks(&self.settings);
        if self.kv_blocks < least {
            return bad(
                "kv_blocks".to_owned(),
                format!("{} do not hold one context of {least}", self.kv_blocks),
            );
        }
        if !tiles(&self.vocab, world, shape.config.vocab_size, 1) {
            return bad("vocab".to_owned(), "its ranges do not tile it".to_owned());
        }
        for (index, (cut, layer)) in self.layers.iter().zip(&shape.config.layers).enumerate() {
            if !tiles(
                &cut.query_heads,
                world,
                attention(&layer.attention).query_heads,
                1,
            ) {
                return bad(
                    format!("query heads of layer {index}"),
                    "its ranges do not tile it".to_owned(),
                );
            }
            if !tiles(&cut.ffn, world, channels(&layer.mlp), 0) {
                return bad(
                    format!("channels of layer {index}"),
                    "its ranges do not tile it".to_owned(),
                );
            }
        }
        Ok(())
    }
}

/// One range per rank, in order, without gap or overlap, from 0 to `units`, each of at least `least`.
fn tiles(ranges: &[Range<usize>], world: usize, units: usize, least: usize) -> bool {
    let mut end = 0;
    let joined = ranges.iter().all(|range| {
        let joins =
            range.start == end && range.end >= range.start && range.end - range.start >= least;
        end = range.end;
        joins
    });
    joined && ranges.len() == world && end == units
}
