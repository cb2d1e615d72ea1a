//! One step of the group as plain data: what the scheduler decides and every rank executes.

/// Names a sequence for the life of the coordinator.
pub type SequenceId = u64;

/// Work of one step. Every rank of an epoch gets the same steps in the same order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Counts from 0 within an epoch, without gaps.
    pub number: u64,
    /// What runs; each sequence appears at most once.
    pub rows: Vec<StepRow>,
    /// Sequences that workers forget before they run `rows`.
    pub ended: Vec<SequenceId>,
}

/// One sequence's part of a step: a chunk of its prompt, or its next token.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRow {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Position of the first token of `input` in the sequence.
    pub position: usize,
    /// The tokens.
    pub input: RowInput,
    /// KV blocks appended to the sequence's table before it runs. Of a sequence that workers do not know
    /// the first ones may be full blocks of others, which hold its tokens before `position`; all others
    /// are its own.
    pub new_blocks: Vec<u32>,
    /// Sample after the last token of `input`; absent for a chunk that does not end the prompt.
    pub sample: Option<Sampling>,
    /// For each token of `input`, the log-probability of the token that follows it: literal targets,
    /// `input.len()` or one fewer of them. Empty when nobody asked.
    pub prompt_targets: Vec<u32>,
}

/// Where a row's tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum RowInput {
    /// Literal ids.
    Tokens(Vec<u32>),
    /// The one token that step `step` samples in its row `row`.
    Sampled {
        /// Step number, the one before at the most.
        step: u64,
        /// Index into that step's `rows`.
        row: usize,
    },
}

impl RowInput {
    /// Tokens that it stands for.
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Sampled { .. } => 1,
        }
    }

    /// True for an empty literal, which no step may carry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How one token is drawn. Random numbers are a function of (`seed`, position) only.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// Seed of the counter-based generator.
    pub seed: u64,
    /// Number of most likely tokens to report with the sampled one; `None` reports no log-probability.
    pub logprobs: Option<u32>,
}

/// What rank 0 answers for one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// The step's number.
    pub number: u64,
    /// One entry per row that samples or has prompt targets, in row order.
    pub rows: Vec<RowResult>,
    /// Rows whose whole logits had to be gathered because the candidates did not cover `top_p`.
    pub gathered_rows: u32,
}

/// What one row gave.
#[derive(Clone, Debug, PartialEq)]
pub struct RowResult {
    /// Index into the step's `rows`.
    pub row: usize,
    /// The sampled token with its log-probability, when the row sampled.
    pub token: Option<TokenLogprobs>,
    /// Natural log-probabilities of `prompt_targets`.
    pub prompt_logprobs: Vec<f32>,
}

/// A token, its natural log-probability under the unscaled logits, and the most likely ones.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Its log-probability; present when asked for.
    pub logprob: Option<f32>,
    /// Most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}
