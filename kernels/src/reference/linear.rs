use crate::error::{KernelError, expect_length};
use crate::weights::LinearWeights;

/// `out = x * W + bias`, every weight dequantised alone, sums in f64.
///
/// `x`: (rows, k) f32; `out`: (rows, n) f32, overwritten.
///
/// # Errors
/// Lengths that disagree with the weights' shape.
pub fn linear(weights: &LinearWeights, x: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    let (k, n) = (weights.k(), weights.n());
    let rows = x.len() / k;
    expect_length("linear", "x", rows * k, x.len())?;
    expect_length("linear", "out", rows * n, out.len())?;
    for column in 0..n {
        let w = dequantise_column(weights, column);
        let bias = weights
            .bias
            .as_ref()
            .map_or(0.0, |bias| f64::from(bias[column]));
        for row in 0..rows {
            let x = &x[row * k..][..k];
            let products = x.iter().zip(&w).map(|(&x, &w)| f64::from(x) * w);
            out[row * n + column] = (products.sum::<f64>() + bias) as f32;
        }
    }
    Ok(())
}

/// One output column of W as exact numbers, (k) in the shard's row order.
pub fn dequantise_column(weights: &LinearWeights, column: usize) -> Vec<f64> {
    let mut w = vec![0.0; weights.k()];
    for (run_index, run) in weights.rows.runs.iter().enumerate() {
        let (scale, zero) = weights.scale_and_zero(run_index, column);
        for offset in 0..run.rows {
            let stored = f64::from(weights.stored_value(run.stored + offset, column));
            w[weights.rows.row(run.first + offset)] = f64::from(scale) * (stored - f64::from(zero));
        }
    }
    w
}
