//! The checkpoint's `tokenizer.json`: byte-level BPE, exact to the byte in both directions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::{DecoderWrapper, Tokenizer as HfTokenizer};

use super::decode::Utf8Decoder;

/// Why a tokenizer cannot be used, or a text not be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// The file does not parse.
    #[error("tokenizer.json cannot be used: {detail}")]
    Unusable {
        /// The parser's words.
        detail: String,
    },
    /// Tokens do not stand for bytes.
    #[error("tokenizer.json has a {decoder} decoder; only byte-level tokenizers are served")]
    NotByteLevel {
        /// What it has instead.
        decoder: String,
    },
    /// A token has no logit.
    #[error(
        "tokenizer.json has token {token:?} with id {id}, but the model's vocabulary has {vocab_size} tokens"
    )]
    BeyondVocabulary {
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// Logits of the model.
        vocab_size: usize,
    },
    /// A text was not encoded.
    #[error("the text cannot be tokenized: {detail}")]
    Encode {
        /// The tokenizer's words.
        detail: String,
    },
}

/// A token's bytes and whether it is special, or at least added to the vocabulary by name.
#[derive(Clone, Debug, Default)]
struct Token {
    bytes: Box<[u8]>,
    special: bool,
    added: bool,
}

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    hf: HfTokenizer,
    /// By id; ids that stand for nothing have no bytes.
    tokens: Vec<Token>,
    max_token_bytes: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` for a model with `vocab_size` logits.
    pub fn from_json(json: &[u8], vocab_size: usize) -> Result<Self, TokenizerError> {
        let unusable = |detail: String| TokenizerError::Unusable { detail };
        // The parser comes from a library that is not written for hostile files.
        let mut hf = catch_unwind(AssertUnwindSafe(|| HfTokenizer::from_bytes(json)))
            .map_err(|_| unusable("the tokenizer library gave up".to_owned()))?
            .map_err(|error| unusable(error.to_string()))?;
        require_byte_level(hf.get_decoder())?;
        hf.with_padding(None);
        hf.with_truncation(None)
            .map_err(|error| unusable(error.to_string()))?;

        let mut tokens: Vec<Token> = Vec::new();
        let added = hf.get_added_tokens_decoder();
        let mut max_token_bytes = 1;
        for (token, id) in hf.get_vocab(true) {
            let index = id as usize;
            if index >= vocab_size {
                return Err(TokenizerError::BeyondVocabulary {
                    token,
                    id,
                    vocab_size,
                });
            }
            if index >= tokens.len() {
                tokens.resize(index + 1, Token::default());
            }
            let entry = added.get(&id);
            let bytes = match entry {
                Some(added) => added.content.as_bytes().to_vec(),
                None => byte_level_bytes(&token),
            };
            max_token_bytes = max_token_bytes.max(bytes.len());
            tokens[index] = Token {
                bytes: bytes.into(),
                special: entry.is_some_and(|added| added.special),
                added: entry.is_some(),
            };
        }
        Ok(Self {
            hf,
            tokens,
            max_token_bytes,
        })
    }

    /// Token ids of `text`. `add_special_tokens` adds what the checkpoint puts around a plain text;
    /// special tokens written out in the text are recognised either way.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let failed = |detail: String| TokenizerError::Encode { detail };
        let encoded = catch_unwind(AssertUnwindSafe(|| {
            self.hf.encode_fast(text, add_special_tokens)
        }));
        encoded
            .map_err(|_| failed("the tokenizer library gave up".to_owned()))?
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| failed(error.to_string()))
    }

    /// The bytes that token `id` stands for; none for an id without a token. Not always whole characters.
    pub fn decode_token(&self, id: u32) -> &[u8] {
        self.tokens
            .get(id as usize)
            .map_or(&[], |token| &token.bytes)
    }

    /// The token is one of the checkpoint's special tokens, which are no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens
            .get(id as usize)
            .is_some_and(|token| token.special)
    }

    /// The token is not made of pieces of text: special, or one like `<think>`, which is part of the text.
    pub fn is_added(&self, id: u32) -> bool {
        self.tokens
            .get(id as usize)
            .is_some_and(|token| token.added)
    }

    /// The added token that is written as `text`.
    pub fn added_token(&self, text: &str) -> Option<u32> {
        self.hf.token_to_id(text).filter(|&id| self.is_added(id))
    }

    /// The special token that is written as `text`.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.hf.token_to_id(text).filter(|&id| self.is_special(id))
    }

    /// The text of one token by itself, with U+FFFD where it is not whole characters.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.decode_token(id)).into_owned()
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut decoder = Utf8Decoder::default();
        let mut text = String::new();
        for &id in ids {
            if !(skip_special_tokens && self.is_special(id)) {
                decoder.push(self.decode_token(id), &mut text);
            }
        }
        decoder.finish(&mut text);
        text
    }

    /// One more than the largest id with a token.
    pub fn token_count(&self) -> usize {
        self.tokens.len()
    }

    /// Bytes of the longest token: `n` tokens never stand for more than `n` times as many bytes.
    pub fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }
}

fn require_byte_level(decoder: Option<&DecoderWrapper>) -> Result<(), TokenizerError> {
    let other = match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => return Ok(()),
        Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
            [DecoderWrapper::ByteLevel(_)] => return Ok(()),
            _ => "Sequence",
        },
        Some(DecoderWrapper::BPE(_)) => "BPEDecoder",
        Some(DecoderWrapper::WordPiece(_)) => "WordPiece",
        Some(DecoderWrapper::Metaspace(_)) => "Metaspace",
        Some(DecoderWrapper::CTC(_)) => "CTC",
        Some(DecoderWrapper::Replace(_)) => "Replace",
        Some(DecoderWrapper::Fuse(_)) => "Fuse",
        Some(DecoderWrapper::Strip(_)) => "Strip",
        Some(DecoderWrapper::ByteFallback(_)) => "ByteFallback",
        None => "missing",
    };
    Err(TokenizerError::NotByteLevel {
        decoder: other.to_owned(),
    })
}

/// Bytes of a token written in GPT-2's byte alphabet; as it stands when it is not in that alphabet.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(alphabet_byte)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and up.
fn alphabet_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}
