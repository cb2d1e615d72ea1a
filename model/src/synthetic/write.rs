//! Which tensors a synthetic checkpoint has, and their bytes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::SyntheticModel;
use super::random::Random;
use crate::checkpoint::{INDEX_FILE, TensorInfo, WEIGHTS_FILE};
use crate::config::ModelConfig;
use crate::error::ModuleError;
use crate::gptq::QuantConfig;
use crate::modules::implied::{ImpliedLinear, implied_linears, implied_plain};
use crate::modules::{DType, GptqFormat, LinearRole, PlainRole, ZeroPoints};
use crate::safetensors::StoredType;

/// One tensor to write.
pub(super) struct Tensor {
    name: String,
    dtype: StoredType,
    shape: Vec<usize>,
    fill: Fill,
}

/// What its bytes are.
enum Fill {
    /// Random bits.
    Codes,
    /// Packed zero points near the middle, one stream per row.
    Zeros(GptqFormat),
    /// Row k of K to its group, in order or shuffled.
    Groups { group_size: usize, shuffled: bool },
    /// Floats of `centre` plus or minus `spread`.
    Floats {
        dtype: DType,
        centre: f32,
        spread: f32,
    },
}

impl Tensor {
    /// As a file's header would list it.
    pub(super) fn info(&self) -> (String, TensorInfo) {
        let info = TensorInfo {
            name: self.name.clone(),
            dtype: self.dtype,
            shape: self.shape.clone(),
            file: 0,
            offset: 0,
            bytes: self.bytes(),
        };
        (self.name.clone(), info)
    }

    fn elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }

    fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bytes()
    }
}

fn float(name: String, dtype: DType, shape: Vec<usize>, centre: f32, spread: f32) -> Tensor {
    let stored = match dtype {
        DType::F32 => StoredType::F32,
        DType::F16 => StoredType::F16,
        DType::Bf16 => StoredType::Bf16,
    };
    Tensor {
        name,
        dtype: stored,
        shape,
        fill: Fill::Floats {
            dtype,
            centre,
            spread,
        },
    }
}

pub(super) fn tensors(
    model: &SyntheticModel,
    config: &ModelConfig,
    quant: Option<&QuantConfig>,
) -> Result<Vec<Tensor>, ModuleError> {
    let mut tensors = Vec::new();
    for plain in implied_plain(config) {
        let (centre, spread) = match plain.role {
            PlainRole::Embedding => (0.0, 1.0),
            _ => (1.0, 0.1),
        };
        tensors.push(float(plain.name, model.float, plain.shape, centre, spread));
    }
    for linear in implied_linears(config) {
        let format = match quant {
            Some(quant) if linear.role != LinearRole::LmHead || quant.lm_head() => {
                quant.format_of(&linear.name)?
            }
            _ => None,
        };
        if linear.bias {
            tensors.push(float(
                format!("{}.bias", linear.name),
                model.float,
                vec![linear.n],
                0.0,
                0.1,
            ));
        }
        match format {
            Some(format) => tensors.extend(packed(&linear, format)?),
            None if linear.role == LinearRole::LmHead && config.tie_word_embeddings => {}
            None => {
                // A uniform value in [-a, a) has the spread a / sqrt(3).
                let spread = (3.0 / linear.k as f32).sqrt();
                let name = format!("{}.weight", linear.name);
                tensors.push(float(
                    name,
                    model.float,
                    vec![linear.n, linear.k],
                    0.0,
                    spread,
                ));
            }
        }
    }
    Ok(tensors)
}

fn packed(linear: &ImpliedLinear, format: GptqFormat) -> Result<[Tensor; 4], ModuleError> {
    let (k, n, bits) = (linear.k, linear.n, format.bits);
    let partial = |dimension, width| ModuleError::PartialWord {
        module: linear.name.clone(),
        dimension,
        width,
        bits,
    };
    let rows = format.packed_words(k).ok_or_else(|| partial("input", k))?;
    let columns = format.packed_words(n).ok_or_else(|| partial("output", n))?;
    let groups = format.groups(k);
    let name = |suffix: &str| format!("{}.{suffix}", linear.name);
    // Codes are uniform in 0..2^bits, with a spread of 2^bits / sqrt(12); together with the scale they shall
    // have one of 1 / sqrt(K).
    let scale = 12_f32.sqrt() / ((1_u32 << bits) as f32 * (k as f32).sqrt());
    Ok([
        Tensor {
            name: name("qweight"),
            dtype: StoredType::I32,
            shape: vec![rows, n],
            fill: Fill::Codes,
        },
        Tensor {
            name: name("qzeros"),
            dtype: StoredType::I32,
            shape: vec![groups, columns],
            fill: Fill::Zeros(format),
        },
        float(
            name("scales"),
            DType::F16,
            vec![groups, n],
            scale,
            scale * 0.5,
        ),
        Tensor {
            name: name("g_idx"),
            dtype: StoredType::I32,
            shape: vec![k],
            fill: Fill::Groups {
                group_size: format.group_size.unwrap_or(k),
                shuffled: format.desc_act,
            },
        },
    ])
}

pub(super) fn weights(
    folder: &Path,
    tensors: &[Tensor],
    shard_bytes: Option<u64>,
    seed: u64,
) -> io::Result<()> {
    let mut shards: Vec<&[Tensor]> = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        if at > start && shard_bytes.is_some_and(|limit| bytes + tensor.bytes() > limit) {
            shards.push(&tensors[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += tensor.bytes();
    }
    shards.push(&tensors[start..]);
    if let [all] = shards.as_slice() {
        return file(&folder.join(WEIGHTS_FILE), all, seed);
    }
    let mut weight_map = Map::new();
    for (at, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", at + 1, shards.len());
        file(&folder.join(&name), shard, seed)?;
        weight_map.extend(
            shard
                .iter()
                .map(|tensor| (tensor.name.clone(), Value::from(name.as_str()))),
        );
    }
    let total: u64 = tensors.iter().map(Tensor::bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(folder.join(INDEX_FILE), index.to_string())
}

fn file(path: &Path, tensors: &[Tensor], seed: u64) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for tensor in tensors {
        data(tensor, seed, &mut out)?;
    }
    out.flush()
}

fn data(tensor: &Tensor, seed: u64, out: &mut impl Write) -> io::Result<()> {
    let mut random = Random::new(seed, &tensor.name);
    match &tensor.fill {
        Fill::Codes => {
            for _ in 0..tensor.elements() / 2 {
                out.write_all(&random.next().to_le_bytes())?;
            }
            let odd = tensor.elements() % 2 == 1;
            if odd {
                out.write_all(&(random.next() as u32).to_le_bytes())
            } else {
                Ok(())
            }
        }
        Fill::Zeros(format) => {
            (0..tensor.shape[0]).try_for_each(|_| zeros(format, tensor.shape[1], &mut random, out))
        }
        Fill::Groups {
            group_size,
            shuffled,
        } => {
            let mut groups: Vec<u32> = (0..tensor.shape[0])
                .map(|row| (row / group_size) as u32)
                .collect();
            if *shuffled {
                for row in (1..groups.len()).rev() {
                    groups.swap(row, random.below(row as u64 + 1) as usize);
                }
            }
            groups
                .iter()
                .try_for_each(|group| out.write_all(&group.to_le_bytes()))
        }
        Fill::Floats {
            dtype,
            centre,
            spread,
        } => {
            for _ in 0..tensor.elements() {
                let value = centre + spread * random.signed();
                match dtype {
                    DType::F32 => out.write_all(&value.to_le_bytes())?,
                    DType::F16 => out.write_all(&f16::from_f32(value).to_le_bytes())?,
                    DType::Bf16 => out.write_all(&bf16::from_f32(value).to_le_bytes())?,
                }
            }
            Ok(())
        }
    }
}

/// One row of `qzeros`: the middle, or for asymmetric modules one around it, so that means stay small.
fn zeros(
    format: &GptqFormat,
    row_words: usize,
    random: &mut Random,
    out: &mut impl Write,
) -> io::Result<()> {
    let bits = u32::from(format.bits);
    let less = u64::from(format.zeros == ZeroPoints::MinusOne);
    let (mut window, mut filled) = (0_u64, 0);
    for _ in 0..row_words {
        while filled < 32 {
            let zero = u64::from(format.middle()) + if format.sym { 0 } else { random.below(3) }
                - u64::from(!format.sym);
            window |= (zero - less) << filled;
            filled += bits;
        }
        out.write_all(&(window as u32).to_le_bytes())?;
        window >>= 32;
        filled -= 32;
    }
    Ok(())
}
