//! The safetensors header: names, types, shapes and byte ranges, all checked before anything is read.
//!
//! The rules are those of the reference implementation: at most 100 MB of header, byte ranges in sequence
//! without overlap or gap from the first byte after the header to the last of the file, no name twice.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::SafetensorsError;

/// Longest header that is read, in bytes; the reference implementation has the same limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors of one file. The largest published mixtures have about 150 000 in all their files.
pub const MAX_TENSORS: usize = 1 << 20;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float, 4 exponent bits.
    F8E4m3,
    /// 8-bit float, 5 exponent bits.
    F8E5m2,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 64 bits.
    U64,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 8 bits.
    U8,
    /// One byte per truth value.
    Bool,
}

/// The types by their names in a header.
const TYPES: [(&str, StoredType, u64); 15] = [
    ("F64", StoredType::F64, 8),
    ("F32", StoredType::F32, 4),
    ("F16", StoredType::F16, 2),
    ("BF16", StoredType::Bf16, 2),
    ("F8_E4M3", StoredType::F8E4m3, 1),
    ("F8_E5M2", StoredType::F8E5m2, 1),
    ("I64", StoredType::I64, 8),
    ("I32", StoredType::I32, 4),
    ("I16", StoredType::I16, 2),
    ("I8", StoredType::I8, 1),
    ("U64", StoredType::U64, 8),
    ("U32", StoredType::U32, 4),
    ("U16", StoredType::U16, 2),
    ("U8", StoredType::U8, 1),
    ("BOOL", StoredType::Bool, 1),
];

impl StoredType {
    /// Its name in a header, such as `BF16`.
    pub fn name(self) -> &'static str {
        TYPES
            .iter()
            .find(|entry| entry.1 == self)
            .map_or("?", |entry| entry.0)
    }

    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        TYPES
            .iter()
            .find(|entry| entry.1 == self)
            .map_or(0, |entry| entry.2)
    }

    fn from_name(name: &str) -> Option<Self> {
        TYPES
            .iter()
            .find(|entry| entry.0 == name)
            .map(|entry| entry.1)
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Length of the JSON header that the first eight bytes of a file announce, checked against the file.
///
/// # Errors
/// [`SafetensorsError::HeaderTooLong`] and [`SafetensorsError::HeaderTruncated`].
pub fn header_length(first_bytes: [u8; 8], file_bytes: u64) -> Result<usize, SafetensorsError> {
    let bytes = u64::from_le_bytes(first_bytes);
    if bytes > MAX_HEADER_BYTES {
        return Err(SafetensorsError::HeaderTooLong {
            bytes,
            limit: MAX_HEADER_BYTES,
        });
    }
    let needed = bytes + 8;
    if needed > file_bytes {
        return Err(SafetensorsError::HeaderTruncated {
            needed,
            found: file_bytes,
        });
    }
    usize::try_from(bytes).map_err(|_| SafetensorsError::HeaderTooLong {
        bytes,
        limit: MAX_HEADER_BYTES,
    })
}

/// Reads and checks the JSON header of a file of `file_bytes` bytes; entries come in the order of their data.
///
/// # Errors
/// Every way in which header and length can contradict each other, with the tensor's name.
pub fn parse_header(header: &[u8], file_bytes: u64) -> Result<Vec<HeaderEntry>, SafetensorsError> {
    let invalid = |reason: String| SafetensorsError::Header { reason };
    if header.first() != Some(&b'{') {
        return Err(invalid("it does not begin with a brace".to_owned()));
    }
    let UniqueMap(raw) = serde_json::from_slice::<UniqueMap<RawTensor>>(header)
        .map_err(|error| invalid(error.to_string()))?;
    let data_start = header.len() as u64 + 8;
    let mut entries = Vec::with_capacity(raw.len());
    for (
        name,
        RawTensor {
            dtype,
            shape,
            data_offsets: (begin, end),
        },
    ) in raw
    {
        entries.push((
            begin,
            end,
            checked(name, &dtype, shape, begin, end, data_start)?,
        ));
    }
    entries.sort_by_key(|(begin, end, _)| (*begin, *end));
    let mut expected = 0;
    for (begin, end, entry) in &entries {
        if *begin != expected {
            let tensor = entry.name.clone();
            return Err(SafetensorsError::Offset {
                tensor,
                found: *begin,
                expected,
            });
        }
        expected = *end;
    }
    let implied = expected.saturating_add(data_start);
    if implied != file_bytes {
        return Err(SafetensorsError::FileLength {
            expected: implied,
            found: file_bytes,
        });
    }
    Ok(entries.into_iter().map(|(_, _, entry)| entry).collect())
}

fn checked(
    name: String,
    dtype: &str,
    shape: Vec<u64>,
    begin: u64,
    end: u64,
    data_start: u64,
) -> Result<HeaderEntry, SafetensorsError> {
    let Some(dtype) = StoredType::from_name(dtype) else {
        return Err(SafetensorsError::ElementType {
            tensor: name,
            found: dtype.chars().take(32).collect(),
        });
    };
    let needed = shape
        .iter()
        .try_fold(dtype.bytes(), |product, dim| product.checked_mul(*dim));
    let sizes = shape
        .iter()
        .map(|dim| usize::try_from(*dim).ok())
        .collect::<Option<Vec<_>>>();
    let (Some(needed), Some(sizes)) = (needed, sizes) else {
        return Err(SafetensorsError::ShapeOverflow {
            tensor: name,
            shape,
        });
    };
    let offset = data_start.checked_add(begin);
    let (true, Some(offset)) = (end.checked_sub(begin) == Some(needed), offset) else {
        let found = i128::from(end) - i128::from(begin);
        return Err(SafetensorsError::Length {
            tensor: name,
            shape,
            needed,
            found,
        });
    };
    Ok(HeaderEntry {
        name,
        dtype,
        shape: sizes,
        offset,
        bytes: needed,
    })
}

/// One tensor as the header writes it.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A JSON object in which no key may stand twice; serde's own maps keep the last one silently.
/// `__metadata__` must be a map of strings and is dropped.
pub(crate) struct UniqueMap<T>(pub(crate) BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Unique<T> {
            type Value = UniqueMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some(key) = access.next_key::<String>()? {
                    let named = |error: A::Error| A::Error::custom(format_args!("{key}: {error}"));
                    if key == "__metadata__" {
                        access
                            .next_value::<BTreeMap<String, String>>()
                            .map_err(named)?;
                        continue;
                    }
                    let value = access.next_value().map_err(named)?;
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("{key} stands there twice")));
                    }
                    if map.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_TENSORS} entries"
                        )));
                    }
                    map.insert(key, value);
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(Unique(PhantomData))
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
