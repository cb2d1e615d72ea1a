//! What a rank knows of a sequence's tokens, and which logits its rules change because of them. Pure.

use std::{collections::BTreeMap, ops::Range};

use secondwind_kernels::logits::{Adjustment, RowMasks};
use secondwind_model::step::LogitRules;

/// A sequence's rules with what its tokens mean for them.
#[derive(Debug)]
pub struct Rules {
    rules: LogitRules,
    /// Tokens that a penalty touches, by rising token.
    seen: Vec<Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    token: u32,
    /// Times that the output has it; 0 if only the prompt does.
    output: u32,
}

/// Changes of the logits of one step on one rank.
#[derive(Debug, Default)]
pub struct Adjustments {
    /// Of all sampling rows, in order.
    pub changes: Vec<Adjustment>,
    /// Of each sampling row: where its changes end.
    pub ends: Vec<usize>,
    /// Of sampling rows that have one, after their changes.
    pub masks: RowMasks,
}

impl Adjustments {
    /// Whether anything of sampling row `row` is not as the model left it.
    pub fn touch(&self, row: usize) -> bool {
        let masked = || self.masks.rows.iter().any(|&masked| masked as usize == row);
        !self.of_row(row).is_empty() || masked()
    }

    /// Where the changes of sampling row `row` are.
    pub fn of_row(&self, row: usize) -> Range<usize> {
        let start = row.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[row]
    }
}

impl Rules {
    /// The rules of a sequence whose next token is at `position`; the vocabulary has `vocab_size` tokens.
    ///
    /// # Errors
    /// What of them does not follow, or no logit could survive.
    pub fn new(rules: &LogitRules, position: usize, vocab_size: usize) -> Result<Self, String> {
        let mut rules = rules.clone();
        let penalties = [rules.presence_penalty, rules.frequency_penalty];
        let repetition = rules.repetition_penalty;
        let numbers = penalties
            .iter()
            .chain([&repetition])
            .chain(rules.logit_bias.iter().map(|(_, bias)| bias));
        if !numbers.into_iter().all(|number| number.is_finite()) || repetition <= 0.0 {
            return Err("its rules have penalties or biases that are no legal numbers".into());
        }
        let rising = |tokens: &mut dyn Iterator<Item = u32>| tokens.is_sorted_by(|a, b| a < b);
        if !rising(&mut rules.logit_bias.iter().map(|(token, _)| *token))
            || !rising(&mut rules.stop_tokens.iter().copied())
        {
            return Err("its rules name tokens out of order".into());
        }
        let biased = rules.logit_bias.iter().map(|(token, _)| token);
        let mut named = biased.chain(&rules.stop_tokens).chain(&rules.history);
        if let Some(token) = named.find(|&&token| token as usize >= vocab_size) {
            return Err(format!(
                "its rules name token {token}, which is outside the vocabulary of {vocab_size}"
            ));
        }
        let history = std::mem::take(&mut rules.history);
        let start = rules.history_start(position);
        if history.len() != position - start {
            return Err(format!(
                "its rules came with {} earlier tokens, {} are due",
                history.len(),
                position - start
            ));
        }
        let mut this = Self {
            rules,
            seen: Vec::new(),
        };
        this.count(start, &history);
        Ok(this)
    }

    /// Takes in the sequence's next tokens; the first is at `position`.
    pub fn count(&mut self, position: usize, tokens: &[u32]) {
        let skipped = self
            .rules
            .history_start(usize::MAX)
            .saturating_sub(position);
        let output_from = self.rules.prompt_tokens.saturating_sub(position);
        let new = tokens.iter().enumerate().skip(skipped);
        let new = new.map(|(index, &token)| Seen {
            token,
            output: u32::from(index >= output_from),
        });
        if tokens.len() <= 4 {
            new.for_each(|seen| self.insert(seen));
            return;
        }
        self.seen.extend(new);
        self.seen.sort_unstable_by_key(|seen| seen.token);
        self.seen.dedup_by(|next, kept| {
            let same = next.token == kept.token;
            if same {
                kept.output += next.output;
            }
            same
        });
    }

    fn insert(&mut self, new: Seen) {
        match self
            .seen
            .binary_search_by_key(&new.token, |seen| seen.token)
        {
            Ok(at) => self.seen[at].output += new.output,
            Err(at) => self.seen.insert(at, new),
        }
    }

    /// Appends the changes of the logits of the token at `position`, over the tokens of `vocab`, of which the
    /// first is `first_element` of the logits.
    pub fn adjust(
        &self,
        position: usize,
        vocab: &Range<usize>,
        first_element: u32,
        changes: &mut Vec<Adjustment>,
    ) {
        let rules = &self.rules;
        let element = |token: u32| first_element + (token - vocab.start as u32);
        let own = |token: u32| vocab.contains(&(token as usize));
        let start = self
            .seen
            .partition_point(|seen| (seen.token as usize) < vocab.start);
        let from = changes.len();
        let here = self.seen[start..].iter().take_while(|seen| own(seen.token));
        changes.extend(here.map(|seen| Adjustment {
            element: element(seen.token),
            bias: 0.0,
            penalty: rules.repetition_penalty,
            subtract: match seen.output {
                0 => 0.0,
                times => rules.frequency_penalty * times as f32 + rules.presence_penalty,
            },
        }));
        let seen = changes.len() - from;
        let mut biases: BTreeMap<u32, f32> = rules.logit_bias.iter().copied().collect();
        if position.saturating_sub(rules.prompt_tokens) < rules.min_tokens as usize {
            biases.extend(
                rules
                    .stop_tokens
                    .iter()
                    .map(|&token| (token, f32::NEG_INFINITY)),
            );
        }
        for (token, bias) in biases.into_iter().filter(|&(token, _)| own(token)) {
            let element = element(token);
            let penalised = &mut changes[from..from + seen];
            match penalised.binary_search_by_key(&element, |change| change.element) {
                Ok(at) => penalised[at].bias = bias,
                Err(_) => changes.push(Adjustment {
                    element,
                    bias,
                    penalty: 1.0,
                    subtract: 0.0,
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests;
