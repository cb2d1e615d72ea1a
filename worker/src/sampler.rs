//! Draws tokens from logits that are split over ranks. Pure.
//!
//! Each rank reduces a row of its vocabulary range to (max, sums of exponentials, its best
//! candidates). Rank 0 merges these and draws by inverting the cumulative distribution in order of
//! falling probability. Top-k, top-p and min-p keep a prefix in that order, and typical-p a part that the
//! entropy decides, so a draw that lands inside the candidates never needs the rest of the row.

use secondwind_model::step::{Sampling, TokenLogprobs};

/// A row of logits over one vocabulary range or, after [`merge`], over the whole vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Largest logit; negative infinity if every token of the range is banned.
    pub max: f32,
    /// Sum of exp(logit - max).
    pub sum_exp: f64,
    /// Sum of exp(x), x = (logit - max) / temperature; without meaning at temperature 0.
    pub sum_exp_at_temperature: f64,
    /// Sum of x * exp(x); likewise.
    pub sum_x_exp_at_temperature: f64,
    /// (token, logit), largest logit first, equal ones by token. No banned ones.
    pub candidates: Vec<(u32, f32)>,
    /// The model's own logits, where rules changed some and log-probabilities are wanted.
    pub own: Option<OwnRow>,
}

/// A row before rules changed it: what log-probabilities are reported of.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnRow {
    /// Largest logit.
    pub max: f32,
    /// Sum of exp(logit - max).
    pub sum_exp: f64,
    /// The best of all (token, logit), as many as are reported.
    pub best: Vec<(u32, f32)>,
    /// What the logits were of those candidates that rules changed: (token, logit).
    pub changed: Vec<(u32, f32)>,
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
    let max = largest(parts.iter().map(|part| part.max));
    let scale = match temperature > 0.0 {
        true => f64::from(temperature),
        false => 1.0,
    };
    let (mut sum_exp, mut sum, mut sum_x) = (0.0, 0.0, 0.0);
    // A range whose tokens are all banned adds nothing.
    for part in parts.iter().filter(|part| part.max > f32::NEG_INFINITY) {
        let shift = f64::from(part.max) - f64::from(max);
        let at_temperature = (shift / scale).exp();
        sum_exp += part.sum_exp * shift.exp();
        sum += part.sum_exp_at_temperature * at_temperature;
        let shifted = part.sum_x_exp_at_temperature + shift / scale * part.sum_exp_at_temperature;
        sum_x += shifted * at_temperature;
    }
    let candidates = parts
        .iter()
        .flat_map(|part| part.candidates.iter().copied());
    let mut candidates: Vec<_> = candidates.collect();
    sort_candidates(&mut candidates);
    Row {
        max,
        sum_exp,
        sum_exp_at_temperature: sum,
        sum_x_exp_at_temperature: sum_x,
        candidates,
        own: merge_own(parts),
    }
}

/// A rank on which nothing changed has no other row than the one it drew up.
fn merge_own(parts: &[Row]) -> Option<OwnRow> {
    parts.iter().find(|part| part.own.is_some())?;
    let numbers = || {
        parts.iter().map(|part| match &part.own {
            Some(own) => (own.max, own.sum_exp),
            None => (part.max, part.sum_exp),
        })
    };
    let max = largest(numbers().map(|(max, _)| max));
    let sums = numbers().map(|(part, sum)| sum * (f64::from(part) - f64::from(max)).exp());
    let mut best = Vec::new();
    let mut changed = Vec::new();
    for part in parts {
        match &part.own {
            Some(own) => {
                best.extend(&own.best);
                changed.extend(&own.changed);
            }
            None => best.extend(&part.candidates),
        }
    }
    sort_candidates(&mut best);
    Some(OwnRow {
        max,
        sum_exp: sums.sum(),
        best,
        changed,
    })
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(f32::NEG_INFINITY, f32::max)
}

/// Largest logit first, equal ones by token, which is the order every rank and every world agrees on.
pub fn sort_candidates(candidates: &mut [(u32, f32)]) {
    // Adding 0 makes -0 equal to 0.
    candidates.sort_unstable_by(|a, b| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
}

/// How much of a row's order the merged candidates tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// So many of them are certainly the best of the whole vocabulary; beyond, the order is unknown.
    pub count: usize,
    /// They are all that can be drawn.
    pub whole: bool,
}

/// Draws the token at `position` of its sequence from a merged row of `vocab` logits. There is at least one
/// candidate.
pub fn draw(
    row: &Row,
    covered: Covered,
    vocab: usize,
    sampling: &Sampling,
    position: usize,
) -> Draw {
    let candidates = &row.candidates[..covered.count.min(row.candidates.len())];
    if sampling.temperature == 0.0 {
        return Draw::Token(report(row, candidates[0], sampling));
    }
    let temperature = f64::from(sampling.temperature);
    // (x, exp(x)) of a candidate.
    let weigh = |&(_, logit): &(u32, f32)| {
        let x = (f64::from(logit) - f64::from(row.max)) / temperature;
        (x, x.exp())
    };

    // Filters keep a prefix; `kept` is `None` while none of them has ended inside the candidates.
    let mut kept = covered.whole.then_some(candidates.len());
    let mut total = row.sum_exp_at_temperature;
    let top_k = match sampling.top_k as usize {
        0 => vocab,
        k => k.min(vocab),
    };
    if top_k < vocab {
        if top_k > candidates.len() && !covered.whole {
            return Draw::NeedsWholeRow;
        }
        let top_k = top_k.min(candidates.len());
        kept = Some(top_k);
        total = candidates[..top_k].iter().map(|it| weigh(it).1).sum();
    }
    let limit = kept.unwrap_or(candidates.len());
    let floor = f64::from(sampling.min_p);
    let mut mass = 0.0;
    for (index, candidate) in candidates[..limit].iter().enumerate() {
        let (_, weight) = weigh(candidate);
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
    let (limit, mut kept_mass) = match kept {
        Some(kept) => (kept, mass),
        None if filtered => return Draw::NeedsWholeRow,
        // Nothing is filtered: the whole row's mass is known though its tail is not.
        None => (candidates.len(), total),
    };
    let mut complete = kept.is_some();
    let mut is_typical = None;
    if sampling.typical_p < 1.0 {
        let weights: Vec<(f64, f64)> = candidates[..limit].iter().map(weigh).collect();
        let products = match complete {
            true => weights.iter().map(|(x, weight)| x * weight).sum(),
            false => row.sum_x_exp_at_temperature,
        };
        let typical_p = f64::from(sampling.typical_p);
        let Some(typical) = typical(&weights, kept_mass, products, complete, typical_p) else {
            return Draw::NeedsWholeRow;
        };
        complete = true;
        let typical_weights = weights.iter().zip(&typical).filter(|(_, is)| **is);
        kept_mass = typical_weights.map(|((_, weight), _)| weight).sum();
        is_typical = Some(typical);
    }
    let target = uniform(sampling.seed, position) * kept_mass;
    let mut cumulative = 0.0;
    let mut last = candidates[0];
    for (index, &candidate) in candidates[..limit].iter().enumerate() {
        if is_typical.as_ref().is_some_and(|typical| !typical[index]) {
            continue;
        }
        cumulative += weigh(&candidate).1;
        last = candidate;
        if target < cumulative {
            return Draw::Token(report(row, candidate, sampling));
        }
    }
    if !complete {
        return Draw::NeedsWholeRow;
    }
    // Rounding left the target at the very end.
    Draw::Token(report(row, last, sampling))
}

/// Which of the best tokens are typical, or `None` if the others, unseen, may be more so.
///
/// `weights`: (x, exp(x)) by falling x; `total` is the sum of exp(x) over all tokens, `products` that of
/// x * exp(x). Without `complete` there are more tokens than `weights`, none of larger x. Kept are those whose
/// surprisal is nearest to the entropy until they hold `typical_p` of the total, and all that are as near as the
/// last of them (the definition of `transformers`).
fn typical(
    weights: &[(f64, f64)],
    total: f64,
    products: f64,
    complete: bool,
    typical_p: f64,
) -> Option<Vec<bool>> {
    // The surprisal of a token is ln(total) - x, and the entropy its mean.
    let mean = products / total;
    let distance = |&(x, _): &(f64, f64)| (mean - x).abs();
    let mut nearest: Vec<(f64, f64)> = weights.iter().map(|it| (distance(it), it.1)).collect();
    nearest.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut mass = 0.0;
    let reached = nearest.iter().find(|(_, weight)| {
        mass += weight;
        mass >= typical_p * total
    });
    let threshold = match reached.or(nearest.last().filter(|_| complete)) {
        Some(&(threshold, _)) => threshold,
        None => return None,
    };
    // What is unseen has an x at most that of the last that was seen.
    let unseen_from = weights.last().map_or(0.0, |&(x, _)| mean - x);
    if !complete && threshold >= unseen_from {
        return None;
    }
    Some(weights.iter().map(|it| distance(it) <= threshold).collect())
}

/// How far the merged candidates cover the row: down to the largest "worst candidate" of a rank that left
/// some out. Ranks keep at most `most` candidates each.
pub fn covered(parts: &[Row], range_lengths: &[usize], most: usize, merged: &Row) -> Covered {
    let mut partial = parts
        .iter()
        .zip(range_lengths)
        .filter(|(part, length)| part.candidates.len() == most && most < **length)
        .filter_map(|(part, _)| part.candidates.last().map(|&(_, logit)| logit))
        .peekable();
    if partial.peek().is_none() {
        return Covered {
            count: merged.candidates.len(),
            whole: true,
        };
    }
    let bound = largest(partial);
    // Equal to the bound may tie with one that was left out; only a greedy first place is beyond doubt.
    let above = merged
        .candidates
        .partition_point(|&(_, logit)| logit > bound);
    Covered {
        count: above.max(usize::from(!merged.candidates.is_empty())),
        whole: false,
    }
}

/// Natural log-probability of a logit under the distribution of logits with this maximum and this sum of
/// exp(logit - max).
pub fn log_probability(max: f32, sum_exp: f64, logit: f32) -> f32 {
    (f64::from(logit) - f64::from(max) - sum_exp.ln()) as f32
}

fn report(row: &Row, (token, logit): (u32, f32), sampling: &Sampling) -> TokenLogprobs {
    let Some(top) = sampling.logprobs else {
        return TokenLogprobs {
            token,
            logprob: None,
            top: Vec::new(),
        };
    };
    let (max, sum_exp, best, logit) = match &row.own {
        None => (row.max, row.sum_exp, &row.candidates, logit),
        Some(own) => {
            let changed = own.changed.iter().find(|(changed, _)| *changed == token);
            let logit = changed.map_or(logit, |&(_, original)| original);
            (own.max, own.sum_exp, &own.best, logit)
        }
    };
    let of = |logit| log_probability(max, sum_exp, logit);
    let best = best.iter().take(top as usize);
    TokenLogprobs {
        token,
        logprob: Some(of(logit)),
        top: best.map(|&(token, logit)| (token, of(logit))).collect(),
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
