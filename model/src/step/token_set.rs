//! A set of tokens of a vocabulary.

use std::{ops::Range, sync::Arc};

/// Which tokens may be drawn; cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSet {
    /// Tokens below this one are in question.
    vocab_size: usize,
    /// `vocab_size.div_ceil(32)`: bit `i % 32` of word `i / 32` says whether it has token `i`. Bits above
    /// the vocabulary are 0.
    words: Arc<[u32]>,
}

impl TokenSet {
    /// Of words as [`TokenSet`] has them; words that are missing hold nothing, those above the vocabulary
    /// are left out.
    pub fn from_words(words: &[u32], vocab_size: usize) -> Self {
        let mut own: Vec<u32> = words.to_vec();
        own.resize(vocab_size.div_ceil(32), 0);
        if let (Some(last), above) = (own.last_mut(), vocab_size % 32)
            && above > 0
        {
            *last &= (1 << above) - 1;
        }
        Self {
            vocab_size,
            words: own.into(),
        }
    }

    /// Of single tokens; those outside the vocabulary are left out.
    pub fn from_tokens(tokens: impl IntoIterator<Item = u32>, vocab_size: usize) -> Self {
        let mut words = vec![0u32; vocab_size.div_ceil(32)];
        for token in tokens {
            if let Some(word) = words.get_mut(token as usize / 32) {
                *word |= 1 << (token % 32);
            }
        }
        Self::from_words(&words, vocab_size)
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// One bit a token, as [`TokenSet::from_words`] takes them.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether it has `token`.
    pub fn contains(&self, token: u32) -> bool {
        let word = self.words.get(token as usize / 32);
        word.is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// How many tokens it has.
    pub fn len(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// True if it has no token.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Its tokens, rising.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        ones(&self.words)
    }

    /// The other tokens of the vocabulary.
    pub fn complement(&self) -> Self {
        let words: Vec<u32> = self.words.iter().map(|word| !word).collect();
        Self::from_words(&words, self.vocab_size)
    }

    /// Appends `range.len().div_ceil(32)` words whose bit `i` is that of token `range.start + i`.
    pub fn append_range(&self, range: &Range<usize>, words: &mut Vec<u32>) {
        let (first, shift) = (range.start / 32, range.start % 32);
        let count = range.len().div_ceil(32);
        let word = |at: usize| self.words.get(at).copied().unwrap_or(0);
        words.extend((first..first + count).map(|at| match shift {
            0 => word(at),
            _ => word(at) >> shift | word(at + 1) << (32 - shift),
        }));
        // Bits above the range are not read by whoever masks `range.len()` columns.
    }
}

fn ones(words: &[u32]) -> impl Iterator<Item = u32> {
    words.iter().zip(0u32..).flat_map(|(&word, index)| {
        let bits = (0..32).filter(move |bit| word >> bit & 1 == 1);
        bits.map(move |bit| index * 32 + bit)
    })
}

impl std::fmt::Debug for TokenSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenSet({} of {})", self.len(), self.vocab_size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_has_what_it_was_made_of(
            vocab_size in 1usize..200,
            tokens in proptest::collection::btree_set(0u32..250, 0..60),
            start in 0usize..200,
            length in 0usize..200,
        ) {
            let set = TokenSet::from_tokens(tokens.iter().copied(), vocab_size);
            let expected: Vec<u32> =
                tokens.iter().copied().filter(|&token| (token as usize) < vocab_size).collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(set.len(), expected.len());
            prop_assert_eq!(set.is_empty(), expected.is_empty());
            for token in 0..300 {
                prop_assert_eq!(set.contains(token), expected.contains(&token));
                let other = set.complement().contains(token);
                prop_assert_eq!(other, (token as usize) < vocab_size && !expected.contains(&token));
            }
            prop_assert_eq!(&TokenSet::from_words(set.words(), vocab_size), &set);
            let range = start..start + length;
            let mut words = vec![7];
            set.append_range(&range, &mut words);
            prop_assert_eq!(words.len(), 1 + length.div_ceil(32));
            for (column, token) in range.enumerate() {
                let bit = words[1 + column / 32] >> (column % 32) & 1 == 1;
                prop_assert_eq!(bit, set.contains(token as u32));
            }
        }
    }
}
