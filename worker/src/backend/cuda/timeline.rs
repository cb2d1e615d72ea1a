//! Marks on a card's stream.

use secondwind_kernels::{
    KernelError,
    cuda::{Device, Event},
};

use crate::timeline::{Mark, Span};

/// Events after the parts of a step. They are kept, so that the next step need not make them.
#[derive(Default)]
pub(super) struct Timeline {
    /// The start, and the end of each mark's part; there may be more than are in use.
    events: Vec<Event>,
    /// While a step is timed.
    marks: Option<Vec<Mark>>,
}

impl Timeline {
    /// True while a step is timed.
    pub(super) fn is_on(&self) -> bool {
        self.marks.is_some()
    }

    pub(super) fn start(&mut self, device: &Device) -> Result<(), KernelError> {
        self.marks = Some(Vec::new());
        self.put(device, 0)
    }

    pub(super) fn mark(&mut self, device: &Device, mark: Mark) -> Result<(), KernelError> {
        let Some(marks) = &mut self.marks else {
            return Ok(());
        };
        marks.push(mark);
        let index = marks.len();
        self.put(device, index)
    }

    /// Ends it; waits for the last mark.
    pub(super) fn finish(&mut self, device: &Device) -> Result<Vec<Span>, KernelError> {
        let marks = self.marks.take().unwrap_or_default();
        let between = marks.into_iter().zip(self.events.windows(2));
        between
            .map(|(mark, pair)| {
                let seconds = device.seconds_between(&pair[0], &pair[1])?;
                Ok(Span { mark, seconds })
            })
            .collect()
    }

    fn put(&mut self, device: &Device, index: usize) -> Result<(), KernelError> {
        match self.events.get(index) {
            Some(event) => device.put(event)?,
            None => self.events.push(device.event()?),
        }
        Ok(())
    }
}
