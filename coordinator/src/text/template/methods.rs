//! Methods of Python's `str`, `list` and `dict` that chat templates call.
//!
//! Only what differs from `minijinja_contrib::pycompat` or is missing there is written here.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Calls `value.method(*args)`, as Python would.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => str_method(text, method, args),
        (ValueKind::Seq | ValueKind::Iterable, _) => list_method(value, method, args),
        _ => None,
    };
    own.unwrap_or_else(|| pycompat::unknown_method_callback(state, value, method, args))
}

/// What `str.strip` and `str.split` take for whitespace.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text.strip(chars)`, or one side of it.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let mut text = text;
    if left {
        text = text.trim_start_matches(strips);
    }
    if right {
        text = text.trim_end_matches(strips);
    }
    text
}

fn str_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "strip" => stripped(text, args, true, true),
        "lstrip" => stripped(text, args, true, false),
        "rstrip" => stripped(text, args, false, true),
        "split" => split(text, args, false),
        "rsplit" => split(text, args, true),
        "splitlines" => splitlines(text, args),
        "partition" => partition(text, args, false),
        "rpartition" => partition(text, args, true),
        "removeprefix" => affix(args, |affix| text.strip_prefix(affix).unwrap_or(text)),
        "removesuffix" => affix(args, |affix| text.strip_suffix(affix).unwrap_or(text)),
        "replace" => replace(text, args),
        "isspace" => {
            no_args(args).map(|()| Value::from(!text.is_empty() && text.chars().all(is_space)))
        }
        "casefold" => no_args(args).map(|()| Value::from(text.to_lowercase())),
        "index" => index(text.find_args(args)),
        "rindex" => index(text.rfind_args(args)),
        "zfill" => zfill(text, args),
        "ljust" => pad(text, args, |missing| (0, missing)),
        "rjust" => pad(text, args, |missing| (missing, 0)),
        _ => return None,
    })
}

fn no_args(args: &[Value]) -> Result<(), Error> {
    from_args::<()>(args)
}

fn invalid(detail: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

fn stripped(text: &str, args: &[Value], left: bool, right: bool) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    Ok(Value::from(strip(text, chars, left, right)))
}

fn affix<'a>(args: &'a [Value], cut: impl Fn(&'a str) -> &'a str) -> Result<Value, Error> {
    let (affix,): (&str,) = from_args(args)?;
    Ok(Value::from(cut(affix)))
}

fn replace(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (old, new, count, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
    let count = count.or(kwargs.get("count")?).unwrap_or(-1);
    kwargs.assert_all_used()?;
    Ok(Value::from(match usize::try_from(count) {
        Ok(count) => text.replacen(old, new, count),
        Err(_) => text.replace(old, new),
    }))
}

fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let separator: Option<&str> = match separator {
        Some(separator) => Some(separator),
        None => kwargs.get("sep")?,
    };
    let limit = limit.or(kwargs.get("maxsplit")?).unwrap_or(-1);
    kwargs.assert_all_used()?;
    // Without a limit: more pieces than any text has.
    let pieces = usize::try_from(limit).map_or(usize::MAX, |limit| limit.saturating_add(1));
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(separator), false) => text.splitn(pieces, separator).collect(),
        (Some(separator), true) => text.rsplitn(pieces, separator).collect(),
        (None, _) => split_space(text, pieces, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Runs of whitespace separate; the last piece keeps its inner whitespace. From the right, pieces come
/// last first.
fn split_space(text: &str, pieces: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = strip(rest, None, !from_right, from_right);
        if rest.is_empty() {
            return parts;
        }
        let cut = if from_right {
            rest.rfind(is_space)
                .map(|at| at + rest[at..].chars().next().map_or(0, char::len_utf8))
        } else {
            rest.find(is_space)
        };
        match cut {
            Some(at) if parts.len() + 1 < pieces => {
                let (left, right) = rest.split_at(at);
                let (piece, others) = if from_right {
                    (right, left)
                } else {
                    (left, right)
                };
                parts.push(piece);
                rest = others;
            }
            _ => {
                parts.push(rest);
                return parts;
            }
        }
    }
}

fn splitlines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let breaks = matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{85}')
            || matches!(c, '\u{1c}'..='\u{1e}' | '\u{2028}' | '\u{2029}');
        if !breaks {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|&(_, next)| next == '\n').is_some() {
            end += 1;
        }
        lines.push(Value::from(&text[start..if keep { end } else { at }]));
        start = end;
    }
    if start < text.len() {
        lines.push(Value::from(&text[start..]));
    }
    Ok(Value::from(lines))
}

fn partition(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let found = if from_right {
        text.rsplit_once(separator)
    } else {
        text.split_once(separator)
    };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn index(found: Result<Option<usize>, Error>) -> Result<Value, Error> {
    match found? {
        Some(at) => Ok(Value::from(at)),
        None => Err(invalid("substring not found")),
    }
}

trait FindChar {
    fn find_args(&self, args: &[Value]) -> Result<Option<usize>, Error>;
    fn rfind_args(&self, args: &[Value]) -> Result<Option<usize>, Error>;
}

impl FindChar for str {
    fn find_args(&self, args: &[Value]) -> Result<Option<usize>, Error> {
        let (needle,): (&str,) = from_args(args)?;
        Ok(self.find(needle).map(|at| self[..at].chars().count()))
    }

    fn rfind_args(&self, args: &[Value]) -> Result<Option<usize>, Error> {
        let (needle,): (&str,) = from_args(args)?;
        Ok(self.rfind(needle).map(|at| self[..at].chars().count()))
    }
}

/// Longest text that padding makes.
const MAX_PADDED_CHARS: usize = 1 << 20;

fn missing_chars(text: &str, width: i64) -> Result<usize, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    if width > MAX_PADDED_CHARS {
        return Err(invalid("padded width is too large"));
    }
    Ok(width.saturating_sub(text.chars().count()))
}

fn zfill(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (width,): (i64,) = from_args(args)?;
    let zeros = "0".repeat(missing_chars(text, width)?);
    let digits = text.trim_start_matches(['+', '-']);
    let sign = if text.len() == digits.len() {
        ""
    } else {
        &text[..1]
    };
    Ok(Value::from(format!("{sign}{zeros}{}", &text[sign.len()..])))
}

fn pad(
    text: &str,
    args: &[Value],
    sides: impl Fn(usize) -> (usize, usize),
) -> Result<Value, Error> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let fill = fill.unwrap_or(' ').to_string();
    let (left, right) = sides(missing_chars(text, width)?);
    Ok(Value::from(format!(
        "{}{text}{}",
        fill.repeat(left),
        fill.repeat(right)
    )))
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let find = || -> Result<Value, Error> {
        let (wanted,): (&Value,) = from_args(args)?;
        for (at, item) in value.try_iter()?.checked().enumerate() {
            if item? == *wanted {
                return Ok(Value::from(at));
            }
        }
        Err(invalid("value is not in list"))
    };
    match method {
        "index" => Some(find()),
        // The reference renders in a sandbox in which lists and dicts cannot be changed.
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "sort" | "reverse" => {
            Some(Err(invalid("a chat template cannot change a list")))
        }
        _ => None,
    }
}
