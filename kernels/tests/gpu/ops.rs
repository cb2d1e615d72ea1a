//! Small operations and sampling.

use std::sync::Arc;

use half::f16;
use secondwind_kernels::{
    cuda::*,
    logits::{Adjustment, RowMasks},
    weights::Dtype,
};

use crate::{close, common::Random, download, poisoned, told};

pub fn embed(device: &Device, random: &mut Random) -> Result<(), String> {
    for (rows, width, tokens) in [(7, 96, 1), (300, 100, 37), (50, 5120, 9), (3, 7, 5)] {
        let table: Vec<f32> = random.floats(rows * width);
        let halves: Vec<u8> = table
            .iter()
            .flat_map(|&value| f16::from_f32(value).to_le_bytes())
            .collect();
        let bytes = Arc::new(device.upload(&halves, "a test").map_err(told)?);
        let dtype = Dtype::F16;
        let table_on = Table {
            dtype,
            rows,
            width,
            bytes,
        };
        // Some ids lie before and behind the range.
        let first_id = 10;
        let ids: Vec<u32> = (0..tokens)
            .map(|_| random.below(rows + 20) as u32)
            .collect();
        let ids_on = device.upload(&ids, "a test").map_err(told)?;
        let out = poisoned(device, tokens * width)?;
        secondwind_kernels::cuda::embed(device, &table_on, first_id, &ids_on, tokens, &out)
            .map_err(told)?;
        let expected: Vec<(f64, f64)> = ids
            .iter()
            .flat_map(|&id| {
                let row = id
                    .checked_sub(first_id)
                    .map(|row| row as usize)
                    .filter(|row| *row < rows);
                let table = &table;
                (0..width).map(move |column| {
                    let value = row.map_or(0.0, |row| {
                        f16::from_f32(table[row * width + column]).to_f64()
                    });
                    (value, 1.0)
                })
            })
            .collect();
        let values = download(device, &out, tokens * width)?;
        close("embed", &values, expected.into_iter(), 0.0)?;
        let picks: Vec<u32> = (0..3).map(|_| random.below(tokens) as u32).collect();
        let picks_on = device.upload(&picks, "a test").map_err(told)?;
        let taken = poisoned(device, 3 * width)?;
        take_rows(device, &out, &picks_on, 3, width, &taken).map_err(told)?;
        let expected: Vec<(f64, f64)> = picks
            .iter()
            .flat_map(|&row| values[row as usize * width..][..width].iter())
            .map(|&value| (f64::from(value), 1.0))
            .collect();
        close(
            "take_rows",
            &download(device, &taken, 3 * width)?,
            expected.into_iter(),
            0.0,
        )?;
    }
    Ok(())
}

pub fn rms_norm(device: &Device, random: &mut Random) -> Result<(), String> {
    for (rows, width) in [(1, 96), (3, 5120), (17, 896), (2, 100), (9, 64), (1, 8192)] {
        let (x, delta) = (random.floats(rows * width), random.floats(rows * width));
        let weight = random.floats(width);
        for add in [false, true] {
            let x_on = device.upload(&x, "a test").map_err(told)?;
            let delta_on = device.upload(&delta, "a test").map_err(told)?;
            let weight_on = device.upload(&weight, "a test").map_err(told)?;
            let out = poisoned(device, rows * width)?;
            let superblocks = width.div_ceil(128);
            let a8 = Quantised::new(device, rows, superblocks).map_err(told)?;
            let guard = Guard::new(device).map_err(told)?;
            let delta_on = add.then_some(&delta_on);
            let mut sum = x.clone();
            if add {
                secondwind_kernels::cpu::add(&mut sum, &delta).map_err(told)?;
            }
            let mut expected = vec![0.0; rows * width];
            secondwind_kernels::cpu::rms_norm(&sum, &weight, 1e-6, &mut expected).map_err(told)?;
            for fused in [false, true] {
                let left = Destination {
                    f32: Some(&out),
                    a8: fused.then_some(&a8),
                };
                // The residual is added to once.
                let delta_on = delta_on.filter(|_| !fused);
                add_rms_norm(
                    device, &x_on, delta_on, &weight_on, rows, width, 1e-6, left, &guard, 1,
                )
                .map_err(told)?;
                let what = format!("rms_norm ({rows}, {width}), add {add}, fused {fused}");
                let wanted = expected.iter().map(|&value| (f64::from(value), 1.0));
                close(&what, &download(device, &out, rows * width)?, wanted, 1e-5)?;
                if fused {
                    let d = download(device, &a8.d, rows.next_multiple_of(8) * superblocks * 4)?;
                    check_scales(&what, &expected, rows, width, &d)?;
                }
            }
        }
    }
    Ok(())
}

/// Each block's scale is its largest magnitude over 127, and 0 in rows that are padding.
pub fn check_scales(
    what: &str,
    values: &[f32],
    rows: usize,
    width: usize,
    d: &[f32],
) -> Result<(), String> {
    let superblocks = width.div_ceil(128);
    for row in 0..rows.next_multiple_of(8) {
        for block in 0..superblocks * 4 {
            let first = (block * 32).min(width);
            let last = (first + 32).min(width);
            let largest = (first..last)
                .filter(|_| row < rows)
                .map(|column| values[row * width + column].abs())
                .fold(0.0, f32::max);
            let at = ((row / 8 * superblocks + block / 4) * 8 + row % 8) * 4 + block % 4;
            let expected = [(f64::from(largest / 127.0), f64::from(largest / 127.0))];
            close(
                &format!("{what}, scale of row {row}, block {block}"),
                &d[at..=at],
                expected.into_iter(),
                1e-5,
            )?;
        }
    }
    Ok(())
}

pub fn silu(device: &Device, random: &mut Random) -> Result<(), String> {
    for (rows, width) in [(1, 160), (5, 18944), (33, 100), (8, 7)] {
        let (gate, up) = (random.floats(rows * width), random.floats(rows * width));
        let gate_on = device.upload(&gate, "a test").map_err(told)?;
        let up_on = device.upload(&up, "a test").map_err(told)?;
        let guard = Guard::new(device).map_err(told)?;
        let superblocks = width.div_ceil(128);
        let a8 = Quantised::new(device, rows, superblocks).map_err(told)?;
        let mut expected = gate.clone();
        secondwind_kernels::cpu::silu_mul(&mut expected, &up).map_err(told)?;
        let left = Destination {
            f32: None,
            a8: Some(&a8),
        };
        silu_mul(device, &gate_on, &up_on, rows, width, left, &guard, 1).map_err(told)?;
        let d = download(device, &a8.d, rows.next_multiple_of(8) * superblocks * 4)?;
        check_scales("silu_mul", &expected, rows, width, &d)?;
        let left = Destination {
            f32: Some(&gate_on),
            a8: None,
        };
        silu_mul(device, &gate_on, &up_on, rows, width, left, &guard, 1).map_err(told)?;
        let wanted = expected
            .iter()
            .map(|&value| (f64::from(value), f64::from(value).abs()));
        close(
            "silu_mul",
            &download(device, &gate_on, rows * width)?,
            wanted,
            2e-5,
        )?;
    }
    Ok(())
}

pub fn sampling(device: &Device, random: &mut Random) -> Result<(), String> {
    for (rows, width) in [(1, 288), (3, 1408), (2, 151_936), (1, 5), (4, 8193)] {
        let mut logits = random.floats(rows * width);
        // Ties, bans and zeros of either sign.
        for _ in 0..width / 3 {
            let at = random.below(rows * width);
            logits[at] = [f32::NEG_INFINITY, 0.5, -0.0, 0.0][random.below(4)];
        }
        let logits_on = device.upload(&logits, "a test").map_err(told)?;
        let scratch = SampleScratch::new(device, rows, width).map_err(told)?;
        let first_id = 17;
        let requests: Vec<RowRequest> = (0..rows)
            .map(|row| RowRequest {
                temperature: [0.0, 0.7, 1.0, 2.5][row % 4],
                target: (row % 2 == 0).then(|| first_id + random.below(width) as u32),
            })
            .collect();
        let reduced =
            reduce_rows(device, &logits_on, width, first_id, &requests, &scratch).map_err(told)?;
        for ((logits, request), (row, target)) in logits.chunks(width).zip(&requests).zip(reduced) {
            let expected =
                secondwind_kernels::cpu::reduce_row(logits, request.temperature, first_id, 256);
            let what = format!("sampling ({rows}, {width}) at {}", request.temperature);
            if row.candidates != expected.candidates || row.max != expected.max {
                return Err(format!("{what}: other candidates"));
            }
            for (actual, expected) in [
                (row.sum_exp, expected.sum_exp),
                (row.sum_exp_t, expected.sum_exp_t),
                (row.sum_x_exp_t, expected.sum_x_exp_t),
            ] {
                let error = (actual - expected).abs();
                if error.is_nan() || error > 2e-5 * expected.abs() {
                    return Err(format!("{what}: a sum is {actual} and not {expected}"));
                }
            }
            let wanted = request.target.map(|id| logits[(id - first_id) as usize]);
            if target != wanted {
                return Err(format!("{what}: target {target:?} and not {wanted:?}"));
            }
        }
    }
    Ok(())
}

pub fn adjusting(device: &Device, random: &mut Random) -> Result<(), String> {
    // The last takes more than one launch.
    for (rows, width, count) in [
        (1, 5, 3),
        (2, 1000, 700),
        (3, 151_936, 5000),
        (1, 151_936, 70_000),
    ] {
        let logits: Vec<f32> = random
            .floats(rows * width)
            .iter()
            .map(|x| x * 20.0)
            .collect();
        let scratch = SampleScratch::new(device, rows, width).map_err(told)?;
        let stride = (rows * width / count) as u32;
        let adjustments: Vec<Adjustment> = (0..count as u32)
            .map(|index| Adjustment {
                element: index * stride,
                bias: [0.0, 1.5, -100.0, f32::NEG_INFINITY][random.below(4)],
                penalty: [1.0, 1.05, 0.3, 7.0][random.below(4)],
                subtract: [0.0, 0.1, -2.0, 31.7][random.below(4)],
            })
            .collect();
        let mut expected = logits.clone();
        let mut expected_originals = vec![0.0; count];
        secondwind_kernels::cpu::adjust_logits(
            &mut expected,
            &adjustments,
            Some(&mut expected_originals),
        )
        .map_err(told)?;
        for keep in [false, true] {
            let logits_on = device.upload(&logits, "a test").map_err(told)?;
            let mut originals = vec![f32::NAN; count];
            let kept = keep.then_some(originals.as_mut_slice());
            adjust_logits(device, &logits_on, &adjustments, kept, &scratch).map_err(told)?;
            let got = download(device, &logits_on, rows * width)?;
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let what = format!("adjust_logits ({rows}, {width}), {count} changes");
            if bits(&got) != bits(&expected) {
                return Err(format!("{what}: other logits"));
            }
            if keep && bits(&originals) != bits(&expected_originals) {
                return Err(format!("{what}: other originals"));
            }
        }
    }
    Ok(())
}

pub fn masking(device: &Device, random: &mut Random) -> Result<(), String> {
    for (rows, width) in [(1, 5), (2, 1000), (4, 151_936), (3, 75_969)] {
        let logits = random.floats(rows * width);
        let scratch = SampleScratch::new(device, rows, width).map_err(told)?;
        let rows_masked: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).collect();
        let words = rows_masked.len() * width.div_ceil(32);
        let masks = RowMasks {
            words: (0..words)
                .map(|_| [0, u32::MAX, random.below(1 << 31) as u32][random.below(3)])
                .collect(),
            rows: rows_masked,
        };
        let mut expected = logits.clone();
        secondwind_kernels::cpu::mask_logits(&mut expected, width, &masks).map_err(told)?;
        let logits_on = device.upload(&logits, "a test").map_err(told)?;
        mask_logits(device, &logits_on, width, &masks, &scratch).map_err(told)?;
        let got = download(device, &logits_on, rows * width)?;
        if got != expected {
            return Err(format!("mask_logits ({rows}, {width}): other logits"));
        }
    }
    Ok(())
}
