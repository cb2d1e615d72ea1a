//! Calls of tools in the text of an answer, as Qwen2.5 and Qwen3 write them (the format of Hermes): a JSON
//! object with `name` and `arguments` between `<tool_call>` and `</tool_call>`. Pure.

use serde_json::Value as Json;

use super::tags::uncertain;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A piece of an answer, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Not empty; without the line breaks around calls.
    Text(String),
    /// A whole call.
    Call(Call),
}

/// A tool that the model wants called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
}

/// Reads a text that comes in pieces. What stands between the tags and is no call stays text, tags included.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    /// What may be part of a tag, of the line breaks beside one, or of a call.
    held: String,
    inside: bool,
    /// Nothing but line breaks came since a call.
    after_call: bool,
}

impl Reader {
    /// Takes the next piece of the text in; gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        loop {
            let tag = if self.inside { CLOSE } else { OPEN };
            let Some(at) = self.held.find(tag) else { break };
            let before = self.held[..at].to_owned();
            self.held.drain(..at + tag.len());
            if self.inside {
                let call = call(&before);
                self.after_call = call.is_some();
                let text = || Part::Text(format!("{OPEN}{before}{CLOSE}"));
                parts.push(call.map_or_else(text, Part::Call));
            } else {
                self.say(before.trim_end_matches('\n'), &mut parts);
            }
            self.inside = !self.inside;
        }
        if !self.inside {
            let certain = self.held.len() - uncertain(&self.held, OPEN);
            let text: String = self.held.drain(..certain).collect();
            self.say(&text, &mut parts);
        }
        parts
    }

    /// No more text comes. A call that only lacks its closing tag is one.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let mut parts = Vec::new();
        match (self.inside, call(&held)) {
            (true, Some(call)) => parts.push(Part::Call(call)),
            (true, None) => parts.push(Part::Text(format!("{OPEN}{held}"))),
            (false, _) => self.say(&held, &mut parts),
        }
        parts
    }

    fn say(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = match self.after_call {
            true => text.trim_start_matches('\n'),
            false => text,
        };
        if !text.is_empty() {
            self.after_call = false;
            parts.push(Part::Text(text.to_owned()));
        }
    }
}

fn call(text: &str) -> Option<Call> {
    let json: Json = serde_json::from_str(text.trim()).ok()?;
    let arguments = match json.get("arguments") {
        None => "{}".to_owned(),
        Some(object @ Json::Object(_)) => object.to_string(),
        Some(_) => return None,
    };
    Some(Call {
        name: json.get("name")?.as_str()?.to_owned(),
        arguments,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Texts that follow each other are one.
    fn read(pieces: &[&str]) -> Vec<Part> {
        let mut reader = Reader::default();
        let mut all: Vec<Part> = Vec::new();
        let mut take = |parts: Vec<Part>| {
            for part in parts {
                match (all.last_mut(), part) {
                    (Some(Part::Text(text)), Part::Text(more)) => text.push_str(&more),
                    (_, part) => all.push(part),
                }
            }
        };
        for piece in pieces {
            take(reader.push(piece));
        }
        take(reader.finish());
        all
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn called(name: &str, arguments: &str) -> Part {
        Part::Call(Call {
            name: name.into(),
            arguments: arguments.into(),
        })
    }

    #[test]
    fn calls_are_read_and_what_is_none_stays_text() {
        let add = r#"{"name": "add", "arguments": {"b": 2, "a": "é\n"}}"#;
        let arguments = r#"{"b":2,"a":"é\n"}"#;
        let cases = [
            ("four\n".to_owned(), vec![text("four\n")]),
            (String::new(), vec![]),
            (
                format!("I see.\n\n<tool_call>\n{add}\n</tool_call>\n"),
                vec![text("I see."), called("add", arguments)],
            ),
            (
                format!(
                    "<tool_call>{add}</tool_call>\n<tool_call>\n{{\"name\": \"now\"}}\n</tool_call>\n\nso"
                ),
                vec![called("add", arguments), called("now", "{}"), text("so")],
            ),
            // Only the closing tag is missing.
            (
                format!("<tool_call>\n{add}\n"),
                vec![called("add", arguments)],
            ),
            // Cut off, no object, no name, arguments that are none.
            (
                "a\n<tool_call>\n{\"na".to_owned(),
                vec![text("a<tool_call>\n{\"na")],
            ),
            (
                "<tool_call>x</tool_call>".to_owned(),
                vec![text("<tool_call>x</tool_call>")],
            ),
            (
                "<tool_call>{}</tool_call>".to_owned(),
                vec![text("<tool_call>{}</tool_call>")],
            ),
            (
                r#"<tool_call>{"name": "a", "arguments": 1}</tool_call>"#.to_owned(),
                vec![text(
                    r#"<tool_call>{"name": "a", "arguments": 1}</tool_call>"#,
                )],
            ),
            ("a <tool_cat>".to_owned(), vec![text("a <tool_cat>")]),
        ];
        for (given, expected) in cases {
            assert_eq!(read(&[&given]), expected, "{given:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(words in prop::collection::vec(
            prop::sample::select(vec![
                "<tool_call>", "</tool_call>", "\n", "<tool", "</", "é", " ", r#"{"name": "a"}"#,
            ]),
            0..12,
        )) {
            let all = words.concat();
            let letters: Vec<String> = all.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let whole = read(&[&all]);
            prop_assert_eq!(&read(&letters), &whole);
            prop_assert_eq!(&read(&words), &whole);
        }
    }
}
