use std::time::{Duration, Instant};

use secondwind_model::config::GenerationDefaults;
use secondwind_model::step::LogitRules;
use secondwind_proto::v1;
use tonic::metadata::MetadataMap;

use super::{CONTEXT, chat_request, model, text_request};
use crate::api::{SamplingDefaults, check_generate, grpc_deadline};
use crate::text::fixture::{END_OF_TEXT, IM_END, tokenizer};

#[test]
fn a_silent_request_takes_the_checkpoints_defaults() {
    let mut model = model();
    let checked = check_generate(text_request("hello"), &model, None).unwrap();
    let sampling = &checked.sequence.sampling;
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p
        ),
        (0.0, 0, 1.0, 0.0)
    );
    assert_eq!(checked.sequence.stop_token_ids, [IM_END]);
    assert_eq!(checked.sequence.max_tokens, CONTEXT - 1);
    assert!(!checked.prompt_was_ids && checked.stops.is_empty());

    let warnings = model.apply_generation(&GenerationDefaults {
        do_sample: Some(true),
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.8),
        min_p: None,
        typical_p: Some(0.95),
        repetition_penalty: Some(1.05),
    });
    assert!(warnings.is_empty(), "{warnings:?}");
    let checked = check_generate(text_request("hello"), &model, None).unwrap();
    let sampling = &checked.sequence.sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_k, sampling.top_p),
        (0.7, 20, 0.8)
    );
    assert_eq!(sampling.typical_p, 0.95);
    let prompt_tokens = checked.sequence.prompt.len();
    let penalised = LogitRules {
        repetition_penalty: 1.05,
        prompt_tokens,
        ..LogitRules::default()
    };
    assert_eq!(sampling.rules.as_deref(), Some(&penalised));
    let request = v1::GenerateRequest {
        temperature: Some(0.0),
        top_k: Some(0),
        top_p: Some(1.0),
        min_p: Some(0.1),
        typical_p: Some(1.0),
        repetition_penalty: Some(1.0),
        seed: Some(5),
        ..text_request("hello")
    };
    let sampling = check_generate(request, &model, None)
        .unwrap()
        .sequence
        .sampling;
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.seed
        ),
        (0.0, 0, 1.0, 0.1, 5)
    );
    assert_eq!((sampling.typical_p, sampling.rules), (1.0, None));
}

#[test]
fn defaults_that_are_out_of_range_are_not_applied() {
    let (defaults, warnings) = SamplingDefaults::new(&GenerationDefaults {
        do_sample: Some(true),
        temperature: Some(-1.0),
        top_p: Some(0.0),
        min_p: Some(f32::NAN),
        typical_p: Some(1.5),
        repetition_penalty: Some(0.0),
        ..GenerationDefaults::default()
    });
    assert_eq!(
        (defaults.temperature, defaults.top_p, defaults.min_p),
        (1.0, 1.0, 0.0)
    );
    assert_eq!(
        (defaults.typical_p, defaults.repetition_penalty),
        (1.0, 1.0)
    );
    assert_eq!(warnings.len(), 5, "{warnings:?}");
    let (greedy, _) = SamplingDefaults::new(&GenerationDefaults {
        temperature: Some(0.7),
        top_p: Some(0.9),
        ..GenerationDefaults::default()
    });
    assert_eq!((greedy.temperature, greedy.top_p), (0.0, 0.9));
}

#[test]
fn stop_tokens_are_sorted_and_special_stop_strings_are_among_them() {
    let request = v1::GenerateRequest {
        stop_token_ids: vec![9, 3, 9],
        stop: vec![b"<|endoftext|>".to_vec(), b"x".to_vec()],
        ..text_request("hello")
    };
    let checked = check_generate(request.clone(), &model(), None).unwrap();
    assert_eq!(checked.sequence.stop_token_ids, [3, 9, END_OF_TEXT, IM_END]);
    assert_eq!(checked.stops, ["<|endoftext|>", "x"]);
    let request = v1::GenerateRequest {
        ignore_eos: true,
        ..request
    };
    let checked = check_generate(request, &model(), None).unwrap();
    assert_eq!(checked.sequence.stop_token_ids, [3, 9, END_OF_TEXT]);
}

#[test]
fn rules_are_whole_and_sorted_and_absent_where_they_change_nothing() {
    let request = v1::GenerateRequest {
        presence_penalty: Some(-2.0),
        frequency_penalty: Some(0.5),
        logit_bias: [(300, 100.0), (7, -100.0)].into(),
        min_tokens: Some(3),
        stop_token_ids: vec![9, 3],
        n: Some(1),
        best_of: Some(1),
        ..text_request("hello")
    };
    let rules = |request| {
        let checked = check_generate(request, &model(), None).unwrap();
        let prompt_tokens = checked.sequence.prompt.len();
        (checked.sequence.sampling.rules, prompt_tokens)
    };
    let (given, prompt_tokens) = rules(request);
    let expected = LogitRules {
        presence_penalty: -2.0,
        frequency_penalty: 0.5,
        logit_bias: vec![(7, -100.0), (300, 100.0)],
        min_tokens: 3,
        stop_tokens: vec![3, 9, IM_END],
        prompt_tokens,
        ..LogitRules::default()
    };
    assert_eq!(given.as_deref(), Some(&expected));
    let nothing = v1::GenerateRequest {
        repetition_penalty: Some(1.0),
        presence_penalty: Some(0.0),
        frequency_penalty: Some(0.0),
        min_tokens: Some(0),
        ..text_request("hello")
    };
    assert_eq!(rules(nothing).0, None);
}

#[test]
fn max_tokens_ends_at_the_context() {
    let max_tokens = |max_tokens| {
        let request = v1::GenerateRequest {
            max_tokens,
            ..text_request("hello world")
        };
        check_generate(request, &model(), None)
            .unwrap()
            .sequence
            .max_tokens
    };
    assert_eq!(max_tokens(Some(1)), 1);
    assert_eq!(max_tokens(Some(u32::MAX)), CONTEXT - 4);
    assert_eq!(max_tokens(None), CONTEXT - 4);
}

#[test]
fn seeds_are_drawn_anew() {
    let seed = || {
        check_generate(text_request("hello"), &model(), None)
            .unwrap()
            .sequence
            .sampling
            .seed
    };
    assert_ne!(seed(), seed());
}

#[test]
fn temperatures_too_small_to_divide_by_are_greedy() {
    let request = v1::GenerateRequest {
        temperature: Some(1e-30),
        ..text_request("hello")
    };
    assert_eq!(
        check_generate(request, &model(), None)
            .unwrap()
            .sequence
            .sampling
            .temperature,
        0.0
    );
}

#[test]
fn tools_and_variables_reach_the_template() {
    let mut request = chat_request(&[("user", "hi")]);
    if let Some(v1::generate_request::Prompt::Chat(chat)) = &mut request.prompt {
        chat.tools_json = vec![r#"{"b":"<x>","a":1}"#.to_owned()];
        chat.template_variables_json =
            r#"{"enable_thinking": false, "add_generation_prompt": false}"#.to_owned();
    }
    let mut model = model();
    model.max_context_tokens = 200;
    let checked = check_generate(request, &model, None).unwrap();
    assert_eq!(
        tokenizer().decode(&checked.sequence.prompt, false),
        "<|im_start|>user\nhi<|im_end|>\n[{\"b\": \"<x>\", \"a\": 1}]no thinking"
    );
}

#[test]
fn timeouts_are_read_as_grpc_writes_them() {
    let now = Instant::now();
    let deadline = |text: &str| {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().unwrap());
        grpc_deadline(&metadata, now).map(|deadline| deadline.map(|deadline| deadline - now))
    };
    for (text, timeout) in [
        ("2H", Duration::from_secs(7200)),
        ("3M", Duration::from_secs(180)),
        ("4S", Duration::from_secs(4)),
        ("5m", Duration::from_millis(5)),
        ("6u", Duration::from_micros(6)),
        ("99999999n", Duration::from_nanos(99_999_999)),
    ] {
        assert_eq!(deadline(text), Ok(Some(timeout)), "{text}");
    }
    for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1 S"] {
        assert!(deadline(wrong).is_err(), "{wrong:?}");
    }
    assert_eq!(grpc_deadline(&MetadataMap::new(), now), Ok(None));
    assert!(deadline("99999999H").is_ok());
}
