//! Linear layers on a card: what they are made of, and the launch of each path.

mod launches;

use launches::PartialSums;

use std::sync::Arc;

use super::{
    CudaError, Device, Memory, Quantised, gather,
    layout::{QuantWeights, SUPERBLOCK_ROWS, TILE_COLUMNS},
    ops::{F16Form, Guard, to_f16},
    quantise,
};
use crate::error::KernelError;
use crate::select::{LinearPath, LinearShape};
use crate::weights::{Dtype, WeightFormat};

/// One shard of a linear layer on a card: `out = x * W + bias`, W of shape (k, n).
pub struct Linear {
    /// Rows of W.
    pub k: usize,
    /// Columns of W.
    pub n: usize,
    /// The numbers.
    pub weights: Weights,
    /// (n).
    pub bias: Option<Memory<f32>>,
}

/// How a linear's numbers are stored.
pub enum Weights {
    /// Integer codes.
    Quantised(QuantWeights),
    /// Plain numbers.
    Dense(DenseWeights),
}

/// Unquantised weights, (n, k) row-major as Hugging Face stores them.
pub struct DenseWeights {
    /// Element type.
    pub dtype: Dtype,
    /// The numbers' bytes; a tied embedding shares them.
    pub bytes: Arc<Memory<u8>>,
}

/// One product of a group.
pub struct LinearCall<'a> {
    /// W and bias.
    pub weights: &'a Linear,
    /// (rows, n).
    pub out: &'a Memory<f32>,
    /// The guard's number for `out`.
    pub check: u32,
}

/// A step's activations in the forms that paths read, and what they are forms of.
pub struct Activations {
    /// For the integer paths.
    pub a8: Quantised,
    /// (rows padded to 16, stored rows) 4 bytes in stored order: f32 or f16, see [`F16Form`].
    gathered: Memory<f32>,
    /// (rows) powers of two, of the f16 forms.
    row_scales: Memory<f32>,
    sums: PartialSums,
    /// What `a8` holds: source, stored order, superblocks.
    a8_of: Option<(u64, u64, usize)>,
}

/// A linear's parameters as `struct LinearJob` of `common.cuh` has them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Job {
    codes: u64,
    scales: u64,
    zeros: u64,
    bias: u64,
    out: u64,
    n: i32,
    tiles: i32,
    check: u32,
}

/// `struct LinearJobs` of `common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Jobs {
    job: [Job; 3],
    count: i32,
    tiles: i32,
    superblocks: i32,
    scales_per_superblock: i32,
    rows: i32,
}

impl Linear {
    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        match &self.weights {
            Weights::Quantised(weights) => WeightFormat::Quantised { bits: weights.bits },
            Weights::Dense(weights) => WeightFormat::Dense(weights.dtype),
        }
    }

    /// What the selector needs to know.
    pub fn shape(&self, rows: usize) -> LinearShape {
        LinearShape {
            format: self.format(),
            k: self.k,
            n: self.n,
            rows,
        }
    }

    /// Bytes of codes or numbers, scales and zero points: what one pass reads.
    pub fn read_bytes(&self) -> u64 {
        match &self.weights {
            Weights::Quantised(weights) => {
                let zeros = weights.zeros.as_ref().map_or(0, Memory::bytes);
                weights.codes.bytes() + weights.scales.bytes() + zeros
            }
            Weights::Dense(weights) => weights.bytes.bytes(),
        }
    }

    /// True if x is read in its own order, so that what makes x may quantise it at once.
    pub fn is_plain(&self) -> bool {
        matches!(&self.weights, Weights::Quantised(weights) if weights.order.is_none())
    }

    /// Linears that may share a launch read x in the same order with the same kernel.
    fn shares_launch(&self, other: &Self) -> bool {
        match (&self.weights, &other.weights) {
            (Weights::Quantised(a), Weights::Quantised(b)) => {
                (a.bits, a.scales_per_superblock, a.superblocks, a.order_hash)
                    == (b.bits, b.scales_per_superblock, b.superblocks, b.order_hash)
                    && a.zeros.is_some() == b.zeros.is_some()
            }
            _ => false,
        }
    }
}

impl Activations {
    /// Room for `rows` rows of linears of up to `superblocks` superblocks.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device, rows: usize, superblocks: usize) -> Result<Self, CudaError> {
        Ok(Self {
            a8: Quantised::new(device, rows, superblocks)?,
            gathered: device.zeros(
                rows.next_multiple_of(F16Form::MOST_ROW_TILE) * superblocks * SUPERBLOCK_ROWS,
                "gathered activations",
            )?,
            row_scales: device.zeros(rows, "scales of activation rows")?,
            sums: PartialSums::new(device)?,
            a8_of: None,
        })
    }

    /// Bytes of [`Activations::new`] for one row.
    pub const fn bytes_per_row(superblocks: usize) -> u64 {
        (Quantised::bytes_per_row(superblocks) + Self::gathered_bytes(superblocks) + 4) as u64
    }

    /// Bytes of [`Activations::new`] whatever the rows; rows are padded to tiles of 8 or 16.
    pub const fn fixed_bytes(superblocks: usize) -> u64 {
        PartialSums::BYTES
            + 7 * Quantised::bytes_per_row(superblocks) as u64
            + ((F16Form::MOST_ROW_TILE - 1) * Self::gathered_bytes(superblocks)) as u64
    }

    const fn gathered_bytes(superblocks: usize) -> usize {
        superblocks * SUPERBLOCK_ROWS * 4
    }

    /// Says that `a8` was written with the rows of `x`, `width` wide, in their own order.
    pub fn quantised_by(&mut self, x: &Memory<f32>, width: usize) {
        self.a8_of = Some((x.address(), 0, width.div_ceil(SUPERBLOCK_ROWS)));
    }

    /// Says that what `a8` was made of is written again.
    pub fn forget(&mut self) {
        self.a8_of = None;
    }

    fn quantise(
        &mut self,
        device: &Device,
        x: &Memory<f32>,
        rows: usize,
        k: usize,
        weights: &QuantWeights,
    ) -> Result<(), CudaError> {
        let wanted = Some((x.address(), weights.order_hash, weights.superblocks));
        if self.a8_of != wanted {
            quantise(
                device,
                x,
                weights.order.as_ref(),
                rows,
                k,
                weights.superblocks,
                &self.a8,
            )?;
            self.a8_of = wanted;
        }
        Ok(())
    }

    /// Writes x as f16 in stored order.
    fn to_f16(
        &self,
        device: &Device,
        form: F16Form,
        x: &Memory<f32>,
        rows: usize,
        k: usize,
        weights: &QuantWeights,
    ) -> Result<(), CudaError> {
        let order = weights.order.as_ref();
        let (out, row_scales) = (&self.gathered, &self.row_scales);
        to_f16(
            device,
            form,
            x,
            order,
            rows,
            k,
            weights.superblocks,
            out,
            row_scales,
        )
    }

    /// The address of x in stored order: x itself where it stands so already.
    fn in_stored_order(
        &self,
        device: &Device,
        x: &Memory<f32>,
        rows: usize,
        k: usize,
        weights: &QuantWeights,
    ) -> Result<u64, CudaError> {
        if weights.order.is_none() && k == weights.superblocks * SUPERBLOCK_ROWS {
            return Ok(x.address());
        }
        let order = weights.order.as_ref();
        gather(
            device,
            x,
            order,
            rows,
            k,
            weights.superblocks,
            &self.gathered,
        )?;
        Ok(self.gathered.address())
    }
}

/// Products of the same x, `rows` rows; neighbours that can, share a launch.
///
/// # Errors
/// A path that is not for these weights, or the card's.
pub fn linear(
    device: &Device,
    path_of: impl Fn(&Linear) -> Result<LinearPath, KernelError>,
    x: &Memory<f32>,
    rows: usize,
    calls: &[LinearCall<'_>],
    activations: &mut Activations,
    guard: &Guard,
) -> Result<(), KernelError> {
    for call in calls {
        let Linear { k, n, .. } = *call.weights;
        assert!(
            rows * k <= x.len() && rows * n <= call.out.len(),
            "linear: lengths"
        );
    }
    for group in calls.chunk_by(|a, b| a.weights.shares_launch(b.weights)) {
        for group in group.chunks(3) {
            let first = group[0].weights;
            let path = path_of(first)?;
            match &first.weights {
                Weights::Quantised(weights) => {
                    let jobs = jobs(group, weights, rows);
                    let bits = weights.bits;
                    if path.takes_a8() {
                        activations.quantise(device, x, rows, first.k, weights)?;
                        let Activations { a8, sums, .. } = &*activations;
                        launches::integer(device, path, bits, a8, &jobs, sums, guard)?;
                    } else if let Some(form) = f16_form(path) {
                        activations.to_f16(device, form, x, rows, first.k, weights)?;
                        launches::halves(device, form, bits, activations, &jobs, guard)?;
                    } else {
                        let x = activations.in_stored_order(device, x, rows, first.k, weights)?;
                        launches::widened(device, path, bits, x, &jobs, guard)?;
                    }
                }
                Weights::Dense(weights) => {
                    for call in group {
                        launches::dense(device, path, x, rows, weights, call, guard)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// The form in which a path reads x, if it is one of f16.
fn f16_form(path: LinearPath) -> Option<F16Form> {
    match path {
        LinearPath::A16Half2 => Some(F16Form::Rounded),
        LinearPath::A16Mma => Some(F16Form::Split),
        _ => None,
    }
}

fn jobs(group: &[LinearCall<'_>], weights: &QuantWeights, rows: usize) -> Jobs {
    let mut jobs = Jobs {
        count: group.len() as i32,
        superblocks: weights.superblocks as i32,
        scales_per_superblock: weights.scales_per_superblock as i32,
        rows: rows as i32,
        ..Jobs::default()
    };
    for (job, call) in jobs.job.iter_mut().zip(group) {
        let Weights::Quantised(weights) = &call.weights.weights else {
            continue;
        };
        let tiles = call.weights.n.div_ceil(TILE_COLUMNS) as i32;
        *job = Job {
            codes: weights.codes.address(),
            scales: weights.scales.address(),
            zeros: weights.zeros.as_ref().map_or(0, Memory::address),
            bias: call.weights.bias.as_ref().map_or(0, Memory::address),
            out: call.out.address(),
            n: call.weights.n as i32,
            tiles,
            check: call.check,
        };
        jobs.tiles += tiles;
    }
    jobs
}
