//! Layers with known weights, and what each family of paths makes of them, in f64 on the host.

use half::f16;
use secondwind_kernels::{cuda::*, reference, weights::QuantSpec};

use crate::{common::Random, told};

/// Share of an output's sum of magnitudes by which integer paths may be off.
pub const INT8_TOLERANCE: f64 = 2e-4;

/// How near to the middle of two integers a value may round either way, in integers: a card divides in fp32
/// and not quite exactly.
const UNDECIDED: f64 = 2e-4;

/// A random quantised layer, on the card and as numbers.
pub struct Layer {
    pub linear: Linear,
    /// (k, n) dequantised.
    pub values: Vec<f64>,
    /// (k, n) codes less their zero points.
    pub codes: Vec<f64>,
    /// (groups, n).
    pub scales: Vec<f64>,
    pub bias: Option<Vec<f32>>,
    /// Where each row is stored, for blocks of activations.
    pub group_of_row: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub bits: u8,
    pub k: usize,
    pub n: usize,
    pub group: usize,
    pub shuffled: bool,
    pub symmetric: bool,
}

pub fn layer(device: &Device, random: &mut Random, kind: Kind) -> Result<Layer, String> {
    let Kind {
        bits,
        k,
        n,
        group,
        shuffled,
        symmetric,
    } = kind;
    let groups = k.div_ceil(group);
    let mut group_of_row: Vec<u32> = (0..k).map(|row| (row / group) as u32).collect();
    if shuffled {
        for row in (1..k).rev() {
            group_of_row.swap(row, random.below(row + 1));
        }
    }
    let centre = 1u16 << (bits - 1);
    let zero = |random: &mut Random| match symmetric {
        true => centre,
        false => random.below((1 << bits) + 1) as u16,
    };
    let zeros: Vec<u16> = (0..groups * n).map(|_| zero(random)).collect();
    let scales: Vec<f16> = (0..groups * n)
        .map(|_| f16::from_f32(0.01 + 0.01 * random.unit().abs()))
        .collect();
    let codes: Vec<u32> = (0..k * n).map(|_| random.below(1 << bits) as u32).collect();
    let mut words = vec![0u32; (k.next_multiple_of(32) * usize::from(bits) / 32) * n];
    let mut values = vec![0.0; k * n];
    let mut centred = vec![0.0; k * n];
    for row in 0..k {
        for column in 0..n {
            let code = codes[row * n + column];
            for bit in 0..usize::from(bits) {
                let at = row * usize::from(bits) + bit;
                words[at / 32 * n + column] |= (code >> bit & 1) << (at % 32);
            }
            let of = group_of_row[row] as usize * n + column;
            centred[row * n + column] = f64::from(code) - f64::from(zeros[of]);
            values[row * n + column] = scales[of].to_f64() * centred[row * n + column];
        }
    }
    let bias = (random.below(2) == 1).then(|| random.floats(n));
    let mut staging = QuantStaging::new(QuantSpec {
        bits,
        k,
        n,
        group_of_row: &group_of_row,
        scales: &scales,
        zeros: &zeros,
        bias: bias.as_deref(),
    })
    .map_err(told)?;
    staging.write_words(0, 0, k, &words).map_err(told)?;
    let (weights, bias_on) = staging.finish(device).map_err(told)?;
    let on_card = Linear {
        k,
        n,
        weights: Weights::Quantised(weights),
        bias: bias_on,
    };
    Ok(Layer {
        linear: on_card,
        values,
        codes: centred,
        scales: scales.iter().map(|scale| scale.to_f64()).collect(),
        bias,
        group_of_row,
    })
}

/// Activations as the integer paths see them, rounded in blocks of 32 stored rows, and by how much each may
/// differ, for lying between two integers.
pub fn rounded(x: &[f32], k: usize, group_of_row: &[u32]) -> (Vec<f64>, Vec<f64>) {
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by_key(|&row| group_of_row[row]);
    let (mut out, mut undecided) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let rows = out.chunks_mut(k).zip(undecided.chunks_mut(k));
    for (x, (out, undecided)) in x.chunks(k).zip(rows) {
        for run in order.chunk_by(|&a, &b| group_of_row[a] == group_of_row[b]) {
            for block in run.chunks(32) {
                let largest = block.iter().map(|&row| x[row].abs()).fold(0.0, f32::max);
                let d = f64::from(largest) / 127.0;
                for &row in block {
                    if d == 0.0 {
                        continue;
                    }
                    let q = f64::from(x[row]) / d;
                    out[row] = d * q.round();
                    if (q.fract().abs() - 0.5).abs() < UNDECIDED {
                        undecided[row] = d;
                    }
                }
            }
        }
    }
    (out, undecided)
}

/// The half next to `exact`, the even one of two: `f16::from_f64` drops the low 32 bits before it rounds, which
/// takes what lies just beside the middle for the middle.
fn nearest_half(exact: f64) -> f16 {
    let bits = f16::from_f64(exact).to_bits();
    if exact.to_bits() as u32 == 0 {
        return f16::from_bits(bits);
    }
    let around = [bits, bits.wrapping_sub(1), bits.wrapping_add(1)].map(f16::from_bits);
    let distance = |half: &f16| (half.to_f64() - exact).abs();
    let finite = around.into_iter().filter(|half| half.is_finite());
    let nearest = finite.min_by(|a, b| {
        let even = (a.to_bits() & 1).cmp(&(b.to_bits() & 1));
        distance(a).total_cmp(&distance(b)).then(even)
    });
    nearest.unwrap_or(f16::from_bits(bits))
}

/// (value, sum of magnitudes) of every output in half arithmetic, rounding as the path does: a half
/// sums what two blocks of 32 stored rows have for it, or one where scales are finer than 64 rows.
pub fn in_halves(layer: &Layer, x: &[f32], rows: usize) -> Vec<(f64, f64)> {
    let (k, n) = (layer.linear.k, layer.linear.n);
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by_key(|&row| layer.group_of_row[row]);
    let mut stored = Vec::new();
    for run in order.chunk_by(|&a, &b| layer.group_of_row[a] == layer.group_of_row[b]) {
        stored.extend(run.iter().copied().map(Some));
        stored.resize(stored.len().next_multiple_of(BLOCK_ROWS), None);
    }
    let at_once = match Rows::new(&layer.group_of_row).scales_per_superblock {
        4 => BLOCK_ROWS,
        _ => 2 * BLOCK_ROWS,
    };
    let mut out = product(
        layer,
        &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
        rows,
    );
    for row in 0..rows {
        let (row_scale, halves) = reference::round_f16(&x[row * k..][..k]);
        for column in 0..n {
            let mut total = 0.0;
            for rows in stored.chunks(at_once) {
                // Values 0, 4, 1, 5 of each block's unit go to one half, 2, 6, 3, 7 to the other.
                let mut sums = [[f16::ZERO; 2]; 4];
                let mut scale = 0.0;
                for block in rows.chunks(BLOCK_ROWS) {
                    for (sums, unit) in sums.iter_mut().zip(block.chunks(8)) {
                        for (half, order) in [[0, 4, 1, 5], [2, 6, 3, 7]].into_iter().enumerate() {
                            for source in order.into_iter().filter_map(|at| unit[at]) {
                                let exact = sums[half].to_f64()
                                    + halves[source].to_f64() * layer.codes[source * n + column];
                                sums[half] = nearest_half(exact);
                                let group = layer.group_of_row[source] as usize;
                                scale = layer.scales[group * n + column];
                            }
                        }
                    }
                }
                let sum: f64 = sums.as_flattened().iter().map(|sum| sum.to_f64()).sum();
                total += scale * sum;
            }
            let bias = layer
                .bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias[column]));
            out[row * n + column].0 = f64::from(row_scale) * total + bias;
        }
    }
    out
}

/// (value, sum of magnitudes) of every output.
pub fn product(layer: &Layer, x: &[f64], rows: usize) -> Vec<(f64, f64)> {
    let (k, n) = (layer.linear.k, layer.linear.n);
    let mut out = Vec::with_capacity(rows * n);
    for row in 0..rows {
        let mut sums = vec![(0.0, 0.0); n];
        for (depth, &x) in x[row * k..][..k].iter().enumerate() {
            for (sum, weight) in sums.iter_mut().zip(&layer.values[depth * n..][..n]) {
                sum.0 += x * weight;
                sum.1 += (x * weight).abs();
            }
        }
        for (column, mut sum) in sums.into_iter().enumerate() {
            let bias = layer
                .bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias[column]));
            sum.0 += bias;
            sum.1 += bias.abs();
            out.push(sum);
        }
    }
    out
}

/// What a layer gives for some rows: of x as it is, and of x rounded to 8 bits.
pub struct Expected {
    pub exact: Vec<(f64, f64)>,
    pub rounded: Vec<(f64, f64)>,
}

pub fn expected(layer: &Layer, x: &[f32], rows: usize) -> Expected {
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let (rounded, undecided) = rounded(x, layer.linear.k, &layer.group_of_row);
    let mut rounded = product(layer, &rounded, rows);
    let (k, n) = (layer.linear.k, layer.linear.n);
    for (out, undecided) in rounded.chunks_mut(n).zip(undecided.chunks(k)) {
        for (weights, undecided) in layer.values.chunks(n).zip(undecided) {
            if *undecided > 0.0 {
                for (out, weight) in out.iter_mut().zip(weights) {
                    out.1 += undecided * weight.abs() / INT8_TOLERANCE;
                }
            }
        }
    }
    Expected {
        exact: product(layer, &exact, rows),
        rounded,
    }
}
