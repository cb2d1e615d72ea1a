//! Five rows and more: a block of weights is unpacked into the cache once and multiplied with
//! every tile of rows, in register tiles.

use std::ops::Range;

use crate::buffer::Aligned;
use crate::pool::{ThreadPool, partition};
use crate::weights::{LinearWeights, PANEL_COLUMNS, SEGMENT_ROWS, UNIT_ROWS};

use super::formats::Format;
use super::lanes::{Available, Kernel, Lanes, dispatch, unroll};
use super::linear::{CHUNK_ROWS, Columns, Panels, segment_sums};

/// Panels whose totals a thread holds at once.
const BLOCK_PANELS: usize = 8;

/// Stored rows that are unpacked at once; a multiple of the longest segment.
const BLOCK_ROWS: usize = SEGMENT_ROWS;

/// Panels of the widest register tile.
const MOST_TILE_PANELS: usize = 4;

/// How rows are cut into tiles of nearly equal height.
pub(crate) struct Tiles {
    rows: usize,
    tiles: usize,
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(crate) struct ThreadScratch {
    /// Unpacked weights, `[stored row][panel of the tile][16]`.
    weights: Aligned<f32>,
    /// Running totals, `[strip of panels][row][panel of the strip][16]`.
    totals: Aligned<f32>,
}

impl ThreadScratch {
    const WEIGHTS: usize = BLOCK_ROWS * MOST_TILE_PANELS * PANEL_COLUMNS;
    const TOTALS: usize = CHUNK_ROWS * BLOCK_PANELS * PANEL_COLUMNS;

    pub(crate) fn bytes(&self) -> u64 {
        self.weights.bytes() + self.totals.bytes()
    }

    pub(crate) fn most_bytes() -> u64 {
        Aligned::<f32>::heap_bytes(Self::WEIGHTS) + Aligned::<f32>::heap_bytes(Self::TOTALS)
    }
}

impl Tiles {
    pub(crate) fn new(rows: usize, isa: Available) -> Self {
        Self {
            rows,
            tiles: rows.div_ceil(isa.tile_rows()),
        }
    }

    fn range(&self, tile: usize) -> Range<usize> {
        partition(self.rows, self.tiles, tile)
    }

    /// Brings activations into `[tile][stored row][row of the tile]` and sums them per segment,
    /// `[tile][segment][row of the tile]` (nothing where the weights need no sums).
    pub(crate) fn pack(
        &self,
        weights: &LinearWeights,
        x: &[f32],
        packed: &mut Aligned<f32>,
        sums: &mut Vec<f32>,
        pool: &ThreadPool,
    ) {
        let order = &weights.rows;
        let (k, stored) = (order.k, order.stored_rows);
        let per_row = if weights.needs_sums() {
            order.segments.len()
        } else {
            0
        };
        packed.reserve(self.rows * stored);
        sums.clear();
        sums.resize(self.rows * per_row, 0.0);
        let mut parts = Vec::with_capacity(pool.threads());
        let (mut packed, mut sums) = (&mut packed[..self.rows * stored], &mut sums[..]);
        for part in 0..pool.threads() {
            let tiles = partition(self.tiles, pool.threads(), part);
            let rows = tiles
                .clone()
                .map(|tile| self.range(tile).len())
                .sum::<usize>();
            let (head, tail) = packed.split_at_mut(rows * stored);
            let (head_sums, tail_sums) = sums.split_at_mut(rows * per_row);
            parts.push((tiles, head, head_sums));
            (packed, sums) = (tail, tail_sums);
        }
        pool.run(parts, |(tiles, mut packed, mut sums)| {
            let mut line = vec![0.0; stored];
            for rows in tiles.map(|tile| self.range(tile)) {
                let height = rows.len();
                let (tile, rest) = packed.split_at_mut(height * stored);
                let (tile_sums, rest_sums) = sums.split_at_mut(height * per_row);
                for (r, row) in rows.enumerate() {
                    order.gather(&x[row * k..][..k], &mut line);
                    for (slot, value) in tile[r..].iter_mut().step_by(height).zip(&line) {
                        *slot = *value;
                    }
                    if per_row > 0 {
                        let slots = tile_sums[r..].iter_mut().step_by(height);
                        for (slot, sum) in slots.zip(segment_sums(weights, &line)) {
                            *slot = sum;
                        }
                    }
                }
                (packed, sums) = (rest, rest_sums);
            }
        });
    }
}

/// One thread's share of the product.
pub(crate) struct Gemm<'a> {
    pub panels: Panels<'a>,
    pub tiles: &'a Tiles,
    /// As [`Tiles::pack`] leaves it.
    pub x: &'a [f32],
    /// As [`Tiles::pack`] leaves it.
    pub sums: &'a [f32],
    pub columns: Columns<'a>,
    pub buffers: &'a mut ThreadScratch,
}

/// A strip of panels that a register tile spans, and where it lies.
#[derive(Clone, Copy)]
struct Strip {
    /// First panel of the strip among all panels of the weights.
    panel: usize,
    /// Panels: 4, 2 or 1.
    width: usize,
    /// First panel of the strip among those whose totals are held.
    slot: usize,
}

impl Gemm<'_> {
    /// `columns.out = x * W + bias` for the thread's columns.
    pub(crate) fn run<F: Format>(mut self, isa: Available) {
        self.buffers.weights.reserve(ThreadScratch::WEIGHTS);
        self.buffers.totals.reserve(ThreadScratch::TOTALS);
        let panels = self.columns.out[0].len().div_ceil(PANEL_COLUMNS);
        let blocks = self.panels.weights.rows.blocks(BLOCK_ROWS);
        for first in (0..panels).step_by(BLOCK_PANELS) {
            let block_panels = BLOCK_PANELS.min(panels - first);
            let strips = strips(self.columns.first_panel + first, block_panels, isa);
            let totals = self.tiles.rows * block_panels * PANEL_COLUMNS;
            self.buffers.totals[..totals].fill(0.0);
            for segments in &blocks {
                for &strip in &strips {
                    self.add_block::<F>(isa, strip, segments.clone());
                }
            }
            for &strip in &strips {
                let totals = &self.buffers.totals.as_chunks().0[strip.slot * self.tiles.rows..];
                let (panels, columns) = (&self.panels, &mut self.columns);
                dispatch(
                    isa,
                    Finish {
                        panels,
                        strip,
                        totals,
                        columns,
                    },
                );
            }
        }
    }

    /// Adds the products of some segments to the totals of a strip, for every tile of rows.
    fn add_block<F: Format>(&mut self, isa: Available, strip: Strip, segments: Range<usize>) {
        let order = &self.panels.weights.rows;
        let (first, last) = (
            order.segments[segments.start],
            order.segments[segments.end - 1],
        );
        let units = first.first_unit..last.first_unit + last.units;
        let length = units.len() * UNIT_ROWS * strip.width;
        let weights = &mut self.buffers.weights.as_chunks_mut().0[..length];
        for p in 0..strip.width {
            let all =
                &F::units(self.panels.storage)[(strip.panel + p) * self.panels.units_per_panel..];
            let (units, width) = (&all[units.clone()], strip.width);
            dispatch(
                isa,
                Unpack::<F> {
                    units,
                    p,
                    width,
                    weights,
                },
            );
        }
        let per_row = if self.sums.is_empty() {
            0
        } else {
            order.segments.len()
        };
        let (mut x, mut sums) = (self.x, self.sums);
        let mut totals = &mut self.buffers.totals.as_chunks_mut().0[strip.slot * self.tiles.rows..];
        for tile in 0..self.tiles.tiles {
            let rows = self.tiles.range(tile).len();
            let (tile_x, rest_x) = x.split_at(rows * order.stored_rows);
            let (tile_sums, rest_sums) = sums.split_at(rows * per_row);
            let (tile_totals, rest_totals) = totals.split_at_mut(rows * strip.width);
            dispatch(
                isa,
                TileProduct {
                    panels: &self.panels,
                    strip,
                    rows,
                    segments: segments.clone(),
                    start: units.start * UNIT_ROWS,
                    weights,
                    x: tile_x,
                    sums: tile_sums,
                    totals: tile_totals,
                },
            );
            (x, sums, totals) = (rest_x, rest_sums, rest_totals);
        }
    }
}

/// Cuts `count` panels from `first` on into strips, as wide as a register tile allows.
fn strips(first: usize, count: usize, isa: Available) -> Vec<Strip> {
    let mut strips = Vec::new();
    let mut slot = 0;
    while slot < count {
        let width = match (count - slot).min(isa.tile_panels()) {
            4.. => 4,
            2 | 3 => 2,
            _ => 1,
        };
        strips.push(Strip {
            panel: first + slot,
            width,
            slot,
        });
        slot += width;
    }
    strips
}

/// Unpacks one panel of a strip into `[stored row][panel of the strip][16]`.
struct Unpack<'a, F: Format> {
    units: &'a [F::Unit],
    /// Which panel of the strip.
    p: usize,
    width: usize,
    weights: &'a mut [[f32; 16]],
}

impl<F: Format> Kernel for Unpack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let targets = self.weights.chunks_exact_mut(UNIT_ROWS * self.width);
        for (unit, target) in self.units.iter().zip(targets) {
            let rows = F::unpack(lanes, unit);
            unroll!(
                i < UNIT_ROWS,
                lanes.store(rows[i], &mut target[i * self.width + self.p])
            );
        }
    }
}

/// Totals plus bias of one strip into the output rows.
struct Finish<'a, 'b> {
    panels: &'a Panels<'a>,
    strip: Strip,
    /// `[row][panel of the strip]`
    totals: &'a [[f32; 16]],
    columns: &'a mut Columns<'b>,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Strip { panel, width, .. } = self.strip;
        for (out, totals) in self
            .columns
            .out
            .iter_mut()
            .zip(self.totals.chunks_exact(width))
        {
            for (panel, total) in (panel..).zip(totals) {
                let start = (panel - self.columns.first_panel) * PANEL_COLUMNS;
                let end = (start + PANEL_COLUMNS).min(out.len());
                self.panels
                    .finish(lanes, panel, lanes.load(total), &mut out[start..end]);
            }
        }
    }
}

/// A tile of rows times a strip of panels over the segments of a block, added to the totals.
struct TileProduct<'a> {
    panels: &'a Panels<'a>,
    strip: Strip,
    rows: usize,
    segments: Range<usize>,
    /// First stored row of the block.
    start: usize,
    /// `[stored row of the block][panel][16]`
    weights: &'a [[f32; 16]],
    /// `[stored row][row of the tile]`
    x: &'a [f32],
    /// `[segment][row of the tile]`, or empty.
    sums: &'a [f32],
    /// `[row of the tile][panel][16]`
    totals: &'a mut [[f32; 16]],
}

impl Kernel for TileProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.strip.width {
            4 if const { L::TILE.1 >= 4 } => self.rows::<L, 4>(lanes),
            2 if const { L::TILE.1 >= 2 } => self.rows::<L, 2>(lanes),
            1 => self.rows::<L, 1>(lanes),
            width => unreachable!("a strip of {width} panels, at most {}", L::TILE.1),
        }
    }
}

impl TileProduct<'_> {
    #[inline(always)]
    fn rows<L: Lanes, const P: usize>(self, lanes: L) {
        match self.rows {
            1 => self.product::<L, 1, P>(lanes),
            2 => self.product::<L, 2, P>(lanes),
            3 => self.product::<L, 3, P>(lanes),
            4 => self.product::<L, 4, P>(lanes),
            5 if const { L::TILE.0 >= 5 } => self.product::<L, 5, P>(lanes),
            6 if const { L::TILE.0 >= 6 } => self.product::<L, 6, P>(lanes),
            rows => unreachable!("a tile of {rows} rows, at most {}", L::TILE.0),
        }
    }

    #[inline(always)]
    fn product<L: Lanes, const R: usize, const P: usize>(self, lanes: L) {
        let segments = &self.panels.weights.rows.segments;
        let x = self.x.as_chunks::<R>().0;
        let weights = self.weights.as_chunks::<P>().0;
        let sums = self.sums.as_chunks::<R>().0;
        let totals = &mut self.totals.as_chunks_mut::<P>().0[..R];
        for index in self.segments {
            let segment = segments[index];
            let (start, rows) = (segment.first_unit * UNIT_ROWS, segment.units * UNIT_ROWS);
            let mut acc = [[lanes.zero(); P]; R];
            for (x, w) in x[start..][..rows]
                .iter()
                .zip(&weights[start - self.start..][..rows])
            {
                let mut vectors = [lanes.zero(); P];
                unroll!(p < P, vectors[p] = lanes.load(&w[p]));
                unroll!(r < R, {
                    let x = lanes.splat(x[r]);
                    unroll!(p < P, acc[r][p] = lanes.mul_add(x, vectors[p], acc[r][p]));
                });
            }
            let sums = sums.get(index).copied().unwrap_or([0.0; R]);
            unroll!(p < P, {
                let fold = self.panels.fold(lanes, self.strip.panel + p, segment.run);
                unroll!(r < R, {
                    let total = lanes.load(&totals[r][p]);
                    let total = fold.apply(lanes, acc[r][p], sums[r], total);
                    lanes.store(total, &mut totals[r][p]);
                });
            });
        }
    }
}
