//! The walk over the merged tree: every unknown key and every bad value, each with its source.

use std::collections::BTreeMap;

use figment::{Figment, Provider, value::Value};

use super::{
    Problem,
    kinds::{Kind, Meant, Written},
    layers::{Layer, Origin},
    nearest,
    schema::{self, Key, Section},
};

/// Values by `section.key`.
pub type Values = BTreeMap<String, (Meant, Origin)>;

/// Merges the layers, weakest first, and checks what comes out.
pub fn merge(layers: &[Layer], problems: &mut Vec<Problem>) -> Values {
    let merged = layers
        .iter()
        .fold(Figment::new(), |figment, layer| figment.merge(layer));
    let mut values = Values::new();
    let tree = match merged.data() {
        Ok(profiles) => profiles.into_values().next().unwrap_or_default(),
        Err(error) => {
            problems.push(Problem::new(Origin::Default, error.to_string()));
            return values;
        }
    };
    for (section, item) in &tree {
        let at = || {
            layers
                .iter()
                .rev()
                .find_map(|layer| layer.origin(section, ""))
                .unwrap_or(&Origin::Default)
                .clone()
        };
        let known = Section::ALL.iter().any(|known| known.name() == section);
        match item {
            _ if !known => problems.push(Problem::new(at(), unknown_section(section, item))),
            Value::Dict(_, table) => {
                for (name, value) in table {
                    let layer = merged.get_metadata(value.tag()).and_then(|metadata| {
                        layers.iter().find(|layer| layer.name() == metadata.name)
                    });
                    let origin = layer
                        .and_then(|layer| layer.origin(section, name))
                        .unwrap_or(&Origin::Default);
                    match schema::find(section, name) {
                        Some(key) => match check(key, value, origin) {
                            Ok(meant) => {
                                values.insert(key.path(), (meant, origin.clone()));
                            }
                            Err(why) => problems.push(Problem::new(
                                origin.clone(),
                                format!("{}: {why}", key.path()),
                            )),
                        },
                        None => {
                            problems.push(Problem::new(origin.clone(), unknown_key(section, name)))
                        }
                    }
                }
            }
            _ => problems.push(Problem::new(
                at(),
                format!("`{section}` is a table: write `[{section}]`"),
            )),
        }
    }
    values
}

fn check(key: &Key, value: &Value, origin: &Origin) -> Result<Meant, String> {
    let typed = matches!(origin, Origin::File(..));
    let numbers: Option<Vec<f64>> = match value {
        Value::Array(_, items) => items.iter().map(number).collect(),
        _ => None,
    };
    let written = match (value, &numbers) {
        (Value::String(_, text), _) if typed => Written::String(text),
        (Value::String(_, text), _) => Written::Text(text),
        (Value::Bool(_, value), _) => Written::Bool(*value),
        (Value::Num(_, number), _) => match number.to_i128() {
            Some(value) => Written::Integer(value),
            None => Written::Float(number.to_f64().unwrap_or(f64::NAN)),
        },
        (Value::Array(..), Some(numbers)) => Written::Numbers(numbers),
        (Value::Array(..), None) => Written::Other("a list"),
        (Value::Dict(..), _) => Written::Other("a table"),
        _ => Written::Other("an empty value"),
    };
    key.kind.check(&written)
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Num(_, number) => number
            .to_i128()
            .map(|whole| whole as f64)
            .or_else(|| number.to_f64()),
        _ => None,
    }
}

fn unknown_section(name: &str, item: &Value) -> String {
    if matches!(item, Value::Dict(..)) {
        let known = Section::ALL.iter().map(|section| section.name().to_owned());
        return match nearest(name, known) {
            Some(near) => format!("unknown table `[{name}]`; did you mean `[{near}]`?"),
            None => {
                format!(
                    "unknown table `[{name}]`; there are [coordinator], [worker], [log] and [[api_key]]"
                )
            }
        };
    }
    match schema::KEYS.iter().find(|key| key.name == name) {
        Some(key) => format!(
            "`{name}` stands outside a table; it belongs under `[{}]`",
            key.section.name()
        ),
        None => format!("unknown key `{name}` outside a table"),
    }
}

fn unknown_key(section: &str, name: &str) -> String {
    let here = schema::KEYS
        .iter()
        .filter(|key| key.section.name() == section)
        .map(|key| key.name.to_owned());
    let elsewhere = schema::KEYS.iter().find(|key| key.name == name);
    let hint = match (elsewhere, nearest(name, here)) {
        (Some(key), _) => format!("; it belongs under `[{}]`", key.section.name()),
        (None, Some(near)) => format!("; did you mean `{near}`?"),
        (None, None) => String::new(),
    };
    format!("unknown key `{section}.{name}`{hint}")
}

/// What only the machine can tell: paths that do not exist. Asked for the sections that a command uses.
pub fn paths(values: &Values, sections: &[Section], problems: &mut Vec<Problem>) {
    for key in schema::KEYS
        .iter()
        .filter(|key| key.kind == Kind::Model && sections.contains(&key.section))
    {
        if let Some((Meant::Text(model), origin)) = values.get(&key.path())
            && let Err(why) = super::checkpoint_folder(model)
        {
            problems.push(Problem::new(origin.clone(), why));
        }
    }
}

/// What spans several keys.
pub fn relations(values: &Values, sections: &[Section], problems: &mut Vec<Problem>) {
    if sections.contains(&Section::Coordinator)
        && let Some((Meant::Shares(shares), origin)) = values.get("coordinator.split")
        && let Some((Meant::Integer(world_size), _)) = values.get("coordinator.world_size")
        && shares.len() as u64 != *world_size
    {
        let message = format!(
            "coordinator.split has {} shares for a world size of {world_size}",
            shares.len()
        );
        problems.push(Problem::new(origin.clone(), message));
    }
    for key in schema::KEYS
        .iter()
        .filter(|key| key.kind == Kind::Listen && sections.contains(&key.section))
    {
        let insecure = values.get(&format!("{}.insecure", key.section.name()));
        if let Some((Meant::Address(address), origin)) = values.get(&key.path())
            && !address.ip().is_loopback()
            && !matches!(insecure, Some((Meant::Bool(true), _)))
        {
            let message = format!(
                "{}: {address} is reachable from other machines, and this version neither encrypts nor \
                 authenticates; listen on 127.0.0.1, or accept that with {}.insecure = true (a daemon's --insecure)",
                key.path(),
                key.section.name()
            );
            problems.push(Problem::new(origin.clone(), message));
        }
    }
}
