//! What a device keeps beside a model: recordings of decoding steps, and its part of the link between cards.

use super::PlanSettings;
use crate::capabilities::Capabilities;

/// Bytes that a rank's device keeps beside the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordedBytes {
    /// Recorded decoding steps.
    pub graphs: u64,
    /// The link over which cards sum.
    pub nccl: u64,
}

/// Tokens of the decoding steps that a device records which wants those of `wanted`, rising, where steps have
/// up to `decoding` tokens: the least size that holds them all ends the list, cut to it. Workers record by
/// this list.
pub fn recorded_sizes(wanted: &[usize], decoding: usize) -> Vec<usize> {
    let most = wanted.last().map_or(0, |last| decoding.min(*last));
    let below = wanted.iter().copied().take_while(|size| *size < most);
    below.chain((most > 0).then_some(most)).collect()
}

/// Bytes that `rank` of these workers keeps beside a model of `layers` layers.
///
/// A rank alone records its steps without sums. Several record theirs with two sums a layer and one for the
/// embedding if all of them have NCCL, and else nothing, for a sum over the host cannot be recorded. That
/// counts too much where the operator turns NCCL off, never too little.
pub fn recorded_bytes(
    layers: usize,
    settings: &PlanSettings,
    workers: &[Capabilities],
    rank: usize,
) -> RecordedBytes {
    let own = &workers[rank].recordings;
    let decoding = settings.max_sequences.min(settings.max_step_tokens);
    let sizes = recorded_sizes(&own.sizes, decoding).len() as u64;
    let layers = layers as u64;
    let alone = own.bytes_per_layer.saturating_mul(layers);
    let sums = own.bytes_per_sum.saturating_mul(2 * layers + 1);
    match workers {
        [_] => RecordedBytes {
            graphs: sizes.saturating_mul(alone),
            nccl: 0,
        },
        _ if workers
            .iter()
            .all(|worker| worker.recordings.nccl_bytes > 0) =>
        {
            RecordedBytes {
                graphs: sizes.saturating_mul(alone.saturating_add(sums)),
                nccl: own.nccl_bytes,
            }
        }
        _ => RecordedBytes::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::Recordings;
    use crate::plan::tests::shapes::{settings, worker};

    fn card(nccl_bytes: u64) -> Capabilities {
        Capabilities {
            recordings: Recordings {
                sizes: vec![1, 2, 4, 8],
                bytes_per_layer: 10,
                bytes_per_sum: 100,
                nccl_bytes,
            },
            ..worker(1 << 30, 1e9)
        }
    }

    #[test]
    fn sizes_end_with_the_largest_step() {
        let wanted = [1, 2, 4, 8];
        assert_eq!(recorded_sizes(&wanted, 100), [1, 2, 4, 8]);
        assert_eq!(recorded_sizes(&wanted, 8), [1, 2, 4, 8]);
        assert_eq!(recorded_sizes(&wanted, 5), [1, 2, 4, 5]);
        assert_eq!(recorded_sizes(&wanted, 1), [1]);
        assert!(recorded_sizes(&[], 5).is_empty());
        assert!(recorded_sizes(&wanted, 0).is_empty());
    }

    #[test]
    fn sums_are_recorded_where_every_rank_can() {
        let settings = PlanSettings {
            max_sequences: 5,
            ..settings()
        };
        let bytes = |workers: &[Capabilities]| recorded_bytes(3, &settings, workers, 0);
        let (card, without) = (card(7), card(0));
        let host = worker(1 << 30, 1e9);
        let alone = RecordedBytes {
            graphs: 4 * 3 * 10,
            nccl: 0,
        };
        for one in [&card, &without] {
            assert_eq!(bytes(std::slice::from_ref(one)), alone);
        }
        let together = RecordedBytes {
            graphs: 4 * (3 * 10 + 7 * 100),
            nccl: 7,
        };
        assert_eq!(bytes(&[card.clone(), card.clone()]), together);
        for other in [without, host.clone()] {
            assert_eq!(bytes(&[card.clone(), other]), RecordedBytes::default());
        }
        assert_eq!(bytes(&[host]), RecordedBytes::default());
    }
}
