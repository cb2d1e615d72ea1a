//! An answer on a terminal as it comes: what the model says on standard output, what it thinks and calls on
//! standard error.

use anyhow::Result;
use secondwind_proto::v1::GenerateResponse;

use crate::output;

/// How far an answer is shown.
#[derive(Debug, Default)]
pub struct Show {
    /// The cursor stands behind reasoning.
    thinking: bool,
    /// Something went to standard output.
    pub answered: bool,
}

impl Show {
    /// Shows the next piece.
    pub fn piece(&mut self, piece: &GenerateResponse) -> Result<()> {
        if !piece.reasoning.is_empty() {
            self.thinking = true;
            output::aside(&piece.reasoning);
        }
        if !piece.text.is_empty() {
            self.end_thought("\n\n");
            self.answered = true;
            output::print(&piece.text)?;
        }
        if piece.finish.is_some() {
            self.end_thought("\n");
        }
        Ok(())
    }

    fn end_thought(&mut self, line_breaks: &str) {
        if std::mem::take(&mut self.thinking) {
            output::aside(line_breaks);
        }
    }
}
