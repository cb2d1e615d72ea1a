//! What a key may hold: from what somebody wrote to what it means.

use std::{fmt, net::SocketAddr, time::Duration};

use secondwind_kernels::select::{AttentionPath, LinearPath};
use secondwind_model::plan::parse_bytes;
use secondwind_worker::Device;

/// The kind of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number of this range, both ends included.
    Integer {
        /// Least.
        min: u64,
        /// Greatest.
        max: u64,
    },
    /// `true` or `false`.
    Bool,
    /// Any text but the empty one.
    Text,
    /// A checkpoint folder, or `builtin`.
    Model,
    /// A device that this build can compute on.
    Device,
    /// Name of a kernel path for linear layers.
    LinearPath,
    /// Name of a kernel path for attention.
    AttentionPath,
    /// Bytes: `512MiB`, `2GiB`, `4GB` or a plain number.
    Size,
    /// Time: `500ms`, `30s`, `5m`, `1h`.
    Duration,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// IP address and port to listen on.
    Listen,
    /// Host and port to dial.
    HostPort,
    /// Relative shares: `3:1`, or a list of numbers.
    Split,
    /// A level or tracing directives.
    LogLevel,
}

/// A value as it was written.
#[derive(Clone, Copy, Debug)]
pub enum Written<'a> {
    /// Text of a flag, of an environment variable or of a default: stands for any kind.
    Text(&'a str),
    /// A string of the file: stands for text only.
    String(&'a str),
    /// A whole number of the file.
    Integer(i128),
    /// A number with a fraction, of the file.
    Float(f64),
    /// A truth value of the file.
    Bool(bool),
    /// A list of numbers of the file.
    Numbers(&'a [f64]),
    /// Something else of the file, by the name of its type.
    Other(&'static str),
}

/// A value as it is meant.
#[derive(Clone, Debug, PartialEq)]
pub enum Meant {
    /// Of [`Kind::Integer`].
    Integer(u64),
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of the kinds that are words.
    Text(String),
    /// Of [`Kind::Size`].
    Bytes(u64),
    /// Of [`Kind::Duration`].
    Duration(Duration),
    /// Of [`Kind::Listen`].
    Address(SocketAddr),
    /// Of [`Kind::Split`].
    Shares(Vec<f64>),
}

impl Kind {
    /// What it takes, for messages and documentation.
    pub fn describe(self) -> String {
        match self {
            Self::Integer { min, max } => format!("a whole number from {min} to {max}"),
            Self::Bool => "true or false".into(),
            Self::Text => "text".into(),
            Self::Model => "a folder, or builtin".into(),
            Self::Device => "cpu or cuda:N".into(),
            Self::LinearPath => names(LinearPath::ALL.iter().map(|path| path.name())),
            Self::AttentionPath => names(AttentionPath::ALL.iter().map(|path| path.name())),
            Self::Size => "a size such as 512MiB or 2GiB".into(),
            Self::Duration => "a duration above 0, such as 500ms, 30s or 5m".into(),
            Self::Choice(words) => words.join(" or "),
            Self::Listen => "an address such as 127.0.0.1:7700".into(),
            Self::HostPort => "HOST:PORT".into(),
            Self::Split => "shares such as 3:1, or [3, 1]".into(),
            Self::LogLevel => "a level such as info".into(),
        }
    }

    /// What `written` means, or why it means nothing.
    pub fn check(self, written: &Written<'_>) -> Result<Meant, String> {
        let text = match *written {
            Written::Text(text) | Written::String(text) => Some(text.trim()),
            _ => None,
        };
        let meant = match self {
            Self::Integer { min, max } => match *written {
                Written::Text(text) => integer(text.trim(), min, max),
                Written::Integer(value) => within(value, min, max),
                _ => None,
            },
            Self::Bool => match *written {
                Written::Bool(value) => Some(Meant::Bool(value)),
                Written::Text(text) => text.trim().parse().ok().map(Meant::Bool),
                _ => None,
            },
            Self::Text | Self::Model => text
                .filter(|text| !text.is_empty())
                .map(|text| Meant::Text(text.into())),
            Self::Device => text
                .filter(|text| text.parse::<Device>().is_ok())
                .map(|text| Meant::Text(text.into())),
            Self::LinearPath => text
                .filter(|text| text.parse::<LinearPath>().is_ok())
                .map(|text| Meant::Text(text.into())),
            Self::AttentionPath => text
                .filter(|text| text.parse::<AttentionPath>().is_ok())
                .map(|text| Meant::Text(text.into())),
            Self::Size => match *written {
                Written::Integer(value) => within(value, 0, u64::MAX).map(as_bytes),
                _ => text.and_then(parse_bytes).map(Meant::Bytes),
            },
            Self::Duration => text.and_then(duration).map(Meant::Duration),
            Self::Choice(words) => text
                .filter(|text| words.contains(text))
                .map(|text| Meant::Text(text.into())),
            Self::Listen => text.and_then(|text| text.parse().ok()).map(Meant::Address),
            Self::HostPort => text.and_then(host_port).map(Meant::Text),
            Self::Split => match *written {
                Written::Numbers(shares) => Some(shares.to_vec()),
                _ => text.and_then(|text| {
                    text.split(':')
                        .map(|share| share.trim().parse().ok())
                        .collect()
                }),
            }
            .filter(|shares| {
                !shares.is_empty()
                    && shares
                        .iter()
                        .all(|share: &f64| share.is_finite() && *share > 0.0)
            })
            .map(Meant::Shares),
            Self::LogLevel => text
                .filter(|text| is_log_filter(text))
                .map(|text| Meant::Text(text.into())),
        };
        meant.ok_or_else(|| format!("{written} is not {}", self.describe()))
    }
}

fn names(of: impl Iterator<Item = &'static str>) -> String {
    of.collect::<Vec<_>>().join(" or ")
}

impl fmt::Display for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "`{}`", text.escape_debug()),
            Self::String(text) => write!(f, "\"{}\"", text.escape_debug()),
            Self::Integer(value) => write!(f, "`{value}`"),
            Self::Float(value) => write!(f, "`{value}`"),
            Self::Bool(value) => write!(f, "`{value}`"),
            Self::Numbers(values) => write!(f, "`{values:?}`"),
            Self::Other(name) => write!(f, "{name}"),
        }
    }
}

fn integer(text: &str, min: u64, max: u64) -> Option<Meant> {
    within(text.replace('_', "").parse().ok()?, min, max)
}

fn within(value: i128, min: u64, max: u64) -> Option<Meant> {
    u64::try_from(value)
        .ok()
        .filter(|value| (min..=max).contains(value))
        .map(Meant::Integer)
}

fn as_bytes(meant: Meant) -> Meant {
    match meant {
        Meant::Integer(bytes) => Meant::Bytes(bytes),
        other => other,
    }
}

/// Splits `1.5GiB` into its number and its unit.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let at = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.trim().parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some((number, unit.trim()))
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let seconds = match unit {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let duration = Duration::try_from_secs_f64(number * seconds).ok()?;
    (duration > Duration::ZERO).then_some(duration)
}

fn host_port(text: &str) -> Option<String> {
    let text = text
        .strip_prefix("http://")
        .unwrap_or(text)
        .trim_end_matches('/');
    let (host, port) = text.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = !host.is_empty() && !host.contains([':', '/', '@', ' ', '[', ']']);
    (port != 0 && (bracketed || plain)).then(|| text.to_owned())
}

fn is_log_filter(text: &str) -> bool {
    !text.is_empty() && tracing_subscriber::EnvFilter::try_new(text).is_ok() && {
        // A lone word is a level, not a target: `inof` should not pass as one.
        let word = text.chars().all(|c| c.is_ascii_alphanumeric());
        !word
            || text
                .parse::<tracing_subscriber::filter::LevelFilter>()
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(kind: Kind, text: &str) -> Option<Meant> {
        kind.check(&Written::Text(text)).ok()
    }

    #[test]
    fn sizes_carry_binary_or_decimal_units() {
        assert_eq!(text(Kind::Size, "2GiB"), Some(Meant::Bytes(2 << 30)));
        assert_eq!(text(Kind::Size, "1.5 MiB"), Some(Meant::Bytes(3 << 19)));
        assert_eq!(text(Kind::Size, "4GB"), Some(Meant::Bytes(4_000_000_000)));
        assert_eq!(text(Kind::Size, "4096"), Some(Meant::Bytes(4096)));
        for bad in ["", "GiB", "-1GiB", "2G", "1e40GiB", "nan", "infGiB"] {
            assert_eq!(text(Kind::Size, bad), None, "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(
            text(Kind::Duration, "30s"),
            Some(Meant::Duration(Duration::from_secs(30)))
        );
        assert_eq!(
            text(Kind::Duration, "250ms"),
            Some(Meant::Duration(Duration::from_millis(250)))
        );
        assert_eq!(text(Kind::Duration, "30"), None);
        assert_eq!(text(Kind::Duration, "-1s"), None);
        assert_eq!(text(Kind::Duration, "0s"), None);
    }

    #[test]
    fn addresses_splits_and_levels() {
        assert_eq!(
            text(Kind::HostPort, "http://rack-1:7701/"),
            Some(Meant::Text("rack-1:7701".into()))
        );
        for bad in [
            "rack-1",
            ":7701",
            "rack-1:0",
            "rack-1:99999",
            "a b:1",
            "https://x:1",
        ] {
            assert_eq!(text(Kind::HostPort, bad), None, "{bad}");
        }
        assert_eq!(
            text(Kind::Split, "3:1"),
            Some(Meant::Shares(vec![3.0, 1.0]))
        );
        for bad in ["", "3:", "3:0", "3:-1", "nan:1", "3,1"] {
            assert_eq!(text(Kind::Split, bad), None, "{bad}");
        }
        assert!(text(Kind::LogLevel, "debug").is_some());
        assert!(text(Kind::LogLevel, "info,secondwind_worker=trace").is_some());
        assert!(text(Kind::LogLevel, "inof").is_none());
    }

    #[test]
    fn the_file_is_typed() {
        let threads = Kind::Integer { min: 1, max: 64 };
        assert_eq!(threads.check(&Written::Integer(4)), Ok(Meant::Integer(4)));
        assert!(threads.check(&Written::String("4")).is_err());
        assert!(threads.check(&Written::Integer(-1)).is_err());
        assert!(threads.check(&Written::Float(4.0)).is_err());
        assert_eq!(text(threads, "4"), Some(Meant::Integer(4)));
    }
}
