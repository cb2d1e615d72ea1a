//! A checkpoint: a folder of Hugging Face files, or the embedded model, checked before use.
//!
//! Opening reads the JSON files and the safetensors headers, lists the modules and checks every name, shape
//! and element type. Tensor bytes stay where they are; a loader reads the ranges it wants by position.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::config::{CONFIG_FILE, GENERATION_CONFIG_FILE, ModelConfig};
use crate::error::CheckpointError;
use crate::gptq::{QUANTIZE_CONFIG_FILE, QuantConfig, ordered_groups};
use crate::modules::{
    DType, LinearModule, ModuleList, PlainTensor, TensorMap, WeightFormat, modules,
};
use crate::plan::ModelShape;
use crate::safetensors::StoredType;

mod contents;
mod digest;
mod source;
mod weights;

use source::Place;
use weights::WeightFile;

/// Name by which every command reaches the embedded model.
pub const BUILTIN: &str = "builtin";
/// Single file of weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Index of weights in several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Files that make up a tokenizer, as far as a checkpoint has them; all are part of the digest.
pub const TOKENIZER_FILES: [&str; 8] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its full name.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's weight files, counted from 0 in the order of their names.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Its type when it is one of the floats that weights outside GPTQ may have.
    pub fn float_type(&self) -> Option<DType> {
        match self.dtype {
            StoredType::F32 => Some(DType::F32),
            StoredType::F16 => Some(DType::F16),
            StoredType::Bf16 => Some(DType::Bf16),
            _ => None,
        }
    }
}

/// An open checkpoint. Reading takes `&self` and is safe from many threads at once.
pub struct Checkpoint {
    place: Place,
    config: ModelConfig,
    quant: Option<QuantConfig>,
    files: Vec<WeightFile>,
    tensors: TensorMap,
    list: ModuleList,
    warnings: Vec<String>,
    digest: [u8; 32],
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens what a `--model` flag names: `builtin`, or the path of a folder.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; a name of the form `owner/model` that is no folder is told apart.
    pub fn open_named(name: &str) -> Result<Self, CheckpointError> {
        if name == BUILTIN {
            return Self::builtin();
        }
        let path = Path::new(name);
        if !path.exists() && source::looks_like_hub_name(name) {
            return Err(CheckpointError::HubName {
                name: name.to_owned(),
            });
        }
        Self::open(path)
    }

    /// Opens a folder with `config.json` and either `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`CheckpointError`], with the file, tensor, module or field.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        Self::from_place(Place::folder(folder)?)
    }

    /// Opens files that are held in memory, by their names; `name` stands for the folder in messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_memory(
        name: &str,
        files: BTreeMap<String, Cow<'static, [u8]>>,
    ) -> Result<Self, CheckpointError> {
        Self::from_place(Place::memory(name, files))
    }

    fn from_place(place: Place) -> Result<Self, CheckpointError> {
        let config_text = place.text(CONFIG_FILE)?.ok_or_else(|| place.no_config())?;
        let config =
            ModelConfig::parse(&config_text, place.text(GENERATION_CONFIG_FILE)?.as_deref())?;
        let quant = QuantConfig::parse(&config_text, place.text(QUANTIZE_CONFIG_FILE)?.as_deref())?;
        let (files, tensors) = weights::open(&place)?;
        let list = modules(&config, quant.as_ref(), &tensors)?;
        let digest = digest::digest(&place, &files)?;
        let mut checkpoint = Self {
            place,
            config,
            quant,
            files,
            tensors,
            list,
            warnings: Vec::new(),
            digest,
        };
        checkpoint.warnings = checkpoint.collect_warnings()?;
        Ok(checkpoint)
    }

    /// The folder's path, or `builtin`.
    pub fn name(&self) -> String {
        self.place.name()
    }

    /// What `config.json` and `generation_config.json` say.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the quantisation block says; `None` for a checkpoint without one.
    pub fn quant(&self) -> Option<&QuantConfig> {
        self.quant.as_ref()
    }

    /// Every linear: by layer q, k, v, o, gate, up, down; `lm_head` last.
    pub fn linears(&self) -> &[LinearModule] {
        &self.list.linears
    }

    /// Every tensor outside the linears: embeddings and norms.
    pub fn plain_tensors(&self) -> &[PlainTensor] {
        &self.list.plain
    }

    /// The model as planner and slicer see it. The order of groups is read from every `g_idx`: the
    /// quantisation block does not tell it reliably.
    ///
    /// # Errors
    /// As [`Checkpoint::group_indices`].
    pub fn shape(&self) -> Result<ModelShape, CheckpointError> {
        let mut shape = ModelShape::new(self.config.clone(), &self.list);
        for linear in &mut shape.linears {
            let WeightFormat::Gptq(format) = &linear.format else {
                continue;
            };
            let mut format = *format;
            format.desc_act = !ordered_groups(&format, &self.group_indices(linear, &format)?);
            linear.format = WeightFormat::Gptq(format);
        }
        Ok(shape)
    }

    /// Every tensor of the files by name, those that nothing reads included.
    pub fn tensors(&self) -> &TensorMap {
        &self.tensors
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Names of the weight files, in order.
    pub fn weight_files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|file| file.name.as_str())
    }

    /// Things that are odd but not wrong, each a sentence for the log.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// SHA-256 over what identifies the checkpoint without reading its weights: `config.json`,
    /// `quantize_config.json`, the [`TOKENIZER_FILES`], and of each weight file its name, length and header.
    /// Sampling defaults (`generation_config.json`) are left out: they concern the coordinator alone.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// [`Checkpoint::digest`] as 64 hexadecimal digits.
    pub fn digest_hex(&self) -> String {
        self.digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Reads `buffer.len()` bytes of a tensor from byte `offset` of it.
    ///
    /// # Errors
    /// [`CheckpointError::Range`] when they leave the tensor, [`CheckpointError::Io`].
    pub fn read_at(
        &self,
        tensor: &TensorInfo,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let end = offset.saturating_add(buffer.len() as u64);
        let (true, Some(file)) = (end <= tensor.bytes, self.files.get(tensor.file)) else {
            return Err(CheckpointError::Range {
                tensor: tensor.name.clone(),
                offset,
                end,
                bytes: tensor.bytes,
            });
        };
        file.source
            .read_exact_at(tensor.offset.saturating_add(offset), buffer)
            .map_err(|source| CheckpointError::Io {
                file: self.place.path(&file.name),
                source,
            })
    }

    /// A text file of the checkpoint, whole; `None` when there is none of that name.
    ///
    /// # Errors
    /// [`CheckpointError::TooLong`] over 64 MiB, [`CheckpointError::NotUtf8`], [`CheckpointError::Io`].
    pub fn text_file(&self, name: &str) -> Result<Option<String>, CheckpointError> {
        self.place.text(name)
    }
}

#[cfg(test)]
#[path = "checkpoint/tests.rs"]
mod tests;
