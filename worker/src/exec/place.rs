//! Where in a step something went wrong, and what.

use secondwind_kernels::KernelError;

use crate::{backend::Check, batch::Batch, collective::CollectiveError};

/// A step that failed on this rank.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// A value is not a number or not finite: the step's results are void.
    #[error("{place}: element {index} of row {row} is not finite")]
    NonFinite {
        /// Layer and operation.
        place: Place,
        /// Token of the step, or logit row.
        row: usize,
        /// Column.
        index: usize,
    },
    /// An operation failed.
    #[error("{place}: {source}")]
    Op {
        /// Layer and operation.
        place: Place,
        /// The device's or kernel's word.
        source: KernelError,
    },
    /// The ranks fell apart.
    #[error("{place}: {source}")]
    Collective {
        /// Layer and operation.
        place: Place,
        /// Who and why.
        source: CollectiveError,
    },
    /// A peer sent what this rank cannot read.
    #[error("{place}: {what}")]
    Protocol {
        /// Layer and operation.
        place: Place,
        /// What is wrong with it.
        what: String,
    },
}

impl ExecError {
    /// The token of the step whose values are the cause, where that is known.
    pub fn token(&self, batch: &Batch) -> Option<usize> {
        match self {
            Self::NonFinite { place, row, .. } if place.op == LM_HEAD => {
                batch.logit_tokens.get(*row).map(|&token| token as usize)
            }
            Self::NonFinite { row, .. } => Some(*row),
            _ => None,
        }
    }
}

/// The operation whose rows are logit rows.
pub(super) const LM_HEAD: &str = "lm_head";

/// Operations of a layer whose outputs are checked.
const LAYER_OPS: [&str; 11] = [
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.softmax",
    "attention.output",
    "attention.add",
    "mlp.gate",
    "mlp.up",
    "mlp.silu",
    "mlp.down",
    "mlp.add",
];

/// Where in the model something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Absent before the first and after the last layer.
    pub layer: Option<usize>,
    /// The operation.
    pub op: &'static str,
}

impl Place {
    /// The number under which the operation's output is checked: they rise through a step, and 0
    /// stands for what comes after the last layer.
    pub(super) fn check(self, layers: usize) -> Check {
        let op = LAYER_OPS.iter().position(|op| *op == self.op);
        match (self.layer, op) {
            (Some(layer), Some(op)) => (layer * LAYER_OPS.len() + op) as Check,
            _ => (layers * LAYER_OPS.len()) as Check,
        }
    }

    /// What [`Place::check`] numbered.
    pub(super) fn of_check(check: Check, layers: usize) -> Self {
        let (layer, op) = (
            check as usize / LAYER_OPS.len(),
            check as usize % LAYER_OPS.len(),
        );
        match layer < layers {
            true => Self {
                layer: Some(layer),
                op: LAYER_OPS[op],
            },
            false => Self {
                layer: None,
                op: LM_HEAD,
            },
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layer {layer}, {}", self.op),
            None => f.write_str(self.op),
        }
    }
}
