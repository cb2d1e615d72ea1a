//! Several answers to one request: sequences of their own, each with a seed of its own.

use super::request::CheckedRequest;

/// Sequences that one request may start.
pub(super) const MAX_CHOICES: usize = 128;

/// The requests of `count` answers.
pub(super) fn choices(
    checked: &CheckedRequest,
    count: usize,
) -> impl Iterator<Item = CheckedRequest> {
    (0..count).map(|choice| {
        let mut checked = checked.clone();
        let seed = &mut checked.sequence.sampling.seed;
        *seed = derived_seed(*seed, choice as u64);
        checked
    })
}

/// The seed of a choice: the first has the request's own, so that it is what a request for one gets. The
/// others are of the SplitMix64 sequence (Steele, Lea and Flood, 2014) that begins there.
fn derived_seed(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_choices_differ_and_the_first_is_the_requests_own() {
        let seeds: std::collections::BTreeSet<u64> = (0..128)
            .flat_map(|choice| [derived_seed(7, choice), derived_seed(8, choice)])
            .collect();
        assert_eq!(seeds.len(), 256);
        assert_eq!(derived_seed(7, 0), 7);
        // The first value of the sequence that begins at 0.
        assert_eq!(derived_seed(0, 1), 0xe220_a839_7b1d_cdaf);
    }
}
