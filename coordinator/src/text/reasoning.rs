//! What a model thinks before it answers, told apart from the answer: Qwen3 writes it between `<think>` and
//! `</think>`, and templates may open the first of them themselves. Pure.

use super::tags::uncertain;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// A piece of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Of what stands between the tags, without the line breaks around it.
    pub reasoning: String,
    /// Of all else, without the line breaks before it if it follows a tag.
    pub content: String,
}

/// Splits a text that comes in pieces. Nothing but the two tags and the line breaks beside them is lost.
#[derive(Clone, Debug)]
pub struct Splitter {
    state: State,
    /// What may be part of a tag, or of the line breaks beside one.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space came yet.
    Before,
    /// Behind the opening tag, and nothing but line breaks came.
    Opened,
    Inside,
    /// Behind the closing tag, and nothing but line breaks came.
    Closed,
    /// A tag from here on is text.
    Answer,
}

impl Splitter {
    /// For the answer to a prompt that ends with `prompt_end`: at least the last characters of it.
    pub fn after(prompt_end: &str) -> Self {
        let opened = prompt_end.trim_end().ends_with(OPEN);
        Self {
            state: if opened { State::Opened } else { State::Before },
            held: String::new(),
        }
    }

    /// Takes the next piece of the text in; gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        let mut piece = Piece::default();
        while self.advance(&mut piece) {}
        piece
    }

    /// No more text comes.
    pub fn finish(&mut self) -> Piece {
        let held = std::mem::take(&mut self.held);
        let mut piece = Piece::default();
        match self.state {
            State::Before | State::Answer => piece.content = held,
            // Line breaks that nothing follows belong to the tag that did not come.
            State::Opened | State::Inside => piece.reasoning = held.trim_end_matches('\n').into(),
            State::Closed => {}
        }
        piece
    }

    /// Takes one step over what is held; false when more text has to come first.
    fn advance(&mut self, piece: &mut Piece) -> bool {
        match self.state {
            State::Before => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Opened;
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    self.state = State::Answer;
                }
            }
            State::Opened | State::Closed => {
                self.held = self.held.trim_start_matches('\n').to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = match self.state {
                    State::Opened => State::Inside,
                    _ => State::Answer,
                };
            }
            State::Inside => {
                if let Some(at) = self.held.find(CLOSE) {
                    piece.reasoning += self.held[..at].trim_end_matches('\n');
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::Closed;
                } else {
                    let certain = self.held.len() - uncertain(&self.held, CLOSE);
                    piece.reasoning.extend(self.held.drain(..certain));
                    return false;
                }
            }
            State::Answer => {
                piece.content.push_str(&self.held);
                self.held.clear();
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(prompt_end: &str, pieces: &[&str]) -> (String, String) {
        let mut splitter = Splitter::after(prompt_end);
        let (mut reasoning, mut content) = (String::new(), String::new());
        let mut take = |piece: Piece| {
            reasoning += &piece.reasoning;
            content += &piece.content;
        };
        for piece in pieces {
            take(splitter.push(piece));
        }
        take(splitter.finish());
        (reasoning, content)
    }

    #[test]
    fn what_stands_between_the_tags_is_reasoning() {
        let cases = [
            (
                "",
                "<think>\nhm\n\nso\n</think>\n\nfour\n",
                "hm\n\nso",
                "four\n",
            ),
            ("", "\n <think></think>4", "", "4"),
            (
                "<|im_start|>assistant\n<think>\n",
                "hm\n</think>\n\n4",
                "hm",
                "4",
            ),
            // Thinking is off: the template wrote both tags.
            ("<think>\n\n</think>\n\n", "4 <think>", "", "4 <think>"),
            ("", "four", "", "four"),
            ("", "  <thin air>", "", "  <thin air>"),
            ("", "4 <think>x</think>", "", "4 <think>x</think>"),
            ("", "<think>a</think>b</think>c", "a", "b</think>c"),
            // It was cut off.
            ("", "<think>\nhm </thi", "hm </thi", ""),
            ("", "<think>\nhm\n\n", "hm", ""),
            ("", "<thi", "", "<thi"),
            ("", "", "", ""),
        ];
        for (prompt_end, text, reasoning, content) in cases {
            let expected = (reasoning.to_owned(), content.to_owned());
            assert_eq!(split(prompt_end, &[text]), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_certain_is_not_held() {
        let mut splitter = Splitter::after("<think>");
        let reasoning = |text: &str| Piece {
            reasoning: text.into(),
            content: String::new(),
        };
        assert_eq!(splitter.push("\n"), reasoning(""));
        assert_eq!(splitter.push("so a < b"), reasoning("so a < b"));
        assert_eq!(splitter.push("\n</th"), reasoning(""));
        assert_eq!(splitter.push("e\n"), reasoning("\n</the"));
        assert_eq!(splitter.push("</think>"), reasoning(""));
        let content = Piece {
            reasoning: String::new(),
            content: "4".into(),
        };
        assert_eq!(splitter.push("\n\n4"), content);
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(
            words in prop::collection::vec(
                prop::sample::select(vec!["<think>", "</think>", "\n", "<", "</thi", "a", "é", " "]),
                0..12,
            ),
            opened in any::<bool>(),
        ) {
            let prompt_end = if opened { "<think>\n" } else { "" };
            let text = words.concat();
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let whole = split(prompt_end, &[&text]);
            prop_assert_eq!(&split(prompt_end, &letters), &whole);
            prop_assert_eq!(&split(prompt_end, &words), &whole);
        }
    }
}
