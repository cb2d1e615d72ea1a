//! Shapes that several ops share: rows of heads in a wider buffer, and what each row attends to.

use crate::error::{KernelError, expect_length, expect_shape};
use crate::kv::KvShape;

/// (rows, heads, head_dim) f32 inside a buffer whose rows may be wider, as the query part of a
/// fused QKV buffer is. The slice given with it starts at the first head of the first row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// Rows.
    pub rows: usize,
    /// Heads of this rank.
    pub heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Elements from one row's start to the next.
    pub row_stride: usize,
}

impl HeadRows {
    /// Heads that fill their buffer.
    pub const fn packed(rows: usize, heads: usize, head_dim: usize) -> Self {
        Self {
            rows,
            heads,
            head_dim,
            row_stride: heads * head_dim,
        }
    }

    /// Elements of one row's heads.
    pub const fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Refuses a buffer of `length` elements that does not hold these rows.
    pub(crate) fn check(
        &self,
        op: &'static str,
        tensor: &'static str,
        length: usize,
    ) -> Result<(), KernelError> {
        let sound = self.head_dim > 0 && self.row_stride >= self.width();
        expect_shape(op, tensor, sound, || {
            format!("has impossible layout {self:?}")
        })?;
        let needed = match self.rows {
            0 => 0,
            rows => (rows - 1) * self.row_stride + self.width(),
        };
        expect_shape(op, tensor, needed <= length, || {
            format!("has {length} elements, {self:?} needs {needed}")
        })
    }

    /// The heads of each row.
    pub(crate) fn iter_mut<'a>(&self, x: &'a mut [f32]) -> impl Iterator<Item = &'a mut [f32]> {
        let width = self.width();
        x.chunks_mut(self.row_stride.max(1))
            .take(self.rows)
            .map(move |row| &mut row[..width])
    }

    /// One head of one row.
    pub(crate) fn head<'a>(&self, x: &'a [f32], row: usize, head: usize) -> &'a [f32] {
        &x[row * self.row_stride + head * self.head_dim..][..self.head_dim]
    }
}

/// What each query row attends to: the first `context_len` tokens of its sequence, itself included.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRows<'a> {
    /// Block ids of all sequences, one after the other.
    pub tables: &'a [u32],
    /// (sequences + 1): sequence `s` owns `tables[table_offsets[s]..table_offsets[s + 1]]`.
    pub table_offsets: &'a [u32],
    /// (rows): the sequence of each row; rows of one sequence should stand together.
    pub sequence_of_row: &'a [u32],
    /// (rows): tokens that the row attends to, from the first; 0 gives a row of zeros.
    pub context_len: &'a [u32],
}

impl<'a> AttentionRows<'a> {
    /// Block table of a row.
    pub(crate) fn table(&self, row: usize) -> &'a [u32] {
        let sequence = self.sequence_of_row[row] as usize;
        let edge = |index: usize| self.table_offsets[index] as usize;
        &self.tables[edge(sequence)..edge(sequence + 1)]
    }

    /// Refuses anything that would index outside the tables or the cache.
    pub(crate) fn check(&self, rows: usize, cache: &KvShape) -> Result<(), KernelError> {
        const OP: &str = "attention";
        expect_length(OP, "sequence_of_row", rows, self.sequence_of_row.len())?;
        expect_length(OP, "context_len", rows, self.context_len.len())?;
        let ordered = self.table_offsets.is_sorted()
            && self
                .table_offsets
                .last()
                .is_none_or(|&end| end as usize <= self.tables.len());
        expect_shape(OP, "table_offsets", ordered, || {
            format!("do not ascend within {} table entries", self.tables.len())
        })?;
        check_indices(OP, "tables", self.tables, cache.blocks)?;
        let sequences = self.table_offsets.len().saturating_sub(1);
        check_indices(OP, "sequence_of_row", self.sequence_of_row, sequences)?;
        for (position, &context) in self.context_len.iter().enumerate() {
            let limit = self.table(position).len() * cache.block_tokens + 1;
            if context as usize >= limit {
                let (tensor, index) = ("context_len", context as usize);
                return Err(KernelError::Index {
                    op: OP,
                    tensor,
                    position,
                    index,
                    limit,
                });
            }
        }
        Ok(())
    }
}

/// `Err(Index)` for the first of `indices` that is not below `limit`.
pub(crate) fn check_indices(
    op: &'static str,
    tensor: &'static str,
    indices: &[u32],
    limit: usize,
) -> Result<(), KernelError> {
    match indices.iter().position(|&index| index as usize >= limit) {
        Some(position) => {
            let index = indices[position] as usize;
            Err(KernelError::Index {
                op,
                tensor,
                position,
                index,
                limit,
            })
        }
        None => Ok(()),
    }
}
