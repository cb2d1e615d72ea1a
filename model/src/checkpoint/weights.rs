//! The weight files: one, or those of an index.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::source::{Place, Source, is_plain_name};
use super::{INDEX_FILE, TensorInfo, WEIGHTS_FILE};
use crate::error::{CheckpointError, SafetensorsError};
use crate::modules::TensorMap;
use crate::safetensors::{HeaderEntry, UniqueMap, header_length, parse_header};

/// Most files of one checkpoint; each stays open.
const MAX_FILES: usize = 512;

/// One open weight file.
pub(super) struct WeightFile {
    pub(super) name: String,
    pub(super) source: Source,
    /// SHA-256 of the header's bytes.
    pub(super) header_digest: [u8; 32],
}

/// Opens the weights of a place. A single file is preferred over an index, as transformers does.
pub(super) fn open(place: &Place) -> Result<(Vec<WeightFile>, TensorMap), CheckpointError> {
    if let Some(source) = place.open(WEIGHTS_FILE)? {
        let (file, entries) = read_header(WEIGHTS_FILE, place, source)?;
        let tensors = entries.into_iter().map(|entry| placed(entry, 0)).collect();
        return Ok((vec![file], tensors));
    }
    match place.text(INDEX_FILE)? {
        Some(index) => open_index(place, &index),
        None => Err(place.no_weights()),
    }
}

fn open_index(place: &Place, index: &str) -> Result<(Vec<WeightFile>, TensorMap), CheckpointError> {
    let index_path = place.path(INDEX_FILE).display().to_string();
    let weight_map = read_index(index, &index_path)?;
    let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    if names.len() > MAX_FILES {
        let found = names.len();
        return Err(CheckpointError::TooManyFiles {
            file: index_path,
            found,
            limit: MAX_FILES,
        });
    }
    let mut files = Vec::with_capacity(names.len());
    let mut tensors = TensorMap::new();
    for name in names {
        let Some(source) = place.open(name)? else {
            let tensor = weight_map
                .iter()
                .find(|(_, file)| *file == name)
                .map(|(tensor, _)| tensor);
            return Err(CheckpointError::NotInFile {
                file: place.path(name).display().to_string(),
                tensor: tensor.cloned().unwrap_or_default(),
                index: INDEX_FILE.to_owned(),
            });
        };
        let (file, entries) = read_header(name, place, source)?;
        for entry in entries {
            if weight_map.get(&entry.name).map(String::as_str) != Some(name) {
                return Err(CheckpointError::NotInIndex {
                    file: place.path(name).display().to_string(),
                    tensor: entry.name,
                    index: INDEX_FILE.to_owned(),
                });
            }
            tensors.extend([placed(entry, files.len())]);
        }
        files.push(file);
    }
    match weight_map
        .into_iter()
        .find(|(tensor, _)| !tensors.contains_key(tensor))
    {
        None => Ok((files, tensors)),
        Some((tensor, file)) => Err(CheckpointError::NotInFile {
            file: place.path(&file).display().to_string(),
            tensor,
            index: INDEX_FILE.to_owned(),
        }),
    }
}

fn read_index(index: &str, index_path: &str) -> Result<BTreeMap<String, String>, CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let Index {
        weight_map: UniqueMap(weight_map),
    } = serde_json::from_str(index).map_err(|error| CheckpointError::Index {
        file: index_path.to_owned(),
        reason: error.to_string(),
    })?;
    if weight_map.is_empty() {
        let reason = "weight_map is empty".to_owned();
        return Err(CheckpointError::Index {
            file: index_path.to_owned(),
            reason,
        });
    }
    match weight_map.iter().find(|(_, target)| !is_plain_name(target)) {
        None => Ok(weight_map),
        Some((tensor, target)) => Err(CheckpointError::IndexPath {
            file: index_path.to_owned(),
            tensor: tensor.clone(),
            target: target.clone(),
        }),
    }
}

fn read_header(
    name: &str,
    place: &Place,
    source: Source,
) -> Result<(WeightFile, Vec<HeaderEntry>), CheckpointError> {
    let path = place.path(name);
    let wrong = |source| CheckpointError::Safetensors {
        file: path.display().to_string(),
        source,
    };
    let failed = |source| CheckpointError::Io {
        file: path.clone(),
        source,
    };
    let bytes = source.bytes();
    if bytes < 8 {
        return Err(wrong(SafetensorsError::TooShort { bytes }));
    }
    let mut first = [0; 8];
    source.read_exact_at(0, &mut first).map_err(failed)?;
    let mut header = vec![0; header_length(first, bytes).map_err(wrong)?];
    source.read_exact_at(8, &mut header).map_err(failed)?;
    let entries = parse_header(&header, bytes).map_err(wrong)?;
    let header_digest = Sha256::digest(&header).into();
    Ok((
        WeightFile {
            name: name.to_owned(),
            source,
            header_digest,
        },
        entries,
    ))
}

fn placed(entry: HeaderEntry, file: usize) -> (String, TensorInfo) {
    let HeaderEntry {
        name,
        dtype,
        shape,
        offset,
        bytes,
    } = entry;
    (
        name.clone(),
        TensorInfo {
            name,
            dtype,
            shape,
            file,
            offset,
            bytes,
        },
    )
}
