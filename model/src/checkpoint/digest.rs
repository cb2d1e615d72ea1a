//! The checkpoint digest: what a worker compares with the coordinator before it joins.

use sha2::{Digest, Sha256};

use super::TOKENIZER_FILES;
use super::source::Place;
use super::weights::WeightFile;
use crate::config::CONFIG_FILE;
use crate::error::CheckpointError;
use crate::gptq::QUANTIZE_CONFIG_FILE;

/// Separates this digest from every other and names its version.
const DOMAIN: &[u8] = b"secondwind checkpoint digest 1";

/// Hashes the text files in a fixed order, then the weight files by name. Every item is framed: name and
/// content each preceded by their length, a missing file by a mark, so that no two checkpoints share a stream.
pub(super) fn digest(place: &Place, files: &[WeightFile]) -> Result<[u8; 32], CheckpointError> {
    let mut hasher = Sha256::new();
    frame(&mut hasher, DOMAIN);
    for name in [CONFIG_FILE, QUANTIZE_CONFIG_FILE]
        .into_iter()
        .chain(TOKENIZER_FILES)
    {
        frame(&mut hasher, name.as_bytes());
        match place.text(name)? {
            None => hasher.update([0]),
            Some(text) => {
                hasher.update([1]);
                frame(&mut hasher, text.as_bytes());
            }
        }
    }
    hasher.update((files.len() as u64).to_le_bytes());
    for file in files {
        frame(&mut hasher, file.name.as_bytes());
        hasher.update(file.source.bytes().to_le_bytes());
        frame(&mut hasher, &file.header_digest);
    }
    Ok(hasher.finalize().into())
}

fn frame(hasher: &mut Sha256, content: &[u8]) {
    hasher.update((content.len() as u64).to_le_bytes());
    hasher.update(content);
}
