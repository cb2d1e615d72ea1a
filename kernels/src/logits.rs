//! What one rank says about a row of logits: enough for the ranks together to sample exactly.

/// Most candidates that a rank keeps of a row.
pub const CANDIDATES: usize = 256;

/// One logit's change: `x + bias`, then divided by `penalty` if positive and else multiplied by it, then
/// less `subtract`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(16))]
pub struct Adjustment {
    /// Index into (rows, width) logits; no two of a call are the same.
    pub element: u32,
    /// Negative infinity bans the token.
    pub bias: f32,
    /// Above 0.
    pub penalty: f32,
    /// Finite.
    pub subtract: f32,
}

impl Adjustment {
    /// What becomes of `logit`. What was finite stays finite or is banned.
    pub fn apply(&self, logit: f32) -> f32 {
        let biased = logit + self.bias;
        let penalised = match biased > 0.0 {
            true => biased / self.penalty,
            false => biased * self.penalty,
        };
        (penalised - self.subtract).min(f32::MAX)
    }
}

/// Which tokens may be drawn of some rows of one rank's logits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowMasks {
    /// Rows of (rows, width) logits, each once.
    pub rows: Vec<u32>,
    /// (rows, width.div_ceil(32)) words: column `i` stays if bit `i % 32` of word `i / 32` is set.
    pub words: Vec<u32>,
}

/// A row of one rank's logits, reduced.
#[derive(Debug, Clone, PartialEq)]
pub struct RowSummary {
    /// Largest logit of the range; negative infinity if every token is banned.
    pub max: f32,
    /// Sum of `exp(logit - max)`.
    pub sum_exp: f64,
    /// Sum of `exp((logit - max) / temperature)`; at temperature 0 how many logits equal `max`.
    pub sum_exp_t: f64,
    /// Sum of `x * exp(x)`, `x = (logit - max) / temperature`, which gives the entropy; 0 at temperature 0.
    pub sum_x_exp_t: f64,
    /// The best tokens, (id, logit), by falling logit, then rising id. Banned ones are left out.
    pub candidates: Vec<(u32, f32)>,
}

/// The `k` largest of `logits` by falling logit, then rising id; `first_id` is the id of the
/// first. Negative infinity and NaN are never among them.
pub(crate) fn candidates(logits: &[f32], first_id: u32, k: usize) -> Vec<(u32, f32)> {
    const BLOCK: usize = 64;
    if k == 0 {
        return Vec::new();
    }
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(2 * k + BLOCK);
    let mut floor = f32::NEG_INFINITY;
    for (block, values) in logits.chunks(BLOCK).enumerate() {
        // Ids rise, so a later logit equal to the floor is worse than all that were kept.
        if !values
            .iter()
            .fold(false, |any, &value| any | (value > floor))
        {
            continue;
        }
        let id = first_id + (block * BLOCK) as u32;
        let better = (id..)
            .zip(values.iter().copied())
            .filter(|&(_, value)| value > floor);
        kept.extend(better);
        if kept.len() >= 2 * k {
            kept.select_nth_unstable_by(k - 1, by_rank);
            kept.truncate(k);
            floor = kept[k - 1].1;
        }
    }
    kept.sort_unstable_by(by_rank);
    kept.truncate(k);
    kept
}

fn by_rank(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    // Adding 0 makes -0 equal to 0, as sampling sees them.
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

/// The logit of token `id` if this rank's range, which starts at `first_id`, holds it.
pub fn target_logit(logits: &[f32], first_id: u32, id: u32) -> Option<f32> {
    logits.get(id.checked_sub(first_id)? as usize).copied()
}

/// Index of the first NaN or infinity.
pub fn first_non_finite(x: &[f32]) -> Option<usize> {
    const BLOCK: usize = 256;
    const EXPONENT: u32 = 0x7f80_0000;
    let bad = |block: &[f32]| {
        block
            .iter()
            .fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT))
    };
    let block = x.chunks(BLOCK).position(bad)?;
    let start = block * BLOCK;
    Some(start + x[start..].iter().position(|x| !x.is_finite())?)
}
