//! Linear layers: every path, width, grouping and order.

use std::sync::Arc;

use half::f16;
use secondwind_kernels::{
    cuda::*,
    reference,
    select::{DeviceFacts, LinearPath, LinearShape, Precision, select_linear},
    weights::{Dtype, QuantSpec, WeightFormat},
};

use crate::{close, common::Random, download, poisoned, told};

/// A random quantised layer, on the card and as numbers.
pub struct Layer {
    linear: Linear,
    /// (k, n) dequantised.
    values: Vec<f64>,
    /// (k, n) codes less their zero points.
    codes: Vec<f64>,
    /// (groups, n).
    scales: Vec<f64>,
    bias: Option<Vec<f32>>,
    /// Where each row is stored, for blocks of activations.
    group_of_row: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub struct Kind {
    bits: u8,
    k: usize,
    n: usize,
    group: usize,
    shuffled: bool,
    symmetric: bool,
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

/// Activations as the integer paths see them: rounded in blocks of 32 stored rows.
pub fn rounded(x: &[f32], k: usize, group_of_row: &[u32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by_key(|&row| group_of_row[row]);
    let mut out = vec![0.0; x.len()];
    for (x, out) in x.chunks(k).zip(out.chunks_mut(k)) {
        for run in order.chunk_by(|&a, &b| group_of_row[a] == group_of_row[b]) {
            for block in run.chunks(32) {
                let largest = block.iter().map(|&row| x[row].abs()).fold(0.0, f32::max);
                let d = f64::from(largest) / 127.0;
                for &row in block {
                    let q = if d > 0.0 {
                        (f64::from(x[row]) / d).round()
                    } else {
                        0.0
                    };
                    out[row] = d * q;
                }
            }
        }
    }
    out
}

/// The half next to `exact`, the even one of two: `f16::from_f64` drops bits before it rounds, which takes
/// what lies just beside the middle for the middle.
fn nearest_half(exact: f64) -> f16 {
    let bits = f16::from_f64(exact).to_bits();
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

/// Paths for quantised weights that the architecture has.
pub fn paths(device: &Device) -> impl Iterator<Item = LinearPath> {
    let arch = device.arch();
    let shape = LinearShape {
        format: WeightFormat::Quantised { bits: 4 },
        k: 128,
        n: 128,
        rows: 1,
    };
    let all = [
        LinearPath::F32,
        LinearPath::A16F32Gemv,
        LinearPath::A16Half2,
        LinearPath::A16Mma,
        LinearPath::A8Dp4aGemv,
        LinearPath::A8Dp4aGemm,
        LinearPath::A8Mma,
    ];
    all.into_iter().filter(move |path| {
        select_linear(
            DeviceFacts::Cuda { arch },
            shape,
            Precision::Fast,
            Some(*path),
        )
        .is_ok()
    })
}

/// What a layer gives for some rows: of x as it is, and of x rounded to 8 bits.
pub struct Expected {
    exact: Vec<(f64, f64)>,
    rounded: Vec<(f64, f64)>,
}

pub fn expected(layer: &Layer, x: &[f32], rows: usize) -> Expected {
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let rounded = rounded(x, layer.linear.k, &layer.group_of_row);
    Expected {
        exact: product(layer, &exact, rows),
        rounded: product(layer, &rounded, rows),
    }
}

pub fn check_product(
    device: &Device,
    path: LinearPath,
    layers: &[(&Layer, &Expected)],
    x: &[f32],
    rows: usize,
    what: &str,
) -> Result<(), String> {
    let x_on = device.upload(x, "a test").map_err(told)?;
    let superblocks = layers.iter().map(|(layer, _)| match &layer.linear.weights {
        Weights::Quantised(weights) => weights.superblocks,
        Weights::Dense(_) => 1,
    });
    let superblocks = superblocks.max().unwrap_or(1);
    let mut activations = Activations::new(device, rows, superblocks).map_err(told)?;
    let guard = Guard::new(device).map_err(told)?;
    let outs: Vec<Memory<f32>> = layers
        .iter()
        .map(|(layer, _)| poisoned(device, rows * layer.linear.n))
        .collect::<Result<_, _>>()?;
    let calls: Vec<LinearCall<'_>> = layers
        .iter()
        .zip(&outs)
        .map(|((layer, _), out)| LinearCall {
            weights: &layer.linear,
            out,
            check: 5,
        })
        .collect();
    linear(
        device,
        |_| Ok(path),
        &x_on,
        rows,
        &calls,
        &mut activations,
        &guard,
    )
    .map_err(|error| format!("{what}: {error}"))?;
    for ((layer, expected), out) in layers.iter().zip(&outs) {
        let halves;
        let (expected, tolerance) = match path {
            LinearPath::A16Half2 => {
                halves = in_halves(layer, x, rows);
                (&halves, 3e-6)
            }
            // A value between two integers may round either way: of 128 values one is up to 4e-4 of the sum.
            _ if path.takes_a8() => (&expected.rounded, 5e-4),
            _ => (&expected.exact, 3e-6),
        };
        let actual = download(device, out, rows * layer.linear.n)?;
        close(what, &actual, expected.iter().copied(), tolerance)?;
    }
    if let Some(found) = guard.read(device).map_err(told)? {
        return Err(format!(
            "{what}: the guard found {found:?} in finite numbers"
        ));
    }
    Ok(())
}

pub fn quantised(device: &Device, random: &mut Random) -> Result<(), String> {
    let mut cases = Vec::new();
    for bits in [2, 3, 4, 8] {
        for (k, n, group) in [
            (128, 64, 128),
            (96, 40, 32),
            (320, 100, 64),
            (1024, 264, 128),
            (136, 9, 1 << 20),
        ] {
            for (shuffled, symmetric) in
                [(false, true), (false, false), (true, true), (true, false)]
            {
                cases.push(Kind {
                    bits,
                    k,
                    n,
                    group,
                    shuffled,
                    symmetric,
                });
            }
        }
    }
    for kind in cases {
        let layer = layer(device, random, kind)?;
        for rows in [1, 2, 3, 5, 8, 9, 17, 33, 70, 130] {
            let mut x = random.floats(rows * kind.k);
            for (row, x) in x.chunks_mut(kind.k).enumerate() {
                let size = [1.0, 1e5, 1e-6][row % 3];
                x.iter_mut().for_each(|x| *x *= size);
            }
            let expected = expected(&layer, &x, rows);
            for path in paths(device) {
                let what = format!("{path}, {rows} rows, {kind:?}");
                check_product(device, path, &[(&layer, &expected)], &x, rows, &what)?;
            }
        }
    }
    Ok(())
}

/// Activations of all magnitudes in one row, and rows of the largest and the smallest beside each
/// other: no f16 overflows, and what the splitting loses stays within its bound.
pub fn far_apart(device: &Device, random: &mut Random) -> Result<(), String> {
    let rows = 21;
    for (bits, group) in [(2, 32), (3, 128), (4, 64), (4, 128), (8, 128)] {
        let kind = Kind {
            bits,
            k: 400,
            n: 75,
            group,
            shuffled: true,
            symmetric: false,
        };
        let layer = layer(device, random, kind)?;
        let mut x = random.floats(rows * kind.k);
        for (row, x) in x.chunks_mut(kind.k).enumerate() {
            let size = [1.0, 1e30, 1e-30, 0.0][row % 4];
            for x in x {
                *x *= size * 10f32.powf(5.0 * random.unit());
            }
        }
        let mut expected = expected(&layer, &x, rows);
        for (row, x) in x.chunks(kind.k).enumerate() {
            let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for column in 0..kind.n {
                let weights = layer.values[column..].iter().step_by(kind.n);
                let weights: f64 = weights.map(|weight| weight.abs()).sum();
                let lost = 2f64.powi(-39) * f64::from(largest) * weights;
                expected.exact[row * kind.n + column].1 += lost / 3e-6;
            }
        }
        for path in [LinearPath::F32, LinearPath::A16Half2, LinearPath::A16Mma] {
            if paths(device).any(|has| has == path) {
                let what = format!("{path}, {kind:?}");
                check_product(device, path, &[(&layer, &expected)], &x, rows, &what)?;
            }
        }
    }
    Ok(())
}

/// Layers of one launch may have different widths.
pub fn grouped(device: &Device, random: &mut Random) -> Result<(), String> {
    for bits in [4, 8] {
        let kind = Kind {
            bits,
            k: 256,
            n: 72,
            group: 64,
            shuffled: false,
            symmetric: true,
        };
        let layers = [72, 8, 33].map(|n| layer(device, random, Kind { n, ..kind }));
        let [a, b, c] = layers;
        let (a, b, c) = (a?, b?, c?);
        for rows in [1, 4, 40, 100] {
            let x = random.floats(rows * kind.k);
            let [for_a, for_b, for_c] = [&a, &b, &c].map(|layer| expected(layer, &x, rows));
            let (a, b, c) = ((&a, &for_a), (&b, &for_b), (&c, &for_c));
            for path in paths(device) {
                let what = format!("{path}, group of 3, {rows} rows");
                check_product(device, path, &[a, b, c], &x, rows, &what)?;
                check_product(device, path, &[b, a], &x, rows, &what)?;
            }
        }
    }
    Ok(())
}

pub fn dense(device: &Device, random: &mut Random) -> Result<(), String> {
    for (k, n) in [(96, 40), (128, 288), (1000, 77), (7, 5), (3584, 130)] {
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            let plain = random.floats(n * k);
            let mut values = vec![0.0; k * n];
            let mut bytes: Vec<u8> = Vec::new();
            for (at, &value) in plain.iter().enumerate() {
                let kept = match dtype {
                    Dtype::F16 => {
                        bytes.extend(f16::from_f32(value).to_le_bytes());
                        f16::from_f32(value).to_f64()
                    }
                    Dtype::Bf16 => {
                        bytes.extend(half::bf16::from_f32(value).to_le_bytes());
                        half::bf16::from_f32(value).to_f64()
                    }
                    Dtype::F32 => {
                        bytes.extend(value.to_le_bytes());
                        f64::from(value)
                    }
                };
                values[at % k * n + at / k] = kept;
            }
            let bias = (random.below(2) == 1).then(|| random.floats(n));
            let mut staging = DenseStaging::new(device, n, k * dtype.bytes()).map_err(told)?;
            staging.write_rows(0, &bytes).map_err(told)?;
            let weights = DenseWeights {
                dtype,
                bytes: Arc::new(staging.finish().map_err(told)?),
            };
            let bias_on = bias.as_ref().map(|bias| device.upload(bias, "a test"));
            let bias_on = bias_on.transpose().map_err(told)?;
            let on_card = Linear {
                k,
                n,
                weights: Weights::Dense(weights),
                bias: bias_on,
            };
            let layer = Layer {
                linear: on_card,
                values,
                codes: Vec::new(),
                scales: Vec::new(),
                bias,
                group_of_row: vec![0; k],
            };
            for rows in [1, 2, 3, 5, 8, 9, 40, 70] {
                let x = random.floats(rows * k);
                let expected = expected(&layer, &x, rows);
                for path in [LinearPath::DenseGemv, LinearPath::DenseGemm] {
                    let what = format!("{path}, {dtype}, ({k}, {n}), {rows} rows");
                    check_product(device, path, &[(&layer, &expected)], &x, rows, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// What is not finite is noted where it arose, and the first of several counts.
pub fn guard(device: &Device, random: &mut Random) -> Result<(), String> {
    let kind = Kind {
        bits: 4,
        k: 128,
        n: 24,
        group: 128,
        shuffled: false,
        symmetric: true,
    };
    let layer = layer(device, random, kind)?;
    let rows = 3;
    for path in paths(device) {
        let mut x = random.floats(rows * kind.k);
        x[kind.k + 5] = f32::INFINITY;
        let x_on = device.upload(&x, "a test").map_err(told)?;
        let mut activations = Activations::new(device, rows, 1).map_err(told)?;
        let guard = Guard::new(device).map_err(told)?;
        for check in [9, 4, 7] {
            let out = poisoned(device, rows * kind.n)?;
            let call = LinearCall {
                weights: &layer.linear,
                out: &out,
                check,
            };
            linear(
                device,
                |_| Ok(path),
                &x_on,
                rows,
                &[call],
                &mut activations,
                &guard,
            )
            .map_err(told)?;
            activations.forget();
        }
        match guard.read(device).map_err(told)? {
            Some((4, element)) if element / kind.n == 1 => {}
            other => return Err(format!("{path}: the guard says {other:?}")),
        }
    }
    Ok(())
}
