//! Steps that follow, and steps that do not.

use secondwind_model::step::{LogitRules, RowInput, Sampling, StepRow, TokenSet};

use super::*;

const LIMITS: Limits = Limits {
    vocab_size: 100,
    kv_blocks: 8,
    block_tokens: 4,
    max_context_tokens: 20,
    max_step_tokens: 8,
    max_logit_rows: 4,
};

fn row(sequence: u64, position: usize, tokens: &[u32], new_blocks: &[u32]) -> StepRow {
    StepRow {
        sequence,
        position,
        input: RowInput::Tokens(tokens.to_vec()),
        new_blocks: new_blocks.to_vec(),
        sample: None,
        prompt_targets: Vec::new(),
        mask: None,
        drafts: 0,
    }
}

fn step(number: u64, rows: Vec<StepRow>) -> Step {
    Step {
        number,
        rows,
        ended: Vec::new(),
    }
}

fn greedy() -> Option<Sampling> {
    Some(Sampling::default())
}

#[test]
fn lays_out_chunks_and_sampled_tokens_of_several_sequences() {
    let mut sequences = Sequences::new(LIMITS);
    let mut prompt = row(7, 0, &[1, 2, 3, 4, 5], &[3, 6]);
    prompt.prompt_targets = vec![2, 3];
    prompt.sample = greedy();
    let first = step(0, vec![prompt, row(9, 0, &[8], &[1])]);
    let batch = sequences.batch(&first).unwrap();
    assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 8]);
    assert_eq!(batch.positions, [0, 1, 2, 3, 4, 0]);
    assert_eq!(batch.slots, [12, 13, 14, 15, 24, 4]);
    assert_eq!(batch.block_tables, [3, 6, 1]);
    assert_eq!(batch.table_offsets, [0, 2, 3]);
    assert_eq!(batch.row_of_token, [0, 0, 0, 0, 0, 1]);
    assert_eq!(batch.context_lengths, [1, 2, 3, 4, 5, 1]);
    assert_eq!(batch.logit_tokens, [4, 0, 1]);
    assert_eq!(batch.samples, [(0, 5)]);
    assert_eq!(batch.targets, [(0, 2), (0, 3)]);

    sequences.sampled(&first, &[(0, vec![42])]);
    let mut next = row(7, 5, &[], &[]);
    next.input = RowInput::Sampled { step: 0, row: 0 };
    let batch = sequences.batch(&step(1, vec![next])).unwrap();
    assert_eq!((batch.tokens, batch.slots), (vec![42], vec![25]));
}

#[test]
fn rules_hold_until_a_sequence_leaves() {
    let mut sequences = Sequences::new(LIMITS);
    let ruled = |repetition_penalty, history: &[u32]| {
        Some(Sampling {
            rules: Some(Box::new(LogitRules {
                repetition_penalty,
                prompt_tokens: 3,
                history: history.to_vec(),
                ..LogitRules::default()
            })),
            ..Sampling::default()
        })
    };
    let touched = |sequences: &Sequences, step: &Step, batch: &Batch| {
        // This rank has tokens 10 to 49.
        let adjustments = sequences.adjustments(step, batch, &(10..50)).unwrap();
        let elements = |row| {
            let changes = &adjustments.changes[adjustments.of_row(row)];
            changes.iter().map(|change| change.element).collect()
        };
        (0..batch.samples.len())
            .map(elements)
            .collect::<Vec<Vec<u32>>>()
    };
    // The rules come with the last chunk of the prompt, beside a sequence without any.
    sequences
        .batch(&step(0, vec![row(7, 0, &[12, 9], &[3])]))
        .unwrap();
    let mut last = row(7, 2, &[49], &[]);
    last.sample = ruled(1.1, &[12, 9]);
    let mut other = row(8, 0, &[20], &[4]);
    other.sample = greedy();
    let second = step(1, vec![other, last]);
    let batch = sequences.batch(&second).unwrap();
    assert_eq!(
        touched(&sequences, &second, &batch),
        [vec![], vec![40 + 2, 40 + 39]]
    );
    sequences.sampled(&second, &[(0, vec![21]), (1, vec![30])]);
    let mut sampled = row(7, 3, &[], &[]);
    sampled.input = RowInput::Sampled { step: 1, row: 1 };
    sampled.sample = greedy();
    let third = step(2, vec![sampled]);
    let batch = sequences.batch(&third).unwrap();
    assert_eq!(touched(&sequences, &third, &batch), [vec![2, 20, 39]]);
    // Rules come once for each time that a sequence comes.
    let mut again = row(7, 4, &[1], &[5]);
    again.sample = ruled(1.1, &[12, 9, 49, 30]);
    let error = sequences
        .batch(&step(3, vec![again.clone()]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("its rules came before"), "{error}");
    let mut anew = step(4, vec![row(7, 0, &[1], &[2])]);
    anew.ended = vec![7];
    anew.rows[0].sample = greedy();
    let batch = sequences.batch(&anew).unwrap();
    assert_eq!(touched(&sequences, &anew, &batch), [Vec::<u32>::new()]);
    let mut wrong = row(9, 0, &[1], &[6]);
    wrong.sample = ruled(-1.0, &[]);
    let error = sequences.batch(&step(5, vec![wrong])).unwrap_err();
    assert!(error.to_string().contains("no legal numbers"), "{error}");
}

#[test]
fn a_padded_step_keeps_its_rows_and_adds_rows_without_a_cache() {
    let mut sequences = Sequences::new(LIMITS);
    sequences
        .batch(&step(0, vec![row(7, 0, &[5, 6], &[3])]))
        .unwrap();
    let mut decoding = row(7, 2, &[9], &[]);
    decoding.sample = greedy();
    let batch = sequences.batch(&step(1, vec![decoding])).unwrap();
    assert!(batch.is_decoding());
    let padded = batch.padded(3);
    assert_eq!(padded.tokens, [9, 0, 0]);
    assert_eq!(padded.slots[1..], [NO_SLOT; 2]);
    assert_eq!(padded.context_lengths, [3, 0, 0]);
    assert_eq!(padded.row_of_token, [0, 1, 2]);
    assert_eq!(padded.logit_tokens, [0, 1, 2]);
    assert_eq!(padded.table_offsets, [0, 1, 1, 1]);
    assert_eq!(batch.padded(1), batch);
}

#[test]
fn an_ended_sequence_starts_anew_in_the_same_step() {
    let mut sequences = Sequences::new(LIMITS);
    sequences
        .batch(&step(0, vec![row(7, 0, &[1, 2], &[3])]))
        .unwrap();
    let mut again = step(1, vec![row(7, 0, &[1], &[2])]);
    again.ended = vec![7];
    assert_eq!(sequences.batch(&again).unwrap().slots, [8]);
}

#[test]
fn a_new_sequence_may_start_after_full_blocks_of_another() {
    let mut sequences = Sequences::new(LIMITS);
    sequences
        .batch(&step(0, vec![row(7, 0, &[1, 2, 3, 4, 5, 6], &[3, 6])]))
        .unwrap();
    let batch = sequences
        .batch(&step(1, vec![row(8, 4, &[9, 9], &[3, 2])]))
        .unwrap();
    assert_eq!(batch.positions, [4, 5]);
    assert_eq!(batch.slots, [8, 9]);
    assert_eq!(batch.block_tables, [3, 2]);
    assert_eq!(batch.context_lengths, [5, 6]);
    // The blocks outlive the sequence that wrote them, until they are given to another.
    let mut third = step(2, vec![row(9, 4, &[1], &[3, 6])]);
    third.ended = vec![7, 8];
    assert_eq!(sequences.batch(&third).unwrap().block_tables, [3, 6]);
    let mut again = step(3, vec![row(7, 0, &[1], &[3])]);
    again.ended = vec![9];
    sequences.batch(&again).unwrap();
    let refused = sequences.batch(&step(4, vec![row(1, 4, &[1], &[3, 2])]));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("block 3, which is not full"),
    );
}

#[test]
fn refuses_to_share_anything_else() {
    let far = usize::MAX & !3;
    let cases: [(StepRow, &str); 9] = [
        (row(1, far, &[1; 5], &[3, 2]), "tokens of at most 20"),
        // Block 6 holds two tokens only, block 5 was never written.
        (row(1, 8, &[1], &[3, 6, 2]), "block 6, which is not full"),
        (row(1, 4, &[1], &[5, 2]), "block 5, which is not full"),
        (row(1, 6, &[1], &[3, 2]), "it starts at 6, 0 is due"),
        (row(1, 8, &[1], &[3]), "after more than the 1 blocks"),
        (row(1, 4, &[1], &[3]), "1 blocks do not hold 5 tokens"),
        (
            row(1, 8, &[1], &[3, 3, 2]),
            "block 3, which is not full or came twice",
        ),
        (row(1, 0, &[1], &[3]), "its block 3 is in use"),
        (row(1, 4, &[1], &[3, 6]), "its block 6 is in use"),
    ];
    for (asked, words) in cases {
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(0, vec![row(7, 0, &[1, 2, 3, 4, 5, 6], &[3, 6])]))
            .unwrap();
        let error = sequences.batch(&step(1, vec![asked])).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    // A known sequence goes on where it is, whatever it brings.
    let mut sequences = Sequences::new(LIMITS);
    sequences
        .batch(&step(
            0,
            vec![row(7, 0, &[1, 2, 3, 4], &[3]), row(8, 0, &[1], &[2])],
        ))
        .unwrap();
    let error = sequences
        .batch(&step(1, vec![row(8, 4, &[1], &[3, 5])]))
        .unwrap_err();
    assert!(
        error.to_string().contains("starts at 4, 1 is due"),
        "{error}"
    );
}

#[test]
fn refuses_what_does_not_follow() {
    let cases: [(StepRow, &str); 8] = [
        (row(1, 2, &[1], &[2]), "it starts at 2, 0 is due"),
        (
            row(1, 0, &[100], &[2]),
            "token 100 is outside the vocabulary of 100",
        ),
        (row(1, 0, &[1], &[0]), "block 0 is outside 1..8"),
        (row(1, 0, &[1], &[8]), "block 8 is outside 1..8"),
        (row(1, 0, &[1; 5], &[2]), "1 blocks do not hold 5 tokens"),
        (row(1, 0, &[], &[2]), "it carries no token"),
        (
            row(1, 0, &[1; 21], &[1, 2, 3, 4, 5, 6]),
            "it reaches 21 tokens of at most 20",
        ),
        (
            StepRow {
                input: RowInput::Sampled { step: 0, row: 3 },
                ..row(1, 0, &[], &[2])
            },
            "its token is of step 0, only the last step's are kept",
        ),
    ];
    for (row, words) in cases {
        let error = Sequences::new(LIMITS)
            .batch(&step(0, vec![row]))
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    }
    let error = Sequences::new(LIMITS)
        .batch(&step(3, Vec::new()))
        .unwrap_err();
    assert_eq!(
        error,
        BatchError::Gap {
            expected: 0,
            got: 3
        }
    );
    let error = Sequences::new(LIMITS)
        .batch(&step(0, vec![row(1, 0, &[1; 9], &[1, 2, 3])]))
        .unwrap_err();
    assert!(
        error.to_string().contains("9 tokens, the plan allows 8"),
        "{error}"
    );
}

#[test]
fn masks_are_cut_to_a_ranks_range() {
    let mut sequences = Sequences::new(LIMITS);
    let mut free = row(1, 0, &[1], &[1]);
    free.sample = greedy();
    let mut masked = row(2, 0, &[1, 2], &[2]);
    masked.sample = greedy();
    masked.mask = Some(TokenSet::from_tokens([3, 40, 41, 72, 99], 100));
    let step = step(0, vec![free, masked]);
    let batch = sequences.batch(&step).unwrap();
    let range = 40..73;
    let adjustments = sequences.adjustments(&step, &batch, &range).unwrap();
    assert_eq!(adjustments.masks.rows, [1]);
    // Tokens 40 and 41; token 72 is bit 0 of the second word.
    assert_eq!(adjustments.masks.words[0], 0b11);
    assert_eq!(adjustments.masks.words[1] & 1, 1);
    assert!(!adjustments.touch(0) && adjustments.touch(1));
}

#[test]
fn refuses_masks_under_which_nothing_can_be_drawn() {
    let refused = |mask, sample| {
        let mut row = row(1, 0, &[1], &[1]);
        row.sample = sample;
        row.mask = Some(mask);
        let step = step(0, vec![row]);
        let error = Sequences::new(LIMITS).batch(&step).unwrap_err();
        assert_eq!(error.sequence(), Some(1));
        error.to_string()
    };
    let empty = TokenSet::from_tokens([], 100);
    assert!(refused(empty.clone(), greedy()).contains("leaves no token"));
    assert!(refused(empty, None).contains("samples nothing"));
    let other = TokenSet::from_tokens([1], 99);
    assert!(refused(other, greedy()).contains("over 99 tokens"));
}

/// A row of one token and guesses.
fn guessing(sequence: u64, position: usize, tokens: &[u32], new_blocks: &[u32]) -> StepRow {
    StepRow {
        sample: greedy(),
        drafts: tokens.len() - 1,
        ..row(sequence, position, tokens, new_blocks)
    }
}

#[test]
fn guesses_are_decoding_rows_and_wrong_ones_are_forgotten() {
    let mut sequences = Sequences::new(LIMITS);
    let mut prompt = row(1, 0, &[1, 2], &[5]);
    prompt.sample = greedy();
    let first = step(0, vec![prompt]);
    sequences.batch(&first).unwrap();
    sequences.sampled(&first, &[(0, vec![3])]);

    let mut other = row(2, 0, &[9], &[6]);
    other.sample = greedy();
    let second = step(1, vec![guessing(1, 2, &[3, 4, 50], &[7]), other]);
    let batch = sequences.batch(&second).unwrap();
    assert!(batch.is_decoding());
    assert_eq!(batch.tokens, [3, 4, 50, 9]);
    assert_eq!(batch.positions, [2, 3, 4, 0]);
    assert_eq!(batch.slots, [22, 23, 28, 24]);
    assert_eq!(batch.block_tables, [5, 7, 5, 7, 5, 7, 6]);
    assert_eq!(batch.table_offsets, [0, 2, 4, 6, 7]);
    assert_eq!(batch.row_of_token, [0, 1, 2, 3]);
    assert_eq!(batch.step_rows, [0, 0, 0, 1]);
    assert_eq!(batch.context_lengths, [3, 4, 5, 1]);
    assert_eq!(batch.samples, [(0, 3), (0, 4), (0, 5), (1, 1)]);
    let extents: Vec<_> = batch.extents().collect();
    assert_eq!(extents, [(2, 1), (3, 1), (4, 1), (0, 1)]);
    // 4 is right, 50 is not.
    let kept = batch.kept(&second, &[4, 5, 60, 8]);
    assert_eq!(kept, [(0, 0..2), (1, 3..4)]);
    assert_eq!(batch.kept(&second, &[4, 50, 6, 8])[0], (0, 0..3));
    assert_eq!(batch.kept(&second, &[5, 50, 6, 8])[0], (0, 0..1));

    sequences.sampled(&second, &[(0, vec![4, 5]), (1, vec![8])]);
    // Position 4 is computed anew; block 5 is full, block 7 is not.
    let third = step(2, vec![guessing(1, 4, &[5], &[])]);
    assert_eq!(sequences.batch(&third).unwrap().slots, [28]);
    sequences.sampled(&third, &[(0, vec![6])]);
    let share = |block, number| {
        let mut row = row(3, 4, &[5], &[block, 4]);
        row.sample = greedy();
        step(number, vec![row])
    };
    assert!(sequences.batch(&share(7, 3)).is_err());
}

#[test]
fn refuses_guesses_that_something_else_depends_on() {
    let refused = |change: &dyn Fn(&mut StepRow)| {
        let mut sequences = Sequences::new(LIMITS);
        sequences
            .batch(&step(0, vec![row(1, 0, &[1], &[5])]))
            .unwrap();
        let mut row = guessing(1, 1, &[3, 4], &[]);
        change(&mut row);
        sequences
            .batch(&step(1, vec![row]))
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&|row| row.drafts = 2).contains("2 of its 2 tokens are guesses"));
    assert!(refused(&|row| row.drafts = usize::MAX).contains("tokens are guesses"));
    for change in [
        (&|row: &mut StepRow| row.sample = None) as &dyn Fn(&mut StepRow),
        &|row| row.mask = Some(TokenSet::from_tokens([1], 100)),
        &|row| row.prompt_targets = vec![4],
        &|row| {
            let rules = LogitRules {
                presence_penalty: 1.0,
                ..LogitRules::default()
            };
            row.sample = Some(Sampling {
                rules: Some(Box::new(rules)),
                ..Sampling::default()
            });
        },
    ] {
        assert!(refused(change).contains("not by them alone"));
    }
}
