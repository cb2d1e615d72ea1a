//! A rank of random weights, made on the card: for measurements of models that nobody has at hand.

use std::collections::BTreeSet;

use secondwind_model::{
    modules::WeightFormat,
    plan::{ModelShape, ShardPlan},
    slices::{SliceKind, slices},
};

use super::{LoadError, ModelParts, Parts, Readings, complete, kernel_dtype, precision, unplaced};
use crate::backend::{Backend, CudaBackend};

/// What [`super::load`] would make of a checkpoint of this shape, with random weights and no biases.
///
/// # Errors
/// The plan does not fit, or the card's.
pub fn random(
    backend: &mut CudaBackend,
    shape: &ModelShape,
    plan: &ShardPlan,
    rank: usize,
) -> Result<Parts<CudaBackend>, LoadError> {
    use secondwind_kernels::weights::WeightFormat as Stored;
    backend.set_precision(precision(plan));
    let readings = Readings::start(backend);
    let mut parts = ModelParts::new(shape.config.layers.len());
    let mut choices = BTreeSet::new();
    for (seed, slice) in (1..).zip(&slices(shape, plan, rank)) {
        let extent = (slice.rows.len(), slice.columns.len());
        match slice.kind {
            SliceKind::Norm { layer, role } => {
                let ones = vec![1.0; slice.columns.len().max(slice.rows.len())];
                *parts.norm(layer, role).ok_or_else(|| unplaced(slice))? =
                    Some(backend.upload(&ones)?);
            }
            SliceKind::Embedding => {
                if shape.shares_embedding() {
                    let format = Stored::Dense(kernel_dtype(shape.embedding_dtype()));
                    let head = backend.random_linear(format, extent, extent.0, seed)?;
                    parts.embedding = Some(backend.tied_embedding(&head)?);
                    parts.lm_head = Some(head);
                } else {
                    parts.embedding = Some(backend.random_embedding(extent.1, extent.0)?);
                }
            }
            SliceKind::TiedHead { .. } => {}
            SliceKind::Linear { index, role } => {
                let module = &shape.linears[index];
                let (format, group) = match &module.format {
                    WeightFormat::Dense(dtype) => (Stored::Dense(kernel_dtype(*dtype)), extent.0),
                    WeightFormat::Gptq(gptq) => (
                        Stored::Quantised { bits: gptq.bits },
                        gptq.group_size.unwrap_or(module.k),
                    ),
                };
                let linear = backend.random_linear(format, extent, group, seed)?;
                choices.extend(backend.linear_choices(&linear));
                let place = parts.linear(module.layer, role);
                *place.ok_or_else(|| unplaced(slice))? = Some(linear);
            }
        }
    }
    complete(backend, shape, plan, rank, parts, choices, readings)
}
