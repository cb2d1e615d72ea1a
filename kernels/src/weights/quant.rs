//! Builder of quantised weights from GPTQ words.

use std::ops::Range;

use half::f16;

use crate::buffer::Aligned;
use crate::error::{KernelError, expect_length, expect_shape};

use super::bytes::unit_words;
use super::dense::check_covered;
use super::rows::RowOrder;
use super::{
    LinearWeights, PANEL_COLUMNS, Scaling, Storage, UNIT_ROWS, WeightFormat, code_centre,
    padded_bias,
};

/// Panels whose source words are copied together: 2 KiB of contiguous source bytes a row.
const PANELS_AT_ONCE: usize = 32;

/// Everything about a quantised layer's shard except its codes.
#[derive(Debug, Clone, Copy)]
pub struct QuantSpec<'a> {
    /// Bits of one code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Rows of the shard.
    pub k: usize,
    /// Output columns of the shard.
    pub n: usize,
    /// (k): the row of `scales` and `zeros` that each row of the shard uses.
    pub group_of_row: &'a [u32],
    /// (groups, n) row-major.
    pub scales: &'a [f16],
    /// (groups, n) row-major: true zero points, `0..=2^bits`.
    pub zeros: &'a [u16],
    /// (n), added last.
    pub bias: Option<&'a [f32]>,
}

/// Builds quantised [`LinearWeights`] a window of source rows at a time.
#[derive(Debug)]
pub struct QuantBuilder {
    weights: LinearWeights,
    bits: usize,
    positions: Vec<u32>,
    written: Vec<bool>,
}

/// Refuses a layer whose parts do not fit each other.
///
/// # Errors
/// As [`QuantBuilder::new`].
pub(crate) fn check_quant(spec: &QuantSpec<'_>) -> Result<(), KernelError> {
    const OP: &str = "quantised weights";
    let QuantSpec {
        bits,
        k,
        n,
        group_of_row,
        scales,
        zeros,
        bias,
    } = *spec;
    expect_shape(OP, "bits", matches!(bits, 2 | 3 | 4 | 8), || {
        format!("is {bits}, must be 2, 3, 4 or 8")
    })?;
    expect_shape(OP, "shape", k > 0 && n > 0, || {
        format!("({k}, {n}) is empty")
    })?;
    expect_length(OP, "group_of_row", k, group_of_row.len())?;
    expect_shape(OP, "scales", scales.len().is_multiple_of(n), || {
        format!(
            "has {} elements, must be a multiple of n = {n}",
            scales.len()
        )
    })?;
    expect_length(OP, "zeros", scales.len(), zeros.len())?;
    if let Some(bias) = bias {
        expect_length(OP, "bias", n, bias.len())?;
    }
    let groups = scales.len() / n;
    if let Some(position) = group_of_row
        .iter()
        .position(|&group| group as usize >= groups)
    {
        let index = group_of_row[position] as usize;
        let tensor = "group_of_row";
        return Err(KernelError::Index {
            op: OP,
            tensor,
            position,
            index,
            limit: groups,
        });
    }
    if let Some(position) = scales.iter().position(|scale| !scale.is_finite()) {
        return Err(KernelError::NonFinite {
            op: OP,
            tensor: "scales",
            position,
        });
    }
    let limit = (1usize << bits) + 1;
    if let Some(position) = zeros.iter().position(|&zero| usize::from(zero) >= limit) {
        let index = usize::from(zeros[position]);
        return Err(KernelError::Index {
            op: OP,
            tensor: "zeros",
            position,
            index,
            limit,
        });
    }
    Ok(())
}

/// Source rows of the (up to 8) values that one call writes into one unit.
struct UnitSources {
    unit: usize,
    /// Window row of each value; `ABSENT` where another call writes the value or padding stands.
    rows: [usize; UNIT_ROWS],
    /// True if the values are 8 consecutive source rows that fill a word.
    straight: bool,
}

const ABSENT: usize = usize::MAX;

impl QuantBuilder {
    /// An empty layer: allocates its final storage and copies scales, zeros and bias.
    ///
    /// # Errors
    /// Bits other than 2, 3, 4, 8, an empty shape, buffers of the wrong length, a group outside
    /// `scales`, a zero point above `2^bits`, or a scale that is not finite.
    pub fn new(spec: QuantSpec<'_>) -> Result<Self, KernelError> {
        check_quant(&spec)?;
        let QuantSpec {
            bits,
            k,
            n,
            group_of_row,
            scales,
            zeros,
            bias,
        } = spec;
        let rows = RowOrder::new(group_of_row);
        let run_groups: Vec<usize> = rows.runs.iter().map(|run| run.group as usize).collect();
        let centre = code_centre(bits) as u16;
        let symmetric = run_groups
            .iter()
            .all(|&g| zeros[g * n..][..n].iter().all(|&zero| zero == centre));
        let scale_bits = |group: usize, column: usize| scales[group * n + column].to_bits();
        let zero = |group: usize, column: usize| zeros[group * n + column];
        let scaling = Scaling {
            scales: per_panel(&run_groups, n, scale_bits),
            zeros: (!symmetric).then(|| per_panel(&run_groups, n, zero)),
        };
        let units = n.div_ceil(PANEL_COLUMNS) * rows.stored_rows / UNIT_ROWS;
        let positions = rows.positions();
        let weights = LinearWeights {
            format: WeightFormat::Quantised { bits },
            n,
            rows,
            storage: match bits {
                2 | 3 => Storage::Halves(Aligned::zeroed(units * unit_words(bits))),
                _ => Storage::Words(Aligned::zeroed(units * unit_words(bits))),
            },
            scaling: Some(scaling),
            bias: bias.map(padded_bias),
        };
        Ok(Self {
            weights,
            bits: usize::from(bits),
            positions,
            written: vec![false; k],
        })
    }

    /// Writes shard rows `first_row..first_row + rows` from a window of GPTQ words.
    ///
    /// `words`: (words along K, n) row-major, packed along K from the least significant bit;
    /// the window begins at a source row that is a multiple of 32. Source rows
    /// `skip_rows..skip_rows + rows` of the window become the shard rows. Where the layer has no
    /// act-order and the rows keep their place within the words this is a copy.
    ///
    /// # Errors
    /// A window that does not hold those rows or is not whole rows of n words, rows past k, or a
    /// row that was written before.
    pub fn write_words(
        &mut self,
        first_row: usize,
        skip_rows: usize,
        rows: usize,
        words: &[u32],
    ) -> Result<(), KernelError> {
        const OP: &str = "write_words";
        let (k, n) = (self.weights.k(), self.weights.n());
        let end = first_row.saturating_add(rows);
        expect_shape(OP, "rows", end <= k, || {
            format!("{first_row}..{end} of {k}")
        })?;
        let word_rows = words.len() / n;
        expect_length(OP, "words", word_rows * n, words.len())?;
        let needed = skip_rows
            .saturating_add(rows)
            .saturating_mul(self.bits)
            .div_ceil(32);
        expect_shape(OP, "words", needed <= word_rows, || {
            format!("has {word_rows} word rows, {skip_rows} + {rows} rows need {needed}")
        })?;
        if self.written[first_row..end].contains(&true) {
            let problem = "were written before";
            return Err(KernelError::Coverage {
                op: OP,
                tensor: "rows",
                first: first_row,
                end,
                problem,
            });
        }
        self.written[first_row..end].fill(true);

        let sources = self.unit_sources(first_row, skip_rows, rows);
        let panels = self.weights.panels();
        for first in (0..panels).step_by(PANELS_AT_ONCE) {
            let panels = first..(first + PANELS_AT_ONCE).min(panels);
            for source in &sources {
                if source.straight && matches!(self.bits, 4 | 8) {
                    self.copy_units(source, panels.clone(), words);
                } else {
                    for panel in panels.clone() {
                        self.merge_unit(source, panel, words);
                    }
                }
            }
        }
        Ok(())
    }

    /// The finished layer.
    ///
    /// # Errors
    /// [`KernelError::Coverage`] naming the first rows that were never written.
    pub fn finish(self) -> Result<LinearWeights, KernelError> {
        check_covered("quantised weights", "rows", &self.written)?;
        Ok(self.weights)
    }

    /// Where each value of the touched units comes from, in stored order.
    fn unit_sources(&self, first_row: usize, skip_rows: usize, rows: usize) -> Vec<UnitSources> {
        let mut placed: Vec<(usize, usize)> = self.positions[first_row..first_row + rows]
            .iter()
            .enumerate()
            .map(|(offset, &position)| (position as usize, skip_rows + offset))
            .collect();
        placed.sort_unstable();
        placed
            .chunk_by(|a, b| a.0 / UNIT_ROWS == b.0 / UNIT_ROWS)
            .map(|values| {
                let mut rows = [ABSENT; UNIT_ROWS];
                for &(position, row) in values {
                    rows[position % UNIT_ROWS] = row;
                }
                let straight = rows[0].is_multiple_of(UNIT_ROWS)
                    && rows.iter().enumerate().all(|(i, &row)| row == rows[0] + i);
                UnitSources {
                    unit: values[0].0 / UNIT_ROWS,
                    rows,
                    straight,
                }
            })
            .collect()
    }

    /// Copies the whole words of one unit for some panels.
    fn copy_units(&mut self, source: &UnitSources, panels: Range<usize>, words: &[u32]) {
        let n = self.weights.n;
        let (begin, end) = (
            panels.start * PANEL_COLUMNS,
            (panels.end * PANEL_COLUMNS).min(n),
        );
        let Storage::Words(target) = &mut self.weights.storage else {
            return;
        };
        let word_rows = self.bits / 4;
        let panel_words = self.weights.rows.stored_rows / UNIT_ROWS * PANEL_COLUMNS * word_rows;
        let first = panels.start * panel_words + source.unit * PANEL_COLUMNS * word_rows;
        for word_row in 0..word_rows {
            let row = (source.rows[0] / UNIT_ROWS * word_rows + word_row) * n;
            let targets = target[first + word_row * PANEL_COLUMNS..].chunks_mut(panel_words);
            for (words, target) in words[row + begin..row + end]
                .chunks(PANEL_COLUMNS)
                .zip(targets)
            {
                match (
                    words.first_chunk::<PANEL_COLUMNS>(),
                    target.first_chunk_mut(),
                ) {
                    (Some(words), Some(target)) => *target = *words,
                    _ => target[..words.len()].copy_from_slice(words),
                }
            }
        }
    }

    /// Assembles the values of one unit of one panel, whatever rows they come from.
    fn merge_unit(&mut self, source: &UnitSources, panel: usize, words: &[u32]) {
        let n = self.weights.n;
        let column = panel * PANEL_COLUMNS;
        let columns = (n - column).min(PANEL_COLUMNS);
        let unit = panel * (self.weights.rows.stored_rows / UNIT_ROWS) + source.unit;
        match (&mut self.weights.storage, self.bits) {
            (Storage::Words(target), 4) => {
                let fields = fields::<4, 4>(&source.rows, words, n, column, columns);
                merge(&mut target[unit * 16..][..columns], &fields);
            }
            (Storage::Words(target), _) => {
                for (half, rows) in source.rows.as_chunks::<4>().0.iter().enumerate() {
                    let fields = fields::<8, 8>(rows, words, n, column, columns);
                    merge(&mut target[unit * 32 + half * 16..][..columns], &fields);
                }
            }
            (Storage::Halves(target), 2) => {
                let fields = fields::<2, 2>(&source.rows, words, n, column, columns);
                for (target, field) in target[unit * 16..][..16].iter_mut().zip(fields) {
                    *target |= field as u16;
                }
            }
            (Storage::Halves(target), _) => {
                let fields = fields::<3, 4>(&source.rows, words, n, column, columns);
                let (low, high) = target[unit * 24..][..24].split_at_mut(16);
                for (lane, field) in fields.into_iter().enumerate() {
                    low[lane] |= squeeze_pairs(field);
                    high[lane / 2] |= squeeze_bits(field >> 2) << (8 * (lane % 2));
                }
            }
        }
    }
}

/// Reads the values of `BITS` bits at window rows `rows` of 16 columns; value `i` lands in bits
/// `i * SPACING..`. Absent values and columns are 0.
fn fields<const BITS: usize, const SPACING: usize>(
    rows: &[usize],
    words: &[u32],
    n: usize,
    column: usize,
    columns: usize,
) -> [u32; PANEL_COLUMNS] {
    let mut fields = [0; PANEL_COLUMNS];
    for (i, &row) in rows.iter().enumerate().filter(|&(_, &row)| row != ABSENT) {
        let (word_row, shift) = (row * BITS / 32, row * BITS % 32);
        let low = &words[word_row * n + column..][..columns];
        let mask = (1 << BITS) - 1;
        for (field, word) in fields.iter_mut().zip(low) {
            *field |= (word >> shift & mask) << (i * SPACING);
        }
        if shift + BITS > 32 {
            let high = &words[(word_row + 1) * n + column..][..columns];
            for (field, word) in fields.iter_mut().zip(high) {
                *field |= (word << (32 - shift) & mask) << (i * SPACING);
            }
        }
    }
    fields
}

fn merge(target: &mut [u32], fields: &[u32]) {
    for (target, field) in target.iter_mut().zip(fields) {
        *target |= field;
    }
}

/// Gathers the low two bits of each nibble.
fn squeeze_pairs(nibbles: u32) -> u16 {
    let x = nibbles & 0x3333_3333;
    let x = (x | x >> 2) & 0x0f0f_0f0f;
    let x = (x | x >> 4) & 0x00ff_00ff;
    (x | x >> 8) as u16
}

/// Gathers the lowest bit of each nibble.
fn squeeze_bits(nibbles: u32) -> u16 {
    let x = nibbles & 0x1111_1111;
    let x = (x | x >> 3) & 0x0303_0303;
    let x = (x | x >> 6) & 0x000f_000f;
    ((x | x >> 12) & 0xff) as u16
}

/// Lays `value(group, column)` out as `[panel][run][16]`, 0 beyond column n.
fn per_panel(run_groups: &[usize], n: usize, value: impl Fn(usize, usize) -> u16) -> Aligned<u16> {
    let runs = run_groups.len();
    let mut out = Aligned::zeroed(n.div_ceil(PANEL_COLUMNS) * runs * PANEL_COLUMNS);
    for (first, panel) in (0..n)
        .step_by(PANEL_COLUMNS)
        .zip(out.chunks_mut(runs * PANEL_COLUMNS))
    {
        for (&group, slots) in run_groups.iter().zip(panel.chunks_mut(PANEL_COLUMNS)) {
            for (column, slot) in (first..n).zip(slots) {
                *slot = value(group, column);
            }
        }
    }
    out
}
