//! What a step gave: checked as a whole, then appended, finished and freed.

use std::ops::Range;

use secondwind_model::step::{RowResult, SequenceId, StepResult};

use super::policy::OUTPUT_WORK;
use super::sequence::{Mask, Phase};
use super::{Event, FinishReason, Scheduler};

/// A step sent and not committed.
#[derive(Clone, Debug)]
pub(super) struct InFlightStep {
    pub number: u64,
    pub rows: Vec<InFlightRow>,
}

/// What one of its rows will have done.
#[derive(Clone, Debug)]
pub(super) struct InFlightRow {
    pub id: SequenceId,
    /// Position after its last token.
    pub end: usize,
    /// Positions of its prompt targets.
    pub targets: Range<usize>,
    pub samples: bool,
    /// How many of its last tokens are guesses.
    pub drafts: usize,
}

/// A result that does not answer the oldest step in flight. Nothing of it was taken over; the epoch
/// cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// No step is in flight.
    #[error("result of step {number}, but no step is in flight")]
    NothingInFlight {
        /// The result's step.
        number: u64,
    },
    /// Results come in the order of their steps.
    #[error("result of step {number}, but step {expected} is the next to commit")]
    OutOfOrder {
        /// The result's step.
        number: u64,
        /// The oldest in flight.
        expected: u64,
    },
    /// The rows that sampled or had prompt targets are not exactly those of the result, in order.
    #[error(
        "result of step {step} answers {answers} rows where {expected} sample or have targets, or others"
    )]
    Rows {
        /// The step.
        step: u64,
        /// Rows in the result.
        answers: usize,
        /// Rows that must be there.
        expected: usize,
    },
    /// Too few tokens, or too many.
    #[error("result of step {step}, row {row}: {tokens} tokens, of {least} to {most}")]
    Tokens {
        /// The step.
        step: u64,
        /// The row.
        row: usize,
        /// Those in the result.
        tokens: usize,
        /// Whether the row samples: 0 or 1.
        least: usize,
        /// With all its guesses.
        most: usize,
    },
    /// Too few or too many prompt log-probabilities.
    #[error(
        "result of step {step}, row {row}: {logprobs} prompt log-probabilities for {targets} targets"
    )]
    PromptLogprobs {
        /// The step.
        step: u64,
        /// The row.
        row: usize,
        /// Those in the result.
        logprobs: usize,
        /// Those asked for.
        targets: usize,
    },
}

impl InFlightRow {
    fn answers(&self) -> bool {
        self.samples || !self.targets.is_empty()
    }
}

impl InFlightStep {
    fn check(&self, result: &StepResult) -> Result<(), CommitError> {
        let step = self.number;
        if result.number != step {
            return Err(CommitError::OutOfOrder {
                number: result.number,
                expected: step,
            });
        }
        let expected = || {
            self.rows
                .iter()
                .enumerate()
                .filter(|(_, row)| row.answers())
        };
        if !expected()
            .map(|(index, _)| index)
            .eq(result.rows.iter().map(|answer| answer.row))
        {
            let (answers, expected) = (result.rows.len(), expected().count());
            return Err(CommitError::Rows {
                step,
                answers,
                expected,
            });
        }
        for ((row, sent), answer) in expected().zip(&result.rows) {
            let (tokens, least) = (answer.tokens.len(), usize::from(sent.samples));
            let most = least + sent.drafts;
            if !(least..=most).contains(&tokens) {
                return Err(CommitError::Tokens {
                    step,
                    row,
                    tokens,
                    least,
                    most,
                });
            }
            let (logprobs, targets) = (answer.prompt_logprobs.len(), sent.targets.len());
            if logprobs != targets {
                return Err(CommitError::PromptLogprobs {
                    step,
                    row,
                    logprobs,
                    targets,
                });
            }
        }
        Ok(())
    }
}

impl Scheduler {
    /// Takes the result of the oldest step in flight: one entry for each row that samples or has prompt
    /// targets, in row order. Events of one sequence are in order: prompt log-probabilities, token, end.
    pub fn commit(&mut self, result: StepResult) -> Result<Vec<Event>, CommitError> {
        let number = result.number;
        let Some(oldest) = self.in_flight.front() else {
            return Err(CommitError::NothingInFlight { number });
        };
        oldest.check(&result)?;
        let rows = self
            .in_flight
            .pop_front()
            .map(|step| step.rows)
            .unwrap_or_default();
        let mut events = Vec::with_capacity(result.rows.len());
        let mut answers = result.rows.into_iter();
        for row in rows {
            let answer = if row.answers() { answers.next() } else { None };
            self.commit_row(&row, answer, &mut events);
        }
        Ok(events)
    }

    fn commit_row(
        &mut self,
        row: &InFlightRow,
        answer: Option<RowResult>,
        events: &mut Vec<Event>,
    ) {
        let id = row.id;
        let RowResult {
            tokens,
            prompt_logprobs,
            ..
        } = answer.unwrap_or(RowResult {
            row: 0,
            tokens: Vec::new(),
            prompt_logprobs: Vec::new(),
        });
        let sequence = &mut self.sequences[id];
        sequence.in_flight -= 1;
        // What was computed of wrong guesses does not count.
        let right = tokens.len().saturating_sub(1);
        let end = row.end - (row.drafts - right);
        if row.drafts > 0 {
            sequence.guessing = false;
            sequence.scheduled = end;
            self.totals.guessing_rows += 1;
            self.totals.guessed_tokens += row.drafts as u64;
            self.totals.right_guesses += right as u64;
        }
        self.totals.computed_tokens += (end - sequence.computed) as u64;
        self.totals.recomputed_tokens += (end
            .min(sequence.high_water)
            .saturating_sub(sequence.computed)) as u64;
        sequence.computed = end;
        sequence.high_water = sequence.high_water.max(end);
        if sequence.phase == Phase::Finishing {
            sequence.register_blocks(&mut self.kv, self.settings.block_tokens);
            self.drop_if_over(id);
            return;
        }
        if !prompt_logprobs.is_empty() {
            sequence.logprobs_done += prompt_logprobs.len();
            let position = row.targets.start;
            events.push(Event::PromptLogprobs {
                sequence: id,
                position,
                logprobs: prompt_logprobs,
            });
        }
        let mut reason = None;
        sequence.pending -= usize::from(row.samples);
        for token in tokens {
            if let Some(lookup) = &mut sequence.lookup {
                lookup.came(&sequence.tokens, token.token);
            }
            sequence.tokens.push(token.token);
            if sequence.mask != Mask::Free {
                sequence.mask = Mask::Due;
            }
            self.totals.sampled_tokens += 1;
            self.policy.charge(sequence.realm.tenant, OUTPUT_WORK);
            if sequence.stop_tokens.contains(&token.token) {
                reason = Some(FinishReason::StopToken);
            } else if sequence.output_tokens() >= sequence.max_output {
                reason = Some(FinishReason::Length);
            }
            events.push(Event::Token {
                sequence: id,
                token,
            });
            if reason.is_some() {
                break;
            }
        }
        if sequence.max_output == 0 && row.end == sequence.tokens.len() {
            reason = Some(FinishReason::Length);
        }
        sequence.register_blocks(&mut self.kv, self.settings.block_tokens);
        if let Some(reason) = reason {
            events.push(Event::Finished {
                sequence: id,
                reason,
            });
            self.end(id);
        }
    }
}
