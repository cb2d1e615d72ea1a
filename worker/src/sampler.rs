//! Draws tokens from logits that are split over ranks. Pure.
//!
//! Each rank reduces a row of its vocabulary range to (max, sums of exponentials, its best
//! candidates). Rank 0 merges these and draws by inverting the cumulative distribution in order of
//! falling probability, so that top-k, top-p and min-p all keep a prefix, and a draw that lands inside
//! the candidates never needs the rest of the row.

use secondwind_model::step::{Sampling, TokenLogprobs};

/// A row of logits over one vocabulary range or, after [`merge`], over the whole vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Largest logit.
    pub max: f32,
    /// Sum of exp(logit - max).
    pub sum_exp: f64,
    /// Sum of exp((logit - max) / temperature); without meaning at temperature 0.
    pub sum_exp_at_temperature: f64,
    /// (token, logit), largest logit first, equal ones by token.
    pub candidates: Vec<(u32, f32)>,
}

/// What rank 0 makes of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Draw {
    /// The sampled token.
    Token(TokenLogprobs),
    /// The candidates do not cover what the filters keep: the row must be gathered whole.
    NeedsWholeRow,
}

/// Joins the ranks' parts of one row, in rank order.
///
/// `temperature` is the row's own; parts must not be empty.
pub fn merge(parts: &[Row], temperature: f32) -> Row {
    let max = parts
        .iter()
        .map(|part| part.max)
        .fold(f32::NEG_INFINITY, f32::max);
    let shift = |part: &Row| f64::from(part.max) - f64::from(max);
    let mut candidates: Vec<_> = parts
        .iter()
        .flat_map(|part| part.candidates.iter().copied())
        .collect();
    sort_candidates(&mut candidates);
    Row {
        max,
        sum_exp: parts
            .iter()
            .map(|part| part.sum_exp * shift(part).exp())
            .sum(),
        sum_exp_at_temperature: parts
            .iter()
            .map(|part| {
                let scale = if temperature > 0.0 {
                    f64::from(temperature)
                } else {
                    1.0
                };
                part.sum_exp_at_temperature * (shift(part) / scale).exp()
            })
            .sum(),
        candidates,
    }
}

/// Largest logit first, equal ones by token, which is the order every rank and every world agrees on.
pub fn sort_candidates(candidates: &mut [(u32, f32)]) {
    // Adding 0 makes -0 equal to 0.
    candidates.sort_unstable_by(|a, b| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
}

/// Draws the token at `position` of its sequence from a merged row. `covered` candidates are the best
/// of the whole vocabulary; beyond them the order of the rest is unknown. `vocab` is the number of
/// logits in the row.
pub fn draw(row: &Row, covered: usize, vocab: usize, sampling: &Sampling, position: usize) -> Draw {
    let candidates = &row.candidates[..covered.min(row.candidates.len())];
    let whole = candidates.len() == vocab;
    if sampling.temperature == 0.0 {
        return Draw::Token(report(row, candidates[0], sampling));
    }
    let temperature = f64::from(sampling.temperature);
    let weight = |logit: f32| ((f64::from(logit) - f64::from(row.max)) / temperature).exp();

    // Every filter keeps a prefix; `kept` is `None` while none of them has ended inside the candidates.
    let mut kept = whole.then_some(candidates.len());
    let mut total = row.sum_exp_at_temperature;
    let top_k = match sampling.top_k as usize {
        0 => vocab,
        k => k.min(vocab),
    };
    if top_k < vocab {
        if top_k > candidates.len() {
            return Draw::NeedsWholeRow;
        }
        kept = Some(top_k);
        total = candidates[..top_k]
            .iter()
            .map(|&(_, logit)| weight(logit))
            .sum();
    }
    let limit = kept.unwrap_or(candidates.len());
    let floor = f64::from(sampling.min_p);
    let mut mass = 0.0;
    for (index, &(_, logit)) in candidates[..limit].iter().enumerate() {
        let weight = weight(logit);
        if index > 0 && weight < floor {
            kept = Some(index);
            break;
        }
        mass += weight;
        if sampling.top_p < 1.0 && mass >= f64::from(sampling.top_p) * total {
            kept = Some(index + 1);
            break;
        }
    }
    let filtered = sampling.top_p < 1.0 || sampling.min_p > 0.0;
    let (limit, kept_mass) = match kept {
        Some(kept) => (kept, mass),
        None if filtered => return Draw::NeedsWholeRow,
        // Nothing is filtered: the whole row's mass is known though its tail is not.
        None => (candidates.len(), total),
    };
    let target = uniform(sampling.seed, position) * kept_mass;
    let mut cumulative = 0.0;
    for &(token, logit) in &candidates[..limit] {
        cumulative += weight(logit);
        if target < cumulative {
            return Draw::Token(report(row, (token, logit), sampling));
        }
    }
    if kept.is_none() {
        return Draw::NeedsWholeRow;
    }
    // Rounding left the target at the very end.
    Draw::Token(report(row, candidates[limit - 1], sampling))
}

/// Number of merged candidates that are certainly the best of the whole vocabulary: down to the
/// largest "worst candidate" of a rank that left some out.
pub fn covered(parts: &[Row], range_lengths: &[usize], merged: &Row) -> usize {
    let bound = parts
        .iter()
        .zip(range_lengths)
        .filter(|(part, length)| part.candidates.len() < **length)
        .filter_map(|(part, _)| part.candidates.last().map(|&(_, logit)| logit))
        .fold(f32::NEG_INFINITY, f32::max);
    // Equal to the bound may tie with one that was left out; only a greedy first place is beyond doubt.
    let above = merged
        .candidates
        .partition_point(|&(_, logit)| logit > bound);
    above.max(usize::from(!merged.candidates.is_empty()))
}

/// Natural log-probability of a logit under the unscaled distribution.
pub fn log_probability(row: &Row, logit: f32) -> f32 {
    (f64::from(logit) - f64::from(row.max) - row.sum_exp.ln()) as f32
}

fn report(row: &Row, (token, logit): (u32, f32), sampling: &Sampling) -> TokenLogprobs {
    let top = sampling.logprobs.unwrap_or(0) as usize;
    TokenLogprobs {
        token,
        logprob: sampling.logprobs.map(|_| log_probability(row, logit)),
        top: row
            .candidates
            .iter()
            .take(top)
            .map(|&(token, logit)| (token, log_probability(row, logit)))
            .collect(),
    }
}

/// A number in [0, 1) that depends on `seed` and `position` only: the finaliser of SplitMix64
/// (Steele, Lea, Flood, OOPSLA 2014) over both.
pub fn uniform(seed: u64, position: usize) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    let z = mix(mix(seed.wrapping_add(golden)) ^ (position as u64 + 1).wrapping_mul(golden));
    (z >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests;
