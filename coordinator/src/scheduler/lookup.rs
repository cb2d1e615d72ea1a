//! Guesses of a sequence's next tokens: what followed when its last tokens came before, in prompt or output
//! (prompt lookup decoding, Saxena, 2023). Pure.
//!
//! A guess costs a row of a step and pays if it is right. How often guesses are right is watched on every
//! token, whether they were sent or not, so that a text that repeats itself is noticed without a loss.

use std::collections::HashMap;

/// Tokens that must come again.
const NGRAM: usize = 3;
/// Weight of the latest guess in the share of right ones.
const LATEST: f64 = 0.15;
/// The share before any guess was checked.
const FIRST: f64 = 0.5;
/// What waiting for a step costs a sequence that runs alone, in steps: the time in which the coordinator
/// hears of it and sends the next.
const WAIT: f64 = 0.1;
/// Gains below this are noise.
const LEAST_GAIN: f64 = 1.05;

/// When guesses are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speculation {
    /// Guesses of a row, at the most.
    pub max_drafts: usize,
    /// What a step's further row of one token costs, in percent of a step of one row.
    pub row_cost_percent: u32,
}

impl Speculation {
    /// How many guesses are best where a guess is right with a chance of `right`; 0 if none are. `alone`: no
    /// other sequence is being decoded, so that waiting for a step's result costs little; otherwise every
    /// other step goes without the sequence.
    pub fn drafts(&self, right: f64, alone: bool) -> usize {
        let round = if alone { 1.0 + WAIT } else { 2.0 };
        let row = f64::from(self.row_cost_percent) / 100.0;
        let mut best = (LEAST_GAIN, 0);
        // Tokens of a step: 1 + right + right^2 + ...
        let (mut tokens, mut all_right) = (1.0, 1.0);
        for drafts in 1..=self.max_drafts {
            all_right *= right;
            tokens += all_right;
            let gain = tokens / (round + row * drafts as f64);
            if gain > best.0 {
                best = (gain, drafts);
            }
        }
        best.1
    }
}

/// What a sequence's tokens say of those to come.
#[derive(Clone, Debug)]
pub(super) struct Lookup {
    /// Where the token after an n-gram stands, the latest if there are several.
    next: HashMap<[u32; NGRAM], usize>,
    /// Tokens before this one are in `next` as the one that follows.
    indexed: usize,
    /// Share of guesses that were right of late.
    right: f64,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            next: HashMap::new(),
            indexed: NGRAM,
            right: FIRST,
        }
    }
}

impl Lookup {
    /// Share of guesses that were right of late.
    pub fn right(&self) -> f64 {
        self.right
    }

    /// What followed `tokens` before; nothing if their last ones are new.
    pub fn guess<'a>(&mut self, tokens: &'a [u32]) -> &'a [u32] {
        while self.indexed < tokens.len() {
            if let Some(ngram) = last_chunk(&tokens[..self.indexed]) {
                self.next.insert(ngram, self.indexed);
            }
            self.indexed += 1;
        }
        let place = last_chunk(tokens).and_then(|ngram| self.next.get(&ngram));
        place.map_or(&[], |&place| &tokens[place..])
    }

    /// Takes in that `token` came after `tokens`.
    pub fn came(&mut self, tokens: &[u32], token: u32) {
        if let Some(&guess) = self.guess(tokens).first() {
            let right = if guess == token { 1.0 } else { 0.0 };
            self.right += LATEST * (right - self.right);
        }
    }
}

fn last_chunk(tokens: &[u32]) -> Option<[u32; NGRAM]> {
    tokens.last_chunk::<NGRAM>().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_last_tokens_is_guessed() {
        let mut lookup = Lookup::default();
        let text = [1, 2, 3, 4, 5, 9, 1, 2, 3];
        assert_eq!(lookup.guess(&text), [4, 5, 9, 1, 2, 3]);
        // The latest wins; the last n-gram itself is none.
        let longer = [&text[..], &[7, 1, 2, 3]].concat();
        assert_eq!(lookup.guess(&longer), [7, 1, 2, 3]);
        assert_eq!(lookup.guess(&[&longer[..], &[8]].concat()), [0; 0]);
        assert_eq!(Lookup::default().guess(&[1, 2]), [0; 0]);
        assert_eq!(Lookup::default().guess(&[5; 3]), [0; 0]);
        assert_eq!(Lookup::default().guess(&[5; 4]), [5]);
    }

    #[test]
    fn guesses_are_judged_whether_they_were_sent_or_not() {
        let mut lookup = Lookup::default();
        let mut tokens = vec![1, 2, 3];
        for at in 0..60 {
            let token = [4, 5, 1, 2, 3][at % 5];
            lookup.came(&tokens, token);
            tokens.push(token);
        }
        assert!(lookup.right() > 0.99, "{}", lookup.right());
        for at in 0..60 {
            // The text has 1, 2, 3, 4 many times, and never again.
            let token = [1, 2, 3, 100 + at][at as usize % 4];
            lookup.came(&tokens, token);
            tokens.push(token);
        }
        assert!(lookup.right() < 0.7, "{}", lookup.right());
    }

    #[test]
    fn guesses_are_sent_where_they_pay() {
        let cheap = Speculation {
            max_drafts: 7,
            row_cost_percent: 2,
        };
        assert_eq!(cheap.drafts(0.0, true), 0);
        assert_eq!(cheap.drafts(1.0, true), 7);
        assert!((1..7).contains(&cheap.drafts(0.6, true)));
        // Beside others, a sequence that waits is in every other step only.
        assert_eq!(cheap.drafts(0.5, false), 0);
        assert_eq!(cheap.drafts(1.0, false), 7);
        let dear = Speculation {
            row_cost_percent: 100,
            ..cheap
        };
        assert_eq!(dear.drafts(1.0, true), 0);
        let mut before = 0;
        for percent in 0..=100 {
            let drafts = cheap.drafts(f64::from(percent) / 100.0, true);
            assert!(drafts >= before);
            before = drafts;
        }
    }
}
