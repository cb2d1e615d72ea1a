//! Which requests are made, and when: a function of the seed, whatever the server does.

use super::{length::Length, random::Random};

/// Streams of the seed that are no request's.
const SHARED: u64 = u64::MAX;
const ARRIVALS: u64 = u64::MAX - 1;

/// What requests are like.
#[derive(Clone, Debug)]
pub struct Load {
    pub seed: u64,
    /// Tokens after the shared prefix.
    pub prompt: Length,
    pub output: Length,
    /// Tokens that all prompts begin with.
    pub shared_prefix: usize,
    /// Share of the requests that are given up before their end, from 0 to 1.
    pub cancel: f64,
    /// Token ids of prompts are below this.
    pub vocab: u32,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub output_tokens: u32,
    /// Give up once as many tokens came.
    pub cancel_after: Option<u32>,
}

impl Load {
    /// Request `index` of a level. No two are alike but for the shared prefix, so that a cache finds only that.
    pub fn ask(&self, level: u32, index: u32) -> Ask {
        let mut random = Random::new(self.seed, u64::from(level) << 32 | u64::from(index));
        let output_tokens = self.output.draw(&mut random);
        let gives_up = random.unit() <= self.cancel;
        let after = 1 + random.below(output_tokens.saturating_sub(1).max(1));
        let length = self.prompt.draw(&mut random);
        let mut shared = Random::new(self.seed, SHARED);
        let mut prompt = Vec::with_capacity(self.shared_prefix + length as usize);
        prompt.extend((0..self.shared_prefix).map(|_| shared.below(self.vocab)));
        prompt.extend((0..length).map(|_| random.below(self.vocab)));
        Ask {
            prompt,
            output_tokens,
            cancel_after: gives_up.then_some(after),
        }
    }

    /// When requests come, in seconds: a Poisson process of `rate` requests per second.
    pub fn arrivals(&self, level: u32, rate: f64) -> impl Iterator<Item = f64> + use<> {
        let mut random = Random::new(self.seed ^ u64::from(level), ARRIVALS);
        let mut at = 0.0;
        std::iter::repeat_with(move || {
            at += random.exponential() / rate;
            at
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn load() -> Load {
        Load {
            seed: 5,
            prompt: Length::Uniform(4, 9),
            output: Length::Uniform(1, 30),
            shared_prefix: 12,
            cancel: 0.25,
            vocab: 100,
        }
    }

    #[test]
    fn requests_share_their_prefix_and_nothing_else() {
        let load = load();
        let asks: Vec<Ask> = (0..4000).map(|index| load.ask(1, index)).collect();
        let own: HashSet<&[u32]> = asks.iter().map(|ask| &ask.prompt[12..]).collect();
        // Two of 100^4 or more are hardly ever alike.
        assert!(own.len() >= 3990, "{}", own.len());
        for ask in &asks {
            assert_eq!(ask.prompt[..12], asks[0].prompt[..12]);
            assert!((16..=21).contains(&ask.prompt.len()));
            assert!(ask.prompt.iter().all(|id| *id < 100));
            let least_and_most = 1..=ask.output_tokens.max(2) - 1;
            assert!(
                ask.cancel_after
                    .is_none_or(|after| least_and_most.contains(&after))
            );
        }
        let cancelled = asks.iter().filter(|ask| ask.cancel_after.is_some()).count();
        // 1000 are expected, give or take 27.
        assert!((900..1100).contains(&cancelled), "{cancelled}");
        assert_eq!(load.ask(1, 7), asks[7]);
        assert_ne!(load.ask(2, 7), asks[7]);
        let none = Load {
            cancel: 0.0,
            ..load
        };
        assert!((0..999).all(|index| none.ask(0, index).cancel_after.is_none()));
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let times: Vec<f64> = load().arrivals(0, 50.0).take(20_000).collect();
        assert_eq!(
            times,
            load().arrivals(0, 50.0).take(20_000).collect::<Vec<_>>()
        );
        assert!(times.is_sorted() && times[0] > 0.0);
        // Counts in seconds have the mean and the variance 50.
        let seconds = times[times.len() - 1] as usize;
        let mut counts = vec![0.0; seconds];
        for at in &times {
            if let Some(count) = counts.get_mut(*at as usize) {
                *count += 1.0;
            }
        }
        let mean = counts.iter().sum::<f64>() / seconds as f64;
        let squares = counts.iter().map(|count| (count - mean) * (count - mean));
        let variance = squares.sum::<f64>() / seconds as f64;
        assert!((mean - 50.0).abs() < 2.0, "{mean}");
        assert!((35.0..65.0).contains(&variance), "{variance}");
    }
}
