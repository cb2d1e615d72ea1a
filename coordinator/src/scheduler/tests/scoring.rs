//! Log-probabilities of the prompt.

use super::*;

#[test]
fn prompt_targets_and_samples_share_the_logit_rows() {
    let mut it = scheduler(|settings| (settings.max_logit_rows, settings.max_sequences) = (3, 3));
    it.submit(request(2, 9)).unwrap();
    turn(&mut it, 5);
    it.submit(scored(6, 2)).unwrap();
    let (step, events) = turn(&mut it, 6);
    assert_eq!(shape(&step), [(1, 2, 1, true), (2, 0, 2, false)]);
    assert_eq!(step.rows[1].prompt_targets, [101, 102]);
    let logprobs = vec![(-101.0).into(), (-102.0).into()];
    assert_eq!(
        events,
        [
            token(1, 6),
            Event::PromptLogprobs {
                sequence: 2,
                position: 1,
                logprobs
            }
        ]
    );
    turn(&mut it, 6);
    let (step, events) = turn(&mut it, 7);
    assert_eq!(
        (shape(&step)[1], step.rows[1].prompt_targets.as_slice()),
        ((2, 4, 2, true), [105].as_slice())
    );
    let logprobs = vec![(-105.0).into()];
    assert_eq!(
        events[1..],
        [
            Event::PromptLogprobs {
                sequence: 2,
                position: 5,
                logprobs
            },
            token(2, 7)
        ]
    );
}

#[test]
fn a_prompt_can_be_scored_without_an_output() {
    let mut it = scheduler(|_| {});
    it.submit(scored(6, 0)).unwrap();
    it.submit(scored(1, 0)).unwrap();
    let (step, events) = turn(&mut it, 5);
    assert_eq!(shape(&step), [(1, 0, 6, false), (2, 0, 1, false)]);
    assert_eq!(
        events[1..],
        [
            finished(1, FinishReason::Length),
            finished(2, FinishReason::Length)
        ]
    );
    let mut whole =
        scheduler(|settings| (settings.max_step_tokens, settings.max_logit_rows) = (64, 64));
    assert_eq!(
        (whole.submit(scored(32, 0)), turn(&mut whole, 5).1.len()),
        (Ok(1), 2)
    );
}

#[test]
fn prompt_log_probabilities_are_not_given_twice() {
    let mut it = scheduler(|settings| settings.max_logit_rows = 5);
    it.submit(scored(8, 1)).unwrap();
    assert_eq!(
        turn(&mut it, 5).0.rows[0].prompt_targets,
        [101, 102, 103, 104, 105]
    );
    it.abort_epoch();
    let (step, events) = turn(&mut it, 5);
    assert_eq!((shape(&step), events), (vec![(1, 0, 5, false)], vec![]));
    let (step, events) = turn(&mut it, 5);
    assert_eq!((shape(&step), events.len()), (vec![(1, 5, 3, true)], 3));
    assert_eq!(step.rows[0].prompt_targets, [106, 107]);
}
