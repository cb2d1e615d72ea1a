//! The small ops, one obvious loop each.

use crate::embedding::EmbeddingSource;
use crate::error::{KernelError, expect_length};
use crate::heads::{HeadRows, check_indices};
use crate::kv::KvCache;
use crate::logits::{Adjustment, RowSummary};
use crate::rows::{check_norm, check_rope};

/// Rows of the embedding; see [`crate::cpu::embed`].
///
/// # Errors
/// As the fast twin.
pub fn embed(
    source: EmbeddingSource<'_>,
    first_id: u32,
    tokens: &[u32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    source.check(tokens, out)?;
    for (&token, out) in tokens.iter().zip(out.chunks_mut(source.hidden())) {
        match token.checked_sub(first_id).map(|row| row as usize) {
            Some(row) if row < source.rows() => source.widen_row(row, out),
            _ => out.fill(0.0),
        }
    }
    Ok(())
}

/// RMS norm in f64; see [`crate::cpu::rms_norm`].
///
/// # Errors
/// As the fast twin.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), KernelError> {
    check_norm("rms_norm", x.len(), weight)?;
    expect_length("rms_norm", "out", x.len(), out.len())?;
    for (x, out) in x.chunks(weight.len()).zip(out.chunks_mut(weight.len())) {
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (f64::from(x) * scale * f64::from(weight)) as f32;
        }
    }
    Ok(())
}

/// `residual += delta`.
///
/// # Errors
/// Lengths that differ.
pub fn add(residual: &mut [f32], delta: &[f32]) -> Result<(), KernelError> {
    expect_length("add", "delta", residual.len(), delta.len())?;
    for (residual, &delta) in residual.iter_mut().zip(delta) {
        *residual += delta;
    }
    Ok(())
}

/// RMS norm of every head in f64; see [`crate::cpu::head_norm`].
///
/// # Errors
/// As the fast twin.
pub fn head_norm(
    x: &mut [f32],
    layout: HeadRows,
    weight: &[f32],
    eps: f32,
) -> Result<(), KernelError> {
    layout.check("head_norm", "x", x.len())?;
    expect_length("head_norm", "weight", layout.head_dim, weight.len())?;
    for row in layout.iter_mut(x) {
        for head in row.chunks_mut(weight.len()) {
            let input = head.to_vec();
            rms_norm(&input, weight, eps, head)?;
        }
    }
    Ok(())
}

/// Rotary embedding; see [`crate::cpu::rope`].
///
/// # Errors
/// As the fast twin.
pub fn rope(x: &mut [f32], layout: HeadRows, cos: &[f32], sin: &[f32]) -> Result<(), KernelError> {
    let half = check_rope(x, layout, cos, sin)?;
    for (row, heads) in layout.iter_mut(x).enumerate() {
        for head in heads.chunks_mut(layout.head_dim) {
            for i in 0..half {
                let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                let (cos, sin) = (
                    f64::from(cos[row * half + i]),
                    f64::from(sin[row * half + i]),
                );
                head[i] = (a * cos - b * sin) as f32;
                head[i + half] = (b * cos + a * sin) as f32;
            }
        }
    }
    Ok(())
}

/// Stores keys and values; see [`crate::cpu::kv_write`].
///
/// # Errors
/// As the fast twin.
pub fn kv_write(
    cache: &mut KvCache,
    slots: &[u32],
    k: &[f32],
    v: &[f32],
    layout: HeadRows,
) -> Result<(), KernelError> {
    const OP: &str = "kv_write";
    let shape = *cache.shape();
    layout.check(OP, "k", k.len())?;
    layout.check(OP, "v", v.len())?;
    expect_length(OP, "slots", layout.rows, slots.len())?;
    expect_length(OP, "heads", shape.kv_heads, layout.heads)?;
    expect_length(OP, "head_dim", shape.head_dim, layout.head_dim)?;
    check_indices(OP, "slots", slots, shape.slots())?;
    for (row, &slot) in slots.iter().enumerate() {
        for head in 0..layout.heads {
            let (k, v) = (layout.head(k, row, head), layout.head(v, row, head));
            cache.store(slot as usize, head, k, v);
        }
    }
    Ok(())
}

/// `gate = silu(gate) * up` in f64; see [`crate::cpu::silu_mul`].
///
/// # Errors
/// As the fast twin.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) -> Result<(), KernelError> {
    expect_length("silu_mul", "up", gate.len(), up.len())?;
    for (slot, &up) in gate.iter_mut().zip(up) {
        let gate = f64::from(*slot);
        *slot = (gate / (1.0 + (-gate).exp()) * f64::from(up)) as f32;
    }
    Ok(())
}

/// Reduces a row of logits, sums in f64 over a full sort; see [`crate::cpu::reduce_row`].
pub fn reduce_row(logits: &[f32], temperature: f32, first_id: u32, k: usize) -> RowSummary {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut candidates: Vec<(u32, f32)> = (first_id..)
        .zip(logits.iter().copied())
        .filter(|&(_, logit)| logit > f32::NEG_INFINITY)
        .collect();
    candidates.sort_by(|a, b| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
    candidates.truncate(k);
    let sum = |temperature: f64, weigh: fn(f64) -> f64| {
        let terms = logits
            .iter()
            .filter(|&&logit| logit > f32::NEG_INFINITY)
            .map(|&logit| {
                let distance = f64::from(logit) - f64::from(max);
                if distance == 0.0 {
                    return weigh(0.0);
                }
                let x = distance / temperature;
                let term = x.exp();
                // At temperature 0 the distance is infinite.
                if term == 0.0 { 0.0 } else { weigh(x) * term }
            });
        terms.sum()
    };
    RowSummary {
        max,
        sum_exp: sum(1.0, |_| 1.0),
        sum_exp_t: sum(f64::from(temperature), |_| 1.0),
        sum_x_exp_t: sum(f64::from(temperature), |x| x),
        candidates,
    }
}

/// Changes single logits, in f64; see [`crate::cpu::adjust_logits`].
///
/// # Errors
/// As the fast twin.
pub fn adjust_logits(
    logits: &mut [f32],
    adjustments: &[Adjustment],
    originals: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    const OP: &str = "adjust_logits";
    let elements: Vec<u32> = adjustments.iter().map(|change| change.element).collect();
    check_indices(OP, "adjustments", &elements, logits.len())?;
    if let Some(originals) = originals {
        expect_length(OP, "originals", adjustments.len(), originals.len())?;
        for (original, &element) in originals.iter_mut().zip(&elements) {
            *original = logits[element as usize];
        }
    }
    for change in adjustments {
        let logit = &mut logits[change.element as usize];
        let biased = f64::from(*logit) + f64::from(change.bias);
        let penalty = f64::from(change.penalty);
        let penalised = biased * if biased > 0.0 { 1.0 / penalty } else { penalty };
        *logit = (penalised - f64::from(change.subtract)).min(f64::from(f32::MAX)) as f32;
    }
    Ok(())
}
