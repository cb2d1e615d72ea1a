//! The order in which the rows of K are stored, and where sums are cut.

use std::ops::Range;

use super::UNIT_ROWS;

/// Most rows that are summed before the sum is scaled and added to the total.
///
/// Part of every path's definition: it fixes the sequence of roundings, so changing it changes
/// bits (and short sums are also the more accurate ones).
pub(crate) const SEGMENT_ROWS: usize = 128;

/// Consecutive stored rows with one scale, at most [`SEGMENT_ROWS`] of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First unit of 8 stored rows.
    pub first_unit: usize,
    /// Units of 8 stored rows.
    pub units: usize,
    /// Index into the stored scales.
    pub run: usize,
}

/// All rows of one group that this shard holds, stored from a unit boundary on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// First index into the sorted rows.
    pub first: usize,
    /// Rows, without padding.
    pub rows: usize,
    /// Where the run starts among the stored (padded) rows; a multiple of 8.
    pub stored: usize,
    /// The group, as the caller numbered it.
    pub group: u32,
}

/// The stored order of the rows of K: sorted (stably) by group, each run padded to whole units.
#[derive(Debug)]
pub(crate) struct RowOrder {
    /// `order[sorted] = row of the shard`, only when that is not the identity.
    order: Option<Vec<u32>>,
    pub runs: Vec<Run>,
    pub segments: Vec<Segment>,
    /// Rows without padding.
    pub k: usize,
    /// Rows with padding; a multiple of 8.
    pub stored_rows: usize,
}

impl RowOrder {
    pub(crate) fn new(group_of_row: &[u32]) -> Self {
        let k = group_of_row.len();
        let order = (!group_of_row.is_sorted()).then(|| {
            let mut order: Vec<u32> = (0..k as u32).collect();
            order.sort_by_key(|&row| group_of_row[row as usize]);
            order
        });
        let group_at = |sorted: usize| match &order {
            Some(order) => group_of_row[order[sorted] as usize],
            None => group_of_row[sorted],
        };
        let mut runs: Vec<Run> = Vec::new();
        let mut stored = 0;
        for sorted in 0..k {
            match runs.last_mut() {
                Some(run) if run.group == group_at(sorted) => run.rows += 1,
                _ => {
                    stored += runs
                        .last()
                        .map_or(0, |run| run.rows.next_multiple_of(UNIT_ROWS));
                    runs.push(Run {
                        first: sorted,
                        rows: 1,
                        stored,
                        group: group_at(sorted),
                    });
                }
            }
        }
        Self::with_runs(order, runs, k)
    }

    /// Rows in their own order, in one run.
    pub(crate) fn identity(k: usize) -> Self {
        let run = Run {
            first: 0,
            rows: k,
            stored: 0,
            group: 0,
        };
        Self::with_runs(None, vec![run], k)
    }

    fn with_runs(order: Option<Vec<u32>>, mut runs: Vec<Run>, k: usize) -> Self {
        runs.shrink_to_fit();
        let mut segments = Vec::new();
        let mut stored_rows = 0;
        for (index, run) in runs.iter().enumerate() {
            let end = run.stored + run.rows.next_multiple_of(UNIT_ROWS);
            for start in (run.stored..end).step_by(SEGMENT_ROWS) {
                let rows = (end - start).min(SEGMENT_ROWS);
                segments.push(Segment {
                    first_unit: start / UNIT_ROWS,
                    units: rows / UNIT_ROWS,
                    run: index,
                });
            }
            stored_rows = end;
        }
        segments.shrink_to_fit();
        Self {
            order,
            runs,
            segments,
            k,
            stored_rows,
        }
    }

    pub(crate) fn is_permuted(&self) -> bool {
        self.order.is_some()
    }

    /// True if the stored rows are exactly the shard's rows: activations are used as they are.
    pub(crate) fn is_plain(&self) -> bool {
        self.order.is_none() && self.stored_rows == self.k
    }

    /// The shard's row at index `sorted` of the sorted order.
    pub(crate) fn row(&self, sorted: usize) -> usize {
        match &self.order {
            Some(order) => order[sorted] as usize,
            None => sorted,
        }
    }

    /// `positions[row of the shard] = stored row`.
    pub(crate) fn positions(&self) -> Vec<u32> {
        let mut positions = vec![0; self.k];
        for run in &self.runs {
            for offset in 0..run.rows {
                positions[self.row(run.first + offset)] = (run.stored + offset) as u32;
            }
        }
        positions
    }

    /// Copies one row of activations into stored order, 0 at the padding.
    ///
    /// `x`: (k); `out`: (stored rows).
    pub(crate) fn gather(&self, x: &[f32], out: &mut [f32]) {
        for run in &self.runs {
            let padded = run.rows.next_multiple_of(UNIT_ROWS);
            let (values, padding) = out[run.stored..run.stored + padded].split_at_mut(run.rows);
            let sorted = run.first..run.first + run.rows;
            match &self.order {
                Some(order) => {
                    for (value, &row) in values.iter_mut().zip(&order[sorted]) {
                        *value = x[row as usize];
                    }
                }
                None => values.copy_from_slice(&x[sorted]),
            }
            padding.fill(0.0);
        }
    }

    /// Groups of consecutive segments that span at most `rows` stored rows (or are one segment).
    pub(crate) fn blocks(&self, rows: usize) -> Vec<Range<usize>> {
        let mut blocks: Vec<Range<usize>> = Vec::new();
        let mut held = 0;
        for (index, segment) in self.segments.iter().enumerate() {
            let size = segment.units * UNIT_ROWS;
            match blocks.last_mut() {
                Some(block) if held + size <= rows => {
                    block.end = index + 1;
                    held += size;
                }
                _ => {
                    blocks.push(index..index + 1);
                    held = size;
                }
            }
        }
        blocks
    }

    pub(crate) fn bytes(&self) -> u64 {
        let order = self
            .order
            .as_ref()
            .map_or(0, |order| size_of_val(&order[..]));
        (order + size_of_val(&self.runs[..]) + size_of_val(&self.segments[..])) as u64
    }

    /// What [`RowOrder::bytes`] answers for runs of these lengths (rows without padding).
    pub(crate) fn bytes_for(run_rows: impl IntoIterator<Item = usize>, permuted: bool) -> u64 {
        run_rows
            .into_iter()
            .map(|rows| {
                let segments = rows.next_multiple_of(UNIT_ROWS).div_ceil(SEGMENT_ROWS);
                let order = if permuted { rows * size_of::<u32>() } else { 0 };
                size_of::<Run>() + segments * size_of::<Segment>() + order
            })
            .sum::<usize>() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_stably_pads_runs_and_cuts_long_ones() {
        let order = RowOrder::new(&[1, 0, 1, 0, 2]);
        assert!(order.is_permuted());
        assert_eq!(order.positions(), [8, 0, 9, 1, 16]);
        assert_eq!(order.stored_rows, 24);
        let mut out = [f32::NAN; 24];
        order.gather(&[1.0, 2.0, 3.0, 4.0, 5.0], &mut out);
        assert_eq!(out[..3], [2.0, 4.0, 0.0]);
        assert_eq!(out[8..11], [1.0, 3.0, 0.0]);
        assert_eq!(out[16..18], [5.0, 0.0]);

        let long = RowOrder::identity(300);
        assert!(!long.is_permuted() && !long.is_plain());
        assert_eq!(
            long.segments.iter().map(|s| s.units).collect::<Vec<_>>(),
            [16, 16, 6]
        );
        assert_eq!(long.blocks(128), [0..1, 1..2, 2..3]);
        assert_eq!(RowOrder::new(&[0, 0, 1, 2]).blocks(16), [0..2, 2..3]);
        assert_eq!(long.bytes(), RowOrder::bytes_for([300], false));
        assert_eq!(order.bytes(), RowOrder::bytes_for([2, 2, 1], true));
    }
}
