//! Rotary embeddings: reading the two spellings of `config.json`, and the frequencies.
//!
//! Formulas and defaults are those of `modeling_rope_utils.py` in transformers 5.23.

use serde_json::Value;

use super::fields::Fields;
use super::{RopeConfig, RopeScaling};
use crate::error::ConfigError;

/// Base when a file names none (`RotaryEmbeddingConfigMixin.default_theta`).
const DEFAULT_THETA: f64 = 10_000.0;
/// Largest base or stretch that is believed.
const LARGEST: f64 = 1e15;

impl RopeConfig {
    /// Inverse frequencies (`head_dim / 2` of them, radians per position) and the factor that multiplies
    /// both cos and sin.
    ///
    /// Channel `i` of a head turns with channel `i + head_dim / 2` by `position * inv_freq[i]`. To match
    /// transformers, multiply in f32 before taking cos and sin.
    ///
    /// `sequence_tokens` matters for [`RopeScaling::Dynamic`] alone, whose base grows with the sequence.
    /// Keys that are cached keep their rotation, so a token at position p is rotated with the base of
    /// `max(original_max_position_embeddings, p + 1)` tokens: what transformers computes when it
    /// generates with its cache, and independent of how a prompt is cut into chunks. (One transformers
    /// forward pass over a whole long sequence rotates every token with the base of the last.)
    pub fn inv_freq(&self, head_dim: usize, sequence_tokens: usize) -> (Vec<f32>, f32) {
        let dim = head_dim as f64;
        let pairs = head_dim / 2;
        let frequencies = |base: f64| (0..pairs).map(move |i| base.powf(-(2.0 * i as f64) / dim));
        match self.scaling {
            RopeScaling::Default => (frequencies(self.theta).map(|f| f as f32).collect(), 1.0),
            RopeScaling::Linear { factor } => (
                frequencies(self.theta)
                    .map(|f| (f / factor) as f32)
                    .collect(),
                1.0,
            ),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings,
            } => {
                let original = original_max_position_embeddings as f64;
                let length = original.max(sequence_tokens as f64);
                let growth = factor * length / original - (factor - 1.0);
                let base = self.theta * growth.powf(dim / (dim - 2.0));
                (frequencies(base).map(|f| f as f32).collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                let original = original_max_position_embeddings as f64;
                let channel = |rotations: f64| {
                    dim * (original / (rotations * std::f64::consts::TAU)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (channel(beta_fast), channel(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(i, extrapolated): (usize, f64)| {
                    let interpolation = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    let blended = extrapolated / factor * interpolation
                        + extrapolated * (1.0 - interpolation);
                    blended as f32
                };
                let inv_freq = frequencies(self.theta).enumerate().map(blend).collect();
                (inv_freq, attention_factor as f32)
            }
        }
    }
}

/// Reads the rotary part of `config.json`: `rope_parameters` (2026) or `rope_theta` and `rope_scaling`.
pub(super) fn parse(
    config: &Fields<'_>,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<RopeConfig, ConfigError> {
    let older = config
        .object("rope_scaling")?
        .filter(|fields| !fields.map().is_empty());
    let newer = match config.object("rope_parameters")? {
        Some(fields) => Some(fields.object("full_attention")?.unwrap_or(fields)),
        None => None,
    };
    if let (Some(older), Some(newer)) = (&older, &newer)
        && older.map() != newer.map()
    {
        return Err(ConfigError::Disagree {
            field: "rope_parameters".to_owned(),
            first_file: format!("{} (rope_scaling)", config.file()),
            first: super::fields::shown(&Value::Object(older.map().clone())),
            second_file: format!("{} (rope_parameters)", config.file()),
            second: super::fields::shown(&Value::Object(newer.map().clone())),
        });
    }
    let parameters = older.or(newer);
    // A base of 1 or less has no wavelengths: YaRN divides by its logarithm.
    let theta = |fields: &Fields<'_>| fields.number("rope_theta", 1.000_001..=LARGEST);
    let theta = match parameters.as_ref().map(theta).transpose()?.flatten() {
        Some(inner) => inner,
        None => theta(config)?.unwrap_or(DEFAULT_THETA),
    };
    for fields in parameters.iter().chain([config]) {
        if let Some(factor) = fields.number("partial_rotary_factor", 0.0..=1.0)?
            && factor != 1.0
        {
            let found = Value::from(factor);
            return Err(fields.unsupported(
                "partial_rotary_factor",
                &found,
                "whole heads are rotated",
            ));
        }
    }
    let scaling = match &parameters {
        None => RopeScaling::Default,
        Some(fields) => scaling(config, fields, head_dim, max_position_embeddings)?,
    };
    Ok(RopeConfig { theta, scaling })
}

fn scaling(
    config: &Fields<'_>,
    fields: &Fields<'_>,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<RopeScaling, ConfigError> {
    let name_field = if fields.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let name = fields.text(name_field)?.unwrap_or("default");
    let factor = || {
        fields
            .number("factor", 1e-6..=LARGEST)?
            .ok_or_else(|| fields.missing("factor"))
    };
    match name {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" => {
            if head_dim <= 2 {
                return Err(config.invalid(
                    "head_dim",
                    &Value::from(head_dim),
                    "more than 2 with dynamic rope",
                ));
            }
            let at_least_one = fields.number("factor", 1.0..=LARGEST)?;
            Ok(RopeScaling::Dynamic {
                factor: at_least_one.ok_or_else(|| fields.missing("factor"))?,
                // transformers takes the model's own length and no other field here.
                original_max_position_embeddings: max_position_embeddings,
            })
        }
        "yarn" => yarn(config, fields, max_position_embeddings),
        other => Err(fields.unsupported(
            name_field,
            &Value::from(other),
            "default, linear, dynamic and yarn are computed",
        )),
    }
}

fn yarn(
    config: &Fields<'_>,
    fields: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<RopeScaling, ConfigError> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let original = match config.size(ORIGINAL, super::MOST_POSITIONS)? {
        Some(outer) => outer,
        None => fields
            .size(ORIGINAL, super::MOST_POSITIONS)?
            .unwrap_or(max_position_embeddings),
    };
    let factor = match fields.number("factor", 1e-6..=LARGEST)? {
        Some(factor) => factor,
        // An explicit null asks for the ratio of the lengths; an absent field is an error there too.
        None if fields.map().contains_key("factor") => {
            max_position_embeddings as f64 / original as f64
        }
        None => return Err(fields.missing("factor")),
    };
    let mscale = |scale: f64, mscale: f64| {
        if scale <= 1.0 {
            1.0
        } else {
            0.1 * mscale * scale.ln() + 1.0
        }
    };
    let positive = |field: &str| -> Result<Option<f64>, ConfigError> {
        Ok(fields
            .number(field, 0.0..=1e6)?
            .filter(|value| *value != 0.0))
    };
    let attention_factor = match fields.number("attention_factor", 0.0..=1e6)? {
        Some(explicit) => explicit,
        None => match (positive("mscale")?, positive("mscale_all_dim")?) {
            (Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast: positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: positive("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: fields.boolean("truncate")?.unwrap_or(true),
    })
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
