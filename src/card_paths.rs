//! The kernel paths that the planned CUDA backend gives each card, for `plan`. Nothing here runs: it
//! tells the planner what a path's layout takes and which arithmetic bounds it. The selector of
//! `kernels` takes this over together with the kernels themselves.

use secondwind_model::{
    capabilities::WeightKind,
    plan::{Arithmetic, CardPreset, PathFacts},
};

/// Rows up to which a linear is bound by reading its weights.
const DECODE_ROWS: usize = 16;

/// The path of `weights` at `rows` rows on `card`; `None` for a card older than compute capability 6.0.
pub fn facts(card: &CardPreset, weights: WeightKind, rows: usize) -> Option<PathFacts> {
    let capability = capability(card)?;
    let decode = rows <= DECODE_ROWS;
    let (path, arithmetic) = match weights {
        WeightKind::Gptq { bits } => quantised(capability, bits, decode)?,
        WeightKind::Dense16 => match capability {
            (7.., _) if !decode => ("dense_f16_mma", Arithmetic::Fp16Tensor),
            // Half precision crawls on 6.1: weights stay halves in memory, arithmetic is fp32.
            _ => ("dense_f16", Arithmetic::Fp32),
        },
        WeightKind::Dense32 => ("dense_f32", Arithmetic::Fp32),
    };
    Some(PathFacts {
        path: path.into(),
        arithmetic,
        bytes_per_weight: match weights {
            WeightKind::Gptq { bits } => f64::from(bits) / 8.0,
            WeightKind::Dense16 => 2.0,
            WeightKind::Dense32 => 4.0,
        },
        column_multiple: 8,
        row_multiple: 8,
        bytes_per_scale: match weights {
            // A half-precision scale and a 16-bit zero point.
            WeightKind::Gptq { .. } => 4.0,
            WeightKind::Dense16 | WeightKind::Dense32 => 0.0,
        },
        // Activations as 8-bit integers with their scales, at most 64 Ki of them in a row.
        scratch_bytes_per_row: 72.0 * 1024.0,
        scratch_bytes: 1024.0 * 1024.0,
    })
}

/// Four-way integer dot products start at 6.1, tensor cores at 7.0, their integers at 7.5.
fn quantised(capability: (u8, u8), bits: u8, decode: bool) -> Option<(&'static str, Arithmetic)> {
    let path = match (capability, decode, bits) {
        ((6, 0), ..) => ("w_a16_half2", Arithmetic::Fp16),
        (_, true, _) | ((6, _), ..) => ("w_a8_dp4a", Arithmetic::Dp4a),
        ((7, 0..=4), ..) => ("w_a16_mma_m8n8k4", Arithmetic::Fp16Tensor),
        // Eight-bit codes are their own operands; narrower ones are widened on the way.
        ((7.., _), ..) => ("w_a8_mma_m8n8k16", Arithmetic::Int8Tensor),
        _ => return None,
    };
    Some(path)
}

fn capability(card: &CardPreset) -> Option<(u8, u8)> {
    let (major, minor) = card.compute_capability.split_once('.')?;
    let capability = (major.parse().ok()?, minor.parse().ok()?);
    (capability >= (6, 0)).then_some(capability)
}

#[cfg(test)]
mod tests {
    use secondwind_model::plan::{card_names, preset};

    use super::*;

    #[test]
    fn every_preset_has_paths_within_its_arithmetic() {
        for name in card_names() {
            let card = preset(name).unwrap();
            for rows in [1, 512] {
                for weights in [
                    WeightKind::Gptq { bits: 4 },
                    WeightKind::Dense16,
                    WeightKind::Dense32,
                ] {
                    let facts =
                        facts(&card, weights, rows).unwrap_or_else(|| panic!("{name}: {weights}"));
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
