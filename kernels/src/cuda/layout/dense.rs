//! Plain numbers, which stand on a card as they do in a file.

use crate::cuda::{Device, Memory};
use crate::error::{KernelError, expect_length, expect_shape};
use crate::weights::check_covered;

/// Rows of plain numbers being written to the card.
pub struct DenseStaging<'a> {
    device: &'a Device,
    row_bytes: usize,
    memory: Memory<u8>,
    written: Vec<bool>,
}

impl<'a> DenseStaging<'a> {
    /// Room for `rows` rows of `row_bytes` bytes.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &'a Device, rows: usize, row_bytes: usize) -> Result<Self, KernelError> {
        expect_shape("dense weights", "shape", rows > 0 && row_bytes > 0, || {
            format!("({rows}, {row_bytes} bytes) is empty")
        })?;
        let memory = device.zeros(rows * row_bytes, "dense weights")?;
        Ok(Self {
            device,
            row_bytes,
            memory,
            written: vec![false; rows],
        })
    }

    /// Writes whole rows, the first being row `first`.
    ///
    /// # Errors
    /// Rows outside, rows written before, or the card's.
    pub fn write_rows(&mut self, first: usize, data: &[u8]) -> Result<(), KernelError> {
        const OP: &str = "write_rows";
        let rows = data.len() / self.row_bytes;
        expect_length(OP, "data", rows * self.row_bytes, data.len())?;
        let end = first.saturating_add(rows);
        let count = self.written.len();
        expect_shape(OP, "rows", end <= count, || {
            format!("{first}..{end} of {count}")
        })?;
        if self.written[first..end].contains(&true) {
            let (tensor, problem) = ("rows", "were written before");
            return Err(KernelError::Coverage {
                op: OP,
                tensor,
                first,
                end,
                problem,
            });
        }
        self.written[first..end].fill(true);
        Ok(self
            .device
            .write(&self.memory, first * self.row_bytes, data)?)
    }

    /// The rows, complete on the card.
    ///
    /// # Errors
    /// Rows that were never written, or the card's.
    pub fn finish(self) -> Result<Memory<u8>, KernelError> {
        check_covered("dense weights", "rows", &self.written)?;
        self.device.synchronize()?;
        Ok(self.memory)
    }
}
