//! Linear layers: every path against the reference, the reference against plain codes, and the
//! promise that a row's bits depend on nothing but the row.

mod common;

use common::{QuantCase, Random, Zeros, assert_close, assert_same_bits, dense, linear_paths};
use secondwind_kernels::cpu::{LinearScratch, linear};
use secondwind_kernels::pool::ThreadPool;
use secondwind_kernels::reference;
use secondwind_kernels::select::LinearPath;
use secondwind_kernels::weights::{Dtype, LinearWeights};

const TOLERANCE: f32 = 2e-6;

struct Shard {
    weights: LinearWeights,
    what: String,
}

/// Bits x group sizes x act-order x zeros x odd cuts.
fn shards(seed: u64) -> Vec<Shard> {
    let mut random = Random(seed);
    let mut shards = Vec::new();
    for bits in [2, 3, 4, 8] {
        for (index, group) in [32, 64, 128, 512].into_iter().enumerate() {
            for act_order in [false, true] {
                let zeros = [Zeros::Centre, Zeros::Random, Zeros::Extreme]
                    [(index + usize::from(act_order)) % 3];
                let n = 1 + random.below(100);
                let case = QuantCase::new(&mut random, bits, (512, n), group, act_order, zeros);
                let start = [0, 5, 37, 64][index];
                let k = [512, 300, 101, 129][index].min(512 - start);
                let window = [512, 64, 7, 33][random.below(4)];
                let weights = case.shard(start, k, window);
                let what = format!(
                    "seed {seed}, {}, group {group}, {zeros:?}, rows {start}..{}, window {window}",
                    weights.describe(),
                    start + k
                );
                check_dequantisation(&case, &weights, start, &what);
                shards.push(Shard { weights, what });
            }
        }
    }
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (k, n) in [(1, 1), (24, 16), (333, 47), (130, 130)] {
            let (weights, values) = dense(&mut random, dtype, k, n);
            for column in 0..n {
                let got = reference::dequantise_column(&weights, column);
                let expected = &values[column * k..][..k];
                assert!(
                    got.iter().zip(expected).all(|(a, b)| *a == f64::from(*b)),
                    "{dtype}"
                );
            }
            shards.push(Shard {
                what: format!("seed {seed}, {}", weights.describe()),
                weights,
            });
        }
    }
    shards
}

fn check_dequantisation(case: &QuantCase, weights: &LinearWeights, start: usize, what: &str) {
    for column in 0..case.n {
        for (offset, got) in reference::dequantise_column(weights, column)
            .into_iter()
            .enumerate()
        {
            assert_eq!(
                got,
                case.weight(start + offset, column),
                "{what}: ({offset}, {column})"
            );
        }
    }
}

fn run(weights: &LinearWeights, path: LinearPath, x: &[f32], threads: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / weights.k() * weights.n()];
    let pool = ThreadPool::new(threads).unwrap();
    linear(weights, path, x, &mut out, &mut LinearScratch::new(), &pool).unwrap();
    out
}

#[test]
fn every_path_agrees_with_the_reference() {
    for Shard { weights, what } in shards(1) {
        let mut random = Random(weights.k() as u64);
        for rows in [1, 2, 3, 4, 5, 13, 40] {
            let x = random.floats(rows * weights.k());
            let mut expected = vec![f32::NAN; rows * weights.n()];
            reference::linear(&weights, &x, &mut expected).unwrap();
            for path in linear_paths() {
                let got = run(&weights, path, &x, 2);
                assert_close(
                    &got,
                    &expected,
                    TOLERANCE,
                    &format!("{path}, {rows} rows, {what}"),
                );
            }
        }
    }
}

#[test]
fn bits_of_a_row_do_not_depend_on_rows_place_or_threads() {
    for Shard { weights, what } in shards(2) {
        let (k, n) = (weights.k(), weights.n());
        let mut random = Random(n as u64);
        let x = random.floats(40 * k);
        for path in linear_paths() {
            let alone: Vec<f32> = x
                .chunks(k)
                .flat_map(|row| run(&weights, path, row, 1))
                .collect();
            for rows in 1..=40 {
                let first = random.below(41 - rows);
                let threads = 1 + rows % 3;
                let got = run(&weights, path, &x[first * k..][..rows * k], threads);
                let what = format!("{path}, rows {first} + {rows}, {threads} threads, {what}");
                assert_same_bits(&got, &alone[first * n..][..rows * n], &what);
            }
        }
    }
}

#[test]
fn bits_survive_the_split_of_long_prefills() {
    let mut random = Random(3);
    let case = QuantCase::new(&mut random, 4, (160, 33), 32, true, Zeros::Random);
    let weights = case.shard(5, 150, 64);
    let x = random.floats(600 * 150);
    for path in linear_paths() {
        let whole = run(&weights, path, &x, 2);
        let pieces: Vec<f32> = x
            .chunks(97 * 150)
            .flat_map(|x| run(&weights, path, x, 1))
            .collect();
        assert_same_bits(&whole, &pieces, path.name());
    }
}

#[test]
fn avx2_and_avx512_give_the_same_bits() {
    if !linear_paths().contains(&LinearPath::CpuAvx512) {
        return;
    }
    for Shard { weights, what } in shards(4) {
        for rows in [1, 9] {
            let x = Random(5).floats(rows * weights.k());
            let narrow = run(&weights, LinearPath::CpuAvx2, &x, 1);
            assert_same_bits(&run(&weights, LinearPath::CpuAvx512, &x, 1), &narrow, &what);
        }
    }
}

#[test]
fn wrong_lengths_are_refused_by_name() {
    let (weights, _) = dense(&mut Random(6), Dtype::F32, 8, 3);
    let pool = ThreadPool::new(1).unwrap();
    for path in linear_paths() {
        let mut scratch = LinearScratch::new();
        let error = linear(
            &weights,
            path,
            &[0.0; 9],
            &mut [0.0; 3],
            &mut scratch,
            &pool,
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("x has 9 elements, expected 8")
        );
        let error = linear(
            &weights,
            path,
            &[0.0; 16],
            &mut [0.0; 3],
            &mut scratch,
            &pool,
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("out has 3 elements, expected 6")
        );
        linear(&weights, path, &[], &mut [], &mut scratch, &pool).unwrap();
    }
}
