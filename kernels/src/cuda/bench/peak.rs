//! The rate of single instructions: what a product that is bound by arithmetic is held against.

use super::{Device, median};
use crate::cuda::{CudaError, launch};
use crate::select::Instruction;

/// Instructions of a thread in one turn of the kernels' loop: `CHAINS` of `bench/peak.cu`.
const CHAINS: u64 = 8;
const ITERATIONS: i32 = 4096;
const THREADS: u32 = 256;

impl Instruction {
    /// (kernel, multiply-adds of a warp).
    const fn peak(self) -> (&'static str, u64) {
        match self {
            Self::FmaF32 => ("peak_fma_f32", 32),
            Self::FmaF16 => ("peak_fma_f16x2", 64),
            Self::Dp4a => ("peak_dp4a", 128),
            Self::MmaS8 => ("peak_mma_s8_m8n8k16", 1024),
            Self::MmaF16 => ("peak_mma_f16_m16n8k8", 1024),
        }
    }
}

/// Multiply-adds per second of kernels that issue nothing but one instruction, for each that the
/// architecture's code has.
///
/// # Errors
/// The card's.
pub fn instruction_peaks(device: &Device) -> Result<Vec<(Instruction, f64)>, CudaError> {
    let mut peaks = Vec::new();
    for instruction in Instruction::ALL {
        if let Some(peak) = instruction_peak(device, instruction)? {
            peaks.push((instruction, peak));
        }
    }
    Ok(peaks)
}

fn instruction_peak(device: &Device, instruction: Instruction) -> Result<Option<f64>, CudaError> {
    let (kernel, multiply_adds) = instruction.peak();
    if !device.has(kernel) {
        return Ok(None);
    }
    let blocks = 16 * device.facts().multiprocessors;
    let out = device.zeros::<f32>((blocks * THREADS) as usize, "a measurement")?;
    let seconds = median(
        device,
        || launch!(device, kernel, [blocks, 1, 1], [THREADS, 1, 1], 0; ITERATIONS, out.address()),
    )?;
    let warps = u64::from(blocks * THREADS / 32);
    let total = warps * CHAINS * ITERATIONS as u64 * multiply_adds;
    Ok(Some(total as f64 / seconds))
}
