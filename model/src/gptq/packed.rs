//! Packed integers: codes, zero points, group indices, and the slow reading of a whole module.
//!
//! The loader of a worker re-lays codes with kernels of its own; zero points and group indices it takes from
//! here, so that their rules stand in one place.

use std::ops::Range;

use half::{bf16, f16};

use crate::error::GptqError;
use crate::modules::{DType, GptqFormat, ZeroPoints};

impl GptqFormat {
    /// Rows of `scales` and `qzeros` of a module with `k` inputs: ceil(k / group size).
    pub fn groups(&self, k: usize) -> usize {
        self.group_size.map_or(1, |group| k.div_ceil(group))
    }

    /// The zero point of symmetric quantisation, 2^(bits-1).
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// 32-bit words that hold `width` packed values, when they fill whole words.
    pub fn packed_words(&self, width: usize) -> Option<usize> {
        let bits = width.checked_mul(usize::from(self.bits))?;
        bits.is_multiple_of(32).then_some(bits / 32)
    }
}

/// Little-endian 32-bit words, as `I32` tensors are stored; trailing bytes short of a word are dropped.
pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect()
}

/// Little-endian floats as f32, exactly.
pub fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|raw| f32::from_le_bytes(*raw))
            .collect(),
        DType::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|raw| f16::from_le_bytes(*raw).to_f32())
            .collect(),
        DType::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|raw| bf16::from_le_bytes(*raw).to_f32())
            .collect(),
    }
}

/// Value `index` of a little-endian bit stream whose word `i` is `word(i)`.
fn value(bits: u8, index: usize, word: impl Fn(usize) -> u32) -> u8 {
    let first_bit = index * usize::from(bits);
    let (at, shift) = (first_bit / 32, first_bit % 32);
    let mut window = u64::from(word(at)) >> shift;
    if shift + usize::from(bits) > 32 {
        window |= u64::from(word(at + 1)) << (32 - shift);
    }
    (window & ((1 << bits) - 1)) as u8
}

/// Codes of `qweight`: `qweight` is (k * bits / 32, n) row-major, the result (k, n) row-major.
///
/// # Errors
/// [`GptqError::Length`].
pub fn unpack_codes(
    tensor: &str,
    format: &GptqFormat,
    k: usize,
    n: usize,
    qweight: &[u32],
) -> Result<Vec<u8>, GptqError> {
    let expected = format
        .packed_words(k)
        .and_then(|rows| rows.checked_mul(n))
        .unwrap_or(usize::MAX);
    check_length(tensor, qweight.len(), expected)?;
    let mut codes = Vec::with_capacity(k * n);
    for row in 0..k {
        for column in 0..n {
            codes.push(value(format.bits, row, |word| qweight[word * n + column]));
        }
    }
    Ok(codes)
}

/// Zero points of `columns` of any whole rows of `qzeros`: `qzeros` is (rows, n * bits / 32) row-major, the
/// result (rows, columns) row-major, each value what is subtracted from a code.
///
/// Symmetric modules have 2^(bits-1) everywhere, whatever is stored: published checkpoints exist whose label
/// and stored values contradict each other, and the other engines ignore the tensor too.
///
/// Otherwise `gptq_v2` stores the value itself, and `gptq` the value minus one. The one is added back as
/// GPTQModel 7.7.0 does (`convert_gptq_v1_to_v2_format_module` in `utils/model.py`): at 2, 4 and 8 bits to
/// the 32-bit word as a whole, wrapping, so that a stored 2^bits-1 becomes 0 and carries into its neighbour,
/// which undoes the borrow of the exporter's word-wise subtraction; at 3 bits to each value modulo 8.
///
/// # Errors
/// [`GptqError::Length`] when `qzeros` is no whole number of rows, [`GptqError::Columns`].
pub fn unpack_zeros(
    tensor: &str,
    format: &GptqFormat,
    n: usize,
    qzeros: &[u32],
    columns: Range<usize>,
) -> Result<Vec<u8>, GptqError> {
    if columns.start > columns.end || columns.end > n {
        let (start, end) = (columns.start, columns.end);
        return Err(GptqError::Columns {
            tensor: tensor.to_owned(),
            start,
            end,
            columns: n,
        });
    }
    let width = format
        .packed_words(n)
        .filter(|width| *width > 0)
        .unwrap_or(usize::MAX);
    let rows = qzeros.len() / width;
    check_length(tensor, qzeros.len(), rows.saturating_mul(width))?;
    if format.sym {
        return Ok(vec![format.middle(); rows * columns.len()]);
    }
    let bits = format.bits;
    let (per_word, per_value) = match (format.zeros, bits) {
        (ZeroPoints::Exact, _) => (0, 0),
        (ZeroPoints::MinusOne, 2) => (0x5555_5555, 0),
        (ZeroPoints::MinusOne, 4) => (0x1111_1111, 0),
        (ZeroPoints::MinusOne, 8) => (0x0101_0101, 0),
        (ZeroPoints::MinusOne, _) => (0, 1),
    };
    let mask = ((1_u16 << bits) - 1) as u8;
    let mut zeros = Vec::with_capacity(rows * columns.len());
    for row in qzeros.chunks_exact(width) {
        for column in columns.clone() {
            let stored = value(bits, column, |word| row[word].wrapping_add(per_word));
            zeros.push(stored.wrapping_add(per_value) & mask);
        }
    }
    Ok(zeros)
}

/// True when an asymmetric `gptq` module stores 2^(bits-1) everywhere, which is what a symmetric `gptq_v2`
/// module would store: label or `sym` is probably wrong. `qzeros` is any whole rows of the tensor.
pub fn suspicious_zeros(format: &GptqFormat, n: usize, qzeros: &[u32]) -> bool {
    let as_stored = GptqFormat {
        zeros: ZeroPoints::Exact,
        ..*format
    };
    !format.sym
        && format.zeros == ZeroPoints::MinusOne
        && !qzeros.is_empty()
        && unpack_zeros("", &as_stored, n, qzeros, 0..n)
            .is_ok_and(|zeros| zeros.iter().all(|zero| *zero == format.middle()))
}

/// The group of each row of K from the words of `g_idx`.
///
/// # Errors
/// [`GptqError::GroupIndex`] for a negative value or one that is not below `groups`.
pub fn group_indices(tensor: &str, g_idx: &[u32], groups: usize) -> Result<Vec<u32>, GptqError> {
    match g_idx.iter().position(|group| *group as usize >= groups) {
        None => Ok(g_idx.to_vec()),
        Some(row) => {
            let group = g_idx[row].cast_signed();
            Err(GptqError::GroupIndex {
                tensor: tensor.to_owned(),
                row,
                group,
                groups,
            })
        }
    }
}

/// True when row i belongs to group i / group size throughout, so that no order has to be kept. The flag
/// `desc_act` does not tell: static groups, for one, are out of order without it.
pub fn ordered_groups(format: &GptqFormat, group_indices: &[u32]) -> bool {
    let group = format.group_size.unwrap_or(usize::MAX);
    group_indices
        .iter()
        .enumerate()
        .all(|(row, index)| *index as usize == row / group)
}

/// Checks scales of whole rows of (groups, n), of which the first is row `first_group` of the tensor.
///
/// # Errors
/// [`GptqError::Scale`] for NaN and infinity.
pub fn check_scales(
    tensor: &str,
    n: usize,
    first_group: usize,
    scales: &[f32],
) -> Result<(), GptqError> {
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(at) => Err(GptqError::Scale {
            tensor: tensor.to_owned(),
            group: first_group + at / n.max(1),
            column: at % n.max(1),
            value: scales[at],
        }),
    }
}

/// Weights of a whole module as (k, n) row-major f32, slowly: what tests compare everything else with.
///
/// `qweight`, `qzeros` and `scales` are whole tensors; `group_indices` comes from [`group_indices()`] or is
/// otherwise below the number of groups. The product is exact in f32 for F16 and BF16 scales.
///
/// # Errors
/// [`GptqError`] for lengths that do not fit, group indices out of range and scales that are not finite.
pub fn dequantise(
    module: &str,
    format: &GptqFormat,
    (k, n): (usize, usize),
    qweight: &[u32],
    qzeros: &[u32],
    scales: &[f32],
    group_indices: &[u32],
) -> Result<Vec<f32>, GptqError> {
    let groups = format.groups(k);
    let codes = unpack_codes(&format!("{module}.qweight"), format, k, n, qweight)?;
    let zeros = unpack_zeros(&format!("{module}.qzeros"), format, n, qzeros, 0..n)?;
    check_length(
        &format!("{module}.qzeros"),
        zeros.len(),
        groups.saturating_mul(n),
    )?;
    let tensor = format!("{module}.scales");
    check_length(&tensor, scales.len(), groups.saturating_mul(n))?;
    check_scales(&tensor, n, 0, scales)?;
    let tensor = format!("{module}.g_idx");
    check_length(&tensor, group_indices.len(), k)?;
    let group_indices = self::group_indices(&tensor, group_indices, groups)?;
    let weight = |(at, code): (usize, &u8)| {
        let from = group_indices[at / n] as usize * n + at % n;
        f32::from(i16::from(*code) - i16::from(zeros[from])) * scales[from]
    };
    Ok(codes.iter().enumerate().map(weight).collect())
}

fn check_length(tensor: &str, found: usize, expected: usize) -> Result<(), GptqError> {
    if found == expected {
        return Ok(());
    }
    Err(GptqError::Length {
        tensor: tensor.to_owned(),
        found,
        expected,
    })
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
