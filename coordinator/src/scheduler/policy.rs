//! Who is next: the one place that fairness between keys and priorities will change.

use std::collections::VecDeque;

use secondwind_model::step::SequenceId;

/// A waiting sequence as the policy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Ids are given in order of arrival.
    pub id: SequenceId,
}

/// Index of the sequence to admit next: first come, first served, whatever was preempted since.
pub(super) fn order(waiting: &VecDeque<Waiting>) -> Option<usize> {
    (0..waiting.len()).min_by_key(|&index| waiting[index].id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_arrive_is_next() {
        let waiting: VecDeque<_> = [7, 3, 9].map(|id| Waiting { id }).into();
        assert_eq!(order(&waiting), Some(1));
        assert_eq!(order(&VecDeque::new()), None);
    }
}
