//! Unquantised weights rounded to 8 bits: symmetric, with a scale for each group of rows of a column.

use half::f16;

/// Codes of 8 bits; 0 stands for -128.
const MIDDLE: f32 = 128.0;
const MOST: f32 = 127.0;

/// Weights on their way into 8 bits.
pub struct Requantised {
    k: usize,
    n: usize,
    group: usize,
    /// (ceil(k / group), n).
    pub scales: Vec<f16>,
    /// (k / 4 rounded up to units of 32 rows, n) codes packed along k as GPTQ packs them.
    pub words: Vec<u32>,
    /// (k) codes of one column, on their way to `words`.
    codes: Vec<u8>,
}

impl Requantised {
    /// Nothing written yet.
    pub fn new(k: usize, n: usize, group: usize) -> Self {
        let padded = k.next_multiple_of(32);
        Self {
            k,
            n,
            group,
            scales: vec![f16::ZERO; k.div_ceil(group) * n],
            words: vec![0; padded / 4 * n],
            codes: Vec::new(),
        }
    }

    /// (k) the row of `scales` that each row uses.
    pub fn group_of_row(&self) -> Vec<u32> {
        (0..self.k).map(|row| (row / self.group) as u32).collect()
    }

    /// Rounds whole columns, of k weights each, the first being column `first`.
    pub fn write(&mut self, first: usize, weights: &[f32]) {
        let columns = weights.len() / self.k;
        self.codes.clear();
        for (column, weights) in weights.chunks_exact(self.k).enumerate() {
            for (group, weights) in weights.chunks(self.group).enumerate() {
                let largest = weights.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                // The scale is rounded first, so that codes are the nearest under the one that is kept.
                let scale = f16::from_f32(largest / MOST);
                self.scales[group * self.n + first + column] = scale;
                let inverse = match scale.to_f32() {
                    0.0 => 0.0,
                    scale => 1.0 / scale,
                };
                let code = |w: &f32| (w * inverse).round().clamp(-MOST, MOST) + MIDDLE;
                self.codes.extend(weights.iter().map(|w| code(w) as u8));
            }
        }
        // By words along k, so that neighbouring columns are written together.
        for at in 0..self.k.div_ceil(4) {
            let rows = at * 4..(at * 4 + 4).min(self.k);
            let words = &mut self.words[at * self.n + first..][..columns];
            for (word, codes) in words.iter_mut().zip(self.codes.chunks_exact(self.k)) {
                *word = codes[rows.clone()]
                    .iter()
                    .rev()
                    .fold(0, |word, &code| word << 8 | u32::from(code));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weight_is_within_half_a_step() {
        let (k, n, group) = (71, 5, 32);
        let weight = |column: usize, row: usize| {
            let spread = (column * 31 + row * 17) % 41;
            (spread as f32 - 20.0) * 1e-3 * (1 + row / group) as f32
        };
        let mut made = Requantised::new(k, n, group);
        for columns in [0..2, 2..5] {
            let first = columns.start;
            let weights: Vec<f32> = columns
                .flat_map(|column| (0..k).map(move |row| weight(column, row)))
                .collect();
            made.write(first, &weights);
        }
        let groups = made.group_of_row();
        for column in 0..n {
            for (row, &group) in groups.iter().enumerate() {
                let word = made.words[row / 4 * n + column];
                let code = (word >> (row % 4 * 8) & 255) as f32 - MIDDLE;
                let scale = made.scales[group as usize * n + column].to_f32();
                let error = (code * scale - weight(column, row)).abs();
                assert!(
                    error <= 0.51 * scale,
                    "({row}, {column}): {error} at {scale}"
                );
            }
        }
        // Nothing to scale by.
        let mut zeros = Requantised::new(4, 1, 4);
        zeros.write(0, &[0.0; 4]);
        assert_eq!(zeros.words[0], 0x8080_8080);
    }
}
