//! Whose a request is: API keys, and what each may reach.
//!
//! Only hashes of keys are known here. Keys are long and random, so that one round of SHA-256 keeps them; a
//! password would need more. The check comes before any routing and looks at the whole path and nothing else
//! of the request: what is not in [`PATHS`] needs a key.

use std::fmt;
use std::sync::Arc;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// How a hash is written: the algorithm, then 64 hex digits.
const HASH_PREFIX: &str = "sha256:";
/// How a key begins, so that people and scanners of secrets know one when they see it.
const KEY_PREFIX: &str = "sk-secondwind-";
/// Random bytes of a key.
const KEY_BYTES: usize = 32;
/// Longest name of a key.
const MAX_NAME_BYTES: usize = 64;

/// What is asked of whoever calls a path that is not every user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Nothing: it tells no more than that there is a server, and probes and browsers have no key.
    Open,
    /// A key of this role.
    Role(Role),
}

/// Every path that does not ask for a user's key, literally as a request spells it. What spells it otherwise
/// needs a key, and leads nowhere.
const PATHS: &[(&str, Access)] = &[
    ("/", Access::Open),
    ("/page/page.css", Access::Open),
    ("/page/icon.svg", Access::Open),
    ("/page/server.js", Access::Open),
    ("/page/chat.js", Access::Open),
    ("/page/rack.js", Access::Open),
    ("/health", Access::Open),
    ("/ready", Access::Open),
    ("/grpc.health.v1.Health/Check", Access::Open),
    ("/grpc.health.v1.Health/Watch", Access::Open),
    ("/metrics", Access::Role(Role::Admin)),
];

/// What a key is good for. Each role may do what those before it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Asks the model, and sees what serves: generation, tokens, models, reflection.
    #[default]
    User,
    /// Also sees what all users do together: `/metrics`.
    Admin,
}

impl Role {
    /// All of them, the least first.
    pub const ALL: [Self; 2] = [Self::User, Self::Admin];

    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Admin => "admin",
        }
    }
}

/// SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Of a key.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Reads `sha256:` and 64 hex digits; `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(HASH_PREFIX)?.as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 2 * hash.len() {
            return None;
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16);
            *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
        }
        Some(Self(hash))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HASH_PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Draws a key: 256 random bits in hex.
///
/// # Errors
/// When the system has no random numbers.
pub fn draw_key() -> Result<String, getrandom::Error> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes)?;
    let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
    Ok(format!("{KEY_PREFIX}{}", digits.collect::<String>()))
}

/// True for what may name a key: it stands in logs and metrics.
pub fn is_key_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(legal)
}

/// One key, as the configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    /// Names its tenant in logs and metrics; see [`is_key_name`].
    pub name: String,
    /// Of the key itself.
    pub hash: KeyHash,
    /// What it is good for.
    pub role: Role,
}

/// Whose a request is. Each key is a tenant of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    /// From 1 in the order of the keys; 0 for whoever needs none.
    pub number: u32,
    /// Its key's name; empty for whoever needs none.
    pub name: Arc<str>,
}

/// Why a request may not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No key, or not the way it is sent.
    #[error("no API key: send `authorization: Bearer KEY`, once")]
    Missing,
    /// No such key.
    #[error("the API key is not known")]
    Unknown,
    /// Not with this key.
    #[error(
        "the API key {name:?} has the role {}, and {path} needs {}",
        role.name(),
        needed.name()
    )]
    Role {
        /// The key's.
        name: Arc<str>,
        /// The key's.
        role: Role,
        /// What would do.
        needed: Role,
        /// What was called.
        path: String,
    },
}

/// All keys; without any, everything is open.
#[derive(Clone, Debug, Default)]
pub struct ApiKeys {
    keys: Vec<(KeyHash, Role, Tenant)>,
}

impl ApiKeys {
    /// Of the configuration.
    pub fn new(keys: &[ApiKey]) -> Self {
        let keys = keys.iter().zip(1..).map(|(key, number)| {
            let name = key.name.as_str().into();
            (key.hash, key.role, Tenant { number, name })
        });
        Self {
            keys: keys.collect(),
        }
    }

    /// Whose a request for `path` with these headers is.
    ///
    /// # Errors
    /// Why it may not go on.
    pub(super) fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Tenant, KeyError> {
        if self.keys.is_empty() {
            return Ok(Tenant::default());
        }
        let needed = match PATHS.iter().find(|(special, _)| *special == path) {
            Some((_, Access::Open)) => return Ok(Tenant::default()),
            Some((_, Access::Role(role))) => *role,
            None => Role::User,
        };
        let key = bearer(headers).ok_or(KeyError::Missing)?;
        let (role, tenant) = self.find(key).ok_or(KeyError::Unknown)?;
        if role < needed {
            return Err(KeyError::Role {
                name: Arc::clone(&tenant.name),
                role,
                needed,
                path: path.to_owned(),
            });
        }
        Ok(tenant.clone())
    }

    /// Takes as long for every key, whether it is known or not.
    fn find(&self, key: &str) -> Option<(Role, &Tenant)> {
        let asked = KeyHash::of(key);
        let mut found = None;
        for (hash, role, tenant) in &self.keys {
            if bool::from(hash.0.ct_eq(&asked.0)) {
                found = Some((*role, tenant));
            }
        }
        found
    }
}

/// The key of `authorization: Bearer KEY`. Two such headers are none: which one counts is for nobody to guess.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn keys() -> ApiKeys {
        let key = |name: &str, key: &str, role| ApiKey {
            name: name.to_owned(),
            hash: KeyHash::of(key),
            role,
        };
        ApiKeys::new(&[
            key("ann", "key of ann", Role::User),
            key("root", "key of root", Role::Admin),
        ])
    }

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn number(path: &str, values: &[&str]) -> Result<u32, KeyError> {
        let tenant = keys().admit(path, &headers(values))?;
        Ok(tenant.number)
    }

    #[test]
    fn hashes_are_written_and_read() {
        let hash = KeyHash::of("abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.to_string(), text);
        assert_eq!(KeyHash::parse(text), Some(hash));
        for wrong in [
            "",
            "abc",
            &text[7..],
            &text[..70],
            &format!("{text}0"),
            &text.replace("ba", "+a"),
            &text.replace("sha256", "md5"),
        ] {
            assert_eq!(KeyHash::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn drawn_keys_are_long_and_differ() {
        let (one, other) = (draw_key().unwrap(), draw_key().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), KEY_PREFIX.len() + 64);
    }

    #[test]
    fn a_key_is_found_by_its_whole_self() {
        let path = "/v1/models";
        assert_eq!(number(path, &["Bearer key of ann"]), Ok(1));
        assert_eq!(number(path, &["bEARER key of root"]), Ok(2));
        for wrong in [
            "Bearer key of an",
            "Bearer key of anna",
            "Bearer KEY OF ANN",
        ] {
            assert_eq!(number(path, &[wrong]), Err(KeyError::Unknown), "{wrong}");
        }
        let none: [&[&str]; 6] = [
            &[],
            &[""],
            &["Bearer"],
            &["Bearer "],
            &["Basic key of ann"],
            &["Bearer key of ann", "Bearer key of root"],
        ];
        for missing in none {
            assert_eq!(number(path, missing), Err(KeyError::Missing), "{missing:?}");
        }
    }

    #[test]
    fn what_is_not_listed_needs_a_key() {
        for open in ["/", "/health", "/ready", "/grpc.health.v1.Health/Check"] {
            assert_eq!(number(open, &[]), Ok(0), "{open}");
        }
        for closed in [
            "",
            "//",
            "/health/",
            "/Health",
            "/%68ealth",
            "/health?x",
            "/healthy",
            "/health/../v1/models",
            "/v1/models",
            "/metrics",
            "/secondwind.v1.Inference/Generate",
            "/grpc.health.v1.Health/Chec",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "*",
        ] {
            assert_eq!(number(closed, &[]), Err(KeyError::Missing), "{closed}");
            if closed != "/metrics" {
                assert_eq!(number(closed, &["Bearer key of ann"]), Ok(1), "{closed}");
            }
        }
    }

    #[test]
    fn metrics_are_for_admins() {
        assert_eq!(number("/metrics", &["Bearer key of root"]), Ok(2));
        let error = number("/metrics", &["Bearer key of ann"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the API key \"ann\" has the role user, and /metrics needs admin"
        );
    }

    #[test]
    fn without_keys_everything_is_open() {
        let open = ApiKeys::default();
        for values in [&[][..], &["Bearer none"]] {
            let tenant = open.admit("/metrics", &headers(values)).unwrap();
            assert_eq!(tenant, Tenant::default());
        }
    }

    #[test]
    fn names_are_plain() {
        for good in ["ann", "team-7_b.c@example"] {
            assert!(is_key_name(good), "{good}");
        }
        for bad in ["", "a b", "a\"b", "a\n", "ä", &"x".repeat(65)] {
            assert!(!is_key_name(bad), "{bad}");
        }
    }
}
