//! Token embeddings: a table of its own, or the columns of a tied dense `lm_head`.

use crate::buffer::Aligned;
use crate::error::{KernelError, expect_length, expect_shape};
use crate::weights::{Dtype, LinearWeights, WeightFormat, check_covered};

#[derive(Debug)]
enum TableData {
    F32(Aligned<u32>),
    Halves(Aligned<u16>),
}

/// A rank's rows of the embedding, (vocab_local, hidden) row-major in their own dtype.
#[derive(Debug)]
pub struct EmbeddingTable {
    dtype: Dtype,
    rows: usize,
    hidden: usize,
    data: TableData,
}

impl EmbeddingTable {
    /// Heap bytes held.
    pub fn bytes(&self) -> u64 {
        match &self.data {
            TableData::F32(data) => data.bytes(),
            TableData::Halves(data) => data.bytes(),
        }
    }

    /// Heap bytes of a table before it is made: exactly [`EmbeddingTable::bytes`].
    pub fn bytes_for(dtype: Dtype, rows: usize, hidden: usize) -> u64 {
        match dtype {
            Dtype::F32 => Aligned::<u32>::heap_bytes(rows * hidden),
            Dtype::F16 | Dtype::Bf16 => Aligned::<u16>::heap_bytes(rows * hidden),
        }
    }

    fn widen_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.hidden..(row + 1) * self.hidden;
        match &self.data {
            TableData::F32(data) => {
                for (out, &bits) in out.iter_mut().zip(&data[range]) {
                    *out = f32::from_bits(bits);
                }
            }
            TableData::Halves(data) => {
                for (out, &bits) in out.iter_mut().zip(&data[range]) {
                    *out = self.dtype.widen_bits(bits);
                }
            }
        }
    }
}

/// Builds an [`EmbeddingTable`] a few rows at a time.
#[derive(Debug)]
pub struct EmbeddingBuilder {
    table: EmbeddingTable,
    written: Vec<bool>,
}

impl EmbeddingBuilder {
    /// An empty table of shape (rows, hidden).
    ///
    /// # Errors
    /// A `hidden` of 0.
    pub fn new(dtype: Dtype, rows: usize, hidden: usize) -> Result<Self, KernelError> {
        expect_shape("embedding", "hidden", hidden > 0, || "is 0".to_owned())?;
        let data = match dtype {
            Dtype::F32 => TableData::F32(Aligned::zeroed(rows * hidden)),
            Dtype::F16 | Dtype::Bf16 => TableData::Halves(Aligned::zeroed(rows * hidden)),
        };
        let table = EmbeddingTable {
            dtype,
            rows,
            hidden,
            data,
        };
        Ok(Self {
            table,
            written: vec![false; rows],
        })
    }

    /// Writes rows `first_row..`; `data`: (rows, hidden) little-endian elements.
    ///
    /// # Errors
    /// `data` is not whole rows, runs past the table, or writes a row twice.
    pub fn write_rows(&mut self, first_row: usize, data: &[u8]) -> Result<(), KernelError> {
        const OP: &str = "write_rows";
        let (hidden, limit) = (self.table.hidden, self.table.rows);
        let row_bytes = hidden * self.table.dtype.bytes();
        let rows = data.len() / row_bytes;
        expect_length(OP, "data bytes", rows * row_bytes, data.len())?;
        let end = first_row.saturating_add(rows);
        expect_shape(OP, "rows", end <= limit, || {
            format!("{first_row}..{end} of {limit}")
        })?;
        if self.written[first_row..end].contains(&true) {
            let problem = "were written before";
            let tensor = "rows";
            return Err(KernelError::Coverage {
                op: OP,
                tensor,
                first: first_row,
                end,
                problem,
            });
        }
        self.written[first_row..end].fill(true);
        let range = first_row * hidden..end * hidden;
        match &mut self.table.data {
            TableData::F32(target) => {
                for (target, bytes) in target[range].iter_mut().zip(data.as_chunks().0) {
                    *target = u32::from_le_bytes(*bytes);
                }
            }
            TableData::Halves(target) => {
                for (target, bytes) in target[range].iter_mut().zip(data.as_chunks().0) {
                    *target = u16::from_le_bytes(*bytes);
                }
            }
        }
        Ok(())
    }

    /// The finished table.
    ///
    /// # Errors
    /// [`KernelError::Coverage`] naming the first rows that were never written.
    pub fn finish(self) -> Result<EmbeddingTable, KernelError> {
        check_covered("embedding", "rows", &self.written)?;
        Ok(self.table)
    }
}

/// Where embedding rows come from.
#[derive(Debug, Clone, Copy)]
pub enum EmbeddingSource<'a> {
    /// A table of its own.
    Table(&'a EmbeddingTable),
    /// Tied embeddings: column `id` of a dense `lm_head` of shape (hidden, vocab_local).
    Tied(&'a LinearWeights),
}

impl EmbeddingSource<'_> {
    /// Ids that the source has rows for.
    pub fn rows(&self) -> usize {
        match self {
            Self::Table(table) => table.rows,
            Self::Tied(weights) => weights.n(),
        }
    }

    /// Elements of one row.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Table(table) => table.hidden,
            Self::Tied(weights) => weights.k(),
        }
    }

    pub(crate) fn check(&self, tokens: &[u32], out: &[f32]) -> Result<(), KernelError> {
        if let Self::Tied(weights) = self {
            let dense = matches!(weights.format(), WeightFormat::Dense(_));
            expect_shape("embed", "tied weights", dense, || {
                format!("are {}, must be dense", weights.format())
            })?;
        }
        expect_length("embed", "out", tokens.len() * self.hidden(), out.len())
    }

    /// One row, widened exactly; `out`: (hidden).
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Table(table) => table.widen_row(row, out),
            Self::Tied(weights) => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = weights.stored_value(k, row);
                }
            }
        }
    }
}
