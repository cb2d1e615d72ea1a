//! The template engine set up to behave as Jinja2 does under `apply_chat_template`.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use super::python::{JsonLayout, json_of, str_of};
use super::{Limits, Raised, methods};

/// Compiles `source`; nothing in it can reach a file or another template.
pub(super) fn compile(
    name: &str,
    source: &str,
    limits: Limits,
) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .keep_trailing_newline(false)
            .build()?,
    );
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(limits.fuel));
    env.set_recursion_limit(limits.recursion);
    env.set_debug(false);
    env.set_unknown_method_callback(methods::call);
    let limit_bytes = limits.output_bytes;
    env.set_formatter(move |out, _state, value| {
        if let Some(text) = value.as_str() {
            return out.write_str(text).map_err(Error::from);
        }
        out.write_str(&str_of(value, limit_bytes)?)
            .map_err(Error::from)
    });
    add_filters(&mut env, limit_bytes);
    add_tests(&mut env);
    add_functions(&mut env);
    env.add_template_owned(name.to_owned(), reference_source(source))?;
    Ok(env)
}

fn add_filters(env: &mut Environment<'static>, limit_bytes: usize) {
    env.add_filter(
        "tojson",
        move |value: &Value, args: Rest<Value>, kwargs: Kwargs| {
            tojson(value, &args, &kwargs, limit_bytes)
        },
    );
    env.add_filter("string", move |value: &Value| str_of(value, limit_bytes));
    env.add_filter("trim", move |value: &Value, chars: Option<&str>| {
        str_of(value, limit_bytes).map(|text| methods::strip(&text, chars, true, true).to_owned())
    });
    env.add_filter(
        "join",
        move |state: &mut State,
              value: &Value,
              joiner: Option<&str>,
              attribute: Option<Value>,
              kwargs: Kwargs| {
            join(state, value, joiner, attribute, &kwargs, limit_bytes)
        },
    );
    env.add_filter("length", length);
    env.add_filter("count", length);
}

fn add_tests(env: &mut Environment<'static>) {
    // Whatever has a length and can be indexed: texts and mappings too.
    env.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined
                | ValueKind::String
                | ValueKind::Seq
                | ValueKind::Iterable
                | ValueKind::Map
        )
    });
    // Python's booleans are numbers.
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

fn add_functions(env: &mut Environment<'static>) {
    env.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, Error> {
            let message = str_of(message, 4096).unwrap_or_default();
            Err(Error::new(ErrorKind::InvalidOperation, message.clone())
                .with_source(Raised(message)))
        },
    );
    env.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        jiff::fmt::strtime::format(format, &jiff::Zoned::now()).map_err(|error| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: {error}"),
            )
        })
    });
    env.add_function("cycler", minijinja_contrib::globals::cycler);
    env.add_function("joiner", minijinja_contrib::globals::joiner);
}

/// `json.dumps` with the arguments that `transformers` lets a template pass.
fn tojson(
    value: &Value,
    args: &[Value],
    kwargs: &Kwargs,
    limit_bytes: usize,
) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match args.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?.map(|indent| indent_text(&indent));
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let indent = indent.transpose()?;
    let (item_separator, key_separator) = match separators {
        Some(separators) => {
            let parts: Vec<Value> = separators.try_iter()?.collect();
            match parts.as_slice() {
                [item, key] => (str_of(item, limit_bytes)?, str_of(key, limit_bytes)?),
                _ => {
                    return Err(Error::new(
                        ErrorKind::InvalidOperation,
                        "separators of tojson are not a pair",
                    ));
                }
            }
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let layout = JsonLayout {
        ensure_ascii,
        indent,
        item_separator,
        key_separator,
        sort_keys,
    };
    json_of(value, &layout, limit_bytes)
}

fn indent_text(indent: &Value) -> Result<String, Error> {
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    let spaces = indent.as_i64().unwrap_or_default();
    match usize::try_from(spaces).unwrap_or(0) {
        spaces if spaces <= 64 => Ok(" ".repeat(spaces)),
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            "indent of tojson is over 64",
        )),
    }
}

fn join(
    state: &mut State,
    value: &Value,
    joiner: Option<&str>,
    attribute: Option<Value>,
    kwargs: &Kwargs,
    limit_bytes: usize,
) -> Result<String, Error> {
    let joiner = match joiner {
        Some(joiner) => joiner,
        None => kwargs.get::<Option<&str>>("d")?.unwrap_or_default(),
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => kwargs.get::<Option<Value>>("attribute")?,
    };
    kwargs.assert_all_used()?;
    let value = match attribute {
        Some(attribute) => {
            let by = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value.clone(), Value::from(by)])?
        }
        None => value.clone(),
    };
    let mut out = String::new();
    for (index, item) in value.try_iter()?.checked().enumerate() {
        if index > 0 {
            out.push_str(joiner);
        }
        out.push_str(&str_of(&item?, limit_bytes)?);
        if out.len() > limit_bytes {
            let limit = super::LimitExceeded(limit_bytes);
            return Err(Error::new(ErrorKind::WriteFailure, limit.to_string()).with_source(limit));
        }
    }
    Ok(out)
}

fn length(value: &Value) -> Result<usize, Error> {
    match (value.len(), value.kind()) {
        (Some(length), _) => Ok(length),
        (None, ValueKind::Undefined) => Ok(0),
        (None, ValueKind::Iterable) => Ok(value.try_iter()?.count()),
        (None, kind) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("value of type {kind} has no length"),
        )),
    }
}

/// The source as Jinja2 reads it: line ends normalised, and `{% generation %}` blocks, which only mark
/// text for training, turned into plain scopes.
fn reference_source(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        match generation_tag(tag) {
            Some((replacement, length)) => {
                out.push_str(&replacement);
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// A generation tag at the start of `tag`: what stands for it, and its length in bytes.
fn generation_tag(tag: &str) -> Option<(String, usize)> {
    let inner = &tag[2..];
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.trim_start();
    let (word, inner) = if let Some(inner) = inner.strip_prefix("generation") {
        ("generation", inner)
    } else {
        ("endgeneration", inner.strip_prefix("endgeneration")?)
    };
    let end = inner.trim_start();
    let end = end.strip_prefix(['-', '+']).unwrap_or(end);
    let after = end.strip_prefix("%}")?;
    let length = tag.len() - after.len();
    let stands_for = if word == "generation" {
        "with"
    } else {
        "endwith"
    };
    Some((tag[..length].replacen(word, stands_for, 1), length))
}
