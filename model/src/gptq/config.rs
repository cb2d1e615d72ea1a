//! The quantisation block: `quantize_config.json`, or `quantization_config` inside `config.json`, or both.

use std::fmt::Display;

use serde_json::Value;

use super::dynamic::{Decision, Dynamic};
use crate::config::CONFIG_FILE;
use crate::config::fields::{Fields, object, shown};
use crate::error::{ConfigError, ModuleError};
use crate::modules::{GptqFormat, ZeroPoints};

/// Name of the file that AutoGPTQ and GPTQModel write beside `config.json`.
pub const QUANTIZE_CONFIG_FILE: &str = "quantize_config.json";

const SERVED_FORMATS: &str = "gptq and gptq_v2 are read; re-export the checkpoint as one of them";

/// How a checkpoint says its linears are quantised.
#[derive(Clone, Debug)]
pub struct QuantConfig {
    bits: i64,
    group_size: i64,
    sym: bool,
    desc_act: bool,
    zeros: ZeroPoints,
    lm_head: bool,
    dynamic: Dynamic,
    only_in_block: Option<Vec<String>>,
    not_converted: Vec<String>,
    warnings: Vec<String>,
}

/// One of the two places, in canonical spelling.
struct Block<'a> {
    fields: Fields<'a>,
    zeros: ZeroPoints,
    zeros_given: bool,
}

impl QuantConfig {
    /// Reads the block from the text of `config.json` and, when there is one, of `quantize_config.json`;
    /// `None` when neither has one. Where both have one, each field that both give must be equal.
    ///
    /// # Errors
    /// [`ConfigError`]: other methods and formats by name, disagreement, patterns that cannot be read.
    pub fn parse(config: &str, quantize_config: Option<&str>) -> Result<Option<Self>, ConfigError> {
        let outer = object(CONFIG_FILE, config)?;
        let outer = Fields::new(CONFIG_FILE, &outer);
        let own = quantize_config
            .map(|text| object(QUANTIZE_CONFIG_FILE, text))
            .transpose()?;
        let own = own
            .as_ref()
            .map(|map| Fields::new(QUANTIZE_CONFIG_FILE, map));
        let blocks = own.into_iter().chain(outer.object("quantization_config")?);
        let blocks = blocks.map(Block::new).collect::<Result<Vec<_>, _>>()?;
        match blocks.as_slice() {
            [] => Ok(None),
            [one] => Self::settle(one, None).map(Some),
            [one, two, ..] => Self::settle(one, Some(two)).map(Some),
        }
    }

    fn settle(first: &Block<'_>, second: Option<&Block<'_>>) -> Result<Self, ConfigError> {
        let both = Both {
            first: &first.fields,
            second: second.map(|block| &block.fields),
        };
        let zeros = match second {
            Some(second) if second.zeros_given => {
                if first.zeros_given && first.zeros != second.zeros {
                    return Err(both.disagree(
                        "format",
                        format_name(first.zeros),
                        format_name(second.zeros),
                    ));
                }
                second.zeros
            }
            _ => first.zeros,
        };
        let bits = both.settle("bits", |fields| fields.integer("bits", 0..=64))?;
        let group_size = both.settle("group_size", |fields| {
            fields.integer("group_size", -1..=1 << 24)
        })?;
        let sym = both.settle("sym", |fields| fields.boolean("sym"))?;
        let dynamic = match both.settle("dynamic", |fields| {
            Ok(fields.get("dynamic").cloned().map(Shown))
        })? {
            None => Dynamic::default(),
            Some(_) => {
                let mut places = [Some(both.first), both.second].into_iter().flatten();
                let place = places.rfind(|fields| fields.get("dynamic").is_some());
                place.map(Dynamic::parse).transpose()?.unwrap_or_default()
            }
        };
        let mut warnings = Vec::new();
        if sym.is_none() {
            let file = both.first.file();
            warnings.push(format!(
                "{file}: sym is missing from the quantisation block; true is assumed"
            ));
        }
        Ok(Self {
            bits: bits.ok_or_else(|| both.first.missing("bits"))?,
            group_size: group_size.ok_or_else(|| both.first.missing("group_size"))?,
            sym: sym.unwrap_or(true),
            // Only a label: what the order is, g_idx says.
            desc_act: both
                .settle("desc_act", |fields| fields.boolean("desc_act"))?
                .unwrap_or(false),
            zeros,
            lm_head: both
                .settle("lm_head", |fields| fields.boolean("lm_head"))?
                .unwrap_or(false),
            dynamic,
            only_in_block: both.names("modules_in_block_to_quantize")?,
            not_converted: both.names("modules_to_not_convert")?.unwrap_or_default(),
            warnings,
        })
    }

    /// How the linear `module` is quantised, after `dynamic`; `None` when it is excluded. Whether `lm_head`
    /// is quantised is decided by its tensors: the flag of that name is not always written.
    ///
    /// # Errors
    /// [`ModuleError::UnservedBits`] and [`ModuleError::UnservedGroupSize`].
    pub fn format_of(&self, module: &str) -> Result<Option<GptqFormat>, ModuleError> {
        let own = match self.dynamic.decide(module) {
            Decision::Excluded => return Ok(None),
            Decision::Base => Default::default(),
            Decision::Overridden(own) => own,
        };
        if self
            .not_converted
            .iter()
            .any(|part| module.contains(part.as_str()))
        {
            return Ok(None);
        }
        if let (Some(only), Some(inner)) = (&self.only_in_block, name_in_block(module))
            && !only.iter().any(|name| name == inner)
        {
            return Ok(None);
        }
        let bits = own.bits.unwrap_or(self.bits);
        let group_size = own.group_size.unwrap_or(self.group_size);
        let module = || module.to_owned();
        Ok(Some(GptqFormat {
            bits: match bits {
                2 => 2,
                3 => 3,
                4 => 4,
                8 => 8,
                bits => {
                    return Err(ModuleError::UnservedBits {
                        module: module(),
                        bits,
                    });
                }
            },
            group_size: match group_size {
                -1 => None,
                32 => Some(32),
                64 => Some(64),
                128 => Some(128),
                group_size => {
                    return Err(ModuleError::UnservedGroupSize {
                        module: module(),
                        group_size,
                    });
                }
            },
            sym: own.sym.unwrap_or(self.sym),
            desc_act: own.desc_act.unwrap_or(self.desc_act),
            zeros: self.zeros,
        }))
    }

    /// The flag `lm_head`: the vocabulary projection is quantised.
    pub fn lm_head(&self) -> bool {
        self.lm_head
    }

    /// The field `dynamic`.
    pub fn dynamic(&self) -> &Dynamic {
        &self.dynamic
    }

    /// What was assumed.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`; `None` outside the layers.
fn name_in_block(module: &str) -> Option<&str> {
    module
        .strip_prefix("model.layers.")?
        .split_once('.')
        .map(|(_, inner)| inner)
}

fn format_name(zeros: ZeroPoints) -> &'static str {
    match zeros {
        ZeroPoints::MinusOne => "gptq",
        ZeroPoints::Exact => "gptq_v2",
    }
}

impl<'a> Block<'a> {
    fn new(fields: Fields<'a>) -> Result<Self, ConfigError> {
        let method = alias(&fields, "quant_method", "method")?;
        let format = alias(&fields, "checkpoint_format", "format")?;
        match method.as_ref().map(|(field, name)| (*field, name.as_str())) {
            None | Some((_, "gptq")) => {}
            Some((_, "auto-round" | "intel/auto-round")) => {
                let packing = fields
                    .text("packing_format")?
                    .unwrap_or("auto_round:auto_round");
                if packing != "auto_round:auto_gptq" {
                    let remedy = "auto_round:auto_gptq is; export with that format";
                    return Err(fields.unsupported(
                        "packing_format",
                        &Value::from(packing),
                        remedy,
                    ));
                }
            }
            Some((field, other)) => {
                let remedy = "gptq, and auto-round in the packing auto_round:auto_gptq, are read";
                return Err(fields.unsupported(field, &Value::from(other), remedy));
            }
        }
        let zeros = match format.as_ref().map(|(field, name)| (*field, name.as_str())) {
            None | Some((_, "gptq" | "auto_round:auto_gptq")) => ZeroPoints::MinusOne,
            Some((_, "gptq_v2")) => ZeroPoints::Exact,
            Some((field, other)) => {
                return Err(fields.unsupported(field, &Value::from(other), SERVED_FORMATS));
            }
        };
        if fields.boolean("is_marlin_format")? == Some(true) {
            return Err(fields.unsupported("is_marlin_format", &Value::Bool(true), SERVED_FORMATS));
        }
        if let Some(pack_dtype) = fields.text("pack_dtype")?
            && pack_dtype != "int32"
        {
            return Err(fields.unsupported(
                "pack_dtype",
                &Value::from(pack_dtype),
                "int32 is read",
            ));
        }
        // Each of these changes what a module computes: rotated inputs, quantised activations, other
        // packings of AWQ, per-module values of auto-round.
        for field in [
            "rotation",
            "activation",
            "zero_point",
            "w_bit",
            "extra_config",
        ] {
            match fields.get(field) {
                None => {}
                Some(Value::Object(map)) if map.is_empty() => {}
                Some(value) => {
                    return Err(fields.unsupported(field, value, "plain GPTQ weights are read"));
                }
            }
        }
        let zeros_given = format.is_some() || method.is_some();
        Ok(Self {
            fields,
            zeros,
            zeros_given,
        })
    }
}

/// A field that has two spellings, in lower case, with the spelling that was used.
fn alias(
    fields: &Fields<'_>,
    one: &'static str,
    two: &'static str,
) -> Result<Option<(&'static str, String)>, ConfigError> {
    let first = fields.text(one)?.map(|text| (one, text.to_lowercase()));
    let second = fields.text(two)?.map(|text| (two, text.to_lowercase()));
    match (first, second) {
        (Some(first), Some(second)) if first.1 != second.1 => Err(ConfigError::Disagree {
            field: fields.path(one),
            first_file: format!("{} ({one})", fields.file()),
            first: first.1,
            second_file: format!("{} ({two})", fields.file()),
            second: second.1,
        }),
        (first, second) => Ok(first.or(second)),
    }
}

/// The two places of the block.
struct Both<'a> {
    first: &'a Fields<'a>,
    second: Option<&'a Fields<'a>>,
}

impl Both<'_> {
    fn settle<T: PartialEq + Display>(
        &self,
        field: &str,
        read: impl Fn(&Fields<'_>) -> Result<Option<T>, ConfigError>,
    ) -> Result<Option<T>, ConfigError> {
        let first = read(self.first)?;
        let second = self.second.map(read).transpose()?.flatten();
        match (first, second) {
            (Some(first), Some(second)) if first != second => {
                Err(self.disagree(field, first, second))
            }
            (first, second) => Ok(first.or(second)),
        }
    }

    fn disagree(&self, field: &str, first: impl Display, second: impl Display) -> ConfigError {
        ConfigError::Disagree {
            field: field.to_owned(),
            first_file: self.first.file().to_owned(),
            first: first.to_string(),
            second_file: self
                .second
                .map_or(String::new(), |fields| fields.file().to_owned()),
            second: second.to_string(),
        }
    }

    /// A list of names, of which GPTQ configurations nest some in further lists.
    fn names(&self, field: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let names = self.settle(field, |fields| {
            let Some(items) = fields.list(field)? else {
                return Ok(None);
            };
            let mut names = Vec::new();
            for item in items {
                let inner = match item {
                    Value::Array(inner) => inner.as_slice(),
                    single => std::slice::from_ref(single),
                };
                for name in inner {
                    let name = name
                        .as_str()
                        .ok_or_else(|| fields.invalid(field, name, "module names"))?;
                    names.push(name.to_owned());
                }
            }
            Ok(Some(Names(names)))
        })?;
        Ok(names.map(|Names(names)| names))
    }
}

#[derive(PartialEq)]
struct Names(Vec<String>);

impl Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A JSON value that an error message shows.
#[derive(PartialEq)]
struct Shown(Value);

impl Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&shown(&self.0))
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
