//! A card, measured.

use secondwind_kernels::{
    KernelError,
    cuda::{
        Activations, Device, LayoutFacts, SUPERBLOCK_ROWS,
        bench::{self, RandomLinears},
    },
    select::{DeviceFacts, LinearPath, LinearShape, Precision, select_linear},
};
use secondwind_model::{
    capabilities::{Capabilities, LinearCapability, Recordings},
    plan::{ModelShape, possible_weight_kinds},
};

use super::{ROW_BUCKETS, kernel_format};
use crate::backend::RECORDING_SIZES;

/// Shape of the linear that is timed: like those of a 7B model.
const TIMED: (usize, usize) = (4096, 8192);

/// What attention, sampling and the step's arrays take, about: eager scores are most of it, and changes of
/// logits a little more than 1 MiB.
const STEP_BYTES: u64 = 26 << 20;

/// Device memory that the driver may still take after a plan is made, as for kernels' stacks.
const DRIVER_RESERVE_BYTES: u64 = 256 << 20;

/// A recorded layer without its sums: at the shape of Qwen2.5-32B 12 recorded sizes of 64 layers took 24 MiB on
/// an H100, which is 3 KiB for each of its about ten launches.
const LAYER_BYTES: u64 = (24 << 20) / (12 * 64);

/// A recorded sum over NCCL: over two such cards the same recordings took 210 MiB, with 129 sums each of which
/// 7 sizes went over NCCL, for the smaller ones take one launch.
const SUM_BYTES: u64 = ((210 - 24) << 20) / (7 * 129);

/// An NCCL communicator: its kernels and its channels' buffers. Two H100s over NVLink took 466 MiB with 4
/// channels, 538 with 8 and 874 with all that NCCL opens there; cards on PCIe get 2 to 4.
const NCCL_BYTES: u64 = 512 << 20;

/// What a card keeps beside a model, with NCCL or without.
pub fn cuda_recordings(nccl: bool) -> Recordings {
    Recordings {
        sizes: RECORDING_SIZES.to_vec(),
        bytes_per_layer: LAYER_BYTES,
        bytes_per_sum: SUM_BYTES,
        nccl_bytes: if nccl { NCCL_BYTES } else { 0 },
    }
}

/// Measures `device` for the weight formats of `shape`; `nccl` says whether it could sum over NCCL.
///
/// # Errors
/// The forced path cannot run here, or the card failed.
pub fn measure_cuda(
    shape: &ModelShape,
    device: &Device,
    linear_path: Option<LinearPath>,
    nccl: bool,
) -> Result<Capabilities, KernelError> {
    let facts = DeviceFacts::Cuda {
        arch: device.arch(),
    };
    let widest = shape
        .linears
        .iter()
        .map(|linear| linear.k)
        .max()
        .unwrap_or(0);
    let superblocks = widest.div_ceil(SUPERBLOCK_ROWS);
    let mut linears = Vec::new();
    let (k, n) = TIMED;
    for kind in possible_weight_kinds(shape) {
        let format = kernel_format(kind);
        let weights = RandomLinears::new(device, format, TIMED, SUPERBLOCK_ROWS)?;
        for max_rows in ROW_BUCKETS {
            let timed = LinearShape {
                format,
                k,
                n,
                rows: max_rows,
            };
            let path = select_linear(facts, timed, Precision::Fast, linear_path)?.path;
            let timing = weights.time(path, max_rows)?;
            let layout = LayoutFacts::of(format);
            linears.push(LinearCapability {
                weights: kind,
                max_rows,
                path: path.to_string(),
                bytes_per_weight: layout.bytes_per_weight,
                column_multiple: layout.column_multiple,
                row_multiple: layout.row_multiple,
                scale_rows: layout.scale_rows,
                bytes_per_scale: layout.bytes_per_scale,
                scratch_bytes_per_row: Activations::bytes_per_row(superblocks) as f64,
                scratch_bytes: (Activations::fixed_bytes(superblocks) + STEP_BYTES) as f64,
                seconds_per_byte: timing.seconds / timing.read_bytes as f64,
            });
        }
    }
    let (free, _) = device.memory()?;
    let card = device.facts();
    Ok(Capabilities {
        device: format!("{} ({} code)", card.name, device.arch()),
        usable_bytes: free.saturating_sub(DRIVER_RESERVE_BYTES),
        // A copy reads and writes at the same time; reading alone is as fast as both together.
        read_bytes_per_second: bench::copy_bandwidth(device)?,
        all_reduce_latency_seconds: 30.0e-6,
        op_latency_seconds: bench::launch_seconds(device)?,
        linears,
        recordings: cuda_recordings(nccl),
    })
}

#[cfg(test)]
mod tests {
    use secondwind_kernels::{
        cuda::{LayoutFacts, Rows, SUPERBLOCK_ROWS, TILE_COLUMNS},
        weights::WeightFormat as Stored,
    };
    use secondwind_model::{
        capabilities::Layout, modules::WeightFormat, plan::linear_bytes, synthetic::SyntheticModel,
    };

    /// What the planner counts is what the layout takes.
    #[test]
    fn planned_bytes_are_those_of_the_layout() {
        let shape = SyntheticModel::qwen2_5("7b").unwrap().shape().unwrap();
        let facts = LayoutFacts::of(Stored::Quantised { bits: 4 });
        let layout = Layout {
            bytes_per_weight: facts.bytes_per_weight,
            column_multiple: facts.column_multiple,
            row_multiple: facts.row_multiple,
            scale_rows: facts.scale_rows,
            bytes_per_scale: facts.bytes_per_scale,
        };
        for (group_size, rows) in [
            (Some(128), 0..3584),
            (Some(64), 0..3584),
            (Some(32), 96..3584),
            (Some(128), 64..1900),
            (None, 0..3584),
            (Some(128), 128..131),
        ] {
            let mut module = shape.linears[0].clone();
            let WeightFormat::Gptq(format) = &mut module.format else {
                panic!("the shape is quantised");
            };
            format.group_size = group_size;
            let size = group_size.unwrap_or(module.k);
            let groups: Vec<u32> = rows.clone().map(|row| (row / size) as u32).collect();
            let stored = Rows::new(&groups);
            let columns = 3001usize;
            let tiles = columns.div_ceil(TILE_COLUMNS);
            let codes = tiles * stored.superblocks * SUPERBLOCK_ROWS * TILE_COLUMNS / 2;
            let scales =
                tiles * stored.superblocks * stored.scales_per_superblock * TILE_COLUMNS * 2;
            let planned = linear_bytes(&module, &rows, &(0..columns), &layout, false);
            assert_eq!(
                planned.total(),
                (codes + scales) as u64,
                "{group_size:?}, {rows:?}"
            );
        }
    }
}
