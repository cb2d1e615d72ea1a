//! Stop strings in a text that comes in pieces.

use super::decode::TextPiece;

/// Finds the stop string that is complete first; of those complete at the same character, the longest.
/// The answer does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Leading bytes of `held` in which no stop string may end.
    exempt: usize,
    stopped: bool,
}

impl StopMatcher {
    /// Empty stop strings are never found.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self {
            stops,
            held: String::new(),
            exempt: 0,
            stopped: false,
        }
    }

    /// Adds text in which no stop string may end, though one may begin; gives what is certain not to be part
    /// of one.
    pub fn pass(&mut self, text: &str) -> String {
        self.held.push_str(text);
        let free = self.release();
        self.exempt = self.held.len();
        free
    }

    /// Adds text; gives what is certain not to be part of a stop string. Nothing after the first stop.
    pub fn push(&mut self, text: &str) -> TextPiece {
        if self.stopped {
            return TextPiece::default();
        }
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| {
                let mut from = (self.exempt + 1).saturating_sub(stop.len());
                while !self.held.is_char_boundary(from) {
                    from += 1;
                }
                let start = from + self.held[from..].find(stop.as_str())?;
                Some((start + stop.len(), start, stop))
            })
            .min_by_key(|&(end, start, _)| (end, start));
        if let Some((_, start, stop)) = first {
            let stop = Some(stop.clone());
            self.stopped = true;
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return TextPiece { text, stop };
        }
        TextPiece {
            text: self.release(),
            stop: None,
        }
    }

    /// Takes out what cannot be the beginning of a stop string.
    fn release(&mut self) -> String {
        let held = self.stops.iter().map(|stop| held_bytes(&self.held, stop));
        let free = self.held.len() - held.max().unwrap_or(0);
        self.exempt = self.exempt.saturating_sub(free);
        let held = self.held.split_off(free);
        std::mem::replace(&mut self.held, held)
    }

    /// What was held back: no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` with which `stop` begins, short of all of `stop`.
fn held_bytes(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&length| text.as_bytes().ends_with(&stop.as_bytes()[..length]))
        // A partial character matches no end of a text, which ends with a whole one.
        .unwrap_or(0)
}
