//! What a request says of its place among others: its priority, and who may share its prefix.

use secondwind_proto::v1;
use sha2::{Digest, Sha256};

use super::request::RequestError;
use crate::request::{CacheSalt, Origin};

/// Furthest from 0, either way.
const MAX_PRIORITY: i32 = i8::MAX as i32;
/// Longest salt.
const MAX_SALT_BYTES: usize = 1024;

/// What the request itself says; whose it is, its key says.
pub(super) fn origin(request: &v1::GenerateRequest) -> Result<Origin, RequestError> {
    Ok(Origin {
        priority: match request.priority {
            Some(priority) => rank(priority)?,
            None => 0,
        },
        cache_salt: request.cache_salt.as_deref().map(salt).transpose()?,
        ..Origin::default()
    })
}

/// Clients count as vLLM does, the lower the sooner; the scheduler counts the other way.
fn rank(priority: i32) -> Result<i8, RequestError> {
    let legal = (-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority);
    let rank = i8::try_from(-i64::from(priority)).ok().filter(|_| legal);
    rank.ok_or_else(|| RequestError::OutOfRange {
        field: "priority",
        value: priority.to_string(),
        range: format!("from -{MAX_PRIORITY} to {MAX_PRIORITY}"),
    })
}

fn salt(salt: &str) -> Result<CacheSalt, RequestError> {
    if !(1..=MAX_SALT_BYTES).contains(&salt.len()) {
        return Err(RequestError::OutOfRange {
            field: "cache_salt",
            value: format!("a text of {} bytes", salt.len()),
            range: format!("one of 1 to {MAX_SALT_BYTES}"),
        });
    }
    let digest = Sha256::digest(salt.as_bytes());
    let mut words = CacheSalt::default();
    for (word, bytes) in words.iter_mut().zip(digest.chunks_exact(4)) {
        *word = bytes
            .iter()
            .fold(0, |word, &byte| word << 8 | u32::from(byte));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_numbers_are_sooner_and_bounded() {
        for (priority, expected) in [(0, Some(0)), (5, Some(-5)), (-127, Some(127)), (128, None)] {
            assert_eq!(rank(priority).ok(), expected, "{priority}");
        }
        assert_eq!(
            rank(i32::MIN).unwrap_err().to_string(),
            "priority: -2147483648 is not from -127 to 127"
        );
    }

    #[test]
    fn salts_differ_in_all_their_bits() {
        // SHA-256 of "abc".
        assert_eq!(salt("abc").unwrap()[..2], [0xba78_16bf, 0x8f01_cfea]);
        assert_ne!(salt("abd"), salt("abc"));
        for wrong in [String::new(), "x".repeat(1025)] {
            assert_eq!(salt(&wrong).unwrap_err().field(), "cache_salt");
        }
    }
}
