//! In which parts a step is worked on. Pure.

use std::ops::Range;

/// Parts of a step, at the most.
pub(super) const MOST_PARTS: usize = 2;
/// Tokens of a part, at the least. Smaller products keep a card less busy than the sums beside them are worth.
const PART_TOKENS: usize = 256;
/// Parts begin at a multiple of this, which is one of every linear path's rows of a block.
const PART_MULTIPLE: usize = 128;

/// The parts in which a step of `tokens` tokens is worked on: two where sums of one may go on while the other is
/// computed. Attention reads what earlier tokens left in the cache, so parts follow each other through each block.
pub(super) fn parts(tokens: usize, sums_aside: bool) -> Vec<Range<usize>> {
    let cut = match sums_aside && tokens >= MOST_PARTS * PART_TOKENS {
        true => (tokens / MOST_PARTS + PART_MULTIPLE / 2) / PART_MULTIPLE * PART_MULTIPLE,
        false => tokens,
    };
    let parts = [0..cut, cut..tokens].into_iter();
    parts.filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_tile_the_step() {
        for whole in [parts(4096, false), parts(511, true)] {
            assert_eq!((whole.len(), whole[0].start), (1, 0));
        }
        for tokens in 512..3000 {
            let parts = parts(tokens, true);
            assert_eq!(parts.len(), MOST_PARTS);
            assert_eq!((parts[0].start, parts[1].end), (0, tokens));
            assert_eq!(parts[0].end, parts[1].start);
            assert_eq!(parts[1].start % PART_MULTIPLE, 0);
            let shorter = parts[0].len().min(parts[1].len());
            assert!(shorter >= PART_TOKENS - PART_MULTIPLE / 2, "{parts:?}");
        }
    }
}
