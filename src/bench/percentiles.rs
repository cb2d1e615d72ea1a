//! Percentiles of what was measured.

use serde::Serialize;

/// By nearest rank: each is a value that was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Percentiles {
    /// Of `values`, in any order; None of nothing.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied()
        };
        Some(Self {
            p50: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_the_least_value_that_as_many_do_not_exceed() {
        for count in [1_usize, 2, 3, 10, 99, 100, 101, 1000] {
            // Distinct values out of order: 7919 is a prime that divides none of the counts.
            let values: Vec<f64> = (0..count)
                .map(|index| (index * 7919 % count) as f64)
                .collect();
            let found = Percentiles::of(values.clone()).unwrap();
            for (percent, found) in [(50, found.p50), (90, found.p90), (99, found.p99)] {
                let enough = |value: f64| {
                    let below = values.iter().filter(|other| **other <= value).count();
                    below * 100 >= percent * count
                };
                let least = values.iter().copied().filter(|value| enough(*value));
                let least = least.fold(f64::INFINITY, f64::min);
                assert_eq!(found, least, "{percent} of {count}");
            }
        }
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}
