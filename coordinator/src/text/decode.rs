//! Tokens to text while they come: whole characters, no special tokens, nothing past a stop string.

use std::sync::Arc;

use super::stop::StopMatcher;
use super::tokenizer::Tokenizer;

/// Bytes to text in pieces. What may still become a character is held back; what cannot becomes U+FFFD,
/// one for each maximal part, as Python's `errors="replace"` does.
#[derive(Clone, Debug, Default)]
pub struct Utf8Decoder {
    /// The beginning of a character: three bytes at the most.
    tail: Vec<u8>,
}

impl Utf8Decoder {
    /// Appends to `text` the characters that `bytes` completes.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.tail.extend_from_slice(bytes);
        let mut rest = self.tail.as_slice();
        loop {
            match str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = invalid;
                    let Some(length) = error.error_len() else {
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        self.tail = rest.to_vec();
    }

    /// Appends what is left of a character that never came.
    pub fn finish(&mut self, text: &mut String) {
        if !self.tail.is_empty() {
            self.tail.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// What one step adds to the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextPiece {
    /// Text that is certain.
    pub text: String,
    /// The stop string that ended it; nothing comes after it.
    pub stop: Option<String>,
}

/// The text of one sequence as its tokens come.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Decoder,
    stops: StopMatcher,
    /// Tokens still to come in which no stop string may end.
    exempt_tokens: u32,
}

impl StreamDecoder {
    /// For one sequence that ends before the first of `stops`.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: Vec<String>) -> Self {
        Self {
            tokenizer,
            utf8: Utf8Decoder::default(),
            stops: StopMatcher::new(stops),
            exempt_tokens: 0,
        }
    }

    /// No stop string ends the text before the sequence has more than `tokens` tokens.
    pub fn not_before(self, tokens: u32) -> Self {
        Self {
            exempt_tokens: tokens,
            ..self
        }
    }

    /// Adds a token. Special tokens have no text.
    pub fn push(&mut self, token: u32) -> TextPiece {
        let mut text = String::new();
        if !self.tokenizer.is_special(token) {
            self.utf8
                .push(self.tokenizer.decode_token(token), &mut text);
        }
        match self.exempt_tokens.checked_sub(1) {
            Some(left) => {
                self.exempt_tokens = left;
                TextPiece {
                    text: self.stops.pass(&text),
                    stop: None,
                }
            }
            None => self.stops.push(&text),
        }
    }

    /// Releases what was held back: the sequence has ended.
    pub fn finish(&mut self) -> TextPiece {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        let mut piece = self.stops.push(&text);
        if piece.stop.is_none() {
            piece.text.push_str(&self.stops.finish());
        }
        piece
    }
}
