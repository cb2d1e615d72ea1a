//! Linear layers: every path, width, grouping and order.

use std::sync::Arc;

use half::f16;
use secondwind_kernels::{
    cuda::*,
    select::{DeviceFacts, LinearPath, LinearShape, Precision, select_linear},
    weights::{Dtype, WeightFormat},
};

mod twin;

use twin::{Expected, INT8_TOLERANCE, Kind, Layer, expected, in_halves, layer};

use crate::{close, common::Random, download, poisoned, some, told};

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
            _ if path.takes_a8() => (&expected.rounded, INT8_TOLERANCE),
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
    for kind in some(cases.into_iter()) {
        let layer = layer(device, random, kind)?;
        for rows in [1, 2, 3, 5, 8, 9, 17, 33, 70, 130] {
            let mut x = random.floats(rows * kind.k);
            for (row, x) in x.chunks_mut(kind.k).enumerate() {
                let size = [1.0, 1e5, 1e-6][row % 3];
                x.iter_mut().for_each(|x| *x *= size);
            }
            let expected = expected(&layer, &x, rows);
            // The twin in halves is slow, and more rows than these the selector gives to other paths.
            let slow = |path: &LinearPath| *path == LinearPath::A16Half2 && rows > 33;
            for path in paths(device).filter(|path| !slow(path)) {
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
