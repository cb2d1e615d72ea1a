//! The listing: whether the tensors at hand make up the modules that a configuration implies.

use std::collections::BTreeSet;

use super::implied::{EMBEDDING, ImpliedLinear, ImpliedPlain, implied_linears, implied_plain};
use super::{DType, GptqFormat, LinearRole, ModuleList, PlainTensor, TensorMap, WeightFormat};
use crate::checkpoint::TensorInfo;
use crate::config::ModelConfig;
use crate::error::ModuleError;
use crate::gptq::QuantConfig;
use crate::safetensors::StoredType;

/// Lists the modules of a model of this configuration and checks name, shape and element type of every tensor
/// they need. Pure: no bytes are read.
///
/// # Errors
/// [`ModuleError`], with the tensor's or module's name.
pub fn modules(
    config: &ModelConfig,
    quant: Option<&QuantConfig>,
    present: &TensorMap,
) -> Result<ModuleList, ModuleError> {
    for suffix in [".qweight", ".qzeros"] {
        let tensor = format!("{EMBEDDING}{suffix}");
        if present.contains_key(&tensor) {
            return Err(ModuleError::QuantisedEmbedding { tensor });
        }
    }
    let mut lister = Lister {
        quant,
        present,
        used: BTreeSet::new(),
        list: ModuleList::default(),
    };
    for plain in implied_plain(config) {
        lister.plain(plain)?;
    }
    for linear in implied_linears(config) {
        if linear.role == LinearRole::LmHead && config.tie_word_embeddings {
            lister.tied_head(linear)?;
        } else {
            lister.linear(linear)?;
        }
    }
    Ok(lister.finish())
}

struct Lister<'a> {
    quant: Option<&'a QuantConfig>,
    present: &'a TensorMap,
    used: BTreeSet<String>,
    list: ModuleList,
}

impl<'a> Lister<'a> {
    fn tied_head(&mut self, implied: ImpliedLinear) -> Result<(), ModuleError> {
        if self.present.contains_key("lm_head.qweight") {
            return Err(ModuleError::TiedHeadQuantised);
        }
        let shape = [implied.n, implied.k];
        if let Some(stored) = self.present.get("lm_head.weight") {
            check_shape(stored, &shape)?;
            self.used.insert(stored.name.clone());
            self.list.tied_head_stored = true;
        }
        let format = WeightFormat::Dense(self.float(format!("{}.weight", implied.name), &shape)?);
        self.list.linears.push(implied.with(format));
        Ok(())
    }

    fn linear(&mut self, implied: ImpliedLinear) -> Result<(), ModuleError> {
        let ImpliedLinear {
            ref name,
            role,
            k,
            n,
            ..
        } = implied;
        let module = || name.clone();
        let dense = self.present.contains_key(&format!("{name}.weight"));
        let packed = self.present.contains_key(&format!("{name}.qweight"));
        // The file may say lm_head: false, or nothing, and still hold a quantised one, and the reverse.
        let configured = match self.quant {
            Some(quant) if role != LinearRole::LmHead || packed => quant.format_of(name)?,
            _ => None,
        };
        let format = match (dense, packed, configured) {
            (true, true, _) => return Err(ModuleError::BothForms { module: module() }),
            (false, true, None) => return Err(ModuleError::Quantised { module: module() }),
            (true, false, Some(_)) => return Err(ModuleError::NotQuantised { module: module() }),
            (false, false, Some(_)) => {
                return Err(ModuleError::Missing {
                    tensor: format!("{name}.qweight"),
                });
            }
            (_, false, None) => WeightFormat::Dense(self.float(format!("{name}.weight"), &[n, k])?),
            (false, true, Some(format)) => {
                self.packed(name, &format, k, n)?;
                WeightFormat::Gptq(format)
            }
        };
        let bias = format!("{name}.bias");
        if implied.bias {
            self.float(bias, &[n])?;
        } else if self.present.contains_key(&bias) {
            self.float(bias.clone(), &[n])?;
            self.list.unused_biases.push(bias);
        }
        self.list.linears.push(implied.with(format));
        Ok(())
    }

    fn packed(
        &mut self,
        name: &str,
        format: &GptqFormat,
        k: usize,
        n: usize,
    ) -> Result<(), ModuleError> {
        let partial = |dimension, width| ModuleError::PartialWord {
            module: name.to_owned(),
            dimension,
            width,
            bits: format.bits,
        };
        let rows = format.packed_words(k).ok_or_else(|| partial("input", k))?;
        let columns = format.packed_words(n).ok_or_else(|| partial("output", n))?;
        let qweight = self.tensor(format!("{name}.qweight"))?;
        if let &[found, found_n] = qweight.shape.as_slice()
            && found != rows
            && found_n == n
            && let Some(implied) = [2_u8, 3, 4, 5, 6, 7, 8]
                .into_iter()
                .find(|bits| found.checked_mul(32) == k.checked_mul(usize::from(*bits)))
        {
            let (tensor, found) = (qweight.name.clone(), qweight.shape.clone());
            return Err(ModuleError::Bits {
                tensor,
                found,
                implied,
                bits: format.bits,
            });
        }
        check_shape(qweight, &[rows, n])?;
        check_type(qweight, StoredType::I32)?;
        let groups = format.groups(k);
        let qzeros = self.tensor(format!("{name}.qzeros"))?;
        check_shape(qzeros, &[groups, columns])?;
        check_type(qzeros, StoredType::I32)?;
        self.float(format!("{name}.scales"), &[groups, n])?;
        let g_idx = format!("{name}.g_idx");
        // auto-round leaves it out where rows are in order.
        if format.desc_act || self.present.contains_key(&g_idx) {
            let g_idx = self.tensor(g_idx)?;
            check_shape(g_idx, &[k])?;
            check_type(g_idx, StoredType::I32)?;
        }
        Ok(())
    }

    fn plain(&mut self, implied: ImpliedPlain) -> Result<(), ModuleError> {
        let ImpliedPlain {
            name,
            layer,
            role,
            shape,
        } = implied;
        let dtype = self.float(name.clone(), &shape)?;
        self.list.plain.push(PlainTensor {
            name,
            layer,
            role,
            shape,
            dtype,
        });
        Ok(())
    }

    fn float(&mut self, name: String, shape: &[usize]) -> Result<DType, ModuleError> {
        let tensor = self.tensor(name)?;
        check_shape(tensor, shape)?;
        tensor.float_type().ok_or_else(|| ModuleError::ElementType {
            tensor: tensor.name.clone(),
            found: tensor.dtype.to_string(),
            expected: "F16, BF16 or F32".to_owned(),
        })
    }

    fn tensor(&mut self, name: String) -> Result<&'a TensorInfo, ModuleError> {
        let Some(tensor) = self.present.get(&name) else {
            return Err(ModuleError::Missing { tensor: name });
        };
        self.used.insert(name);
        Ok(tensor)
    }

    fn finish(mut self) -> ModuleList {
        let extra = self
            .present
            .keys()
            .filter(|name| !self.used.contains(*name) && !name.ends_with(".rotary_emb.inv_freq"));
        self.list.extra = extra.cloned().collect();
        self.list
    }
}

fn check_shape(tensor: &TensorInfo, expected: &[usize]) -> Result<(), ModuleError> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(ModuleError::Shape {
        tensor: tensor.name.clone(),
        found: tensor.shape.clone(),
        expected: expected.to_vec(),
    })
}

fn check_type(tensor: &TensorInfo, expected: StoredType) -> Result<(), ModuleError> {
    if tensor.dtype == expected {
        return Ok(());
    }
    Err(ModuleError::ElementType {
        tensor: tensor.name.clone(),
        found: tensor.dtype.to_string(),
        expected: expected.to_string(),
    })
}

#[cfg(test)]
#[path = "list_tests.rs"]
mod tests;
