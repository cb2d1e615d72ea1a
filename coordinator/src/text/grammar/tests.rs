//! Answers drawn at random under a grammar have its shape, whatever the model would have said.

use std::time::Instant;

use proptest::prelude::Rng;
use proptest::test_runner::{Config, TestRng, TestRunner};

use super::*;
use crate::text::fixture::{END_OF_TEXT, IM_END, THINK, VOCAB_SIZE, text};

fn grammars() -> Grammars {
    Grammars::new(text().tokenizer(), VOCAB_SIZE, &[IM_END, END_OF_TEXT]).unwrap()
}

fn random() -> TestRng {
    TestRunner::new_with_rng(
        Config::default(),
        TestRng::deterministic_rng(Default::default()),
    )
    .rng()
    .clone()
}

/// An answer drawn evenly from what may come next, as its text; `None` if it does not end in time.
fn draw(grammar: &Grammar, random: &mut TestRng) -> Option<String> {
    let mut grammar = grammar.clone();
    let mut tokens = Vec::new();
    let mut mask = grammar.mask().clone();
    for _ in 0..400 {
        let ends = mask.contains(IM_END);
        let choices: Vec<u32> = mask.iter().collect();
        // Answers end sooner or later.
        let token = match ends && random.next_u32().is_multiple_of(4) {
            true => IM_END,
            false => choices[random.next_u32() as usize % choices.len()],
        };
        tokens.push(token);
        match grammar.accept(token).unwrap() {
            Next::End => return Some(text().tokenizer().decode(&tokens, true)),
            Next::Tokens(next) => mask = next,
        }
    }
    None
}

fn answers(shape: &Shape, thinking: Thinking) -> Vec<String> {
    let grammar = grammars().compile(shape, thinking).unwrap();
    let mut random = random();
    let drawn: Vec<_> = (0..40)
        .filter_map(|_| draw(&grammar, &mut random))
        .collect();
    assert!(drawn.len() >= 10, "only {} answers end", drawn.len());
    drawn
}

#[test]
fn answers_are_valid_under_their_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 5 },
            "kind": { "enum": ["p40", "t4"] },
            "cards": { "$ref": "#/$defs/count" },
        },
        "required": ["name", "kind", "cards"],
        "additionalProperties": false,
        "$defs": { "count": { "type": "integer", "minimum": 1, "maximum": 8 } },
    });
    for answer in answers(&Shape::JsonSchema(schema), Thinking::No) {
        let json: Json = serde_json::from_str(&answer).unwrap();
        assert!(
            json["name"].as_str().unwrap().chars().count() <= 5,
            "{json}"
        );
        assert!(
            ["p40", "t4"].contains(&json["kind"].as_str().unwrap()),
            "{json}"
        );
        assert!((1..=8).contains(&json["cards"].as_i64().unwrap()), "{json}");
        assert_eq!(json.as_object().unwrap().len(), 3);
    }
    for answer in answers(&Shape::JsonObject, Thinking::No) {
        match serde_json::from_str::<Json>(&answer) {
            Ok(json) => assert!(json.is_object(), "{answer}"),
            // JSON has numbers that no machine number is.
            Err(error) => assert!(error.to_string().contains("out of range"), "{answer}"),
        }
    }
}

#[test]
fn answers_are_what_an_expression_matches_or_a_choice() {
    for answer in answers(&Shape::Regex(r"(GPU|card)/\d{2,3}".into()), Thinking::No) {
        let rest = answer
            .strip_prefix("GPU/")
            .or_else(|| answer.strip_prefix("card/"));
        let digits = rest.unwrap();
        assert!((2..=3).contains(&digits.chars().count()), "{answer}");
        assert!(digits.chars().all(char::is_numeric), "{answer}");
    }
    let choices = ["yes", "no", "\"may\\be\"\n"].map(str::to_owned);
    for answer in answers(&Shape::Choice(choices.to_vec()), Thinking::No) {
        assert!(choices.contains(&answer), "{answer}");
    }
    let lark = "start: \"(\" start? \")\"".to_owned();
    for answer in answers(&Shape::Lark(lark), Thinking::No) {
        let depth = answer.len() / 2;
        assert_eq!(answer, "(".repeat(depth) + &")".repeat(depth));
    }
}

#[test]
fn calls_name_a_tool_and_its_arguments() {
    let tool = |name: &str, schema| Tool {
        name: name.to_owned(),
        parameters: schema,
    };
    let count = json!({
        "type": "object",
        "properties": { "n": { "$ref": "#/$defs/digit" } },
        "required": ["n"],
        "additionalProperties": false,
        "$defs": { "digit": { "type": "integer", "minimum": 0, "maximum": 9 } },
    });
    let shape = Shape::ToolCalls {
        tools: vec![
            tool(
                "reset",
                json!({"type": "object", "properties": {}, "additionalProperties": false}),
            ),
            tool("count", count),
        ],
        several: true,
    };
    let mut seen = std::collections::BTreeSet::new();
    for answer in answers(&shape, Thinking::No) {
        let mut reader = crate::text::tool_calls::Reader::default();
        let mut parts = reader.push(&answer);
        parts.extend(reader.finish());
        for part in parts {
            let crate::text::tool_calls::Part::Call(call) = part else {
                panic!("text beside the calls: {answer}");
            };
            let arguments: Json = serde_json::from_str(&call.arguments).unwrap();
            match call.name.as_str() {
                "reset" => assert_eq!(arguments, json!({})),
                "count" => assert!(arguments["n"].as_i64().unwrap() < 10),
                other => panic!("no tool is called {other}"),
            }
            seen.insert(call.name);
        }
    }
    assert_eq!(seen.len(), 2);

    // Arguments are an object, whatever the schema leaves open.
    for schema in [json!({}), json!(true), json!({"properties": {}})] {
        let shape = Shape::ToolCalls {
            tools: vec![tool("a \"quoted\" name", schema)],
            several: false,
        };
        for answer in answers(&shape, Thinking::No) {
            let mut reader = crate::text::tool_calls::Reader::default();
            let mut parts = reader.push(&answer);
            parts.extend(reader.finish());
            assert!(
                matches!(&parts[..], [crate::text::tool_calls::Part::Call(call)] if call.name == "a \"quoted\" name"),
                "{answer}"
            );
        }
    }
    let list = Shape::ToolCalls {
        tools: vec![tool("a", json!({"type": "array"}))],
        several: false,
    };
    let error = grammars().compile(&list, Thinking::No).unwrap_err();
    assert!(error.contains("not of type \"array\""), "{error}");
}

#[test]
fn thoughts_may_come_first() {
    let shape = Shape::Choice(vec!["yes".into()]);
    let grammars = grammars();
    let no = grammars.compile(&shape, Thinking::No).unwrap();
    assert!(!no.mask().contains(THINK));
    let possible = grammars.compile(&shape, Thinking::Possible).unwrap();
    assert!(possible.mask().contains(THINK));
    let tokens = |text_: &str| text().tokenizer().encode(text_, false).unwrap();
    for (thinking, answer) in [
        (Thinking::Possible, "yes"),
        (Thinking::Possible, "<think>no, \n\nyes, no</think>\n\nyes"),
        (Thinking::Open, "\nhm</think>yes"),
    ] {
        let mut grammar = grammars.compile(&shape, thinking).unwrap();
        let tokens = tokens(answer);
        let (last, others) = tokens.split_last().unwrap();
        for &token in others {
            assert!(grammar.mask().contains(token), "{answer}: {token}");
            assert_ne!(grammar.accept(token).unwrap(), Next::End, "{answer}");
        }
        assert_eq!(grammar.accept(*last).unwrap(), Next::End, "{answer}");
    }
}

#[test]
fn copies_go_their_own_ways() {
    let shape = Shape::Choice(vec!["ab".into(), "cd".into()]);
    let mut one = grammars().compile(&shape, Thinking::No).unwrap();
    let mut other = one.clone();
    let token = |text_: &str| text().tokenizer().encode(text_, false).unwrap()[0];
    one.accept(token("a")).unwrap();
    other.accept(token("c")).unwrap();
    assert_eq!(one.mask().iter().collect::<Vec<_>>(), [token("b")]);
    assert_eq!(other.mask().iter().collect::<Vec<_>>(), [token("d")]);
    assert!(one.accept(token("c")).is_err());
}

/// What does not compile, and what would take for ever, is refused; the times are for the reader.
#[test]
fn bad_and_exploding_shapes_are_refused() {
    let deep = (0..100).fold(
        json!({"type": "null"}),
        |schema, _| json!({"type": "array", "items": {"anyOf": [schema, {"type": "string"}]}}),
    );
    let wide: serde_json::Map<String, Json> = (0..300)
        .map(|at| {
            (
                format!("p{at}"),
                json!({"type": "string", "pattern": "(a|b)*c{1,900}"}),
            )
        })
        .collect();
    let nested = "((a{1,1000}){1,1000}){1,1000}";
    for (shape, refused) in [
        (
            Shape::JsonSchema(json!({"type": "nothing"})),
            Some("nothing"),
        ),
        (
            Shape::JsonSchema(json!({"$ref": "http://127.0.0.1/s"})),
            Some("127.0.0.1"),
        ),
        (Shape::JsonSchema(json!({"$ref": "#"})), Some(NOTHING)),
        (
            Shape::JsonSchema(json!({"x-guidance": {}})),
            Some("x-guidance"),
        ),
        (Shape::JsonSchema(json!(7)), Some("an object")),
        (
            Shape::JsonSchema(json!({"type": "string", "pattern": "("})),
            Some("unclosed"),
        ),
        (Shape::JsonSchema(deep), None),
        (
            Shape::JsonSchema(json!({"type": "object", "properties": wide})),
            None,
        ),
        (Shape::Regex(nested.into()), None),
        (Shape::Regex("(.*a){30}".into()), None),
        (Shape::Regex("(?=a)b".into()), Some("look-around")),
        (Shape::Regex("[".into()), Some("unclosed")),
        (Shape::Lark("start: start".into()), Some(NOTHING)),
        (Shape::Lark("start: @whole".into()), Some(NOTHING)),
        (Shape::Lark("begin: \"a\"".into()), Some("start")),
        (Shape::Lark("start: (".repeat(5000)), Some("Expected")),
        (
            Shape::Lark("start: ".to_owned() + &"(".repeat(100_000)),
            Some("nested"),
        ),
        (Shape::Choice(vec![String::new()]), None),
    ] {
        let began = Instant::now();
        let compiled = grammars().compile(&shape, Thinking::No);
        let shown: String = format!("{shape:?}").chars().take(60).collect();
        let error = compiled.err();
        println!("{shown}: {error:?} after {:?}", began.elapsed());
        match (refused, error) {
            (None, None) => {}
            (Some(words), Some(error)) => assert!(error.contains(words), "{error}"),
            (_, error) => panic!("{shown}: {error:?}"),
        }
    }
}

/// A chain of rules is followed by recursion: as long as it can be, it must not overflow the stack.
#[test]
fn the_longest_chains_compile() {
    let chain = |head: &str, link: &dyn Fn(usize) -> String, tail: &dyn Fn(usize) -> String| {
        let mut text = head.to_owned();
        let mut length = 0;
        while text.len() + 40 < MAX_GRAMMAR_BYTES {
            text += &link(length);
            length += 1;
        }
        text + &tail(length)
    };
    let rules = chain("start: r0\n", &|n| format!("r{n}:r{}\n", n + 1), &|n| {
        format!("r{n}: \"a\"\n")
    });
    let terminals = chain(
        "start: T0\n",
        &|n| format!("T{n}:\"a\"T{}?\n", n + 1),
        &|n| format!("T{n}: \"a\"\n"),
    );
    let schema = chain(
        "{\"$ref\":\"#/$defs/0\",\"$defs\":{",
        &|n| format!("\"{n}\":{{\"items\":{{\"$ref\":\"#/$defs/{}\"}}}},", n + 1),
        &|n| format!("\"{n}\":{{}}}}}}"),
    );
    let schema = serde_json::from_str(&schema).unwrap();
    for shape in [
        Shape::Lark(rules),
        Shape::Lark(terminals),
        Shape::JsonSchema(schema),
    ] {
        let mut grammar = grammars().compile(&shape, Thinking::No).unwrap();
        let first = grammar.mask().iter().next().unwrap();
        grammar.accept(first).unwrap();
    }
}
