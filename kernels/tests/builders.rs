//! Builders: bytes as foretold, every row exactly once, and refusals that name what is wrong.

mod common;

use common::{QuantCase, Random, Zeros, dense};
use half::f16;
use secondwind_kernels::KernelError;
use secondwind_kernels::weights::{
    DenseBuilder, Dtype, QuantBuilder, QuantSpec, dense_bytes, quant_bytes,
};

#[test]
fn quantised_bytes_are_foretold() {
    let mut random = Random(1);
    for bits in [2, 3, 4, 8] {
        for act_order in [false, true] {
            for zeros in [Zeros::Centre, Zeros::Extreme] {
                let case = QuantCase::new(&mut random, bits, (160, 37), 32, act_order, zeros);
                let (start, k) = (5, 150);
                let weights = case.shard(start, k, 64);
                let mut run_rows = [0; 5];
                for &group in &case.g_idx[start..start + k] {
                    run_rows[group as usize] += 1;
                }
                let bias = case.bias.is_some();
                let foretold =
                    quant_bytes(bits, 37, &run_rows, act_order, zeros == Zeros::Centre, bias);
                assert_eq!(weights.bytes(), foretold.total, "{}", weights.describe());
                assert!(foretold.padding < foretold.total / 2);
            }
        }
    }
}

#[test]
fn dense_bytes_are_foretold() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (weights, _) = dense(&mut Random(2), dtype, 37, 21);
        assert_eq!(weights.bytes(), dense_bytes(dtype, 37, 21, true));
    }
}

#[test]
fn aligned_windows_and_single_rows_give_the_same_layer() {
    let mut random = Random(3);
    for bits in [2, 3, 4, 8] {
        let case = QuantCase::new(&mut random, bits, (96, 40), 32, false, Zeros::Random);
        let at_once = case.shard(0, 96, 96);
        let by_row = case.shard(0, 96, 1);
        for column in 0..40 {
            assert_eq!(
                secondwind_kernels::reference::dequantise_column(&at_once, column),
                secondwind_kernels::reference::dequantise_column(&by_row, column),
            );
        }
    }
}

fn spec<'a>(scales: &'a [f16], zeros: &'a [u16], groups: &'a [u32]) -> QuantSpec<'a> {
    QuantSpec {
        bits: 4,
        k: groups.len(),
        n: 2,
        group_of_row: groups,
        scales,
        zeros,
        bias: None,
    }
}

#[test]
fn bad_layers_are_refused_by_name() {
    let one = f16::ONE;
    let groups = [0u32; 8];
    let (scales, zeros) = ([one; 2], [8; 2]);
    let good = spec(&scales, &zeros, &groups);
    assert!(QuantBuilder::new(good).is_ok());
    let cases: [(QuantSpec<'_>, &str); 7] = [
        (
            QuantSpec { bits: 5, ..good },
            "bits is 5, must be 2, 3, 4 or 8",
        ),
        (QuantSpec { n: 0, ..good }, "(8, 0) is empty"),
        (
            QuantSpec { k: 9, ..good },
            "group_of_row has 8 elements, expected 9",
        ),
        (
            QuantSpec {
                zeros: &[8; 3],
                ..good
            },
            "zeros has 3 elements, expected 2",
        ),
        (
            QuantSpec {
                zeros: &[8, 17],
                ..good
            },
            "zeros[1] is 17, must be below 17",
        ),
        (
            QuantSpec {
                group_of_row: &[0, 0, 0, 1, 0, 0, 0, 0],
                ..good
            },
            "group_of_row[3] is 1",
        ),
        (
            QuantSpec {
                scales: &[one, f16::NAN],
                ..good
            },
            "scales[1] is not finite",
        ),
    ];
    for (spec, expected) in cases {
        let message = QuantBuilder::new(spec).unwrap_err().to_string();
        assert!(
            message.contains(expected),
            "{message:?} should say {expected:?}"
        );
    }
}

#[test]
fn every_row_is_written_exactly_once() {
    let groups = [0u32; 16];
    let (scales, zeros) = ([f16::ONE; 2], [8; 2]);
    let mut builder = QuantBuilder::new(spec(&scales, &zeros, &groups)).unwrap();
    builder.write_words(0, 0, 8, &[0; 2]).unwrap();
    let again = builder.write_words(7, 0, 2, &[0; 4]).unwrap_err();
    assert!(
        matches!(
            again,
            KernelError::Coverage {
                first: 7,
                end: 9,
                ..
            }
        ),
        "{again}"
    );
    let short = builder.write_words(8, 0, 8, &[0; 3]).unwrap_err();
    assert!(
        short
            .to_string()
            .contains("words has 3 elements, expected 2"),
        "{short}"
    );
    let few = builder.write_words(8, 1, 8, &[0; 2]).unwrap_err();
    assert!(few.to_string().contains("1 + 8 rows need 2"), "{few}");
    let past = builder.write_words(8, 0, usize::MAX, &[0; 2]).unwrap_err();
    assert!(past.to_string().contains("of 16"), "{past}");
    let missing = builder.finish().unwrap_err();
    assert_eq!(
        missing.to_string(),
        "quantised weights: rows 8 to 16 were never written"
    );

    let mut builder = DenseBuilder::new(Dtype::F16, 3, 2, None).unwrap();
    assert!(builder.write_columns(0, &[0; 7]).is_err());
    assert!(builder.write_columns(1, &[0; 12]).is_err());
    builder.write_columns(1, &[0; 6]).unwrap();
    assert!(builder.write_columns(1, &[0; 6]).is_err());
    let missing = builder.finish().unwrap_err();
    assert_eq!(
        missing.to_string(),
        "dense weights: columns 0 to 1 were never written"
    );
}
