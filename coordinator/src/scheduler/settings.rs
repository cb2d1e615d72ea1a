//! What bounds the scheduler's decisions.

use super::lookup::Speculation;

/// What the plan and the operator allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// Sequences that may run at once. No more run than a step has tokens or logit rows for, so that
    /// neither decodes nor prompts starve.
    pub max_sequences: usize,
    /// Tokens of one step.
    pub max_step_tokens: usize,
    /// Tokens of prompts in a step in which others decode, for each of up to four sequences that wait or
    /// are not yet computed.
    pub max_prefill_tokens: usize,
    /// Rows of one step for which logits are computed.
    pub max_logit_rows: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// KV blocks of the group, the padding block included.
    pub kv_blocks: usize,
    /// Longest sequence, prompt and output together.
    pub max_context_tokens: usize,
    /// Steps in flight: 1 or 2.
    pub max_in_flight: usize,
    /// Sequences that may wait beyond those for which there is a place to run.
    pub max_waiting: usize,
    /// Tokens of all that wait, beyond which no further sequence is taken; a lone one always is.
    pub max_waiting_tokens: usize,
    /// Keep full blocks, and share them between sequences of one tenant that begin alike.
    pub prefix_cache: bool,
    /// Guess tokens of sequences that repeat themselves.
    pub speculation: Option<Speculation>,
}

/// Settings under which nothing could run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A limit that must be positive is not.
    #[error("{setting} must be at least 1")]
    Zero {
        /// Its name.
        setting: &'static str,
    },
    /// Only one or two steps can be in flight: a row feeds on the step before its own at most.
    #[error("max_in_flight must be 1 or 2, not {max_in_flight}")]
    InFlight {
        /// What was asked for.
        max_in_flight: usize,
    },
}

impl SchedulerSettings {
    /// Nothing that must be positive is 0.
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        for (setting, value) in [
            ("max_sequences", self.max_sequences),
            ("max_step_tokens", self.max_step_tokens),
            ("max_prefill_tokens", self.max_prefill_tokens),
            ("max_logit_rows", self.max_logit_rows),
            ("block_tokens", self.block_tokens),
            ("max_context_tokens", self.max_context_tokens),
        ] {
            if value == 0 {
                return Err(SettingsError::Zero { setting });
            }
        }
        if !(1..=2).contains(&self.max_in_flight) {
            return Err(SettingsError::InFlight {
                max_in_flight: self.max_in_flight,
            });
        }
        Ok(())
    }

    /// Sequences that run at once: each of them must find a token and a row of logits in a step.
    pub(super) fn max_running(&self) -> usize {
        self.max_sequences
            .min(self.max_step_tokens)
            .min(self.max_logit_rows)
    }
}
