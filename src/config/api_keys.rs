//! `[[api_key]]` tables: hashes of keys, never the keys themselves.

use std::ops::Range;

use secondwind_coordinator::{ApiKey, KeyHash, Role, is_key_name};
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue},
};

use super::{Problem, layers::Origin, nearest};

/// The table's name.
pub const TABLE: &str = "api_key";

/// What such a table may hold.
const FIELDS: [&str; 3] = ["name", "hash", "role"];

/// A key and the line of its table.
pub type Entry = (ApiKey, Origin);

/// Reads all tables of a file. `origin` says where a span of it lies.
pub fn read(
    item: &Spanned<DeValue<'_>>,
    origin: impl Fn(Range<usize>) -> Origin,
    problems: &mut Vec<Problem>,
) -> Vec<Entry> {
    let no_tables = || {
        let message = format!("`{TABLE}` is a list of tables: write `[[{TABLE}]]` before each");
        Problem::new(origin(item.span()), message)
    };
    let DeValue::Array(tables) = item.get_ref() else {
        problems.push(no_tables());
        return Vec::new();
    };
    let tables: &DeArray<'_> = tables;
    let mut entries = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        match table.get_ref() {
            DeValue::Table(fields) => {
                let at = origin(table.span());
                let before = problems.len();
                let mut tell = |span: Option<Range<usize>>, words: String| {
                    let at = span.map_or_else(|| at.clone(), &origin);
                    problems.push(Problem::new(at, format!("{TABLE}[{index}]{words}")));
                };
                let key = one(fields, &mut tell);
                if let Some(key) = key.filter(|_| problems.len() == before) {
                    entries.push((key, at));
                }
            }
            _ => problems.push(no_tables()),
        }
    }
    entries
}

fn one(
    fields: &DeTable<'_>,
    tell: &mut impl FnMut(Option<Range<usize>>, String),
) -> Option<ApiKey> {
    for (field, _) in fields.iter() {
        let name: &str = field.get_ref();
        if FIELDS.contains(&name) {
            continue;
        }
        let words = match name {
            "key" | "secret" | "token" => {
                "keys do not stand in files; write the `hash` that `secondwind key new` prints"
                    .to_owned()
            }
            _ => match nearest(name, FIELDS.map(str::to_owned)) {
                Some(near) => format!("is unknown; did you mean `{near}`?"),
                None => format!("is unknown; there are {}", FIELDS.join(", ")),
            },
        };
        tell(Some(field.span()), format!(".{name}: {words}"));
    }
    let mut text = |field: &str, needed: bool| {
        let Some(value) = fields.get(field) else {
            if needed {
                tell(None, format!(": `{field}` is missing"));
            }
            return None;
        };
        let text = value.get_ref().as_str();
        if text.is_none() {
            tell(Some(value.span()), format!(".{field}: is not text"));
        }
        text.map(|text| (text, value.span()))
    };
    let (name, hash, role) = (text("name", true), text("hash", true), text("role", false));
    let name = name.and_then(|(name, span)| {
        if !is_key_name(name) {
            let words = "is not 1 to 64 letters, digits and `-_.@`";
            tell(Some(span), format!(".name: {name:?} {words}"));
            return None;
        }
        Some(name.to_owned())
    });
    let hash = hash.and_then(|(hash, span)| {
        let read = KeyHash::parse(hash);
        if read.is_none() {
            // Not repeated: somebody may have written the key itself.
            let words = "is not `sha256:` and 64 hex digits; `secondwind key new` prints it";
            tell(Some(span), format!(".hash: {words}"));
        }
        read
    });
    let role = match role {
        None => Some(Role::default()),
        Some((role, span)) => {
            let read = Role::ALL.into_iter().find(|it| it.name() == role);
            if read.is_none() {
                let names = Role::ALL.map(Role::name).join(" or ");
                tell(Some(span), format!(".role: {role:?} is not {names}"));
            }
            read
        }
    };
    Some(ApiKey {
        name: name?,
        hash: hash?,
        role: role?,
    })
}

/// Names are tenants and hashes are keys: each stands once.
pub fn distinct(entries: &[Entry], problems: &mut Vec<Problem>) {
    for (index, (key, origin)) in entries.iter().enumerate() {
        for (earlier, at) in &entries[..index] {
            for (same, field) in [
                (earlier.name == key.name, "name"),
                (earlier.hash == key.hash, "hash"),
            ] {
                if same {
                    let message = format!(
                        "{TABLE} {:?}: its {field} stands at {at} already; every key has its own",
                        key.name
                    );
                    problems.push(Problem::new(origin.clone(), message));
                }
            }
        }
    }
}
