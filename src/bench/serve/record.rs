//! What is noted of a request while its answer comes.

use std::{ops::ControlFlow, time::Instant};

use super::load::Ask;

/// One request, from its start to its end. Times are in seconds since the level began.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub start: f64,
    pub pieces: Vec<Piece>,
    pub end: f64,
    pub outcome: Outcome,
}

/// A part of an answer that came at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    pub at: f64,
    /// Where the protocol tells them.
    pub tokens: Option<u32>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Done(Usage),
    /// By us.
    Cancelled,
    /// By an error of this kind.
    Failed(String),
}

/// Tokens as the server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Notes the pieces of an answer as they come.
pub struct Listener {
    began: Instant,
    pieces: Vec<Piece>,
    tokens: u32,
    cancel_after: Option<u32>,
}

impl Listener {
    /// To the answer of `ask`; times count from `began`.
    pub fn new(began: Instant, ask: &Ask) -> Self {
        Self {
            began,
            pieces: Vec::new(),
            tokens: 0,
            cancel_after: ask.cancel_after,
        }
    }

    /// A piece came; breaks where the request is to be given up.
    pub fn hear(&mut self, tokens: Option<u32>) -> ControlFlow<()> {
        let at = self.began.elapsed().as_secs_f64();
        self.pieces.push(Piece { at, tokens });
        // A piece whose tokens nobody tells has at least one.
        self.tokens = self.tokens.saturating_add(tokens.unwrap_or(1));
        match self.cancel_after {
            Some(after) if self.tokens >= after => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }

    /// The record of a request that began at `start` and ended now: with the usage, given up, or by an error of
    /// this kind.
    pub fn end(self, start: f64, ended: Result<Option<Usage>, String>) -> Record {
        let outcome = match ended {
            Ok(Some(usage)) => Outcome::Done(usage),
            Ok(None) => Outcome::Cancelled,
            Err(kind) => Outcome::Failed(kind),
        };
        Record {
            start,
            end: self.began.elapsed().as_secs_f64(),
            pieces: self.pieces,
            outcome,
        }
    }
}
