//! Where a checkpoint's files are: a folder, or memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use crate::error::CheckpointError;

/// Longest text file that is read, in bytes. Tokenizers of today take 4 to 12 MB.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Files of one checkpoint by name.
pub(super) enum Place {
    Folder(PathBuf),
    Memory {
        name: String,
        files: BTreeMap<String, Cow<'static, [u8]>>,
    },
}

/// One open file.
pub(super) enum Source {
    File { file: File, bytes: u64 },
    Memory(Cow<'static, [u8]>),
}

impl Source {
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::File { bytes, .. } => *bytes,
            Self::Memory(content) => content.len() as u64,
        }
    }

    pub(super) fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.read_exact_at(buffer, offset),
            Self::Memory(content) => {
                let range = usize::try_from(offset)
                    .ok()
                    .and_then(|start| content.get(start..start.checked_add(buffer.len())?));
                buffer.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

impl Place {
    pub(super) fn folder(path: &Path) -> Result<Self, CheckpointError> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Folder(path.to_owned())),
            Ok(_) => Err(CheckpointError::NotAFolder {
                path: path.to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(CheckpointError::NotFound {
                    path: path.to_owned(),
                })
            }
            Err(source) => Err(CheckpointError::Io {
                file: path.to_owned(),
                source,
            }),
        }
    }

    pub(super) fn memory(name: &str, files: BTreeMap<String, Cow<'static, [u8]>>) -> Self {
        Self::Memory {
            name: name.to_owned(),
            files,
        }
    }

    pub(super) fn name(&self) -> String {
        match self {
            Self::Folder(path) => path.display().to_string(),
            Self::Memory { name, .. } => name.clone(),
        }
    }

    /// Path of a file, for messages.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        match self {
            Self::Folder(path) => path.join(file),
            Self::Memory { name, .. } => Path::new(name).join(file),
        }
    }

    /// Opens a file of this place; `None` when it does not exist. Links are followed, as hub caches use
    /// them; that a name stays inside the folder is for the caller to see to.
    pub(super) fn open(&self, name: &str) -> Result<Option<Source>, CheckpointError> {
        let Self::Folder(folder) = self else {
            let Self::Memory { files, .. } = self else {
                return Ok(None);
            };
            return Ok(files.get(name).cloned().map(Source::Memory));
        };
        let path = folder.join(name);
        let io_error = |source| CheckpointError::Io {
            file: path.clone(),
            source,
        };
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(io_error)?,
        };
        // Opening a pipe would block for ever.
        if !metadata.is_file() {
            return Err(CheckpointError::NotAFile { file: path });
        }
        let file = File::open(&path).map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        Ok(Some(Source::File { file, bytes }))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<String>, CheckpointError> {
        if !is_plain_name(name) {
            return Ok(None);
        }
        let Some(source) = self.open(name)? else {
            return Ok(None);
        };
        let (file, bytes) = (self.path(name), source.bytes());
        if bytes > MAX_TEXT_BYTES {
            return Err(CheckpointError::TooLong {
                file,
                bytes,
                limit: MAX_TEXT_BYTES,
            });
        }
        let mut content = vec![0; bytes as usize];
        match source.read_exact_at(0, &mut content) {
            Err(source) => Err(CheckpointError::Io { file, source }),
            Ok(()) => String::from_utf8(content)
                .map(Some)
                .map_err(|_| CheckpointError::NotUtf8 { file }),
        }
    }

    pub(super) fn no_config(&self) -> CheckpointError {
        let hint = if self.has(|name| name == "snapshots") {
            "it is a hub cache; pass one of the folders in its snapshots/"
        } else if self.has(|name| name.ends_with(".gguf")) {
            "GGUF files are not read; pass a GPTQ checkpoint in Hugging Face layout"
        } else {
            "pass a checkpoint folder in Hugging Face layout"
        };
        CheckpointError::NoConfig {
            path: self.path(""),
            hint: hint.to_owned(),
        }
    }

    pub(super) fn no_weights(&self) -> CheckpointError {
        let hint = if let Some(found) = self
            .names()
            .into_iter()
            .find(|name| name.ends_with(".safetensors"))
        {
            format!("rename {found} to model.safetensors if it holds all weights")
        } else if self.has(|name| name.ends_with(".bin") || name.ends_with(".pt")) {
            "pickled weights are not read; convert them to safetensors".to_owned()
        } else if self.has(|name| name.ends_with(".gguf")) {
            "GGUF files are not read; pass a GPTQ checkpoint".to_owned()
        } else {
            "the download is incomplete".to_owned()
        };
        CheckpointError::NoWeights {
            path: self.path(""),
            hint,
        }
    }

    fn has(&self, matches: impl Fn(&str) -> bool) -> bool {
        self.names().iter().any(|name| matches(name))
    }

    /// Names in the folder, sorted; empty when it cannot be listed, for they only make a hint.
    fn names(&self) -> Vec<String> {
        match self {
            Self::Memory { files, .. } => files.keys().cloned().collect(),
            Self::Folder(path) => {
                let entries = fs::read_dir(path).into_iter().flatten().flatten();
                let mut names: Vec<_> = entries
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .collect();
                names.sort();
                names
            }
        }
    }
}

/// True for the name of a file directly in the folder.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    plain && components.next().is_none() && !name.contains(['\\', '\0'])
}

/// True for `owner/model` in the alphabet of hub names.
pub(super) fn looks_like_hub_name(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '~'])
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    name.split_once('/')
        .is_some_and(|(owner, model)| part(owner) && part(model))
}
