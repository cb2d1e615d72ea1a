//! How many tokens prompts and answers have.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use super::random::Random;

/// Tokens that a prompt or an answer may be asked to have.
const TOKENS: RangeInclusive<u32> = 1..=1 << 20;

/// A distribution of lengths, in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Always the same.
    Fixed(u32),
    /// Each from the first to the second alike.
    Uniform(u32, u32),
    /// Exponential, of this mean before it is rounded up and cut off at the most.
    Exponential { mean: u32, most: u32 },
}

impl Length {
    /// One of it.
    pub fn draw(&self, random: &mut Random) -> u32 {
        match *self {
            Self::Fixed(tokens) => tokens,
            Self::Uniform(least, most) => least + random.below(most - least + 1),
            Self::Exponential { mean, most } => {
                let tokens = (f64::from(mean) * random.exponential()).ceil();
                // Casts of floats saturate.
                (tokens as u32).clamp(1, most)
            }
        }
    }

    /// The longest that may be drawn.
    pub fn most(&self) -> u32 {
        match *self {
            Self::Fixed(most) | Self::Uniform(_, most) | Self::Exponential { most, .. } => most,
        }
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a length: fixed:N, uniform:A..B, exponential:MEAN or exponential:MEAN..MOST, in \
                 tokens from {} to {}",
                TOKENS.start(),
                TOKENS.end()
            )
        };
        let tokens = |text: &str| {
            let tokens = text.parse().ok().filter(|tokens| TOKENS.contains(tokens));
            tokens.ok_or_else(wrong)
        };
        let (kind, values) = text.split_once(':').ok_or_else(wrong)?;
        let length = match (kind, values.split_once("..")) {
            ("fixed", None) => Self::Fixed(tokens(values)?),
            ("uniform", Some((least, most))) => Self::Uniform(tokens(least)?, tokens(most)?),
            ("exponential", None) => Self::Exponential {
                mean: tokens(values)?,
                most: *TOKENS.end(),
            },
            ("exponential", Some((mean, most))) => Self::Exponential {
                mean: tokens(mean)?,
                most: tokens(most)?,
            },
            _ => return Err(wrong()),
        };
        match length {
            Self::Uniform(least, most) if least > most => Err(wrong()),
            Self::Exponential { mean, most } if mean > most => Err(wrong()),
            length => Ok(length),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(tokens) => write!(f, "fixed:{tokens}"),
            Self::Uniform(least, most) => write!(f, "uniform:{least}..{most}"),
            Self::Exponential { mean, most } if most == TOKENS.end() => {
                write!(f, "exponential:{mean}")
            }
            Self::Exponential { mean, most } => write!(f, "exponential:{mean}..{most}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_lengths_and_back() {
        for text in [
            "fixed:7",
            "uniform:1..1048576",
            "exponential:64",
            "exponential:64..200",
        ] {
            assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "7",
            "fixed:0",
            "fixed:-1",
            "fixed:1..2",
            "uniform:5",
            "uniform:5..4",
            "uniform:5..",
            "exponential:nan",
            "exponential:9..8",
            "fixed:1048577",
            "normal:3",
        ] {
            let error = text.parse::<Length>().unwrap_err();
            assert!(
                error.contains("is not a length: fixed:N"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn draws_follow_their_distribution() {
        let mut random = Random::new(11, 0);
        let mut draws = |length: Length| -> Vec<f64> {
            let draws = (0..20_000).map(|_| f64::from(length.draw(&mut random)));
            draws.collect()
        };
        let mean = |draws: &[f64]| draws.iter().sum::<f64>() / draws.len() as f64;
        assert!(draws(Length::Fixed(9)).iter().all(|draw| *draw == 9.0));

        let uniform = draws(Length::Uniform(3, 7));
        for value in 3..=7 {
            let count = uniform.iter().filter(|draw| **draw == f64::from(value));
            // 4000 are expected, give or take 57.
            assert!((3700..4300).contains(&count.count()), "{value}");
        }
        assert!(uniform.iter().all(|draw| (3.0..=7.0).contains(draw)));

        // What is rounded up is geometric, with success 1 - exp(-1 / mean): its mean is 1 / success.
        let exponential = draws(Length::Exponential {
            mean: 10,
            most: 1 << 20,
        });
        let expected = 1.0 / (1.0 - (-0.1_f64).exp());
        assert!((mean(&exponential) / expected - 1.0).abs() < 0.05);
        let longer = exponential.iter().filter(|draw| **draw > 20.0).count();
        // exp(-2) of 20000.
        assert!((2450..2960).contains(&longer), "{longer}");
        let cut = draws(Length::Exponential { mean: 10, most: 12 });
        assert!(cut.iter().all(|draw| (1.0..=12.0).contains(draw)));
        assert!(cut.contains(&12.0));
    }
}
