//! Measurements of this machine and of the kernels on it; the callers print them.
//!
//! Each function repeats its work and keeps the fastest repetition, for the others are the same
//! work plus somebody else's.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::f16;

use crate::buffer::Aligned;
use crate::cpu::lanes::{Available, Kernel, Lanes, dispatch};
use crate::cpu::{LinearScratch, linear};
use crate::error::KernelError;
use crate::pool::{ThreadPool, partition};
use crate::select::LinearPath;
use crate::weights::{
    DenseBuilder, LinearWeights, QuantBuilder, QuantSpec, WeightFormat, code_centre,
};

/// More than any last-level cache that one worker gets to itself: for reports.
pub const COLD_BYTES: usize = 256 << 20;

/// More than most last-level caches, and little beside a model: for a worker that starts.
pub const COOL_BYTES: usize = 48 << 20;

/// What one timing of [`read_bandwidth`] covers.
const WINDOW_BYTES: usize = 8 << 20;

/// Source rows of one window of [`QuantBuilder::write_words`] in [`time_build`].
const WINDOW_ROWS: usize = 1024;

/// One linear layer shape, timed.
#[derive(Debug, Clone, Copy)]
pub struct LinearTiming {
    /// What ran.
    pub path: LinearPath,
    /// How the weights are stored.
    pub format: WeightFormat,
    /// Rows of W.
    pub k: usize,
    /// Columns of W.
    pub n: usize,
    /// Activation rows of one call.
    pub rows: usize,
    /// Codes, scales and zero points that one call reads, in bytes.
    pub read_bytes: u64,
    /// Seconds of the fastest call.
    pub seconds: f64,
}

impl LinearTiming {
    /// Weight bytes read per second.
    pub fn bytes_per_second(&self) -> f64 {
        self.read_bytes as f64 / self.seconds
    }

    /// Floating-point operations per second, a multiply-add counting as two.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.k as f64 * self.n as f64 / self.seconds
    }
}

/// Laying out a tensor of GPTQ words, timed against copying the same bytes.
#[derive(Debug, Clone, Copy)]
pub struct BuildTiming {
    /// Bytes of GPTQ words.
    pub bytes: u64,
    /// Seconds from an empty builder to the finished layer.
    pub build_seconds: f64,
    /// Seconds of copying the words into fresh memory.
    pub copy_seconds: f64,
}

/// Bytes per second at which all threads together read memory that no cache holds.
///
/// Reads a buffer larger than the caches round and round and times windows of the size of a layer,
/// as [`time_linear`] does, so that both see the same pauses. `buffer_bytes`: [`COLD_BYTES`] or
/// [`COOL_BYTES`]; `budget`: how long to repeat.
pub fn read_bandwidth(pool: &ThreadPool, buffer_bytes: usize, budget: Duration) -> f64 {
    let data = vec![1.0f32; buffer_bytes / 4];
    let isa = Available::best();
    let windows: Vec<_> = data
        .chunks(WINDOW_BYTES / 4)
        .map(|window| window.as_chunks().0)
        .collect();
    let seconds = fastest_of(&windows, budget, |lines| {
        pool.run(thread_parts(lines.len(), pool), |range| {
            black_box(dispatch(
                isa,
                ReadSum {
                    lines: &lines[range],
                },
            ));
        });
    });
    WINDOW_BYTES as f64 / seconds
}

/// Bytes per second at which all threads together copy memory, counting each byte once.
pub fn copy_bandwidth(pool: &ThreadPool) -> f64 {
    let source = vec![1u8; COLD_BYTES / 2];
    let mut target = vec![2u8; source.len()];
    let seconds = fastest(Duration::from_millis(400), || {
        let chunk = source.len().div_ceil(pool.threads());
        let parts = target.chunks_mut(chunk).zip(source.chunks(chunk)).collect();
        pool.run(parts, |(target, source): (&mut [u8], &[u8])| {
            target.copy_from_slice(source)
        });
        black_box(&target);
    });
    source.len() as f64 / seconds
}

/// Times [`linear`] on random weights that no cache holds: enough layers of the shape are made to
/// exceed the caches, and one call runs each in turn.
///
/// `group`: rows of K per scale (ignored for dense weights); `cold_bytes`: how much weight to make,
/// [`COLD_BYTES`] or [`COOL_BYTES`]; `budget`: how long to repeat.
///
/// # Errors
/// A format or shape that the builders refuse, or a path that this machine cannot run.
#[expect(clippy::too_many_arguments, reason = "a measurement is its conditions")]
pub fn time_linear(
    path: LinearPath,
    format: WeightFormat,
    (k, n): (usize, usize),
    group: usize,
    rows: usize,
    pool: &ThreadPool,
    cold_bytes: usize,
    budget: Duration,
) -> Result<LinearTiming, KernelError> {
    let mut layers = vec![random_layer(format, k, n, group)?];
    let read_bytes = layers[0].read_bytes();
    while layers.len() as u64 * read_bytes < cold_bytes as u64 && rows < 64 {
        layers.push(random_layer(format, k, n, group)?);
    }
    let mut random = Random(1);
    let x: Vec<f32> = (0..rows * k).map(|_| random.unit()).collect();
    let mut out = vec![0.0; rows * n];
    let mut scratch = LinearScratch::new();
    let mut failure = Ok(());
    let seconds = fastest_of(&layers, budget, |weights| {
        let done = linear(weights, path, &x, &mut out, &mut scratch, pool);
        failure = failure.clone().and(done);
        black_box(&out);
    });
    failure?;
    Ok(LinearTiming {
        path,
        format,
        k,
        n,
        rows,
        read_bytes,
        seconds,
    })
}

/// Times [`QuantBuilder`] without act-order against a plain copy of the same words.
///
/// # Errors
/// Bits or a shape that the builder refuses.
pub fn time_build(
    bits: u8,
    (k, n): (usize, usize),
    group: usize,
    budget: Duration,
) -> Result<BuildTiming, KernelError> {
    let words = random_words(k.next_multiple_of(32) * usize::from(bits) / 32 * n);
    let mut failure = None;
    let build_seconds = fastest(budget, || match quantised(bits, k, n, group, &words) {
        Ok(layer) => drop(black_box(layer)),
        Err(error) => failure = Some(error),
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let copy_seconds = fastest(budget, || {
        let mut copy = Aligned::<u32>::zeroed(words.len());
        copy.copy_from_slice(&words);
        black_box(&copy[..]);
    });
    Ok(BuildTiming {
        bytes: 4 * words.len() as u64,
        build_seconds,
        copy_seconds,
    })
}

/// Seconds of the fastest single call of `work`, over all `items` in turn, again and again until
/// `budget` is spent, at least twice.
fn fastest_of<T>(items: &[T], budget: Duration, mut work: impl FnMut(&T)) -> f64 {
    let mut best = f64::INFINITY;
    fastest(budget, || {
        for item in items {
            let start = Instant::now();
            work(item);
            best = best.min(start.elapsed().as_secs_f64());
        }
    });
    best
}

/// Seconds of the fastest of as many repetitions as fit into `budget`, at least two.
pub fn fastest(budget: Duration, mut work: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut repetitions = 0;
    while repetitions < 2 || begin.elapsed() < budget {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
        repetitions += 1;
    }
    best
}

fn thread_parts(items: usize, pool: &ThreadPool) -> Vec<std::ops::Range<usize>> {
    (0..pool.threads())
        .map(|part| partition(items, pool.threads(), part))
        .collect()
}

fn random_layer(
    format: WeightFormat,
    k: usize,
    n: usize,
    group: usize,
) -> Result<LinearWeights, KernelError> {
    match format {
        WeightFormat::Quantised { bits } => {
            let words = random_words(k.next_multiple_of(32) * usize::from(bits) / 32 * n);
            quantised(bits, k, n, group, &words)
        }
        WeightFormat::Dense(dtype) => {
            let mut builder = DenseBuilder::new(dtype, k, n, None)?;
            let column: Vec<u8> = (0..k * dtype.bytes()).map(|i| (i % 61) as u8).collect();
            for index in 0..n {
                builder.write_columns(index, &column)?;
            }
            builder.finish()
        }
    }
}

fn quantised(
    bits: u8,
    k: usize,
    n: usize,
    group: usize,
    words: &[u32],
) -> Result<LinearWeights, KernelError> {
    let group_of_row: Vec<u32> = (0..k).map(|row| (row / group) as u32).collect();
    let groups = k.div_ceil(group);
    let scales = vec![f16::from_f32(0.01); groups * n];
    let zeros = vec![code_centre(bits) as u16; groups * n];
    let spec = QuantSpec {
        bits,
        k,
        n,
        group_of_row: &group_of_row,
        scales: &scales,
        zeros: &zeros,
        bias: None,
    };
    let mut builder = QuantBuilder::new(spec)?;
    for first in (0..k).step_by(WINDOW_ROWS) {
        let rows = WINDOW_ROWS.min(k - first);
        let window = &words[first * usize::from(bits) / 32 * n..];
        let length = rows.next_multiple_of(32) * usize::from(bits) / 32 * n;
        builder.write_words(first, 0, rows, &window[..length])?;
    }
    builder.finish()
}

fn random_words(count: usize) -> Vec<u32> {
    let mut random = Random(7);
    (0..count).map(|_| random.next() as u32).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

struct ReadSum<'a> {
    lines: &'a [[f32; 16]],
}

impl Kernel for ReadSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> f32 {
        let mut sums = [lanes.zero(); 8];
        for lines in self.lines.as_chunks::<8>().0 {
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = lanes.add(*sum, lanes.load(line));
            }
        }
        sums.into_iter().map(|sum| lanes.sum(sum)).sum()
    }
}
