//! The small ops against their plain twins over odd sizes, and their edges.

mod common;

use common::{Random, assert_close, assert_same_bits, dense, dense_data};
use secondwind_kernels::embedding::{EmbeddingBuilder, EmbeddingSource, EmbeddingTable};
use secondwind_kernels::heads::HeadRows;
use secondwind_kernels::logits::{Adjustment, RowMasks, first_non_finite, target_logit};
use secondwind_kernels::weights::Dtype;
use secondwind_kernels::{cpu, reference};

#[test]
fn norms_agree_with_the_twin_and_with_themselves_batched() {
    let mut random = Random(1);
    for width in [1, 15, 16, 64, 100, 896, 3584] {
        let rows = 1 + random.below(5);
        let (x, weight) = (random.floats(rows * width), random.floats(width));
        let (mut got, mut expected) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        cpu::rms_norm(&x, &weight, 1e-6, &mut got).unwrap();
        reference::rms_norm(&x, &weight, 1e-6, &mut expected).unwrap();
        assert_close(&got, &expected, 1e-6, &format!("rms_norm of {width}"));
        let mut alone = vec![f32::NAN; width];
        cpu::rms_norm(&x[..width], &weight, 1e-6, &mut alone).unwrap();
        assert_same_bits(&got[..width], &alone, "rms_norm alone");
    }
    for head_dim in [16, 40, 64, 128] {
        let layout = HeadRows {
            rows: 3,
            heads: 5,
            head_dim,
            row_stride: 5 * head_dim + 7,
        };
        let x = random.floats(3 * layout.row_stride);
        let weight = random.floats(head_dim);
        let (mut got, mut expected) = (x.clone(), x.clone());
        cpu::head_norm(&mut got, layout, &weight, 1e-6).unwrap();
        reference::head_norm(&mut expected, layout, &weight, 1e-6).unwrap();
        assert_close(&got, &expected, 1e-6, "head_norm");
        assert_eq!(
            got[layout.width()..layout.row_stride],
            x[layout.width()..layout.row_stride]
        );
    }
}

#[test]
fn rope_rotates_pairs_half_a_head_apart() {
    let mut random = Random(2);
    for (head_dim, half) in [(16, 8), (64, 32), (128, 64), (64, 8), (6, 3)] {
        let layout = HeadRows {
            rows: 4,
            heads: 3,
            head_dim,
            row_stride: 3 * head_dim + 1,
        };
        let x = random.floats(4 * layout.row_stride);
        let angles = random.floats(4 * half);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let (mut got, mut expected) = (x.clone(), x.clone());
        cpu::rope(&mut got, layout, &cos, &sin).unwrap();
        reference::rope(&mut expected, layout, &cos, &sin).unwrap();
        assert_close(&got, &expected, 1e-6, "rope");
        assert_eq!(
            got[2 * half..head_dim],
            x[2 * half..head_dim],
            "unrotated rest"
        );
        assert!(cpu::rope(&mut got, layout, &cos, &sin[1..]).is_err());
    }
    let mut x = [1.0, 2.0, 3.0, 4.0];
    cpu::rope(&mut x, HeadRows::packed(1, 1, 4), &[0.0, 1.0], &[1.0, 0.0]).unwrap();
    assert_eq!(x, [-3.0, 2.0, 1.0, 4.0]);
}

#[test]
fn silu_and_add_agree_with_their_twins() {
    let mut random = Random(3);
    for length in [1, 16, 33, 4864] {
        let gate: Vec<f32> = random.floats(length).iter().map(|x| x * 30.0).collect();
        let up = random.floats(length);
        let (mut got, mut expected) = (gate.clone(), gate.clone());
        cpu::silu_mul(&mut got, &up).unwrap();
        reference::silu_mul(&mut expected, &up).unwrap();
        for (got, expected) in got.iter().zip(&expected) {
            assert!(
                (got - expected).abs() <= 1e-6 * expected.abs() + 1e-12,
                "{got} {expected}"
            );
        }
        assert!(cpu::silu_mul(&mut got, &up[1..]).is_err());

        let mut sum = gate.clone();
        cpu::add(&mut sum, &up).unwrap();
        assert!(
            sum.iter()
                .zip(&gate)
                .zip(&up)
                .all(|((s, a), b)| *s == a + b)
        );
        assert!(cpu::add(&mut sum, &up[1..]).is_err());
    }
    let mut edge = [-200.0, 0.0, 200.0];
    cpu::silu_mul(&mut edge, &[1.0; 3]).unwrap();
    assert_eq!(edge, [0.0, 0.0, 200.0]);
}

fn table(
    random: &mut Random,
    dtype: Dtype,
    rows: usize,
    hidden: usize,
) -> (EmbeddingTable, Vec<f32>) {
    let (data, values) = dense_data(random, dtype, rows * hidden);
    let mut builder = EmbeddingBuilder::new(dtype, rows, hidden).unwrap();
    let cut = random.below(rows);
    let row = hidden * dtype.bytes();
    builder.write_rows(0, &data[..cut * row]).unwrap();
    builder.write_rows(cut, &data[cut * row..]).unwrap();
    assert!(
        builder.write_rows(rows - 1, &data[..row]).is_err(),
        "written twice"
    );
    (builder.finish().unwrap(), values)
}

#[test]
fn embeddings_are_exact_and_foreign_ids_give_zeros() {
    let mut random = Random(4);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (rows, hidden) = (11, 37);
        let (table, values) = table(&mut random, dtype, rows, hidden);
        assert_eq!(
            table.bytes(),
            EmbeddingTable::bytes_for(dtype, rows, hidden)
        );
        let (tied, tied_values) = dense(&mut random, dtype, hidden, rows);
        let sources = [
            (EmbeddingSource::Table(&table), values),
            (EmbeddingSource::Tied(&tied), tied_values),
        ];
        for (source, values) in sources {
            let mut out = vec![f32::NAN; 4 * hidden];
            cpu::embed(source, 100, &[103, 99, 111, 110], &mut out).unwrap();
            assert_same_bits(&out[..hidden], &values[3 * hidden..][..hidden], "row 3");
            assert!(out[hidden..3 * hidden].iter().all(|x| *x == 0.0));
            assert_same_bits(&out[3 * hidden..], &values[10 * hidden..], "row 10");
        }
    }
    assert!(
        EmbeddingBuilder::new(Dtype::F32, 2, 2)
            .unwrap()
            .finish()
            .is_err()
    );
}

#[test]
fn a_row_of_logits_reduces_as_a_full_sort_does() {
    let mut random = Random(5);
    for length in [1, 5, 256, 257, 1000, 20_000] {
        for (spread, temperature) in [(10.0, 1.0), (0.1, 0.5), (40.0, 2.0), (3.0, 0.0)] {
            // Rounding makes ties.
            let mut logits: Vec<f32> = random
                .floats(length)
                .iter()
                .map(|x| (x * spread * 50.0).round() / 50.0)
                .collect();
            for _ in 0..length / 10 {
                logits[random.below(length)] = f32::NEG_INFINITY;
            }
            for k in [0, 1, 256] {
                let got = cpu::reduce_row(&logits, temperature, 7, k);
                let expected = reference::reduce_row(&logits, temperature, 7, k);
                assert_eq!(got.max, expected.max);
                assert_eq!(got.candidates, expected.candidates, "{length} {spread} {k}");
                let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b;
                assert!(close(got.sum_exp, expected.sum_exp), "{got:?} {expected:?}");
                assert!(
                    close(got.sum_exp_t, expected.sum_exp_t),
                    "{temperature} {length}"
                );
                let error = (got.sum_x_exp_t - expected.sum_x_exp_t).abs();
                assert!(
                    error <= 2e-5 * expected.sum_x_exp_t.abs(),
                    "{temperature} {length}: {} {}",
                    got.sum_x_exp_t,
                    expected.sum_x_exp_t
                );
            }
        }
    }
    let banned = cpu::reduce_row(&[f32::NEG_INFINITY; 40], 1.0, 0, 256);
    assert_eq!(
        (
            banned.sum_exp,
            banned.sum_exp_t,
            banned.sum_x_exp_t,
            banned.candidates.len()
        ),
        (0.0, 0.0, 0.0, 0)
    );
    let greedy = cpu::reduce_row(&[1.0, 3.0, 3.0], 0.0, 10, 2);
    assert_eq!(greedy.candidates, [(11, 3.0), (12, 3.0)]);
    assert_eq!((greedy.sum_exp_t, greedy.sum_x_exp_t), (2.0, 0.0));
}

#[test]
fn single_logits_change_as_their_rules_say() {
    let mut random = Random(6);
    let logits: Vec<f32> = random.floats(900).iter().map(|x| x * 20.0).collect();
    let mut elements: Vec<u32> = (0..900).collect();
    elements.retain(|_| random.below(3) == 0);
    let adjustments: Vec<Adjustment> = elements
        .iter()
        .map(|&element| Adjustment {
            element,
            bias: [0.0, 1.5, -100.0, f32::NEG_INFINITY][random.below(4)],
            penalty: [1.0, 1.05, 0.3, 7.0][random.below(4)],
            subtract: [0.0, 0.1, -2.0, 31.7][random.below(4)],
        })
        .collect();
    let (mut got, mut expected) = (logits.clone(), logits.clone());
    let mut originals = vec![f32::NAN; elements.len()];
    cpu::adjust_logits(&mut got, &adjustments, Some(&mut originals)).unwrap();
    reference::adjust_logits(&mut expected, &adjustments, None).unwrap();
    for (index, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
        let same = got == expected || (got - expected).abs() <= 1e-5 * expected.abs().max(1.0);
        assert!(same, "{index}: {got} {expected}");
        if !elements.contains(&(index as u32)) {
            assert_eq!(got.to_bits(), logits[index].to_bits());
        }
    }
    for (&element, original) in elements.iter().zip(originals) {
        assert_eq!(original, logits[element as usize]);
    }
    // What is finite never becomes infinity, which would make every other token impossible.
    let far = Adjustment {
        element: 0,
        bias: 0.0,
        penalty: 0.01,
        subtract: -5.0,
    };
    assert_eq!(far.apply(f32::MAX), f32::MAX);
    assert_eq!(far.apply(4.0), 405.0);
    let outside = Adjustment {
        element: 900,
        ..far
    };
    let error = cpu::adjust_logits(&mut got, &[outside], None).unwrap_err();
    assert!(error.to_string().contains("element 900 of 900"), "{error}");
    assert!(reference::adjust_logits(&mut got, &[outside], None).is_err());
    let mut short = [0.0; 2];
    assert!(cpu::adjust_logits(&mut got, &[far], Some(&mut short)).is_err());
}

#[test]
fn masked_rows_keep_what_their_masks_say() {
    let mut random = Random(7);
    for width in [1, 31, 32, 33, 200] {
        let logits = random.floats(5 * width);
        let masks = RowMasks {
            rows: vec![0, 3],
            words: (0..2 * width.div_ceil(32))
                .map(|_| [0, u32::MAX, random.below(1 << 31) as u32][random.below(3)])
                .collect(),
        };
        let mut got = logits.clone();
        cpu::mask_logits(&mut got, width, &masks).unwrap();
        for (at, (&got, &was)) in got.iter().zip(&logits).enumerate() {
            let (row, column) = (at / width, at % width);
            let place = masks.rows.iter().position(|&masked| masked as usize == row);
            let stays = place.is_none_or(|place| {
                let words = &masks.words[place * width.div_ceil(32)..];
                words[column / 32] & (1 << (column % 32)) != 0
            });
            let expected = if stays { was } else { f32::NEG_INFINITY };
            assert_eq!(got, expected, "width {width}, row {row}, column {column}");
        }
        let outside = RowMasks {
            rows: vec![5],
            words: vec![0; width.div_ceil(32)],
        };
        let error = cpu::mask_logits(&mut got, width, &outside).unwrap_err();
        assert!(error.to_string().contains("row 5 of 5"), "{error}");
        let short = RowMasks {
            rows: vec![0],
            words: Vec::new(),
        };
        assert!(cpu::mask_logits(&mut got, width, &short).is_err());
    }
}

#[test]
fn targets_and_bad_values_are_found() {
    assert_eq!(target_logit(&[1.0, 2.0], 10, 11), Some(2.0));
    assert_eq!(target_logit(&[1.0, 2.0], 10, 9), None);
    assert_eq!(target_logit(&[1.0, 2.0], 10, 12), None);
    let mut x = vec![f32::MAX; 1000];
    assert_eq!(first_non_finite(&x), None);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[777] = bad;
        assert_eq!(first_non_finite(&x), Some(777));
    }
}
