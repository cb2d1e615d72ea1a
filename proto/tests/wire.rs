//! Conversions between the wire and the model's data.

use proptest::prelude::*;
use prost::Message;
use secondwind_model::{
    capabilities::{Capabilities, Recordings},
    step::{
        LogitRules, PromptLogprob, RowInput, RowResult, Sampling, Step, StepResult, StepRow,
        TokenLogprobs, TokenSet,
    },
};
use secondwind_proto::{
    WireError, fuzz, step_from_wire, step_result_from_wire, step_result_to_wire, step_to_wire, v1,
};

fn rules() -> impl Strategy<Value = LogitRules> {
    let ids = || prop::collection::vec(any::<u32>(), 0..4);
    (
        (0.1_f32..9.0, -2.0_f32..2.0, -2.0_f32..2.0),
        prop::collection::vec((any::<u32>(), -100.0_f32..100.0), 0..3),
        any::<u32>(),
        ids(),
        0_usize..1 << 40,
        ids(),
    )
        .prop_map(
            |(penalties, logit_bias, min_tokens, stop_tokens, prompt_tokens, history)| LogitRules {
                repetition_penalty: penalties.0,
                presence_penalty: penalties.1,
                frequency_penalty: penalties.2,
                logit_bias,
                min_tokens,
                stop_tokens,
                prompt_tokens,
                history,
            },
        )
}

fn sampling() -> impl Strategy<Value = Sampling> {
    (
        0.0_f32..9.0,
        0_u32..99,
        0.1_f32..1.0,
        0.0_f32..1.0,
        0.1_f32..1.0,
        any::<u64>(),
        prop::option::of(0_u32..20),
        prop::option::of(rules().prop_map(Box::new)),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, typical_p, seed, logprobs, rules)| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                typical_p,
                seed,
                logprobs,
                rules,
            },
        )
}

/// Few tokens of many, all but a few, and any number between: each has a form of its own.
fn mask() -> impl Strategy<Value = TokenSet> {
    let few = prop::collection::vec(0_u32..3000, 0..9);
    let any = prop::collection::vec(any::<u32>(), 94);
    (1_usize..3000, few, any, 0..3).prop_map(|(vocab_size, few, any, form)| match form {
        0 => TokenSet::from_tokens(few, vocab_size),
        1 => TokenSet::from_tokens(few, vocab_size).complement(),
        _ => TokenSet::from_words(&any, vocab_size),
    })
}

#[test]
fn sets_of_tokens_that_do_not_fit_their_vocabulary_are_refused() {
    use v1::token_set::Form;
    let refused = |vocab_size, form| {
        let row = v1::StepRow {
            input: Some(v1::step_row::Input::Tokens(v1::TokenIds { ids: vec![1] })),
            mask: Some(v1::TokenSet { vocab_size, form }),
            ..v1::StepRow::default()
        };
        StepRow::try_from(row).unwrap_err().to_string()
    };
    let ids = |id| v1::TokenIds { ids: vec![3, id] };
    for (vocab_size, form, named) in [
        (100, Some(Form::Only(ids(100))), "token 100 of 100"),
        (100, Some(Form::AllBut(ids(700))), "token 700 of 100"),
        (
            100,
            Some(Form::Bits(vec![0; 12])),
            "12 bytes for 100 tokens",
        ),
        (u32::MAX, Some(Form::Only(ids(4))), "4294967295"),
        (100, None, "form"),
    ] {
        let error = refused(vocab_size, form);
        assert!(
            error.contains(named) && error.contains("TokenSet"),
            "{error}"
        );
    }
}

fn row() -> impl Strategy<Value = StepRow> {
    let input = prop_oneof![
        prop::collection::vec(any::<u32>(), 1..5).prop_map(RowInput::Tokens),
        (any::<u64>(), 0_usize..64).prop_map(|(step, row)| RowInput::Sampled { step, row }),
    ];
    let ids = || prop::collection::vec(any::<u32>(), 0..4);
    (
        any::<u64>(),
        0_usize..1 << 40,
        input,
        ids(),
        prop::option::of(sampling()),
        ids(),
        prop::option::of(mask()),
    )
        .prop_map(
            |(sequence, position, input, new_blocks, sample, prompt_targets, mask)| StepRow {
                sequence,
                position,
                input,
                new_blocks,
                sample,
                prompt_targets,
                mask,
            },
        )
}

fn row_result() -> impl Strategy<Value = RowResult> {
    let top = prop::collection::vec((any::<u32>(), -9.0_f32..0.0), 0..3);
    let token =
        (any::<u32>(), prop::option::of(-9.0_f32..0.0), top).prop_map(|(token, logprob, top)| {
            TokenLogprobs {
                token,
                logprob,
                top,
            }
        });
    let top = prop::collection::vec((any::<u32>(), -9.0_f32..0.0), 0..3);
    let logprob = (-9.0_f32..0.0, top).prop_map(|(logprob, top)| PromptLogprob { logprob, top });
    let logprobs = prop::collection::vec(logprob, 0..4);
    (0_usize..64, prop::option::of(token), logprobs).prop_map(|(row, token, prompt_logprobs)| {
        RowResult {
            row,
            token,
            prompt_logprobs,
        }
    })
}

proptest! {
    #[test]
    fn steps_survive_the_wire(
        number in any::<u64>(),
        epoch in any::<u64>(),
        rows in prop::collection::vec(row(), 0..4),
        ended in prop::collection::vec(any::<u64>(), 0..3),
    ) {
        let step = Step { number, rows, ended };
        let bytes = step_to_wire(epoch, &step).encode_to_vec();
        let message = v1::Step::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(message.epoch, epoch);
        prop_assert_eq!(step_from_wire(message), Ok(step));
        fuzz::wire(&bytes);
    }

    #[test]
    fn results_survive_the_wire(
        number in any::<u64>(),
        rows in prop::collection::vec(row_result(), 0..4),
        gathered_rows in any::<u32>(),
    ) {
        let result = StepResult { number, rows, gathered_rows };
        let bytes = step_result_to_wire(3, result.clone()).encode_to_vec();
        let message = v1::StepResult::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(step_result_from_wire(message), Ok(result));
        fuzz::wire(&bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz::wire(&bytes);
    }

    #[test]
    fn damaged_steps_are_read_or_refused(
        rows in prop::collection::vec(row(), 1..4),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let step = Step { number: 1, rows, ended: vec![7] };
        let mut bytes = step_to_wire(1, &step).encode_to_vec();
        let at = at.index(bytes.len());
        bytes[at] = value;
        fuzz::wire(&bytes);
        fuzz::wire(&bytes[..at]);
    }
}

#[test]
fn what_is_missing_is_named() {
    let row = v1::StepRow::default();
    let message = v1::Step {
        rows: vec![row],
        ..Default::default()
    };
    let error = step_from_wire(message).unwrap_err();
    let expected = WireError::Missing {
        message: "StepRow",
        field: "input",
    };
    assert_eq!(error, expected);
    assert_eq!(error.to_string(), "StepRow lacks input");
    let error = secondwind_model::plan::ShardPlan::try_from(v1::Plan::default()).unwrap_err();
    assert_eq!(error.to_string(), "Plan lacks settings");
}

#[test]
fn recordings_survive_the_wire() {
    let worker = Capabilities {
        device: "card".into(),
        usable_bytes: 1,
        read_bytes_per_second: 2.0,
        all_reduce_latency_seconds: 0.0,
        op_latency_seconds: 3.0,
        linears: Vec::new(),
        recordings: Recordings {
            sizes: vec![1, 4],
            bytes_per_layer: 5,
            bytes_per_sum: 6,
            nccl_bytes: 7,
        },
    };
    let wire = v1::Capabilities::decode(v1::Capabilities::from(&worker).encode_to_vec().as_slice());
    assert_eq!(Capabilities::try_from(wire.unwrap()).unwrap(), worker);
}
