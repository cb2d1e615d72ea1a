//! Reading tensors whole, and what can only be seen in their bytes.

use super::{Checkpoint, TensorInfo};
use crate::error::{CheckpointError, ModuleError};
use crate::gptq::{check_scales, dequantise, floats, group_indices, suspicious_zeros, words};
use crate::modules::{GptqFormat, LinearModule, WeightFormat, ZeroPoints};

/// Names of one kind that a warning shows before it only counts.
const SHOWN_NAMES: usize = 5;
/// How a stored but tied `lm_head` is compared: this many pieces of this many bytes.
const COMPARED_PIECES: u64 = 16;
const COMPARED_BYTES: u64 = 1 << 16;

impl Checkpoint {
    /// A tensor's bytes, whole.
    ///
    /// # Errors
    /// As [`Checkpoint::read_at`].
    pub fn read(&self, tensor: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = vec![0; usize::try_from(tensor.bytes).unwrap_or(usize::MAX)];
        self.read_at(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// A float tensor as f32, whole.
    ///
    /// # Errors
    /// [`ModuleError::Missing`] and [`ModuleError::ElementType`], and those of [`Checkpoint::read_at`].
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.required(name)?;
        let Some(dtype) = tensor.float_type() else {
            return Err(CheckpointError::Module(ModuleError::ElementType {
                tensor: name.to_owned(),
                found: tensor.dtype.to_string(),
                expected: "F16, BF16 or F32".to_owned(),
            }));
        };
        Ok(floats(dtype, &self.read(tensor)?))
    }

    /// The group of each of the `k` rows of a GPTQ linear, checked against the number of groups. A module
    /// without the tensor (auto-round leaves it out where rows are in order) gets `row / group size`.
    ///
    /// # Errors
    /// [`GptqError::GroupIndex`](crate::error::GptqError::GroupIndex), and those of [`Checkpoint::read_at`].
    pub fn group_indices(
        &self,
        module: &LinearModule,
        format: &GptqFormat,
    ) -> Result<Vec<u32>, CheckpointError> {
        let name = format!("{}.g_idx", module.name);
        let Some(tensor) = self.tensor(&name) else {
            let group = format.group_size.unwrap_or(module.k).max(1);
            return Ok((0..module.k).map(|row| (row / group) as u32).collect());
        };
        Ok(group_indices(
            &name,
            &words(&self.read(tensor)?),
            format.groups(module.k),
        )?)
    }

    /// Weights of a linear as (k, n) row-major f32, slowly: what tests compare everything else with.
    ///
    /// # Errors
    /// [`CheckpointError::Gptq`] for damaged contents, and those of [`Checkpoint::read_at`].
    pub fn dequantise(&self, module: &LinearModule) -> Result<Vec<f32>, CheckpointError> {
        let name = |suffix: &str| format!("{}.{suffix}", module.name);
        let (k, n) = (module.k, module.n);
        match &module.format {
            WeightFormat::Dense(_) => {
                let stored = self.floats(&name("weight"))?;
                Ok((0..k * n).map(|at| stored[at % n * k + at / n]).collect())
            }
            WeightFormat::Gptq(format) => {
                let qweight = words(&self.read(self.required(&name("qweight"))?)?);
                let qzeros = words(&self.read(self.required(&name("qzeros"))?)?);
                let scales = self.floats(&name("scales"))?;
                let groups = self.group_indices(module, format)?;
                Ok(dequantise(
                    &module.name,
                    format,
                    (k, n),
                    &qweight,
                    &qzeros,
                    &scales,
                    &groups,
                )?)
            }
        }
    }

    /// Checks the contents that shapes do not show: every scale finite, every group index in range. A worker
    /// does the same for its own slices as it loads them; this reads those two tensors of every module.
    ///
    /// # Errors
    /// [`CheckpointError::Gptq`], with the tensor.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        for module in self.linears() {
            if let WeightFormat::Gptq(format) = &module.format {
                let scales = format!("{}.scales", module.name);
                check_scales(&scales, module.n, 0, &self.floats(&scales)?)?;
                self.group_indices(module, format)?;
            }
        }
        Ok(())
    }

    fn required(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.tensor(name).ok_or_else(|| {
            CheckpointError::Module(ModuleError::Missing {
                tensor: name.to_owned(),
            })
        })
    }

    pub(super) fn collect_warnings(&self) -> Result<Vec<String>, CheckpointError> {
        let mut warnings = Vec::new();
        if let Some(quant) = &self.quant {
            warnings.extend_from_slice(quant.warnings());
            let modules = self.linears().iter().map(|module| module.name.as_str());
            let unmatched = quant.dynamic().unmatched(modules);
            warnings.extend(summary(&unmatched, "dynamic pattern(s) match no module"));
        }
        warnings.extend(summary(
            &self.list.extra,
            "tensor(s) belong to no module and are ignored",
        ));
        let mut used = Vec::new();
        for name in &self.list.unused_biases {
            if self.floats(name)?.iter().any(|value| *value != 0.0) {
                used.push(name);
            }
        }
        let ignored = "bias(es) with values other than zero belong to modules that have no bias in this \
                       architecture, and are ignored";
        warnings.extend(summary(&used, ignored));
        if self.list.tied_head_stored && self.tied_head_differs()? {
            return Err(CheckpointError::TiedHeadDiffers);
        }
        let suspicious = self.suspicious_modules()?;
        let text = "asymmetric module(s) labelled gptq store 2^(bits-1) as every zero point seen, which is what \
                    gptq_v2 stores for symmetric weights; if the output is nonsense, set checkpoint_format to \
                    gptq_v2 or sym to true";
        warnings.extend(summary(&suspicious, text));
        Ok(warnings)
    }

    /// Asymmetric modules under a v1 label whose first row of zero points looks symmetric.
    fn suspicious_modules(&self) -> Result<Vec<&str>, CheckpointError> {
        let mut found = Vec::new();
        for module in self.linears() {
            let WeightFormat::Gptq(format) = &module.format else {
                continue;
            };
            if format.sym || format.zeros != ZeroPoints::MinusOne {
                continue;
            }
            let row_words = format.packed_words(module.n).unwrap_or(0);
            let mut row = vec![0; row_words * 4];
            self.read_at(
                self.required(&format!("{}.qzeros", module.name))?,
                0,
                &mut row,
            )?;
            if suspicious_zeros(format, module.n, &words(&row)) {
                found.push(module.name.as_str());
            }
        }
        Ok(found)
    }

    /// Compares pieces spread over the two tensors: all of a small one, a megabyte of a large one.
    fn tied_head_differs(&self) -> Result<bool, CheckpointError> {
        let head = self.required("lm_head.weight")?;
        let embedding = self.required("model.embed_tokens.weight")?;
        if head.dtype != embedding.dtype || head.bytes != embedding.bytes {
            return Ok(true);
        }
        let stride = head.bytes.div_ceil(COMPARED_PIECES).max(1);
        let mut offset = 0;
        while offset < head.bytes {
            let length = (head.bytes - offset).min(COMPARED_BYTES) as usize;
            let (mut one, mut two) = (vec![0; length], vec![0; length]);
            self.read_at(head, offset, &mut one)?;
            self.read_at(embedding, offset, &mut two)?;
            if one != two {
                return Ok(true);
            }
            offset += stride;
        }
        Ok(false)
    }
}

/// `3 tensor(s) …: a, b, c`; nothing for no names.
fn summary<T: AsRef<str>>(names: &[T], text: &str) -> Option<String> {
    if names.is_empty() {
        return None;
    }
    let shown: Vec<&str> = names.iter().take(SHOWN_NAMES).map(AsRef::as_ref).collect();
    let more = if names.len() > SHOWN_NAMES {
        ", …"
    } else {
        ""
    };
    Some(format!(
        "{} {text}: {}{more}",
        names.len(),
        shown.join(", ")
    ))
}
