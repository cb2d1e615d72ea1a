//! The slicer: a plan and a rank to the element ranges of every stored tensor that the rank reads,
//! and the bytes that cover them. Pure: it reads no file.
//!
//! Stored tensors are seen as matrices, vectors as one row. Packed tensors are widened to whole units
//! of 32 values, which is a whole number of 32-bit words at every width (3 words at 3 bits), so that
//! a reader can unpack what it gets without knowing its neighbours; the values that a rank does not
//! hold are dropped after unpacking.

use std::ops::Range;

use crate::config::ModelConfig;
use crate::modules::{GptqFormat, LinearModule, LinearRole, PlainRole, PlainTensor, WeightFormat};
use crate::plan::{ModelShape, ShardPlan, adds_bias, groups_of};

/// Values that packed integers are read in multiples of.
pub const PACKED_UNIT: usize = 32;
/// Bits of a word of packed integers.
const WORD_BITS: usize = 32;

/// What a rank holds of one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSlice {
    /// Prefix of its tensors, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// What the module is.
    pub kind: SliceKind,
    /// Input rows that the rank holds, in elements; of the embedding, columns of the table.
    pub rows: Range<usize>,
    /// Output columns that the rank holds, in elements; of the embedding, rows of the table.
    pub columns: Range<usize>,
    /// This rank adds the module's bias: its own columns of it, and of a row-parallel module all of
    /// it, on rank 0 alone.
    pub bias: bool,
    /// What to read; empty where the rank holds nothing, or reads another module's storage.
    pub tensors: Vec<TensorSlice>,
}

/// What a sliced module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SliceKind {
    /// A linear of the model, by its place in [`ModelShape::linears`].
    Linear {
        /// Index of the module.
        index: usize,
        /// What it computes.
        role: LinearRole,
    },
    /// `lm_head` that reads the embedding's storage: tied, and not quantised.
    TiedHead {
        /// Index of the module.
        index: usize,
    },
    /// The embedding table.
    Embedding,
    /// A norm's weights, which every rank holds whole.
    Norm {
        /// `None` for the final norm.
        layer: Option<usize>,
        /// Which norm.
        role: PlainRole,
    },
}

/// A tensor of a module, by the last part of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorPart {
    /// Packed integers, `(ceil(k * bits / 32), n)`.
    Qweight,
    /// Packed zero points, `(groups, ceil(n * bits / 32))`.
    Qzeros,
    /// Scales, `(groups, n)`.
    Scales,
    /// Group of every input row, `(1, k)`.
    GroupIndex,
    /// Bias, `(1, n)`.
    Bias,
    /// Unquantised weights: `(n, k)` of a linear, `(vocabulary, hidden)` of the embedding,
    /// `(1, width)` of a norm.
    Weight,
}

impl TensorPart {
    /// Last part of the tensor's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Qweight => "qweight",
            Self::Qzeros => "qzeros",
            Self::Scales => "scales",
            Self::GroupIndex => "g_idx",
            Self::Bias => "bias",
            Self::Weight => "weight",
        }
    }
}

/// The part of one stored tensor that a rank reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// Which tensor of the module.
    pub part: TensorPart,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape as stored, in stored elements; a vector has one row.
    pub shape: [usize; 2],
    /// Stored rows to read.
    pub rows: Range<usize>,
    /// Stored columns to read.
    pub columns: Range<usize>,
    /// What `rows` cover: input rows for `qweight`, otherwise the same as `rows`.
    pub covered_rows: Range<usize>,
    /// What `columns` cover: output columns for `qzeros`, otherwise the same as `columns`.
    pub covered_columns: Range<usize>,
}

impl TensorSlice {
    /// Stored elements to read.
    pub fn elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

/// Everything that a rank of a plan reads of a model: embedding and norms in the order of
/// [`ModelShape::plain`], then the linears in the order of [`ModelShape::linears`].
///
/// # Panics
/// When the plan is not one of this shape ([`ShardPlan::check`]) or has no such rank.
pub fn slices(shape: &ModelShape, plan: &ShardPlan, rank: usize) -> Vec<ModuleSlice> {
    let tied = shape.shares_embedding();
    let plain = |tensor: &PlainTensor| match tensor.role {
        PlainRole::Embedding => embedding(tensor, shape, &plan.vocab[rank]),
        _ => norm(tensor),
    };
    let linear = |(index, linear): (usize, &LinearModule)| {
        let (rows, columns) = plan.extent(&shape.config, linear, rank);
        let bias = adds_bias(linear, rank);
        let tied_head = tied && linear.role == LinearRole::LmHead;
        let tensors = if rows.is_empty() || columns.is_empty() {
            Vec::new()
        } else if tied_head {
            bias_slice(linear, &columns, bias).into_iter().collect()
        } else {
            let head = shape.config.tie_word_embeddings && linear.requantised.is_some();
            let stored = match shape.embedding_name().filter(|_| head) {
                Some(embedding) => module_of(embedding),
                None => &linear.name,
            };
            linear_tensors(linear, stored, &rows, &columns, bias)
        };
        let kind = if tied_head {
            SliceKind::TiedHead { index }
        } else {
            SliceKind::Linear {
                index,
                role: linear.role,
            }
        };
        ModuleSlice {
            module: linear.name.clone(),
            kind,
            rows,
            columns,
            bias,
            tensors,
        }
    };
    shape
        .plain
        .iter()
        .map(plain)
        .chain(shape.linears.iter().enumerate().map(linear))
        .collect()
}

fn embedding(stored: &PlainTensor, shape: &ModelShape, vocab: &Range<usize>) -> ModuleSlice {
    let ModelConfig {
        vocab_size,
        hidden_size,
        ..
    } = shape.config;
    let module = module_of(&stored.name);
    let weight = tensor(
        module,
        TensorPart::Weight,
        [vocab_size, hidden_size],
        vocab.clone(),
        0..hidden_size,
    );
    ModuleSlice {
        module: module.to_owned(),
        kind: SliceKind::Embedding,
        rows: 0..hidden_size,
        columns: vocab.clone(),
        bias: false,
        tensors: if vocab.is_empty() {
            Vec::new()
        } else {
            vec![weight]
        },
    }
}

fn norm(stored: &PlainTensor) -> ModuleSlice {
    let width = stored.shape.iter().product();
    let module = module_of(&stored.name);
    ModuleSlice {
        module: module.to_owned(),
        kind: SliceKind::Norm {
            layer: stored.layer,
            role: stored.role,
        },
        rows: 0..1,
        columns: 0..width,
        bias: false,
        tensors: vec![tensor(
            module,
            TensorPart::Weight,
            [1, width],
            0..1,
            0..width,
        )],
    }
}

/// Module of a tensor named `module.weight`.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// `stored` is the module whose unquantised weights are read: of a tied head that of the embedding.
fn linear_tensors(
    linear: &LinearModule,
    stored: &str,
    rows: &Range<usize>,
    columns: &Range<usize>,
    bias: bool,
) -> Vec<TensorSlice> {
    let mut tensors = match &linear.format {
        WeightFormat::Gptq(format) if linear.requantised.is_none() => {
            gptq_tensors(linear, format, rows, columns)
        }
        _ => {
            let shape = [linear.n, linear.k];
            vec![tensor(
                stored,
                TensorPart::Weight,
                shape,
                columns.clone(),
                rows.clone(),
            )]
        }
    };
    tensors.extend(bias_slice(linear, columns, bias));
    tensors
}

fn gptq_tensors(
    linear: &LinearModule,
    format: &GptqFormat,
    rows: &Range<usize>,
    columns: &Range<usize>,
) -> Vec<TensorSlice> {
    let LinearModule { name, k, n, .. } = linear;
    let (k, n, bits) = (*k, *n, usize::from(format.bits));
    let all_groups = k.div_ceil(format.group_size.unwrap_or(k).max(1));
    let groups = groups_of(format, k, rows);
    let (row_words, covered_rows) = packed(rows, k, bits);
    let (column_words, covered_columns) = packed(columns, n, bits);
    let qweight = tensor(
        name,
        TensorPart::Qweight,
        [words(k, bits), n],
        row_words,
        columns.clone(),
    );
    let qzeros = tensor(
        name,
        TensorPart::Qzeros,
        [all_groups, words(n, bits)],
        groups.clone(),
        column_words,
    );
    vec![
        TensorSlice {
            covered_rows,
            ..qweight
        },
        TensorSlice {
            covered_columns,
            ..qzeros
        },
        tensor(
            name,
            TensorPart::Scales,
            [all_groups, n],
            groups,
            columns.clone(),
        ),
        tensor(name, TensorPart::GroupIndex, [1, k], 0..1, rows.clone()),
    ]
}

fn bias_slice(linear: &LinearModule, columns: &Range<usize>, bias: bool) -> Option<TensorSlice> {
    bias.then(|| {
        tensor(
            &linear.name,
            TensorPart::Bias,
            [1, linear.n],
            0..1,
            columns.clone(),
        )
    })
}

fn tensor(
    module: &str,
    part: TensorPart,
    shape: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
) -> TensorSlice {
    let name = format!("{module}.{}", part.suffix());
    let (covered_rows, covered_columns) = (rows.clone(), columns.clone());
    TensorSlice {
        part,
        name,
        shape,
        rows,
        columns,
        covered_rows,
        covered_columns,
    }
}

/// Words that hold `values` integers of `bits` bits.
fn words(values: usize, bits: usize) -> usize {
    (values * bits).div_ceil(WORD_BITS)
}

/// Words that hold the values of a range, widened to whole units of [`PACKED_UNIT`] values, and the
/// values that they hold.
fn packed(values: &Range<usize>, all: usize, bits: usize) -> (Range<usize>, Range<usize>) {
    let start = values.start / PACKED_UNIT * PACKED_UNIT;
    let end = values.end.next_multiple_of(PACKED_UNIT).min(all);
    (words(start, bits)..words(end, bits), start..end)
}

/// Byte ranges that cover rows and columns of a stored row-major matrix, from the tensor's first
/// byte: ascending and disjoint, one run in all when the rows are whole, else one per row. Ranges
/// are cut to the shape.
pub fn byte_runs(
    shape: [usize; 2],
    element_bytes: usize,
    rows: Range<usize>,
    columns: Range<usize>,
) -> impl Iterator<Item = Range<u64>> {
    let [height, width] = shape.map(|size| size as u64);
    let size = element_bytes as u64;
    let rows = rows.start as u64..(rows.end as u64).min(height);
    let columns = columns.start as u64..(columns.end as u64).min(width);
    let empty = rows.start >= rows.end || columns.start >= columns.end;
    let whole = columns == (0..width);
    // Whole rows are one run: as if the matrix had one row.
    let (runs, length) = match (empty, whole) {
        (true, _) => (0..0, 0),
        (false, true) => (0..1, (rows.end - rows.start) * width * size),
        (false, false) => (
            0..rows.end - rows.start,
            (columns.end - columns.start) * size,
        ),
    };
    let first = (rows.start * width + columns.start) * size;
    runs.map(move |run| {
        let start = first + run * width * size;
        start..start + length
    })
}

#[cfg(test)]
mod tests;
