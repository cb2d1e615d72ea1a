//! The kernel paths of cards that need not be there, for `plan`: asked of the one selector.

use secondwind_kernels::{
    cuda::{Activations, Arch, LayoutFacts, SUPERBLOCK_ROWS},
    select::{DeviceFacts, Instruction, LinearPath, LinearShape, Precision, select_linear},
    weights::{Dtype, WeightFormat},
};
use secondwind_model::{
    capabilities::WeightKind,
    plan::{Arithmetic, CardPreset, PathFacts},
};

/// The path of `weights` at `rows` rows on `card`, where no linear has more than `widest` input
/// channels; `None` for a card older than compute capability 6.0.
pub fn facts(
    card: &CardPreset,
    weights: WeightKind,
    rows: usize,
    widest: usize,
) -> Option<PathFacts> {
    let arch = Arch::for_card(capability(card)?)?;
    let format = match weights {
        WeightKind::Gptq { bits } => WeightFormat::Quantised { bits },
        WeightKind::Dense16 => WeightFormat::Dense(Dtype::F16),
        WeightKind::Dense32 => WeightFormat::Dense(Dtype::F32),
    };
    let shape = LinearShape {
        format,
        k: 4096,
        n: 4096,
        rows,
    };
    let choice = select_linear(DeviceFacts::Cuda { arch }, shape, Precision::Fast, None).ok()?;
    let layout = LayoutFacts::of(format);
    let superblocks = widest.div_ceil(SUPERBLOCK_ROWS);
    Some(PathFacts {
        path: choice.path.to_string(),
        arithmetic: arithmetic(choice.path),
        bytes_per_weight: layout.bytes_per_weight,
        column_multiple: layout.column_multiple,
        row_multiple: layout.row_multiple,
        scale_rows: layout.scale_rows,
        bytes_per_scale: layout.bytes_per_scale,
        scratch_bytes_per_row: Activations::bytes_per_row(superblocks) as f64,
        scratch_bytes: Activations::fixed_bytes(superblocks) as f64,
    })
}

/// What a path spends its time in when rows are many.
fn arithmetic(path: LinearPath) -> Arithmetic {
    match path.instruction() {
        Some(Instruction::Dp4a) => Arithmetic::Dp4a,
        Some(Instruction::MmaS8) => Arithmetic::Int8Tensor,
        Some(Instruction::MmaF16) => Arithmetic::Fp16Tensor,
        Some(Instruction::FmaF16) => Arithmetic::Fp16,
        Some(Instruction::FmaF32) | None => Arithmetic::Fp32,
    }
}

fn capability(card: &CardPreset) -> Option<(u8, u8)> {
    let (major, minor) = card.compute_capability.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use secondwind_model::plan::{card_names, preset};

    use super::*;

    #[test]
    fn every_preset_has_paths_within_its_arithmetic() {
        for name in card_names() {
            let card = preset(name).unwrap();
            for rows in [1, 8, 512] {
                for weights in [
                    WeightKind::Gptq { bits: 4 },
                    WeightKind::Dense16,
                    WeightKind::Dense32,
                ] {
                    let facts = facts(&card, weights, rows, 8192)
                        .unwrap_or_else(|| panic!("{name}: {weights}"));
                    let rates = &card.operations_per_second;
                    let has = match facts.arithmetic {
                        Arithmetic::Fp32 | Arithmetic::Fp16 => true,
                        Arithmetic::Dp4a => rates.dp4a.is_some(),
                        Arithmetic::Fp16Tensor => rates.fp16_tensor.is_some(),
                        Arithmetic::Int8Tensor => rates.int8_tensor.is_some(),
                    };
                    assert!(has, "{name} has no {:?}", facts.arithmetic);
                }
            }
        }
    }
}
