//! Seeded inputs and strict comparison, shared by the tests.
#![allow(dead_code)]

use half::f16;
use secondwind_kernels::isa::CpuIsa;
use secondwind_kernels::select::{AttentionPath, LinearPath};
use secondwind_kernels::weights::{DenseBuilder, Dtype, LinearWeights, QuantBuilder, QuantSpec};

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }
}

pub fn linear_paths() -> Vec<LinearPath> {
    LinearPath::ALL
        .iter()
        .copied()
        .filter(|path| path.isa().is_some_and(CpuIsa::is_available))
        .collect()
}

pub fn attention_paths() -> Vec<AttentionPath> {
    AttentionPath::ALL
        .iter()
        .copied()
        .filter(|path| path.isa().is_some_and(CpuIsa::is_available))
        .collect()
}

pub fn has_simd() -> bool {
    CpuIsa::Avx2.is_available()
}

/// A quantised layer as a checkpoint has it, of which a shard is cut.
pub struct QuantCase {
    pub bits: u8,
    /// Rows of the whole tensor.
    pub source_rows: usize,
    pub n: usize,
    /// (source_rows)
    pub g_idx: Vec<u32>,
    pub scales: Vec<f16>,
    pub zeros: Vec<u16>,
    pub bias: Option<Vec<f32>>,
    /// (source_rows, n)
    pub codes: Vec<u8>,
    /// GPTQ words, (source_rows * bits / 32, n)
    pub words: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeros {
    Centre,
    Random,
    Extreme,
}

impl QuantCase {
    pub fn new(
        random: &mut Random,
        bits: u8,
        (source_rows, n): (usize, usize),
        group: usize,
        act_order: bool,
        zero_kind: Zeros,
    ) -> Self {
        let source_rows = source_rows.next_multiple_of(32);
        let mut g_idx: Vec<u32> = (0..source_rows).map(|row| (row / group) as u32).collect();
        if act_order {
            for i in (1..source_rows).rev() {
                g_idx.swap(i, random.below(i + 1));
            }
        }
        let groups = source_rows.div_ceil(group);
        let scales = (0..groups * n)
            .map(|_| f16::from_f32(random.unit() * 0.1))
            .collect();
        let top = 1usize << bits;
        let zeros = (0..groups * n)
            .map(|_| match zero_kind {
                Zeros::Centre => top / 2,
                Zeros::Random => random.below(top + 1),
                Zeros::Extreme => top * random.below(2),
            } as u16)
            .collect();
        let bias = (random.below(2) == 0).then(|| random.floats(n));
        let codes: Vec<u8> = (0..source_rows * n)
            .map(|_| random.below(top) as u8)
            .collect();
        let mut words = vec![0u32; source_rows * usize::from(bits) / 32 * n];
        for row in 0..source_rows {
            for column in 0..n {
                for bit in 0..usize::from(bits) {
                    let value = u32::from(codes[row * n + column]) >> bit & 1;
                    let at = row * usize::from(bits) + bit;
                    words[at / 32 * n + column] |= value << (at % 32);
                }
            }
        }
        Self {
            bits,
            source_rows,
            n,
            g_idx,
            scales,
            zeros,
            bias,
            codes,
            words,
        }
    }

    /// Shard rows `start..start + k`, written in windows of about `window` rows.
    pub fn shard(&self, start: usize, k: usize, window: usize) -> LinearWeights {
        let mut builder = QuantBuilder::new(QuantSpec {
            bits: self.bits,
            k,
            n: self.n,
            group_of_row: &self.g_idx[start..start + k],
            scales: &self.scales,
            zeros: &self.zeros,
            bias: self.bias.as_deref(),
        })
        .unwrap();
        let mut row = start;
        while row < start + k {
            let rows = window.min(start + k - row);
            let base = row / 32 * 32;
            let end = (row + rows).next_multiple_of(32);
            let word = |row: usize| row * usize::from(self.bits) / 32 * self.n;
            let words = &self.words[word(base)..word(end)];
            builder
                .write_words(row - start, row - base, rows, words)
                .unwrap();
            row += rows;
        }
        builder.finish().unwrap()
    }

    /// The weight at a source row, straight from codes, scale and zero.
    pub fn weight(&self, row: usize, column: usize) -> f64 {
        let group = self.g_idx[row] as usize * self.n + column;
        let code = f64::from(self.codes[row * self.n + column]);
        f64::from(self.scales[group].to_f32()) * (code - f64::from(self.zeros[group]))
    }
}

pub fn dense(random: &mut Random, dtype: Dtype, k: usize, n: usize) -> (LinearWeights, Vec<f32>) {
    let bias = random.floats(n);
    let (data, values) = dense_data(random, dtype, n * k);
    let mut builder = DenseBuilder::new(dtype, k, n, Some(&bias)).unwrap();
    let row = k * dtype.bytes();
    let cut = random.below(n);
    builder.write_columns(cut, &data[cut * row..]).unwrap();
    builder.write_columns(0, &data[..cut * row]).unwrap();
    (builder.finish().unwrap(), values)
}

/// `count` random elements of `dtype`: little-endian bytes and their exact values.
pub fn dense_data(random: &mut Random, dtype: Dtype, count: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut data, mut values) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let x = random.unit();
        match dtype {
            Dtype::F32 => {
                data.extend(x.to_le_bytes());
                values.push(x);
            }
            Dtype::F16 => {
                let x = f16::from_f32(x);
                data.extend(x.to_le_bytes());
                values.push(x.to_f32());
            }
            Dtype::Bf16 => {
                let x = half::bf16::from_f32(x);
                data.extend(x.to_le_bytes());
                values.push(x.to_f32());
            }
        }
    }
    (data, values)
}

/// Fails on a length mismatch, a NaN, or a difference above `tolerance` of the reference's norm.
#[track_caller]
pub fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    let largest = expected
        .iter()
        .fold(0.0f32, |max, x| max.max(x.abs()))
        .max(1e-6);
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        assert!(
            error <= tolerance * largest,
            "{what}: [{i}] is {got}, expected {expected}, error {error} of {largest}"
        );
    }
}

#[track_caller]
pub fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(
            got.to_bits(),
            expected.to_bits(),
            "{what}: [{i}] {got} and {expected}"
        );
    }
}
