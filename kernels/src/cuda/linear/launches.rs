//! Which kernel of a path runs, on what grid: the rules were fitted to measurements, which
//! docs/gpu-report.md has.

use super::{Activations, DenseWeights, Job, Jobs, LinearCall};
use crate::cuda::{
    CudaError, Device, F16Form, Memory, Quantised, SUPERBLOCK_ROWS, TILE_COLUMNS, launch,
    ops::Guard,
};
use crate::error::KernelError;
use crate::select::LinearPath;
use crate::weights::Dtype;

/// Paths that read x as f32 in stored order, at address `x`.
pub(super) fn widened(
    device: &Device,
    path: LinearPath,
    bits: u8,
    x: u64,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), KernelError> {
    match path {
        LinearPath::F32 => sgemm(device, bits, x, jobs, guard)?,
        LinearPath::A16F32Gemv => f32_gemv(device, bits, x, jobs, guard)?,
        other => return Err(not_for(other, "quantised")),
    }
    Ok(())
}

/// Paths that read x as 8-bit integers.
pub(super) fn integer(
    device: &Device,
    path: LinearPath,
    bits: u8,
    a8: &Quantised,
    jobs: &Jobs,
    sums: &PartialSums,
    guard: &Guard,
) -> Result<(), KernelError> {
    match path {
        LinearPath::A8Dp4aGemv => dp4a_gemv(device, bits, a8, jobs, guard)?,
        LinearPath::A8Dp4aGemm => dp4a_gemm(device, bits, a8, jobs, sums, guard)?,
        LinearPath::A8Mma => mma(device, bits, a8, jobs, sums, guard)?,
        other => return Err(not_for(other, "quantised")),
    }
    Ok(())
}

/// Paths that read x as f16, which `activations` holds.
pub(super) fn halves(
    device: &Device,
    form: F16Form,
    bits: u8,
    activations: &Activations,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), CudaError> {
    match form {
        F16Form::Rounded => half2(device, bits, activations, jobs, guard),
        F16Form::Split => f16_mma(device, bits, activations, jobs, guard),
    }
}

fn half2(
    device: &Device,
    bits: u8,
    x: &Activations,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), CudaError> {
    let (rows, tiles) = (jobs.rows as usize, jobs.tiles as usize);
    let block_rows = if rows <= 4 { 4 } else { 8 };
    let at_once = if bits == 8 { 2 } else { 4 };
    let warps = (jobs.superblocks as usize).clamp(1, 4);
    let kernel = format!("linear_half2_w{bits}_r{block_rows}");
    let grid = [rows.div_ceil(block_rows), tiles.div_ceil(at_once)];
    let shared = warps * block_rows * (SUPERBLOCK_ROWS * 2 + 32 * at_once);
    launch!(device, &kernel, flat(grid), [32 * warps as u32, 1, 1], shared;
        x.gathered.address(), x.row_scales.address(), *jobs, guard.address())
}

fn f16_mma(
    device: &Device,
    bits: u8,
    x: &Activations,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), CudaError> {
    // On Volta a warp's sums take four times the registers.
    let (tiles, most_rows) = match device.arch().has_int8_mma() {
        true => (4, 64),
        false => (2, 32),
    };
    let block_rows = match jobs.rows {
        0..=16 => 16,
        17..=32 => 32,
        _ => most_rows,
    };
    let kernel = format!("linear_a16_mma_w{bits}_rows{block_rows}");
    let blocks = match block_rows {
        16 => 3,
        _ => 2,
    };
    let grid = tiled(device, jobs, block_rows, tiles, blocks);
    launch!(device, &kernel, grid, [128, 1, 1], 0;
        *jobs, x.gathered.address(), x.row_scales.address(), x.sums.sums.address(),
        x.sums.tickets.address(), guard.address())
}

/// (rows, columns, threads) of the fp32 products' tile: one that is mostly padding wastes arithmetic,
/// one too large leaves multiprocessors idle in the last wave.
fn sgemm_tile(rows: usize, columns: usize, multiprocessors: usize) -> (usize, usize, u32) {
    // Waves of two blocks a multiprocessor, over the share of the peak that the tile reaches.
    let waves =
        |tile: usize| (rows.div_ceil(tile) * columns.div_ceil(128)).div_ceil(2 * multiprocessors);
    match rows {
        0..=32 => (32, 64, 256),
        _ if rows > 64 && 2 * waves(128) * 59 < waves(64) * 63 => (128, 128, 128),
        _ => (64, 128, 256),
    }
}

fn sgemm(device: &Device, bits: u8, x: u64, jobs: &Jobs, guard: &Guard) -> Result<(), CudaError> {
    let (rows, columns) = (jobs.rows as usize, jobs.tiles as usize * TILE_COLUMNS);
    let multiprocessors = device.facts().multiprocessors as usize;
    let (tile, tile_columns, threads) = sgemm_tile(rows, columns, multiprocessors);
    let kernel = format!("linear_f32_w{bits}_t{tile}");
    let grid = [rows.div_ceil(tile), columns.div_ceil(tile_columns)];
    launch!(device, &kernel, flat(grid), [threads, 1, 1], 0; x, *jobs, guard.address())
}

fn f32_gemv(
    device: &Device,
    bits: u8,
    x: u64,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), CudaError> {
    let (tiles, superblocks) = (jobs.tiles as usize, jobs.superblocks as usize);
    let multiprocessors = device.facts().multiprocessors as usize;
    let rows = [1, 2, 4]
        .into_iter()
        .find(|rows| *rows >= jobs.rows as usize)
        .unwrap_or(4);
    // More tiles of a warp need fewer loads of x, more warps hide more latency: what is best depends
    // on whether the columns alone fill the card.
    let fills = |tiles_at_once: usize| tiles.div_ceil(tiles_at_once) * 4 >= 16 * multiprocessors;
    let (at_once, most_warps) = match (rows, bits) {
        (1, 8) => (2, if fills(2) { 4 } else { 8 }),
        (2, 8) => (2, 8),
        (_, 8) => (2, 4),
        (1, _) if fills(4) => (4, 4),
        (1, _) => (2, if fills(2) { 4 } else { 8 }),
        (2, _) => (4, 8),
        _ => (4, 4),
    };
    let warps = superblocks.clamp(1, most_warps);
    let fine = match jobs.scales_per_superblock {
        1 => "",
        _ => "_fine",
    };
    let zeros = match jobs.job[0].zeros {
        0 => "",
        _ => "_zeros",
    };
    let kernel = format!("linear_f32_gemv_w{bits}_r{rows}_t{at_once}{fine}{zeros}");
    let grid = [(jobs.rows as usize).div_ceil(rows), tiles.div_ceil(at_once)];
    let shared = warps * rows * (SUPERBLOCK_ROWS * 4 + 32 * at_once);
    launch!(device, &kernel, flat(grid), [32 * warps as u32, 1, 1], shared; x, *jobs, guard.address())
}

/// Tiles that a warp of the dp4a GEMV takes at once.
const DP4A_TILES: usize = 4;

fn dp4a_gemv(
    device: &Device,
    bits: u8,
    a8: &Quantised,
    jobs: &Jobs,
    guard: &Guard,
) -> Result<(), CudaError> {
    let (tiles, superblocks) = (jobs.tiles as usize, jobs.superblocks as usize);
    let rows = [1, 2, 4, 8]
        .into_iter()
        .find(|rows| *rows >= jobs.rows as usize)
        .unwrap_or(8);
    let groups_in_all = tiles.div_ceil(DP4A_TILES);
    // Warps that share a group of tiles split K, while there are too few groups for the card.
    let enough = 16 * device.facts().multiprocessors as usize;
    let mut splits = 1;
    while splits < 16 && groups_in_all * splits < enough && superblocks >= 4 * splits {
        splits *= 2;
    }
    let groups = (4 / splits).max(1);
    let kernel = format!("linear_a8_dp4a_gemv_w{bits}_m{rows}");
    let grid = [
        (jobs.rows as usize).div_ceil(8),
        tiles.div_ceil(DP4A_TILES * groups),
    ];
    let block = [32, splits as u32, groups as u32];
    let shared = splits * groups * (rows * 176 + 512);
    launch!(device, &kernel, flat(grid), block, shared;
        a8.q.address(), a8.d.address(), a8.dsum.address(), *jobs, guard.address())
}

fn dp4a_gemm(
    device: &Device,
    bits: u8,
    a8: &Quantised,
    jobs: &Jobs,
    partial: &PartialSums,
    guard: &Guard,
) -> Result<(), CudaError> {
    let (rows, tiles) = (jobs.rows as usize, jobs.tiles as usize);
    // The widest only where it is known to pay; it leaves K whole.
    let known: &[(usize, usize, bool)] = match rows {
        512.. => &[(64, 128, false), (64, 64, true), (32, 64, true)],
        _ => &[(64, 64, true), (32, 64, true)],
    };
    let costs = known.iter().map(|&(tile_rows, columns, may_split)| {
        let (down, across) = (
            rows.div_ceil(tile_rows),
            tiles.div_ceil(columns / TILE_COLUMNS),
        );
        let outputs = tile_rows * columns;
        let most = if may_split { MOST_SPLITS } else { 1 };
        let (splits, cost) = splits(device, jobs, [down, across], outputs, 3, most);
        // A taller tile reads shared memory less often for the same products.
        let weight = outputs * if tile_rows == 32 { 104 } else { 100 };
        (cost * weight, tile_rows, columns, [down, across, splits])
    });
    let best = costs.min_by_key(|(cost, ..)| *cost);
    let (_, tile_rows, columns, grid) = best.expect("there are shapes");
    let kernel = format!("linear_a8_dp4a_gemm_w{bits}_r{tile_rows}_c{columns}");
    launch!(device, &kernel, grid.map(|size| size as u32), [128, 1, 1], 0;
        a8.q.address(), a8.d.address(), a8.dsum.address(), *jobs, partial.sums.address(),
        partial.tickets.address(), guard.address())
}

/// Where blocks that split K leave their sums for the last of them to add up.
pub struct PartialSums {
    sums: Memory<f32>,
    /// Zero between launches.
    tickets: Memory<u32>,
}

impl PartialSums {
    /// f32s: what two row tiles of the largest card's warps take, and prompts need no more.
    const SUMS: usize = 8 << 20;
    const TICKETS: usize = 64 << 10;

    /// Room for any launch.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let what = "partial sums";
        Ok(Self {
            sums: device.zeros(Self::SUMS, what)?,
            tickets: device.zeros(Self::TICKETS, what)?,
        })
    }

    /// Bytes that [`PartialSums::new`] takes.
    pub const BYTES: u64 = (4 * (Self::SUMS + Self::TICKETS)) as u64;
}

fn mma(
    device: &Device,
    bits: u8,
    a8: &Quantised,
    jobs: &Jobs,
    partial: &PartialSums,
    guard: &Guard,
) -> Result<(), CudaError> {
    let rows = jobs.rows as usize;
    let multiprocessors = device.facts().multiprocessors as usize;
    let fine = jobs.scales_per_superblock > 1;
    // A block takes so many rows, and its warps so many tiles each: registers set the limit.
    let (block_rows, tiles) = match (rows, bits, fine) {
        (0..=8, 8, true) => (8, 1),
        (0..=8, 8, false) | (0..=8, _, true) => (8, 2),
        (0..=8, _, false) => (8, 4),
        (9..=16, 8, true) => (16, 1),
        (9..=16, 8, false) | (9..=16, _, true) => (16, 2),
        (9..=16, _, false) => (16, 4),
        (17..=32, _, true) => (32, 2),
        (17..=32, _, false) => (32, 4),
        (_, 8, _) | (_, _, true) => (64, 2),
        (_, _, false) => (64, 4),
    };
    let kernel = format!(
        "linear_a8_mma_w{bits}_rows{block_rows}{}",
        if fine { "_fine" } else { "" }
    );
    let grid = match block_rows {
        // As many blocks as the card holds at once cut the work into equal runs.
        8 => [4 * multiprocessors as u32, 1, 1],
        16 => [3 * multiprocessors as u32, 1, 1],
        _ => tiled(device, jobs, block_rows, tiles, 2),
    };
    if block_rows <= 16 {
        let sums = grid[0] as usize * 4 * 2 * (block_rows / 8 * tiles * 64);
        assert!(
            sums <= PartialSums::SUMS && runs(jobs, tiles, 1) <= PartialSums::TICKETS,
            "a8_mma: scratch"
        );
    }
    launch!(device, &kernel, grid, [128, 1, 1], 0;
        *jobs, a8.q.address(), a8.d.address(), a8.dsum.address(), partial.sums.address(),
        partial.tickets.address(), guard.address())
}

/// Groups of `warps` runs of `tiles` tiles that the jobs are cut into.
fn runs(jobs: &Jobs, tiles: usize, warps: usize) -> usize {
    let each = jobs.job[..jobs.count as usize].iter().map(|job| {
        let of = job.tiles as usize;
        // A job narrower than a warp's tiles is taken tile by tile.
        of.div_ceil(if of < tiles { warps } else { warps * tiles })
    });
    each.sum()
}

/// The grid of blocks that take `block_rows` rows and, with each of 4 warps, `tiles` tiles, of which
/// a multiprocessor holds `blocks`: (groups of rows, groups of columns, splits of K).
fn tiled(device: &Device, jobs: &Jobs, block_rows: usize, tiles: usize, blocks: usize) -> [u32; 3] {
    let (row_groups, groups) = (
        (jobs.rows as usize).div_ceil(block_rows),
        runs(jobs, tiles, 4),
    );
    let outputs = block_rows * 4 * tiles * TILE_COLUMNS;
    let grid = [row_groups, groups];
    let (splits, _) = splits(device, jobs, grid, outputs, blocks, MOST_SPLITS);
    [row_groups as u32, groups as u32, splits as u32]
}

/// Parts of K, at the most.
const MOST_SPLITS: usize = 12;

/// Into how many parts, `most` at the most, blocks split K where a grid of `outputs` values a block would not fill the card, of which
/// a multiprocessor holds `blocks`, and what that costs in superblocks.
fn splits(
    device: &Device,
    jobs: &Jobs,
    [rows, columns]: [usize; 2],
    outputs: usize,
    blocks: usize,
    most: usize,
) -> (usize, usize) {
    let at_once = blocks * device.facts().multiprocessors as usize;
    let superblocks = jobs.superblocks as usize;
    let most = match rows * columns <= PartialSums::TICKETS {
        true => (PartialSums::SUMS / (rows * columns * outputs)).clamp(1, superblocks.min(most)),
        false => 1,
    };
    let costs = (1..=most).map(|splits| {
        let waves = (rows * columns * splits).div_ceil(at_once);
        // A split costs as much as five superblocks.
        (splits, waves * (superblocks.div_ceil(splits) + 5))
    });
    costs
        .min_by_key(|(_, cost)| *cost)
        .unwrap_or((1, superblocks))
}

/// Products with unquantised weights.
pub(super) fn dense(
    device: &Device,
    path: LinearPath,
    x: &Memory<f32>,
    rows: usize,
    weights: &DenseWeights,
    call: &LinearCall<'_>,
    guard: &Guard,
) -> Result<(), KernelError> {
    let dtype = match weights.dtype {
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
        Dtype::F32 => "f32",
    };
    let (k, n) = (call.weights.k, call.weights.n);
    let (kernel, grid, threads) = match path {
        LinearPath::DenseGemv => {
            let at_once = [1, 2, 4, 8]
                .into_iter()
                .find(|most| *most >= rows)
                .unwrap_or(8);
            let grid = [rows.div_ceil(at_once), n.div_ceil(16)];
            (format!("dense_gemv_{dtype}_r{at_once}"), grid, 128)
        }
        LinearPath::DenseGemm => {
            let multiprocessors = device.facts().multiprocessors as usize;
            let (tile, columns, threads) = sgemm_tile(rows, n, multiprocessors);
            let grid = [rows.div_ceil(tile), n.div_ceil(columns)];
            (format!("dense_gemm_{dtype}_t{tile}"), grid, threads)
        }
        LinearPath::DenseMma if weights.dtype == Dtype::F16 => {
            let most = if n < 5000 { 64 } else { 128 };
            let tile = [16, 32, 64]
                .into_iter()
                .find(|tile| *tile >= rows)
                .unwrap_or(most);
            let grid = [rows.div_ceil(tile), n.div_ceil(128)];
            (format!("dense_mma_f16_t{tile}"), grid, 256)
        }
        other => return Err(not_for(other, "unquantised")),
    };
    let bias = call.weights.bias.as_ref().map_or(0, Memory::address);
    launch!(device, &kernel, flat(grid), [threads, 1, 1], 0;
        x.address(), weights.bytes.address(), bias, call.out.address(),
        rows as i32, n as i32, k as i32, guard.address(), call.check)?;
    Ok(())
}

/// Blocks of rows side by side: those at work together read the same weights.
fn flat([rows, columns]: [usize; 2]) -> [u32; 3] {
    [rows as u32, columns as u32, 1]
}

fn not_for(path: LinearPath, weights: &str) -> KernelError {
    KernelError::PathRefused {
        path: path.name(),
        reason: format!("it is not for {weights} weights on a card"),
    }
}

// A kernel reads them by value: the layout is that of `common.cuh`.
const _: () = assert!(size_of::<Job>() == 56 && size_of::<Jobs>() == 192);
