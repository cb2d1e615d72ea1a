//! Where the rows of K are stored.

use super::{BLOCK_ROWS, SUPERBLOCK_ROWS};

/// In [`Rows::order`]: no row, activations are 0 there.
pub(super) const PADDING: u32 = u32::MAX;

/// Where the rows of K are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    pub(super) k: usize,
    /// (k) the stored row of each row.
    pub(super) positions: Vec<u32>,
    /// Superblocks of 128 stored rows.
    pub superblocks: usize,
    /// Scales per superblock and column: 1, 2 or 4.
    pub scales_per_superblock: usize,
    /// (superblocks * scales_per_superblock) the group of each; `None` where only padding lies.
    pub(super) group_of_scale: Vec<Option<u32>>,
}

impl Rows {
    /// The stored order of rows in these groups.
    pub fn new(group_of_row: &[u32]) -> Self {
        let k = group_of_row.len();
        let mut sorted: Vec<u32> = (0..k as u32).collect();
        sorted.sort_by_key(|&row| group_of_row[row as usize]);
        let mut positions = vec![0; k];
        let mut runs = Vec::new();
        let mut stored = 0;
        for run in sorted.chunk_by(|&a, &b| group_of_row[a as usize] == group_of_row[b as usize]) {
            runs.push((stored, group_of_row[run[0] as usize]));
            for (offset, &row) in run.iter().enumerate() {
                positions[row as usize] = (stored + offset) as u32;
            }
            stored += run.len().next_multiple_of(BLOCK_ROWS);
        }
        let fits = |rows: usize| runs.iter().all(|(start, _)| start.is_multiple_of(rows));
        let scales_per_superblock = if fits(128) {
            1
        } else if fits(64) {
            2
        } else {
            4
        };
        let superblocks = stored.div_ceil(SUPERBLOCK_ROWS);
        let scale_rows = SUPERBLOCK_ROWS / scales_per_superblock;
        let group_of_scale = (0..superblocks * scales_per_superblock)
            .map(|scale| {
                let first = scale * scale_rows;
                let run = runs.partition_point(|(start, _)| *start <= first);
                (first < stored).then(|| runs[run - 1].1)
            })
            .collect();
        Self {
            k,
            positions,
            superblocks,
            scales_per_superblock,
            group_of_scale,
        }
    }

    /// Stored rows, padding included.
    pub fn stored(&self) -> usize {
        self.superblocks * SUPERBLOCK_ROWS
    }

    /// (stored) the row that stands at each place, [`PADDING`] where none does; `None` when rows
    /// stand in their own order with padding behind the last one only.
    pub(super) fn order(&self) -> Option<Vec<u32>> {
        let plain = self
            .positions
            .iter()
            .enumerate()
            .all(|(row, &at)| row == at as usize);
        (!plain).then(|| {
            let mut order = vec![PADDING; self.stored()];
            for (row, &at) in self.positions.iter().enumerate() {
                order[at as usize] = row as u32;
            }
            order
        })
    }
}
