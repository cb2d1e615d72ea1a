//! Values printed as Python prints them: `str`, `repr` and `json.dumps`.

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Nesting beyond which printing stops, near where Python raises `RecursionError`.
const MAX_DEPTH: usize = 900;

/// `str(value)`, as a template prints it; an undefined value is empty.
pub(super) fn str_of(value: &Value, limit_bytes: usize) -> Result<String, Error> {
    if value.is_undefined() {
        return Ok(String::new());
    }
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut printer = Printer::new(limit_bytes);
    printer.repr(value)?;
    Ok(printer.out)
}

/// How `json.dumps` lays its text out.
pub(super) struct JsonLayout {
    /// Escape everything outside ASCII.
    pub ensure_ascii: bool,
    /// One item a line, each level indented by this text.
    pub indent: Option<String>,
    /// Between items.
    pub item_separator: String,
    /// Between a key and its value.
    pub key_separator: String,
    /// Keys in order of their text.
    pub sort_keys: bool,
}

/// `json.dumps(value)`.
pub(super) fn json_of(
    value: &Value,
    layout: &JsonLayout,
    limit_bytes: usize,
) -> Result<String, Error> {
    let mut printer = Printer::new(limit_bytes);
    printer.json(value, layout)?;
    Ok(printer.out)
}

/// `repr` of a float: shortest digits, exponent from 1e16 up and below 1e-4.
fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let mut fixed = value.to_string();
        if !fixed.contains('.') {
            fixed.push_str(".0");
        }
        fixed
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

/// A float, if the value is one rather than an integer.
fn as_float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer())
        .then(|| f64::try_from(value.clone()).ok())
        .flatten()
}

fn is_printable(c: char) -> bool {
    // `str::escape_debug` escapes what Python calls unprintable, and, in front only, combining marks.
    let mut text = String::from("a");
    text.push(c);
    matches!(c, '\'' | '"' | '\\') || text.escape_debug().count() == 2
}

struct Printer {
    out: String,
    limit_bytes: usize,
    depth: usize,
}

impl Printer {
    fn new(limit_bytes: usize) -> Self {
        Self {
            out: String::new(),
            limit_bytes,
            depth: 0,
        }
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if text.len() > self.limit_bytes.saturating_sub(self.out.len()) {
            return Err(Error::new(
                ErrorKind::WriteFailure,
                super::LimitExceeded(self.limit_bytes).to_string(),
            )
            .with_source(super::LimitExceeded(self.limit_bytes)));
        }
        self.out.push_str(text);
        Ok(())
    }

    fn enter(&mut self) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("value nests deeper than {MAX_DEPTH} levels"),
            ));
        }
        Ok(())
    }

    fn repr(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined => self.push("Undefined"),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number => match as_float(value) {
                Some(float) if float.is_nan() => self.push("nan"),
                Some(float) if float.is_infinite() => {
                    self.push(if float > 0.0 { "inf" } else { "-inf" })
                }
                Some(float) => self.push(&float_repr(float)),
                None => self.push(&value.to_string()),
            },
            ValueKind::String => self.repr_str(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.enter()?;
                let tuple = value.downcast_object_ref::<Tuple>().is_some();
                self.push(if tuple { "(" } else { "[" })?;
                let mut items = 0;
                for item in value.try_iter()?.checked() {
                    if items > 0 {
                        self.push(", ")?;
                    }
                    self.repr(&item?)?;
                    items += 1;
                }
                self.push(match (tuple, items) {
                    (true, 1) => ",)",
                    (true, _) => ")",
                    (false, _) => "]",
                })?;
                self.depth -= 1;
                Ok(())
            }
            ValueKind::Map => {
                self.enter()?;
                self.push("{")?;
                for (index, key) in value.try_iter()?.enumerate() {
                    if index > 0 {
                        self.push(", ")?;
                    }
                    self.repr(&key)?;
                    self.push(": ")?;
                    self.repr(&value.get_item(&key)?)?;
                }
                self.depth -= 1;
                self.push("}")
            }
            _ => self.push(&value.to_string()),
        }
    }

    fn repr_str(&mut self, text: &str) -> Result<(), Error> {
        let quote = if text.contains('\'') && !text.contains('"') {
            "\""
        } else {
            "'"
        };
        self.push(quote)?;
        let mut buffer = [0; 4];
        for c in text.chars() {
            match c {
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\'' if quote == "'" => self.push("\\'")?,
                c if is_printable(c) => self.push(c.encode_utf8(&mut buffer))?,
                c if u32::from(c) < 0x100 => self.push(&format!("\\x{:02x}", u32::from(c)))?,
                c if u32::from(c) < 0x10000 => self.push(&format!("\\u{:04x}", u32::from(c)))?,
                c => self.push(&format!("\\U{:08x}", u32::from(c)))?,
            }
        }
        self.push(quote)
    }

    fn json(&mut self, value: &Value, layout: &JsonLayout) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match as_float(value) {
                Some(float) if float.is_nan() => self.push("NaN"),
                Some(float) if float.is_infinite() => {
                    self.push(if float > 0.0 { "Infinity" } else { "-Infinity" })
                }
                Some(float) => self.push(&float_repr(float)),
                None => self.push(&value.to_string()),
            },
            ValueKind::String => {
                self.json_str(value.as_str().unwrap_or_default(), layout.ensure_ascii)
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.enter()?;
                self.push("[")?;
                let mut empty = true;
                for item in value.try_iter()?.checked() {
                    self.json_gap(empty, layout)?;
                    self.json(&item?, layout)?;
                    empty = false;
                }
                self.json_close("]", empty, layout)
            }
            ValueKind::Map => {
                self.enter()?;
                self.push("{")?;
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if layout.sort_keys {
                    keys.sort();
                }
                let empty = keys.is_empty();
                for (index, key) in keys.iter().enumerate() {
                    self.json_gap(index == 0, layout)?;
                    self.json_key(key, layout)?;
                    self.push(&layout.key_separator)?;
                    self.json(&value.get_item(key)?, layout)?;
                }
                self.json_close("}", empty, layout)
            }
            kind => Err(Error::new(
                ErrorKind::BadSerialization,
                format!("value of type {kind} is not JSON serializable"),
            )),
        }
    }

    fn json_key(&mut self, key: &Value, layout: &JsonLayout) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.json(key, layout),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.push("\"")?;
                self.json(key, layout)?;
                self.push("\"")
            }
            kind => Err(Error::new(
                ErrorKind::BadSerialization,
                format!("a key of type {kind} is not JSON serializable"),
            )),
        }
    }

    fn json_gap(&mut self, first: bool, layout: &JsonLayout) -> Result<(), Error> {
        if !first {
            self.push(&layout.item_separator)?;
        }
        self.json_line(self.depth, layout)
    }

    fn json_close(&mut self, close: &str, empty: bool, layout: &JsonLayout) -> Result<(), Error> {
        self.depth -= 1;
        if !empty {
            self.json_line(self.depth, layout)?;
        }
        self.push(close)
    }

    fn json_line(&mut self, depth: usize, layout: &JsonLayout) -> Result<(), Error> {
        if let Some(indent) = &layout.indent {
            self.push("\n")?;
            for _ in 0..depth {
                self.push(indent)?;
            }
        }
        Ok(())
    }

    fn json_str(&mut self, text: &str, ensure_ascii: bool) -> Result<(), Error> {
        self.push("\"")?;
        let mut buffer = [0; 4];
        for c in text.chars() {
            match c {
                '"' => self.push("\\\"")?,
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\u{8}' => self.push("\\b")?,
                '\u{c}' => self.push("\\f")?,
                c if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.push(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => self.push(c.encode_utf8(&mut buffer))?,
            }
        }
        self.push("\"")
    }
}
