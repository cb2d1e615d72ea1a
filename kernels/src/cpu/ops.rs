//! The small ops on the best instruction set of the machine.

use crate::embedding::EmbeddingSource;
use crate::error::{KernelError, expect_length};
use crate::heads::HeadRows;
use crate::kv::KvCache;
use crate::logits::{Adjustment, RowMasks, RowSummary, candidates};
use crate::reference;
use crate::rows::{check_norm, check_rope};

use super::exp::exp;
use super::lanes::{Available, Kernel, LANES, Lanes, dispatch};

/// Gathers embedding rows, widened exactly.
///
/// `tokens`: (rows) ids; `first_id`: the id of the source's first row; `out`: (rows, hidden).
/// An id outside this rank's range gives a row of zeros, so that ranks can be summed.
///
/// # Errors
/// `out` of the wrong length, or a quantised tied source.
pub fn embed(
    source: EmbeddingSource<'_>,
    first_id: u32,
    tokens: &[u32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    reference::embed(source, first_id, tokens, out)
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` of every row.
///
/// `x`, `out`: (rows, hidden); `weight`: (hidden).
///
/// # Errors
/// `x` is not whole rows, or `out` is of another length.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), KernelError> {
    check_norm("rms_norm", x.len(), weight)?;
    expect_length("rms_norm", "out", x.len(), out.len())?;
    out.copy_from_slice(x);
    dispatch(
        Available::best(),
        Norm {
            x: out,
            weight,
            eps,
        },
    );
    Ok(())
}

/// `residual += delta`, of any equal length.
///
/// # Errors
/// Lengths that differ.
pub fn add(residual: &mut [f32], delta: &[f32]) -> Result<(), KernelError> {
    reference::add(residual, delta)
}

/// RMS norm of every head by itself, in place (the q and k norm of Qwen3).
///
/// `x`: rows of heads as `layout` says; `weight`: (head_dim).
///
/// # Errors
/// A buffer that does not hold the layout, or a weight of another length.
pub fn head_norm(
    x: &mut [f32],
    layout: HeadRows,
    weight: &[f32],
    eps: f32,
) -> Result<(), KernelError> {
    layout.check("head_norm", "x", x.len())?;
    expect_length("head_norm", "weight", layout.head_dim, weight.len())?;
    for x in layout.iter_mut(x) {
        dispatch(Available::best(), Norm { x, weight, eps });
    }
    Ok(())
}

/// Rotary position embedding in place, half-split (NeoX) pairs: element `i` with `i + half`.
///
/// `x`: rows of heads as `layout` says; `cos`, `sin`: (rows, half), gathered for each row's
/// position. `half` may be less than head_dim / 2: the remaining elements stay.
///
/// # Errors
/// A buffer that does not hold the layout, or tables of another length.
pub fn rope(x: &mut [f32], layout: HeadRows, cos: &[f32], sin: &[f32]) -> Result<(), KernelError> {
    let half = check_rope(x, layout, cos, sin)?;
    for (row, heads) in layout.iter_mut(x).enumerate() {
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        for head in heads.chunks_mut(layout.head_dim) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    Ok(())
}

/// Stores one step's keys and values.
///
/// `slots`: (rows), `block * block_tokens + offset`; `k`, `v`: rows of KV heads as `layout` says.
///
/// # Errors
/// A slot outside the cache, or heads that are not the cache's.
pub fn kv_write(
    cache: &mut KvCache,
    slots: &[u32],
    k: &[f32],
    v: &[f32],
    layout: HeadRows,
) -> Result<(), KernelError> {
    reference::kv_write(cache, slots, k, v, layout)
}

/// `gate = gate / (1 + exp(-gate)) * up`, both of the same length.
///
/// # Errors
/// Lengths that differ.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) -> Result<(), KernelError> {
    expect_length("silu_mul", "up", gate.len(), up.len())?;
    dispatch(Available::best(), SiluMul { gate, up });
    Ok(())
}

/// Changes single logits in place; `originals`, if wanted, get what they were, in order.
///
/// `logits`: (rows, width).
///
/// # Errors
/// An element outside `logits`, or `originals` of another length than `adjustments`.
pub fn adjust_logits(
    logits: &mut [f32],
    adjustments: &[Adjustment],
    mut originals: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    const OP: &str = "adjust_logits";
    if let Some(originals) = &originals {
        expect_length(OP, "originals", adjustments.len(), originals.len())?;
    }
    for (index, adjustment) in adjustments.iter().enumerate() {
        let elements = logits.len();
        let Some(logit) = logits.get_mut(adjustment.element as usize) else {
            return Err(KernelError::Shape {
                op: OP,
                tensor: "adjustments",
                problem: format!("name element {} of {elements}", adjustment.element),
            });
        };
        if let Some(originals) = &mut originals {
            originals[index] = *logit;
        }
        *logit = adjustment.apply(*logit);
    }
    Ok(())
}

/// Bans the tokens that `masks` leave out, in place.
///
/// `logits`: (rows, `width`).
///
/// # Errors
/// A row outside `logits`, or words for other rows than there are.
pub fn mask_logits(logits: &mut [f32], width: usize, masks: &RowMasks) -> Result<(), KernelError> {
    const OP: &str = "mask_logits";
    let words = width.div_ceil(32);
    expect_length(OP, "words", masks.rows.len() * words, masks.words.len())?;
    let rows = logits.len().checked_div(width).unwrap_or(0);
    for (&row, words) in masks.rows.iter().zip(masks.words.chunks(words.max(1))) {
        if row as usize >= rows {
            return Err(KernelError::Shape {
                op: OP,
                tensor: "rows",
                problem: format!("name row {row} of {rows}"),
            });
        }
        let row = &mut logits[row as usize * width..][..width];
        for (logits, &word) in row.chunks_mut(32).zip(words) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
    Ok(())
}

/// Reduces one row of logits to what sampling needs from this rank.
///
/// `logits`: (vocab_local), finite or negative infinity (banned); `temperature` >= 0; `first_id`:
/// the id of the first logit; `k`: how many candidates to keep.
pub fn reduce_row(logits: &[f32], temperature: f32, first_id: u32, k: usize) -> RowSummary {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let isa = Available::best();
    let sums = |rate| dispatch(isa, SumExp { logits, max, rate });
    let (sum_exp, _) = sums(1.0);
    let (sum_exp_t, sum_x_exp_t) = if temperature > 0.0 {
        sums(1.0 / temperature)
    } else {
        let best = logits
            .iter()
            .filter(|&&logit| logit == max && max > f32::NEG_INFINITY)
            .count();
        (best as f64, 0.0)
    };
    RowSummary {
        max,
        sum_exp,
        sum_exp_t,
        sum_x_exp_t,
        candidates: candidates(logits, first_id, k),
    }
}

/// RMS norm in place, rows of `weight.len()`.
struct Norm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let width = self.weight.len();
        for row in self.x.chunks_mut(width) {
            let mut squares = [lanes.zero(); 4];
            let (whole, tail) = row.as_chunks::<LANES>();
            for x in whole.chunks(squares.len()) {
                for (sum, x) in squares.iter_mut().zip(x) {
                    let x = lanes.load(x);
                    *sum = lanes.mul_add(x, x, *sum);
                }
            }
            let x = lanes.load_part(tail);
            squares[0] = lanes.mul_add(x, x, squares[0]);
            let [a, b, c, d] = squares;
            let sum = lanes.sum(lanes.add(lanes.add(a, b), lanes.add(c, d)));
            let scale = lanes.splat(1.0 / (sum / width as f32 + self.eps).sqrt());
            let vectors = row.chunks_mut(LANES).zip(self.weight.chunks(LANES));
            for (x, weight) in vectors {
                let scaled = lanes.mul(lanes.load_part(x), scale);
                lanes.store_part(lanes.mul(scaled, lanes.load_part(weight)), x);
            }
        }
    }
}

struct SiluMul<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (slot, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            let gate = lanes.load_part(slot);
            let decay = exp(lanes, lanes.sub(lanes.zero(), gate));
            let silu = lanes.div(gate, lanes.add(lanes.splat(1.0), decay));
            lanes.store_part(lanes.mul(silu, lanes.load_part(up)), slot);
        }
    }
}

/// Sums of `exp(x)` and of `x * exp(x)`, `x = (logit - max) * rate`, f32 within a block and f64 across
/// blocks.
struct SumExp<'a> {
    logits: &'a [f32],
    max: f32,
    rate: f32,
}

impl Kernel for SumExp<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> (f64, f64) {
        const BLOCK: usize = 64 * LANES;
        if self.max == f32::NEG_INFINITY {
            return (0.0, 0.0);
        }
        let (max, rate) = (lanes.splat(self.max), lanes.splat(self.rate));
        // Below it the exponential is 0, and so is the product, also of a banned logit.
        let least = lanes.splat(-105.0);
        let mut totals = (0.0, 0.0);
        for block in self.logits.chunks(BLOCK) {
            let (mut sum, mut products) = (lanes.zero(), lanes.zero());
            let mut add = |logits: &[f32; LANES]| {
                let distance = lanes.mul(lanes.sub(lanes.load(logits), max), rate);
                let term = exp(lanes, distance);
                sum = lanes.add(sum, term);
                products = lanes.mul_add(lanes.max(least, distance), term, products);
            };
            let (whole, tail) = block.as_chunks::<LANES>();
            for logits in whole {
                add(logits);
            }
            if !tail.is_empty() {
                let mut padded = [f32::NEG_INFINITY; LANES];
                padded[..tail.len()].copy_from_slice(tail);
                add(&padded);
            }
            totals.0 += f64::from(lanes.sum(sum));
            totals.1 += f64::from(lanes.sum(products));
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::test_sets;

    fn wave(length: usize) -> Vec<f32> {
        (0..length).map(|i| 20.0 * (i as f32 * 0.7).sin()).collect()
    }

    fn run_all(isa: Available, length: usize) -> Vec<f32> {
        let (x, weight) = (wave(length), wave(length));
        let mut normed = x.clone();
        dispatch(
            isa,
            Norm {
                x: &mut normed,
                weight: &weight,
                eps: 1e-6,
            },
        );
        let mut silu = x.clone();
        dispatch(
            isa,
            SiluMul {
                gate: &mut silu,
                up: &weight,
            },
        );
        let (sum, products) = dispatch(
            isa,
            SumExp {
                logits: &x,
                max: 20.0,
                rate: 0.7,
            },
        );
        let sums = [sum as f32, products as f32];
        normed.into_iter().chain(silu).chain(sums).collect()
    }

    #[test]
    fn every_instruction_set_agrees_and_the_fused_ones_bit_for_bit() {
        for length in [1, 16, 31, 100, 3000] {
            let best = run_all(Available::best(), length);
            let mut fused: Option<Vec<f32>> = None;
            for isa in test_sets() {
                let got = run_all(isa, length);
                for (got, expected) in got.iter().zip(&best) {
                    let limit = 4e-6 * expected.abs() + 1e-9;
                    assert!(
                        (got - expected).abs() <= limit,
                        "{isa:?} {length}: {got} {expected}"
                    );
                }
                if !matches!(isa, Available::Portable(_)) {
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    if let Some(first) = &fused {
                        assert_eq!(bits(first), bits(&got), "{isa:?} {length}");
                    }
                    fused = Some(got);
                }
            }
        }
    }
}
