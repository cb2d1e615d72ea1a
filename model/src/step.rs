//! One step of the group as plain data: what the scheduler decides and every rank executes.

mod token_set;

pub use token_set::TokenSet;

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
    /// The only tokens that may be sampled, after rules; never empty. Absent: all may.
    pub mask: Option<TokenSet>,
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
///
/// Logits are changed as `rules` say and divided by `temperature`; then `top_k`, `top_p`, `min_p` and
/// `typical_p` filter, in this order, each what the former left, as `transformers` does.
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
    /// Keeps the tokens whose surprisal is nearest to the entropy until they hold this much probability
    /// (Meister et al., "Locally Typical Sampling", 2022). 1 is off.
    pub typical_p: f32,
    /// Seed of the counter-based generator.
    pub seed: u64,
    /// Number of most likely tokens to report with the sampled one; `None` reports no log-probability.
    pub logprobs: Option<u32>,
    /// What changes the sequence's logits. Comes with the first row that samples since the sequence came
    /// to the workers, and holds until it leaves them.
    pub rules: Option<Box<LogitRules>>,
}

impl Default for Sampling {
    /// Greedy, of the logits as they are.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 0,
            logprobs: None,
            rules: None,
        }
    }
}

/// What changes a sequence's logits before anything is drawn, and what that depends on.
///
/// With `n` the times that a token is among the output, its logit becomes, in this order:
/// `x + bias`; where prompt or output have the token, `x / repetition_penalty` if positive, else
/// `x * repetition_penalty`; `x - (frequency_penalty * n + presence_penalty)` if `n > 0`. While the output
/// is shorter than `min_tokens`, stop tokens cannot be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitRules {
    /// Above 0; 1 is off (Keskar et al., "CTRL", 2019, as `transformers` applies it).
    pub repetition_penalty: f32,
    /// 0 is off (OpenAI's definition, as that of `frequency_penalty`).
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// (token, amount), by rising token, each token once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens of output before which `stop_tokens` are out of the question.
    pub min_tokens: u32,
    /// Rising; empty if `min_tokens` is 0.
    pub stop_tokens: Vec<u32>,
    /// How many of the sequence's tokens are its prompt; the others are output.
    pub prompt_tokens: usize,
    /// The sequence's tokens from [`LogitRules::history_start`] up to the row that brings these rules, which
    /// need not cross the wire otherwise: their KV may be there already. The scheduler fills it in.
    pub history: Vec<u32>,
}

impl Default for LogitRules {
    /// Nothing is changed.
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            stop_tokens: Vec::new(),
            prompt_tokens: 0,
            history: Vec::new(),
        }
    }
}

impl LogitRules {
    /// True if no logit changes.
    pub fn change_nothing(&self) -> bool {
        !self.count_prompt()
            && !self.count_output()
            && self.logit_bias.is_empty()
            && self.min_tokens == 0
    }

    /// Position of the first of a sequence's `position` first tokens that matter to the rules; `position` if
    /// none does.
    pub fn history_start(&self, position: usize) -> usize {
        match (self.count_prompt(), self.count_output()) {
            (true, _) => 0,
            (false, true) => self.prompt_tokens.min(position),
            (false, false) => position,
        }
    }

    fn count_prompt(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    fn count_output(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
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
    /// Of `prompt_targets`.
    pub prompt_logprobs: Vec<PromptLogprob>,
}

/// Most likely tokens that are ever reported in the place of a token.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// The natural log-probability of a prompt token, and the most likely tokens in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprob {
    /// Of the token that stands there.
    pub logprob: f32,
    /// [`MAX_TOP_LOGPROBS`] most likely tokens, or as many as there are; best first, equal ones by id.
    pub top: Vec<(u32, f32)>,
}

impl From<f32> for PromptLogprob {
    /// Of a token whose rivals nobody knows.
    fn from(logprob: f32) -> Self {
        Self {
            logprob,
            top: Vec::new(),
        }
    }
}

/// A token, its natural log-probability, and the most likely tokens. Probabilities are the model's own: of the
/// logits before rules, temperature and filters, as vLLM reports them by default. So they compare between
/// requests, and a token that a rule forbids may be among the most likely ones.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Its log-probability; present when asked for.
    pub logprob: Option<f32>,
    /// Most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}
