//! What can be wrong with a checkpoint. Every message names the file, tensor, module or field, and the
//! remedy where there is one.

use std::io;
use std::path::PathBuf;

mod config;
mod tensors;

pub use config::ConfigError;
pub use tensors::{GptqError, ModuleError, SafetensorsError};

/// A checkpoint cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The name looks like a repository of a model hub.
    #[error(
        "no folder {name}; it looks like a hub name, and nothing is downloaded here: fetch it first, for example with `hf download {name} --local-dir DIR`, and pass DIR, or pass builtin for the embedded model"
    )]
    HubName {
        /// The name.
        name: String,
    },
    /// The path does not exist.
    #[error(
        "no folder {path}; pass a folder with config.json and safetensors files, or builtin for the embedded model"
    )]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// The path is a file.
    #[error(
        "{path} is not a folder; pass the folder that holds config.json and the safetensors files"
    )]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// The folder is not a checkpoint.
    #[error("{path} has no config.json; {hint}")]
    NoConfig {
        /// The folder.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// The folder has no weights under a name that is read.
    #[error("{path} has neither model.safetensors nor model.safetensors.index.json; {hint}")]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A directory, socket or device where a file should be.
    #[error("{file} is not a regular file")]
    NotAFile {
        /// The file.
        file: PathBuf,
    },
    /// A text file longer than any real one.
    #[error("{file}: {bytes} bytes are over the limit of {limit}")]
    TooLong {
        /// The file.
        file: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A text file that is not UTF-8.
    #[error("{file}: not UTF-8")]
    NotUtf8 {
        /// The file.
        file: PathBuf,
    },
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`SafetensorsError`].
    #[error("{file}: {source}")]
    Safetensors {
        /// The file.
        file: String,
        /// What is wrong with it.
        source: SafetensorsError,
    },
    /// The index is not the JSON it should be; duplicate names end here too.
    #[error("{file}: cannot be read: {reason}")]
    Index {
        /// The file.
        file: String,
        /// What the parser said.
        reason: String,
    },
    /// The index names a file outside the folder.
    #[error(
        "{file}: tensor {tensor} is said to be in {target:?}, which is not a plain file name; refused, for it may point outside the folder"
    )]
    IndexPath {
        /// The index.
        file: String,
        /// The tensor.
        tensor: String,
        /// The name refused.
        target: String,
    },
    /// The index names more files than any real checkpoint has.
    #[error("{file}: names {found} files, over the limit of {limit}")]
    TooManyFiles {
        /// The index.
        file: String,
        /// Files named.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The index promises a tensor that its file does not have.
    #[error(
        "{file}: tensor {tensor} is missing, although {index} says it is there; download the folder again"
    )]
    NotInFile {
        /// The safetensors file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The index.
        index: String,
    },
    /// A file has a tensor that the index does not know, or places elsewhere.
    #[error(
        "{file}: tensor {tensor} is not listed for this file in {index}; download the folder again"
    )]
    NotInIndex {
        /// The safetensors file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The index.
        index: String,
    },
    /// See [`ModuleError`].
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// See [`GptqError`].
    #[error(transparent)]
    Gptq(#[from] GptqError),
    /// A read leaves its tensor.
    #[error("tensor {tensor}: bytes {offset}..{end} are outside its {bytes}")]
    Range {
        /// The tensor.
        tensor: String,
        /// First byte asked for.
        offset: u64,
        /// End of the bytes asked for.
        end: u64,
        /// Bytes of the tensor.
        bytes: u64,
    },
    /// `lm_head.weight` is stored beside the embeddings it is tied to, and differs.
    #[error(
        "tensor lm_head.weight differs from model.embed_tokens.weight although tie_word_embeddings is true; set tie_word_embeddings to false in config.json to serve lm_head.weight, or remove the tensor"
    )]
    TiedHeadDiffers,
}
