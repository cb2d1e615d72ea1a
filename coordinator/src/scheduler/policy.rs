//! Who is let in next: fair between tenants by tokens of work, by priority within a tenant.
//!
//! Tenants are served by the virtual token counter of Sheng et al., "Fairness in Serving Large Language
//! Models" (OSDI 2024): each has a counter of the work done for it, and the one with the least is next.
//! A prompt is charged when it is let in, for the tokens that are computed; an output token when it is
//! there. A tenant that comes to an empty queue of its own is lifted to the least counter of those that
//! wait, so that nobody saves up turns by staying away. While two tenants have sequences waiting, the
//! work done for them differs by a bound that does not grow with time.
//!
//! Within a tenant the highest priority is next, then the first to arrive. A priority never takes another
//! tenant's share. A waiting sequence rises by one for every [`AGE`] sequences of its tenant that are let
//! in before it, so that it waits for a bounded number of them.
//!
//! Whoever was preempted, or lost its group, goes first, the oldest before all others: it was charged.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use secondwind_model::step::SequenceId;

/// What an output token costs, in tokens of a prompt: it has a step to itself, a prompt shares one.
pub(super) const OUTPUT_WORK: u64 = 2;

/// Sequences of its tenant let in before a sequence, for which it rises by one priority.
pub(super) const AGE: u64 = 8;

/// A waiting sequence as the policy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Ids are given in order of arrival.
    pub id: SequenceId,
    pub tenant: u32,
    pub priority: i8,
    /// It was let in before.
    pub again: bool,
    /// How many of its tenant had been let in when it came.
    came_after: u64,
}

/// What is remembered of the tenants that ever had a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Policy {
    tenants: BTreeMap<u32, Tenant>,
    /// Whose sequence was let in last.
    last: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    /// Work done for it, and what it was lifted by.
    counter: u64,
    /// Sequences let in.
    let_in: u64,
}

impl Policy {
    /// Takes a new sequence into the books of its tenant; it is still to join those that wait.
    pub fn arrive(
        &mut self,
        waiting: &VecDeque<Waiting>,
        id: SequenceId,
        tenant: u32,
        priority: i8,
    ) -> Waiting {
        let new = |waiting: &&Waiting| !waiting.again;
        if waiting.iter().filter(new).all(|it| it.tenant != tenant) {
            let waits = waiting.iter().filter(new).map(|it| it.tenant);
            let least = match waits.map(|it| self.counter(it)).min() {
                Some(least) => least,
                None => self.last.map_or(0, |last| self.counter(last)),
            };
            let entry = self.tenants.entry(tenant).or_default();
            entry.counter = entry.counter.max(least);
        }
        Waiting {
            id,
            tenant,
            priority,
            again: false,
            came_after: self.tenants.entry(tenant).or_default().let_in,
        }
    }

    /// A sequence that was let in and has to wait again.
    pub fn return_to_wait(&self, id: SequenceId, tenant: u32, priority: i8) -> Waiting {
        Waiting {
            id,
            tenant,
            priority,
            again: true,
            came_after: 0,
        }
    }

    /// Index of the sequence to let in next.
    pub fn next(&self, waiting: &VecDeque<Waiting>) -> Option<usize> {
        let all = || waiting.iter().enumerate();
        let again = all().filter(|(_, it)| it.again);
        if let Some((index, _)) = again.min_by_key(|(_, it)| it.id) {
            return Some(index);
        }
        // At equal counters the tenant with the oldest sequence, so that newcomers pass nobody.
        let (_, first) = all().min_by_key(|(_, it)| (self.counter(it.tenant), it.id))?;
        let tenant = first.tenant;
        let let_in = self.tenants.get(&tenant).map_or(0, |it| it.let_in);
        let of_tenant = all().filter(|(_, it)| it.tenant == tenant);
        let rank = |it: &Waiting| {
            let risen = let_in.saturating_sub(it.came_after) / AGE;
            i64::from(it.priority).saturating_add_unsigned(risen)
        };
        of_tenant
            .max_by_key(|(_, it)| (rank(it), Reverse(it.id)))
            .map(|(index, _)| index)
    }

    /// A sequence was let in, of which `tokens` are computed.
    pub fn let_in(&mut self, waiting: &Waiting, tokens: usize) {
        if waiting.again {
            return;
        }
        self.charge(waiting.tenant, tokens as u64);
        self.tenants.entry(waiting.tenant).or_default().let_in += 1;
        self.last = Some(waiting.tenant);
    }

    /// Work was done for a tenant.
    pub fn charge(&mut self, tenant: u32, work: u64) {
        self.tenants.entry(tenant).or_default().counter += work;
    }

    fn counter(&self, tenant: u32) -> u64 {
        self.tenants.get(&tenant).map_or(0, |it| it.counter)
    }
}

#[cfg(test)]
mod tests;
