//! Checks that the fast ops and their plain twins share.

use crate::error::{KernelError, expect_length, expect_shape};
use crate::heads::HeadRows;

pub(crate) fn check_norm(
    op: &'static str,
    length: usize,
    weight: &[f32],
) -> Result<(), KernelError> {
    expect_shape(op, "weight", !weight.is_empty(), || "is empty".to_owned())?;
    expect_shape(op, "x", length.is_multiple_of(weight.len()), || {
        format!(
            "has {length} elements, must be whole rows of {}",
            weight.len()
        )
    })
}

/// Half the rotated elements of a head.
pub(crate) fn check_rope(
    x: &[f32],
    layout: HeadRows,
    cos: &[f32],
    sin: &[f32],
) -> Result<usize, KernelError> {
    const OP: &str = "rope";
    layout.check(OP, "x", x.len())?;
    let half = cos.len() / layout.rows.max(1);
    expect_length(OP, "cos", layout.rows * half, cos.len())?;
    expect_length(OP, "sin", cos.len(), sin.len())?;
    expect_shape(OP, "cos", 2 * half <= layout.head_dim, || {
        format!(
            "rotates {} of {} elements a head",
            2 * half,
            layout.head_dim
        )
    })?;
    Ok(half)
}
