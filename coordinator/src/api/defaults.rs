//! Sampling where a request is silent: what the checkpoint's `generation_config.json` says.

use secondwind_model::config::GenerationDefaults;

/// Sampling parameters of a request that sets none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0, greedy, unless the file says `do_sample`.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub typical_p: f32,
    /// 1 is off. As with `transformers`, greedy answers are penalised too.
    pub repetition_penalty: f32,
}

impl SamplingDefaults {
    /// From the file, with a warning for each value that is not applied. As with `transformers`, the
    /// file's `top_k`, `top_p`, `min_p` and `typical_p` hold also when only the request asks for sampling.
    pub fn new(file: &GenerationDefaults) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let mut checked = |name: &str, value: Option<f32>, legal: fn(f32) -> bool| {
            let value = value?;
            if legal(value) {
                return Some(value);
            }
            warnings.push(format!(
                "generation_config.json: {name} = {value} is out of range and not applied"
            ));
            None
        };
        let temperature = checked("temperature", file.temperature, is_temperature);
        let top_p = checked("top_p", file.top_p, is_top_p);
        let min_p = checked("min_p", file.min_p, is_min_p);
        let typical_p = checked("typical_p", file.typical_p, is_typical_p);
        let repetition_penalty = checked(
            "repetition_penalty",
            file.repetition_penalty,
            is_repetition_penalty,
        );
        let temperature = match file.do_sample {
            Some(true) => temperature.unwrap_or(1.0),
            Some(false) | None => 0.0,
        };
        let defaults = Self {
            temperature,
            top_k: file.top_k.unwrap_or(0),
            top_p: top_p.unwrap_or(1.0),
            min_p: min_p.unwrap_or(0.0),
            typical_p: typical_p.unwrap_or(1.0),
            repetition_penalty: repetition_penalty.unwrap_or(1.0),
        };
        (defaults, warnings)
    }
}

/// Highest temperature that is taken.
pub(super) const MAX_TEMPERATURE: f32 = 100.0;

/// Least repetition penalty that is taken: below, dividing by it makes any order of logits arbitrary.
pub(super) const MIN_REPETITION_PENALTY: f32 = 0.01;
/// Highest repetition penalty that is taken.
pub(super) const MAX_REPETITION_PENALTY: f32 = 100.0;

pub(super) fn is_temperature(value: f32) -> bool {
    (0.0..=MAX_TEMPERATURE).contains(&value)
}

pub(super) fn is_top_p(value: f32) -> bool {
    value > 0.0 && value <= 1.0
}

pub(super) fn is_typical_p(value: f32) -> bool {
    value > 0.0 && value <= 1.0
}

pub(super) fn is_repetition_penalty(value: f32) -> bool {
    (MIN_REPETITION_PENALTY..=MAX_REPETITION_PENALTY).contains(&value)
}

pub(super) fn is_min_p(value: f32) -> bool {
    (0.0..=1.0).contains(&value)
}
