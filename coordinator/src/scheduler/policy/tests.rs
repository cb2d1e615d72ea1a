//! Order, fairness and the end of waiting.

use proptest::prelude::*;

use super::*;

/// A queue with its policy, and what a sequence costs.
#[derive(Default)]
struct Queue {
    policy: Policy,
    waiting: VecDeque<Waiting>,
    next_id: SequenceId,
    cost: BTreeMap<SequenceId, usize>,
}

impl Queue {
    fn arrive(&mut self, tenant: u32, priority: i8, cost: usize) -> SequenceId {
        self.next_id += 1;
        let id = self.next_id;
        let waiting = self.policy.arrive(&self.waiting, id, tenant, priority);
        self.waiting.push_back(waiting);
        self.cost.insert(id, cost);
        id
    }

    fn let_in(&mut self) -> Option<Waiting> {
        let index = self.policy.next(&self.waiting)?;
        let waiting = self.waiting.remove(index)?;
        self.policy.let_in(&waiting, self.cost[&waiting.id]);
        Some(waiting)
    }

    fn ids(&mut self, count: usize) -> Vec<SequenceId> {
        (0..count)
            .map_while(|_| self.let_in())
            .map(|it| it.id)
            .collect()
    }
}

#[test]
fn of_one_tenant_the_highest_priority_is_next_then_the_first_to_arrive() {
    let mut queue = Queue::default();
    for priority in [0, 0, 5, -1, 5] {
        queue.arrive(0, priority, 1);
    }
    assert_eq!(queue.ids(9), [3, 5, 1, 2, 4]);
    assert_eq!(queue.policy.next(&queue.waiting), None);
}

#[test]
fn the_tenant_with_the_least_work_is_next_whatever_the_priorities() {
    let mut queue = Queue::default();
    for _ in 0..3 {
        queue.arrive(7, 100, 10);
    }
    for _ in 0..4 {
        queue.arrive(8, 0, 4);
    }
    // 7 has 10, 8 comes to 4, 8, 12; then 7 has 20 and 8 has 16.
    assert_eq!(queue.ids(7), [1, 4, 5, 6, 2, 7, 3]);
}

#[test]
fn nobody_saves_up_turns_by_staying_away() {
    let mut queue = Queue::default();
    queue.arrive(1, 0, 1);
    queue.arrive(2, 0, 1);
    queue.ids(2);
    for _ in 0..20 {
        queue.arrive(1, 0, 10);
    }
    queue.ids(10);
    let late: Vec<_> = (0..10).map(|_| queue.arrive(2, 0, 10)).collect();
    let turns = queue.ids(10);
    let of_late = turns.iter().filter(|id| late.contains(id)).count();
    assert!((5..=6).contains(&of_late), "{turns:?}");
    // Nor by coming when the queue is empty.
    queue.ids(99);
    queue.arrive(3, 0, 1);
    assert_eq!(
        queue.policy.counter(3),
        queue.policy.counter(queue.policy.last.unwrap())
    );
}

#[test]
fn whoever_waits_again_goes_first_and_is_not_charged_twice() {
    let mut queue = Queue::default();
    for _ in 0..3 {
        queue.arrive(0, 0, 10);
    }
    let first = queue.let_in().unwrap();
    let again = queue.policy.return_to_wait(first.id, 0, 0);
    queue.waiting.push_back(again);
    assert_eq!(queue.ids(3), [1, 2, 3]);
    assert_eq!(queue.policy.counter(0), 30);
}

#[test]
fn a_sequence_rises_while_others_of_its_tenant_pass_it() {
    let mut queue = Queue::default();
    let victim = queue.arrive(0, -1, 1);
    let passed = (0..1000).position(|_| {
        queue.arrive(0, 1, 1);
        queue.let_in().unwrap().id == victim
    });
    // Two priorities up it is as high as the others, and older.
    assert_eq!(passed, Some(2 * AGE as usize));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Of any two tenants that always wait, neither gets more than one sequence ahead.
    #[test]
    fn work_is_shared_evenly(costs in prop::collection::vec((0..4_u32, any::<i8>(), 1..100_usize), 40..400)) {
        let mut queue = Queue::default();
        for &(tenant, priority, cost) in &costs {
            queue.arrive(tenant, priority, cost);
        }
        let tenants: Vec<u32> = queue.policy.tenants.keys().copied().collect();
        let mut work = BTreeMap::<u32, usize>::new();
        while tenants.iter().all(|&tenant| queue.waiting.iter().any(|it| it.tenant == tenant)) {
            let it = queue.let_in().unwrap();
            *work.entry(it.tenant).or_default() += queue.cost[&it.id];
            let of = |tenant| work.get(tenant).copied().unwrap_or(0);
            let most = tenants.iter().map(of).max().unwrap();
            let least = tenants.iter().map(of).min().unwrap();
            prop_assert!(most - least <= 100, "{:?}", work);
        }
    }

    /// Whatever arrives later, whoever waits is let in after a bounded number of others.
    #[test]
    fn nobody_starves(
        before in prop::collection::vec((0..3_u32, -2..=2_i8, 1..20_usize), 0..20),
        later in prop::collection::vec((0..3_u32, -2..=2_i8, 1..20_usize), 1..40),
    ) {
        let mut queue = Queue::default();
        for &(tenant, priority, cost) in &before {
            queue.arrive(tenant, priority, cost);
        }
        let victim = queue.arrive(0, -2, 1);
        // Five priorities of AGE turns each and those that were there; in each turn of its tenant the
        // two others may spend the twenty tokens of one sequence in sequences of one token.
        let turns = (5 * AGE as usize + before.len() + 1) * (1 + 2 * 21);
        let waited = (0..turns).position(|turn| {
            let (tenant, priority, cost) = later[turn % later.len()];
            queue.arrive(tenant, priority, cost);
            queue.arrive(0, 2, cost);
            queue.let_in().unwrap().id == victim
        });
        prop_assert!(waited.is_some(), "{} others were let in", turns);
    }
}
