//! `dynamic`: per-module overrides and exclusions by regular expression, as GPTQModel evaluates them.
//!
//! Read in `quantization/config.py` of GPTQModel 7.7.0: a key is a regular expression with an optional
//! prefix; `-:` excludes the module, `+:` or nothing overrides. Patterns are matched with `match`, that is
//! anchored at the start of the full module name and not at its end. All keys that begin with `-` are tried
//! before all others (`__post_init__` reorders the map); within each kind the first match in file order wins.

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use crate::config::fields::Fields;
use crate::error::ConfigError;

/// Most patterns of one map; a file that names every expert of the largest mixtures stays below.
const MAX_PATTERNS: usize = 1 << 17;
/// Most patterns that are more than a module's name, and the compiled bytes of each: together they bound
/// what a hostile file can make us allocate.
const MAX_EXPRESSIONS: usize = 1024;
const MAX_COMPILED_BYTES: usize = 1 << 19;

/// Keys of an override that tell how a module was calibrated and nothing about how it is stored.
const CALIBRATION_KEYS: [&str; 12] = [
    "act_group_aware",
    "damp_auto_increment",
    "damp_percent",
    "fallback",
    "foem",
    "gptaq",
    "hessian",
    "mse",
    "smooth",
    "smoother",
    "static_groups",
    "true_sequential",
];

/// The compiled map.
#[derive(Clone, Debug, Default)]
pub struct Dynamic {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    pattern: String,
    matcher: Matcher,
    action: Action,
}

/// Most real maps name modules one by one; those need no automaton each.
#[derive(Clone, Debug)]
enum Matcher {
    Exact(String),
    Prefix(Regex),
}

#[derive(Clone, Debug)]
enum Action {
    Exclude,
    Override(Override),
}

/// Values that replace those of the base configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Override {
    pub(super) bits: Option<i64>,
    pub(super) group_size: Option<i64>,
    pub(super) sym: Option<bool>,
    pub(super) desc_act: Option<bool>,
}

/// What the map says about one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing.
    Base,
    /// It is not quantised.
    Excluded,
    /// It has values of its own.
    Overridden(Override),
}

impl Dynamic {
    /// Compiles the field `dynamic` of a quantisation block.
    pub(super) fn parse(block: &Fields<'_>) -> Result<Self, ConfigError> {
        let Some(map) = block.object("dynamic")? else {
            return Ok(Self::default());
        };
        if map.map().len() > MAX_PATTERNS {
            let found = Value::from(map.map().len());
            return Err(block.invalid(
                "dynamic",
                &found,
                format!("at most {MAX_PATTERNS} patterns"),
            ));
        }
        let (excluding, overriding): (Vec<_>, Vec<_>) = map
            .map()
            .keys()
            .partition(|pattern| pattern.starts_with('-'));
        let ordered: Vec<&String> = excluding.into_iter().chain(overriding).collect();
        let expressions = ordered
            .iter()
            .filter(|pattern| literal(split_prefix(pattern).1).is_none())
            .count();
        if expressions > MAX_EXPRESSIONS {
            let expected =
                format!("at most {MAX_EXPRESSIONS} patterns that are not ^module\\.name$");
            return Err(block.invalid("dynamic", &Value::from(expressions), expected));
        }
        let rules = ordered.into_iter().map(|pattern| rule(&map, pattern));
        Ok(Self {
            rules: rules.collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn decide(&self, module: &str) -> Decision {
        let matching = self.rules.iter().find(|rule| rule.matches(module));
        match matching.map(|rule| &rule.action) {
            None => Decision::Base,
            Some(Action::Exclude) => Decision::Excluded,
            Some(Action::Override(values)) => Decision::Overridden(*values),
        }
    }

    /// Patterns, with their prefixes, that match none of `modules`.
    pub fn unmatched<'a>(&self, modules: impl Iterator<Item = &'a str> + Clone) -> Vec<&str> {
        let unmatched = self
            .rules
            .iter()
            .filter(|rule| !modules.clone().any(|module| rule.matches(module)));
        unmatched.map(|rule| rule.pattern.as_str()).collect()
    }
}

impl Rule {
    fn matches(&self, module: &str) -> bool {
        match &self.matcher {
            Matcher::Exact(name) => name == module,
            Matcher::Prefix(regex) => regex.is_match(module),
        }
    }
}

fn rule(map: &Fields<'_>, pattern: &str) -> Result<Rule, ConfigError> {
    let unreadable = |reason: String| ConfigError::Pattern {
        file: map.file().to_owned(),
        pattern: pattern.chars().take(120).collect(),
        reason,
    };
    let (prefix, expression) = split_prefix(pattern);
    let excludes = prefix == "-:";
    if prefix.is_empty() && pattern.starts_with(['-', '+', '!', '?', '*', ':']) {
        return Err(unreadable("unknown prefix".to_owned()));
    }
    let matcher = match literal(expression) {
        Some(name) => Matcher::Exact(name),
        None => {
            let regex = RegexBuilder::new(&format!("^(?:{expression})"))
                .size_limit(MAX_COMPILED_BYTES)
                .build();
            Matcher::Prefix(regex.map_err(|error| {
                let text = error.to_string();
                unreadable(text.lines().last().unwrap_or_default().trim().to_owned())
            })?)
        }
    };
    let values = map.object(pattern)?;
    let action = match (excludes, values) {
        (true, _) => Action::Exclude,
        (false, None) => Action::Override(Override::default()),
        (false, Some(values)) => Action::Override(overrides(&values)?),
    };
    Ok(Rule {
        pattern: pattern.to_owned(),
        matcher,
        action,
    })
}

fn split_prefix(pattern: &str) -> (&str, &str) {
    match pattern.get(..2) {
        Some(prefix @ ("-:" | "+:")) => (prefix, &pattern[2..]),
        _ => ("", pattern),
    }
}

/// The one string that `^…$` without operators matches.
fn literal(expression: &str) -> Option<String> {
    let inner = expression.strip_prefix('^')?.strip_suffix('$')?;
    let mut name = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => name.push(chars.next().filter(|escaped| !escaped.is_alphanumeric())?),
            '.' | '^' | '$' | '*' | '+' | '?' | '{' | '}' | '[' | ']' | '(' | ')' | '|' => {
                return None;
            }
            other => name.push(other),
        }
    }
    Some(name)
}

fn overrides(values: &Fields<'_>) -> Result<Override, ConfigError> {
    for (key, value) in values.map() {
        match key.as_str() {
            "bits" | "group_size" | "sym" | "desc_act" => {}
            "pack_dtype" if value.as_str() == Some("int32") => {}
            known if CALIBRATION_KEYS.contains(&known) => {}
            other => {
                let remedy = "bits, group_size, sym and desc_act can be overridden";
                return Err(values.unsupported(other, value, remedy));
            }
        }
    }
    Ok(Override {
        bits: values.integer("bits", 0..=64)?,
        group_size: values.integer("group_size", -1..=1 << 24)?,
        sym: values.boolean("sym")?,
        desc_act: values.boolean("desc_act")?,
    })
}

#[cfg(test)]
#[path = "dynamic_tests.rs"]
mod tests;
