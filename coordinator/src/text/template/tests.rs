use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Map, Value as Json, json};

use super::{ChatInput, ChatTemplate, Limits, TemplateError, fuzz};

fn render_with(limits: Limits, source: &str, input: &ChatInput) -> Result<String, TemplateError> {
    ChatTemplate::compile("chat_template.jinja", source, limits)?.render(&Map::new(), input)
}

fn render(source: &str) -> Result<String, TemplateError> {
    let input = ChatInput {
        messages: vec![json!({"role": "user", "content": "Hi"})],
        ..ChatInput::default()
    };
    render_with(Limits::default(), source, &input)
}

/// Every feature renders as `transformers` renders it; see `make_template_features.py` beside the file.
#[test]
fn renders_features_as_transformers_does() {
    let cases: Vec<Json> =
        serde_json::from_str(include_str!("../../../tests/data/template_features.json")).unwrap();
    assert!(cases.len() > 60);
    let mut wrong = Vec::new();
    for case in &cases {
        let input = ChatInput {
            messages: case["messages"].as_array().unwrap().clone(),
            tools: case["tools"].as_array().cloned(),
            add_generation_prompt: true,
            variables: case["variables"].as_object().unwrap().clone(),
        };
        let source = case["template"].as_str().unwrap();
        let rendered = render_with(Limits::default(), source, &input);
        let right = match (&rendered, case.get("expected")) {
            (Ok(text), Some(expected)) => expected.as_str() == Some(text),
            (Err(_), None) => true,
            _ => false,
        };
        if !right {
            let expected = case.get("expected").unwrap_or(&case["error"]);
            wrong.push(format!(
                "template {source}\n  expected {expected}\n  rendered {rendered:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_template_that_loops_for_ever_is_an_error_that_names_it() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let started = Instant::now();
    let error = render(endless).unwrap_err();
    assert!(matches!(error, TemplateError::Endless { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "chat template chat_template.jinja did not end within 4000000 instructions"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_template_that_is_slow_without_instructions_is_given_up() {
    let limits = Limits {
        time: Duration::from_millis(50),
        ..Limits::default()
    };
    let slow = "{% for a in range(200) %}{% set x = ('x' * 20000000) ~ a %}{% endfor %}";
    let error = render_with(limits, slow, &ChatInput::default()).unwrap_err();
    assert!(matches!(error, TemplateError::TimedOut { .. }), "{error}");
}

#[test]
fn recursion_and_output_are_limited() {
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    let error = render(recursive).unwrap_err();
    assert!(matches!(error, TemplateError::Failed { .. }), "{error}");

    let limits = Limits {
        output_bytes: 1 << 20,
        ..Limits::default()
    };
    let limit = |source: &str| match render_with(limits, source, &ChatInput::default()) {
        Err(TemplateError::OutputTooLong { limit_bytes, .. }) => limit_bytes,
        other => panic!("{other:?}"),
    };
    let long = "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}";
    assert_eq!(limit(long), 1 << 20);
    let nested = "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    assert_eq!(limit(&format!("{nested}{{{{ ns.x | tojson }}}}")), 1 << 20);
    assert_eq!(limit(&format!("{nested}{{{{ ns.x }}}}")), 1 << 20);
    assert_eq!(limit(&format!("{nested}{{{{ [ns.x] | join }}}}")), 1 << 20);
}

#[test]
fn values_nested_as_deep_as_the_fuel_reaches_are_freed() {
    let nest = format!(
        "{{% set ns = namespace(x=[]) %}}{{% for a in range(99999) %}}{{% set ns.x = {}ns.x{} %}}{{% endfor %}}",
        "[".repeat(60),
        "]".repeat(60)
    );
    let error = render(&nest).unwrap_err();
    assert!(matches!(error, TemplateError::Endless { .. }), "{error}");
    let deep = "{% set ns = namespace(x=[]) %}{% for b in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let error = render(deep).unwrap_err().to_string();
    assert!(error.contains("nests deeper than 900 levels"), "{error}");
}

#[test]
fn nothing_outside_the_template_is_reachable() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ open('/etc/passwd') }}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
    let error = render("{% include 'chat_template.jinja' %}").unwrap_err();
    assert!(matches!(error, TemplateError::Failed { .. }), "{error}");
}

/// The engine's slices index past the end of what is empty; no template may take the process down.
#[test]
fn a_panic_of_the_engine_is_an_error() {
    for source in ["{{ ''[::-1] }}", "{% for x in [][::-1] %}{% endfor %}"] {
        match render(source) {
            Ok(text) => assert_eq!(text, ""),
            Err(error) => assert!(error.to_string().ends_with("the template engine gave up")),
        }
    }
}

#[test]
fn errors_name_the_template_and_the_line() {
    let error = render("a\n{% if %}").unwrap_err().to_string();
    assert!(
        error.starts_with("chat template chat_template.jinja does not parse: ")
            && error.ends_with("(line 2)"),
        "{error}"
    );
    let error = render("a\nb\n{{ x.y }}").unwrap_err().to_string();
    assert!(
        error.starts_with("chat template chat_template.jinja failed on these messages: ")
            && error.ends_with("(line 3)"),
        "{error}"
    );
    let error = render("{{ raise_exception('no ' ~ messages[0].role) }}").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the chat template refuses the messages: no user"
    );
    // Also from inside a macro and a filter block.
    let inner = "{% macro f() %}{{ raise_exception('deep') }}{% endmacro %}{% filter upper %}{{ f() }}{% endfilter %}";
    let error = render(inner).unwrap_err();
    assert!(matches!(error, TemplateError::Raised { .. }), "{error}");
    let source = "x".repeat((1 << 20) + 1);
    assert!(matches!(
        render(&source),
        Err(TemplateError::SourceTooLong { .. })
    ));
}

#[test]
fn the_date_is_todays() {
    let today = jiff::Zoned::now().date();
    let rendered = render("{{ strftime_now('%Y-%m-%d') }}").unwrap();
    let tomorrow = jiff::Zoned::now().date();
    assert!([today, tomorrow].contains(&rendered.parse().unwrap()));
    assert!(render("{{ strftime_now('%d %B %Y, %H:%M:%S %A %b %j') }}").is_ok());
    assert!(render("{{ strftime_now('%!') }}").is_err());
}

#[test]
fn special_tokens_are_variables_and_requests_override_them() {
    let template = ChatTemplate::compile(
        "t",
        "{{ bos_token }}{{ eos_token }}{{ x }}",
        Limits::default(),
    )
    .unwrap();
    let tokens = Map::from_iter([("eos_token".to_owned(), json!("<end>"))]);
    let mut input = ChatInput::default();
    assert_eq!(template.render(&tokens, &input).unwrap(), "<end>");
    input.variables.insert("eos_token".to_owned(), json!("E"));
    input.variables.insert("x".to_owned(), json!(1));
    assert_eq!(template.render(&tokens, &input).unwrap(), "E1");
}

/// Pieces of templates, so that random mixes of them often parse.
const PIECES: [&str; 48] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{%-",
    "-%}",
    " for ",
    " in ",
    " if ",
    " else ",
    " endfor ",
    " endif ",
    " set ",
    "=",
    " m ",
    " x ",
    "messages",
    "tools",
    "ns.x",
    "namespace(x=1)",
    "[",
    "]",
    "(",
    ")",
    "[::-1]",
    "[1:]",
    "[0:9:-2]",
    "'a b'",
    "1",
    "-3",
    "1e400",
    "none",
    "~",
    "+",
    "*",
    "%",
    " | tojson",
    " | length",
    " | join('x')",
    " | trim",
    ".split(' ')",
    ".strip()",
    ".items()",
    ".x",
    "range(9)",
    "{'a': 1}",
    " macro f(a) ",
    " endmacro ",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_template_ends_with_a_text_or_an_error(
        pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40),
        expression in prop::collection::vec(prop::sample::select(&PIECES[14..46]), 1..8),
    ) {
        let chat = r#"{"messages": [{"role": "user", "content": "a b"}], "tools": [{"x": [1.5, null]}]}"#;
        fuzz(format!("{}\0{chat}", pieces.concat()).as_bytes());
        let expression = expression.concat();
        fuzz(format!("{{% for m in {expression} %}}{{{{ m }}}}{{% endfor %}}{{{{ {expression} }}}}\0{chat}").as_bytes());
    }
}
