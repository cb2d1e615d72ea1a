//! The linear layer: checks, prepares activations, and shares the columns among the threads.
//!
//! Per output element every path of one instruction set does, in this order: per segment (at most
//! 128 stored rows of one quantisation run) `acc = fma(x, code - centre, acc)` over its rows from
//! `acc = 0`; if asymmetric `acc = fma(centre - zero, sum of x, acc)`; `total = fma(scale, acc,
//! total)`, or `total + acc` for dense weights; at last `total + bias`. Rows, chunks, tiles and
//! threads decide only where that happens, so they never change a bit.

use std::marker::PhantomData;

use crate::buffer::Aligned;
use crate::error::{KernelError, expect_length};
use crate::pool::{ThreadPool, partition};
use crate::reference;
use crate::select::LinearPath;
use crate::weights::{Dtype, LinearWeights, PANEL_COLUMNS, Storage, WeightFormat};

use super::formats::{self, Format};
use super::lanes::{Available, Lanes, dispatch};
use super::{gemm, gemv};

/// Up to this many rows weights are unpacked in registers and used at once; from here on they are
/// unpacked into the cache, once for all rows.
pub(crate) const FUSED_ROWS: usize = 4;

/// Rows that one pass over the weights serves; more are split.
pub(crate) const CHUNK_ROWS: usize = 256;

/// Buffers that [`linear`] reuses between calls; they grow to the largest call seen.
#[derive(Debug, Default)]
pub struct LinearScratch {
    /// Activations in stored order: (rows, stored rows) for the fused pass, tiles for the other.
    activations: Aligned<f32>,
    /// Sums of activations per (row, segment) or (tile, segment, row).
    sums: Vec<f32>,
    threads: Vec<gemm::ThreadScratch>,
}

impl LinearScratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Heap bytes held now.
    pub fn bytes(&self) -> u64 {
        self.activations.bytes()
            + (self.sums.capacity() * size_of::<f32>()) as u64
            + self
                .threads
                .iter()
                .map(gemm::ThreadScratch::bytes)
                .sum::<u64>()
    }
}

/// Upper bound of the heap bytes that [`linear`] keeps in its scratch for a layer of `stored_rows`
/// rows of K, at up to `rows` rows and `threads` threads.
pub fn linear_scratch_bytes(stored_rows: usize, rows: usize, threads: usize) -> u64 {
    let rows = rows.min(CHUNK_ROWS);
    let activations = Aligned::<f32>::heap_bytes(rows * stored_rows);
    let sums = rows * stored_rows.div_ceil(8) * size_of::<f32>();
    activations + sums as u64 + threads as u64 * gemm::ThreadScratch::most_bytes()
}

/// `out = x * W + bias` in fp32.
///
/// `x`: (rows, k) f32 row-major; `out`: (rows, n) f32 row-major, overwritten. The number of rows
/// is `x.len() / k`. A row's bits depend on that row, the weights and the path's instruction set.
///
/// # Errors
/// Lengths that disagree with the weights' shape, or a path that this machine cannot run.
pub fn linear(
    weights: &LinearWeights,
    path: LinearPath,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut LinearScratch,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    if path == LinearPath::CpuReference {
        return reference::linear(weights, x, out);
    }
    let isa = Available::new(path.isa(), path.name())?;
    let (k, n) = (weights.k(), weights.n());
    let rows = x.len() / k;
    expect_length("linear", "x", rows * k, x.len())?;
    expect_length("linear", "out", rows * n, out.len())?;
    for (x, out) in x.chunks(CHUNK_ROWS * k).zip(out.chunks_mut(CHUNK_ROWS * n)) {
        match weights.format {
            WeightFormat::Quantised { bits: 2 } => {
                chunk::<formats::Int2>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Quantised { bits: 3 } => {
                chunk::<formats::Int3>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Quantised { bits: 4 } => {
                chunk::<formats::Int4>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Quantised { .. } => {
                chunk::<formats::Int8>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Dense(Dtype::F32) => {
                chunk::<formats::F32>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Dense(Dtype::F16) => {
                chunk::<formats::F16>(weights, isa, x, out, scratch, pool);
            }
            WeightFormat::Dense(Dtype::Bf16) => {
                chunk::<formats::Bf16>(weights, isa, x, out, scratch, pool);
            }
        }
    }
    Ok(())
}

/// The columns of one thread: whole panels, and its part of every output row.
pub(crate) struct Columns<'a> {
    pub first_panel: usize,
    /// One slice per row, all of the same length.
    pub out: Vec<&'a mut [f32]>,
}

/// Cuts `out` (rows, n) into one contiguous range of panels per thread.
fn split_columns(out: &mut [f32], n: usize, threads: usize, align: usize) -> Vec<Columns<'_>> {
    let groups = n.div_ceil(PANEL_COLUMNS * align);
    let rows = out.len() / n;
    let mut parts: Vec<Columns<'_>> = (0..threads.min(groups))
        .map(|part| Columns {
            first_panel: partition(groups, threads.min(groups), part).start * align,
            out: Vec::with_capacity(rows),
        })
        .collect();
    for mut row in out.chunks_mut(n) {
        let mut next = 0;
        for part in 0..parts.len() {
            let end = parts
                .get(part + 1)
                .map_or(n, |part| part.first_panel * PANEL_COLUMNS);
            let (head, tail) = row.split_at_mut(end - next);
            parts[part].out.push(head);
            (row, next) = (tail, end);
        }
    }
    parts
}

/// At most [`CHUNK_ROWS`] rows.
fn chunk<F: Format>(
    weights: &LinearWeights,
    isa: Available,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut LinearScratch,
    pool: &ThreadPool,
) {
    let rows = x.len() / weights.k();
    if rows <= FUSED_ROWS {
        fused::<F>(weights, isa, x, out, scratch, pool);
    } else {
        let tiles = gemm::Tiles::new(rows, isa);
        tiles.pack(
            weights,
            x,
            &mut scratch.activations,
            &mut scratch.sums,
            pool,
        );
        let parts = split_columns(out, weights.n(), pool.threads(), 2);
        scratch
            .threads
            .resize_with(parts.len().max(scratch.threads.len()), Default::default);
        let parts = parts.into_iter().zip(&mut scratch.threads).collect();
        let (x, sums) = (&scratch.activations[..], &scratch.sums[..]);
        pool.run(
            parts,
            |(columns, buffers): (Columns<'_>, &mut gemm::ThreadScratch)| {
                let panels = Panels::new(weights);
                gemm::Gemm {
                    panels,
                    tiles: &tiles,
                    x,
                    sums,
                    columns,
                    buffers,
                }
                .run::<F>(isa);
            },
        );
    }
}

fn fused<F: Format>(
    weights: &LinearWeights,
    isa: Available,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut LinearScratch,
    pool: &ThreadPool,
) {
    let (order, k) = (&weights.rows, weights.k());
    let rows = x.len() / k;
    let x = if order.is_plain() {
        x
    } else {
        scratch.activations.reserve(rows * order.stored_rows);
        let gathered = &mut scratch.activations[..rows * order.stored_rows];
        for (x, out) in x.chunks(k).zip(gathered.chunks_mut(order.stored_rows)) {
            order.gather(x, out);
        }
        &*gathered
    };
    scratch.sums.clear();
    if weights.needs_sums() {
        for x in x.chunks(order.stored_rows) {
            scratch.sums.extend(segment_sums(weights, x));
        }
    }
    let sums = &scratch.sums[..];
    pool.run(
        split_columns(out, weights.n(), pool.threads(), 4),
        |columns| {
            let panels = Panels::new(weights);
            dispatch(
                isa,
                gemv::Gemv {
                    panels,
                    x,
                    sums,
                    columns,
                    format: PhantomData::<F>,
                },
            );
        },
    );
}

/// Sum of the activations of each segment; `x`: one row in stored order.
pub(crate) fn segment_sums(weights: &LinearWeights, x: &[f32]) -> impl Iterator<Item = f32> {
    weights.rows.segments.iter().map(|segment| {
        let mut lanes = [0.0f32; 8];
        for unit in &x.as_chunks::<8>().0[segment.first_unit..][..segment.units] {
            for (lane, x) in lanes.iter_mut().zip(unit) {
                *lane += x;
            }
        }
        let [a, b, c, d, e, f, g, h] = lanes;
        ((a + b) + (c + d)) + ((e + f) + (g + h))
    })
}

/// The parts of the weights that kernels index, as slices.
pub(crate) struct Panels<'a> {
    pub weights: &'a LinearWeights,
    pub storage: &'a Storage,
    pub units_per_panel: usize,
    runs: usize,
    scales: &'a [[u16; 16]],
    zeros: Option<&'a [[u16; 16]]>,
    centre: f32,
}

/// Scale and `centre - zero` of 16 columns in one run.
#[derive(Clone, Copy)]
pub(crate) struct Fold<F> {
    scale: Option<F>,
    offset: Option<F>,
}

impl<'a> Panels<'a> {
    fn new(weights: &'a LinearWeights) -> Self {
        let scaling = weights.scaling.as_ref();
        Self {
            weights,
            storage: &weights.storage,
            units_per_panel: weights.rows.stored_rows / crate::weights::UNIT_ROWS,
            runs: weights.rows.runs.len(),
            scales: scaling.map_or(&[], |scaling| scaling.scales.as_chunks().0),
            zeros: scaling.and_then(|scaling| Some(scaling.zeros.as_ref()?.as_chunks().0)),
            centre: match weights.format {
                WeightFormat::Quantised { bits } => crate::weights::code_centre(bits) as f32,
                WeightFormat::Dense(_) => 0.0,
            },
        }
    }

    #[inline(always)]
    pub fn fold<L: Lanes>(&self, lanes: L, panel: usize, run: usize) -> Fold<L::F> {
        let index = panel * self.runs + run;
        let mut fold = Fold {
            scale: None,
            offset: None,
        };
        if let Some(scale) = self.scales.get(index) {
            fold.scale = Some(lanes.widen_f16(scale));
        }
        if let Some(zeros) = self.zeros {
            let zero = lanes.widen_u16(&zeros[index]);
            fold.offset = Some(lanes.sub(lanes.splat(self.centre), zero));
        }
        fold
    }

    /// `total + bias` of one panel into the (up to 16) columns of `out`.
    #[inline(always)]
    pub fn finish<L: Lanes>(&self, lanes: L, panel: usize, total: L::F, out: &mut [f32]) {
        let total = match &self.weights.bias {
            Some(bias) => lanes.add(total, lanes.load(&bias.as_chunks().0[panel])),
            None => total,
        };
        lanes.store_part(total, out);
    }
}

impl<F: Copy> Fold<F> {
    /// Adds a segment's accumulator to the running total.
    #[inline(always)]
    pub fn apply<L: Lanes<F = F>>(&self, lanes: L, acc: F, sum: f32, total: F) -> F {
        let acc = match self.offset {
            Some(offset) => lanes.mul_add(offset, lanes.splat(sum), acc),
            None => acc,
        };
        match self.scale {
            Some(scale) => lanes.mul_add(scale, acc, total),
            None => lanes.add(total, acc),
        }
    }
}
