//! An answer's text in its parts: what the model thinks, what it says, which tools it calls. Pure.

use super::reasoning;
use super::tool_calls::{Call, Part, Reader};

/// Parts of a piece of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What the model thinks.
    pub reasoning: String,
    /// What it says.
    pub content: String,
    /// Whole calls of tools, in their order.
    pub calls: Vec<Call>,
}

/// Takes an answer apart as its text comes. As made by default, all of it is content.
#[derive(Clone, Debug, Default)]
pub struct AnswerSplitter {
    reasoning: Option<reasoning::Splitter>,
    calls: Option<Reader>,
}

impl AnswerSplitter {
    /// Puts reasoning apart; the prompt ends with `prompt_end`, at least the last characters of it.
    pub fn with_reasoning(self, prompt_end: &str) -> Self {
        Self {
            reasoning: Some(reasoning::Splitter::after(prompt_end)),
            ..self
        }
    }

    /// Reads calls of tools: the model was told of some.
    pub fn with_calls(self) -> Self {
        Self {
            calls: Some(Reader::default()),
            ..self
        }
    }

    /// Takes the next piece of the text in; gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Parts {
        let piece = match &mut self.reasoning {
            Some(splitter) => splitter.push(text),
            None => reasoning::Piece {
                reasoning: String::new(),
                content: text.to_owned(),
            },
        };
        let mut parts = Parts {
            reasoning: piece.reasoning,
            ..Parts::default()
        };
        match &mut self.calls {
            Some(reader) => parts.add(reader.push(&piece.content)),
            None => parts.content = piece.content,
        }
        parts
    }

    /// No more text comes.
    pub fn finish(&mut self) -> Parts {
        let mut last = Parts::default();
        if let Some(splitter) = &mut self.reasoning {
            let piece = splitter.finish();
            last.reasoning = piece.reasoning;
            last.content = piece.content;
        }
        if let Some(reader) = &mut self.calls {
            let mut parts = reader.push(&std::mem::take(&mut last.content));
            parts.extend(reader.finish());
            last.add(parts);
        }
        last
    }
}

impl Parts {
    fn add(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Text(text) => self.content += &text,
                Part::Call(call) => self.calls.push(call),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "<think>\nhm\n</think>\n\nI see.\n<tool_call>\n{\"name\": \"add\"}\n</tool_call>";

    fn split(mut splitter: AnswerSplitter, text: &str) -> Parts {
        let mut all = Parts::default();
        let mut take = |parts: Parts| {
            all.reasoning += &parts.reasoning;
            all.content += &parts.content;
            all.calls.extend(parts.calls);
        };
        for letter in text.chars() {
            take(splitter.push(&letter.to_string()));
        }
        take(splitter.finish());
        all
    }

    #[test]
    fn parts_stand_apart_as_far_as_asked() {
        let add = Call {
            name: "add".into(),
            arguments: "{}".into(),
        };
        let calls = TEXT.split_once("\n\n").unwrap().1;
        let thought = TEXT.split_once("\n\n").unwrap().0;
        let plain = AnswerSplitter::default;
        let parts = |reasoning: &str, content: &str, calls: &[Call]| Parts {
            reasoning: reasoning.into(),
            content: content.into(),
            calls: calls.to_vec(),
        };
        assert_eq!(split(plain(), TEXT), parts("", TEXT, &[]));
        assert_eq!(
            split(plain().with_reasoning(""), TEXT),
            parts("hm", calls, &[])
        );
        let kept = format!("{thought}\n\nI see.");
        assert_eq!(
            split(plain().with_calls(), TEXT),
            parts("", &kept, std::slice::from_ref(&add))
        );
        assert_eq!(
            split(plain().with_reasoning("").with_calls(), TEXT),
            parts("hm", "I see.", &[add])
        );
    }

    #[test]
    fn what_both_hold_back_comes_at_the_end() {
        let both = AnswerSplitter::default().with_reasoning("").with_calls();
        let all = split(both.clone(), "<tool_call>{\"name\": \"add\"}");
        assert_eq!(all.calls.len(), 1, "{all:?}");
        assert_eq!(split(both.clone(), "<thi").content, "<thi");
        assert_eq!(split(both, "a\n").content, "a\n");
    }
}
