//! Builder of weights that are not quantised.

use crate::buffer::Aligned;
use crate::error::{KernelError, expect_length, expect_shape};

use super::rows::RowOrder;
use super::{Dtype, LinearWeights, PANEL_COLUMNS, Storage, WeightFormat, padded_bias};

/// Builds dense [`LinearWeights`] from Hugging Face's (out, in) layout, a few columns at a time.
#[derive(Debug)]
pub struct DenseBuilder {
    weights: LinearWeights,
    dtype: Dtype,
    written: Vec<bool>,
}

impl DenseBuilder {
    /// An empty layer of shape (k, n); `bias`: (n) f32.
    ///
    /// # Errors
    /// A bias of another length than `n`, or a dimension of 0.
    pub fn new(
        dtype: Dtype,
        k: usize,
        n: usize,
        bias: Option<&[f32]>,
    ) -> Result<Self, KernelError> {
        const OP: &str = "dense weights";
        expect_shape(OP, "shape", k > 0 && n > 0, || {
            format!("({k}, {n}) is empty")
        })?;
        if let Some(bias) = bias {
            expect_length(OP, "bias", n, bias.len())?;
        }
        let rows = RowOrder::identity(k);
        let elements = rows.stored_rows * n.next_multiple_of(PANEL_COLUMNS);
        let storage = match dtype {
            Dtype::F32 => Storage::Words(Aligned::zeroed(elements)),
            Dtype::F16 | Dtype::Bf16 => Storage::Halves(Aligned::zeroed(elements)),
        };
        let weights = LinearWeights {
            format: WeightFormat::Dense(dtype),
            n,
            rows,
            storage,
            scaling: None,
            bias: bias.map(padded_bias),
        };
        Ok(Self {
            weights,
            dtype,
            written: vec![false; n],
        })
    }

    /// Writes output columns `first_column..`, whole rows of the checkpoint's tensor.
    ///
    /// `data`: (columns, k) little-endian elements of the builder's dtype, row-major.
    ///
    /// # Errors
    /// `data` is not whole rows, runs past column n, or writes a column twice.
    pub fn write_columns(&mut self, first_column: usize, data: &[u8]) -> Result<(), KernelError> {
        const OP: &str = "write_columns";
        let (k, n) = (self.weights.k(), self.weights.n());
        let column_bytes = k * self.dtype.bytes();
        let columns = data.len() / column_bytes;
        expect_length(OP, "data bytes", columns * column_bytes, data.len())?;
        let end = first_column.saturating_add(columns);
        expect_shape(OP, "columns", end <= n, || {
            format!("{first_column}..{end} of {n}")
        })?;
        if self.written[first_column..end].contains(&true) {
            return Err(KernelError::Coverage {
                op: OP,
                tensor: "columns",
                first: first_column,
                end,
                problem: "were written before",
            });
        }
        let rows = self.weights.rows.stored_rows;
        let mut column = first_column;
        let mut data = data;
        while !data.is_empty() {
            let lane = column % PANEL_COLUMNS;
            let columns = (PANEL_COLUMNS - lane).min(end - column);
            let (columns_data, rest) = data.split_at(columns * column_bytes);
            let panel = column / PANEL_COLUMNS * rows * PANEL_COLUMNS..;
            match &mut self.weights.storage {
                Storage::Words(words) => {
                    interleave(&mut words[panel], lane, columns_data, k, u32::from_le_bytes);
                }
                Storage::Halves(halves) => {
                    interleave(
                        &mut halves[panel],
                        lane,
                        columns_data,
                        k,
                        u16::from_le_bytes,
                    );
                }
            }
            (column, data) = (column + columns, rest);
        }
        self.written[first_column..end].fill(true);
        Ok(())
    }

    /// The finished layer.
    ///
    /// # Errors
    /// [`KernelError::Coverage`] naming the first columns that were never written.
    pub fn finish(self) -> Result<LinearWeights, KernelError> {
        check_covered("dense weights", "columns", &self.written)?;
        Ok(self.weights)
    }
}

/// Writes columns of `k` elements side by side into a panel, from column `lane` on.
///
/// Goes a few rows at a time through all columns, so that the lines written stay in the nearest
/// cache until they are full.
fn interleave<T, const N: usize>(
    panel: &mut [T],
    lane: usize,
    columns: &[u8],
    k: usize,
    read: impl Fn([u8; N]) -> T,
) {
    const ROWS: usize = 64;
    let elements = columns.as_chunks::<N>().0;
    for first in (0..k).step_by(ROWS) {
        let rows = ROWS.min(k - first);
        for (offset, column) in elements.chunks_exact(k).enumerate() {
            let target = &mut panel[first * PANEL_COLUMNS + lane + offset..];
            let target = target.iter_mut().step_by(PANEL_COLUMNS);
            for (target, bytes) in target.zip(&column[first..first + rows]) {
                *target = read(*bytes);
            }
        }
    }
}

/// `Err(Coverage)` naming the first gap in `written`.
pub(crate) fn check_covered(
    op: &'static str,
    tensor: &'static str,
    written: &[bool],
) -> Result<(), KernelError> {
    let Some(first) = written.iter().position(|done| !done) else {
        return Ok(());
    };
    let length = written[first..].iter().position(|&done| done);
    let end = length.map_or(written.len(), |length| first + length);
    Err(KernelError::Coverage {
        op,
        tensor,
        first,
        end,
        problem: "were never written",
    })
}
