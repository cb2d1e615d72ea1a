//! The embedded model: a small chat model of our own, compiled into every binary.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::checkpoint::{BUILTIN, Checkpoint};
use crate::error::CheckpointError;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../builtin/checkpoint/", $name)).as_slice())),*]
    };
}

/// Its files, by their names in a checkpoint folder.
static FILES: [(&str, &[u8]); 5] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

impl Checkpoint {
    /// Opens the embedded model.
    ///
    /// # Errors
    /// None in a binary whose tests pass; the signature is that of [`Checkpoint::open`].
    pub fn builtin() -> Result<Self, CheckpointError> {
        let files: BTreeMap<_, _> = FILES
            .iter()
            .map(|(name, content)| ((*name).to_owned(), Cow::Borrowed(*content)))
            .collect();
        Self::from_memory(BUILTIN, files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_clean() {
        let checkpoint = Checkpoint::open_named(BUILTIN).unwrap();
        checkpoint.verify().unwrap();
        assert_eq!(checkpoint.name(), BUILTIN);
        assert_eq!(checkpoint.warnings(), [""; 0]);
        assert!(checkpoint.text_file("tokenizer.json").unwrap().is_some());
        assert!(!checkpoint.config().eos_token_ids.is_empty());
    }
}
