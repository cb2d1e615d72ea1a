//! Measurements of a card and of the kernels on it; the callers print them.
//!
//! Every timing is of recorded launches, so that the host's speed stays out of it, over inputs that
//! rotate through more memory than the card's last cache holds. The median of several replays counts.

mod attention;
mod cublas;
mod peak;

use std::sync::Arc;

use half::f16;

pub use attention::{AttentionCall, time_attention};
pub use cublas::Cublas;
pub use peak::instruction_peaks;

use super::{
    Activations, CudaError, DenseWeights, Device, Guard, Linear, LinearCall, Memory, QuantWeights,
    SUPERBLOCK_ROWS, TILE_COLUMNS, Weights, linear,
};
use crate::bench::LinearTiming;
use crate::error::KernelError;
use crate::select::LinearPath;
use crate::weights::{Dtype, WeightFormat};

/// More than the last cache of any card that is served.
pub const COLD_BYTES: usize = 192 << 20;
/// A run that takes longer is repeated less often.
const LONG_SECONDS: f64 = 0.05;
/// How often.
const LONG_REPLAYS: usize = 3;
/// Replays whose median counts.
const REPLAYS: usize = 9;
/// Random bytes that are made on the host, and then repeated.
const BLOCK_BYTES: usize = 4 << 20;
/// Most launches of one recording.
const MAX_LAUNCHES: usize = 24;

/// Bytes read plus bytes written per second of a large copy on the card.
///
/// # Errors
/// The card's.
pub fn copy_bandwidth(device: &Device) -> Result<f64, CudaError> {
    let (free, _) = device.memory()?;
    let len = (free as usize / 8).min(1 << 30);
    let (from, to) = (
        device.zeros::<u8>(len, "a copy")?,
        device.zeros::<u8>(len, "a copy")?,
    );
    let seconds = median(device, || device.copy(&from, &to, len))?;
    Ok(2.0 * len as f64 / seconds)
}

/// Seconds of one launch within a recording: what an operation costs beside its work.
///
/// # Errors
/// The card's.
pub fn launch_seconds(device: &Device) -> Result<f64, CudaError> {
    const LAUNCHES: usize = 200;
    let word = device.zeros::<u8>(4, "a launch")?;
    let graph = device.record(|| (0..LAUNCHES).try_for_each(|_| device.fill(&word, 0)))?;
    Ok(median(device, || device.replay(&graph))? / LAUNCHES as f64)
}

/// Random weights of one shape, as many copies as no cache of the card holds.
pub struct RandomLinears<'a> {
    device: &'a Device,
    format: WeightFormat,
    weights: Vec<Linear>,
}

impl<'a> RandomLinears<'a> {
    /// Makes them.
    ///
    /// # Errors
    /// The card's.
    pub fn new(
        device: &'a Device,
        format: WeightFormat,
        extent: (usize, usize),
        group: usize,
    ) -> Result<Self, CudaError> {
        let first = random_linear(device, format, extent, group, 1)?;
        let copies = (COLD_BYTES as u64)
            .div_ceil(first.read_bytes())
            .clamp(1, MAX_LAUNCHES as u64);
        let mut weights = vec![first];
        for seed in 2..=copies {
            weights.push(random_linear(device, format, extent, group, seed as u32)?);
        }
        Ok(Self {
            device,
            format,
            weights,
        })
    }

    /// Times one product of `rows` rows by `path`; the quantisation of its activations is part of it.
    ///
    /// # Errors
    /// A path that is not for such weights, or the card's.
    pub fn time(&self, path: LinearPath, rows: usize) -> Result<LinearTiming, KernelError> {
        let (device, weights) = (self.device, &self.weights);
        let Linear { k, n, .. } = weights[0];
        let x: Vec<f32> = random(7)
            .take(rows * k)
            .map(|word| word as f32 / 2e9 - 1.0)
            .collect();
        let x = device.upload(&x, "activations")?;
        let out = device.zeros(rows * n, "a product")?;
        let guard = Guard::new(device)?;
        let mut activations = Activations::new(device, rows, k.div_ceil(SUPERBLOCK_ROWS))?;
        let mut run = |weights: &Linear| {
            activations.forget();
            let call = LinearCall {
                weights,
                out: &out,
                check: 0,
            };
            linear(
                device,
                |_| Ok(path),
                &x,
                rows,
                &[call],
                &mut activations,
                &guard,
            )
        };
        // The first launch of a kernel loads it, which cannot be recorded.
        run(&weights[0])?;
        device.synchronize()?;
        let launches = weights.len().max(4);
        let graph = device.record(|| {
            (0..launches).try_for_each(|launch| run(&weights[launch % weights.len()]))
        })?;
        let seconds = median(device, || device.replay(&graph))? / launches as f64;
        Ok(LinearTiming {
            path,
            format: self.format,
            k,
            n,
            rows,
            read_bytes: weights[0].read_bytes(),
            seconds,
        })
    }
}

/// A linear with random codes, for measurements.
///
/// # Errors
/// The card's.
pub fn random_linear(
    device: &Device,
    format: WeightFormat,
    (k, n): (usize, usize),
    group: usize,
    seed: u32,
) -> Result<Linear, CudaError> {
    let superblocks = k.div_ceil(SUPERBLOCK_ROWS);
    let weights = match format {
        WeightFormat::Quantised { bits } => {
            let tiles = n.div_ceil(TILE_COLUMNS);
            let scales_per_superblock = (SUPERBLOCK_ROWS / group.clamp(32, SUPERBLOCK_ROWS)).max(1);
            let scales = tiles * superblocks * scales_per_superblock * TILE_COLUMNS;
            let scale = 0.1 / (f32::from(bits).exp2() * (k as f32).sqrt());
            Weights::Quantised(QuantWeights {
                bits,
                superblocks,
                scales_per_superblock,
                codes: random_bytes(device, tiles * superblocks * 128 * usize::from(bits), seed)?,
                scales: device.upload(&vec![f16::from_f32(scale).to_bits(); scales], "scales")?,
                zeros: None,
                order: None,
                order_hash: 0,
            })
        }
        WeightFormat::Dense(dtype) => {
            // Bytes at random would be NaN here and there.
            let words = match dtype {
                Dtype::F32 => device.upload(
                    &random(seed)
                        .take(k * n)
                        .flat_map(|word| unit(word).to_le_bytes())
                        .collect::<Vec<_>>(),
                    "weights",
                )?,
                Dtype::F16 | Dtype::Bf16 => random_halves(device, k * n, seed)?,
            };
            Weights::Dense(DenseWeights {
                dtype,
                bytes: Arc::new(words),
            })
        }
    };
    Ok(Linear {
        k,
        n,
        weights,
        bias: None,
    })
}

fn unit(word: u32) -> f32 {
    word as f32 / 4e10
}

/// Random bytes.
fn random_bytes(device: &Device, len: usize, seed: u32) -> Result<Memory<u8>, CudaError> {
    let words = random(seed).take(len.min(BLOCK_BYTES).div_ceil(4));
    repeated(device, words.flat_map(u32::to_le_bytes).collect(), len)
}

/// `count` random 16-bit numbers, small ones in f16 and in bf16: random mantissas under one exponent.
pub(super) fn random_halves(
    device: &Device,
    count: usize,
    seed: u32,
) -> Result<Memory<u8>, CudaError> {
    let words = random(seed).take(count.min(BLOCK_BYTES / 2));
    let halves = words.flat_map(|word| (((word >> 16) as u16 & 0x83ff) | 0x2000).to_le_bytes());
    repeated(device, halves.collect(), 2 * count)
}

/// A block of bytes, repeated on the card until `len` are there.
fn repeated(device: &Device, block: Vec<u8>, len: usize) -> Result<Memory<u8>, CudaError> {
    let memory = device.zeros(len, "random numbers")?;
    for first in (0..len).step_by(block.len().max(1)) {
        device.write(&memory, first, &block[..block.len().min(len - first)])?;
    }
    device.synchronize()?;
    Ok(memory)
}

fn random(seed: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(seed.wrapping_mul(2_654_435_761) | 1), |state| {
        let mut word = *state;
        word ^= word << 13;
        word ^= word >> 17;
        Some(word ^ word << 5)
    })
    .skip(8)
}

/// Median seconds on the card of `run`, which is warmed up first. What takes long repeats well, and fewer runs of
/// it count.
pub fn median<E: From<CudaError>>(
    device: &Device,
    mut run: impl FnMut() -> Result<(), E>,
) -> Result<f64, E> {
    let mut once = || -> Result<f64, E> {
        let start = device.event()?;
        run()?;
        let end = device.event()?;
        Ok(device.seconds_between(&start, &end)?)
    };
    let replays = match once()? < LONG_SECONDS {
        true => REPLAYS,
        false => LONG_REPLAYS,
    };
    let mut times = (0..replays)
        .map(|_| once())
        .collect::<Result<Vec<_>, E>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[replays / 2])
}
