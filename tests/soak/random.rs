//! Random numbers that a seed decides.

/// splitmix64.
pub struct Random(u64);

impl Random {
    /// Of item `index`, such as a request.
    pub fn new(seed: u64, index: u64) -> Self {
        let key = Self(seed).next();
        Self(key ^ Self(index).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..bound.
    pub fn below(&mut self, bound: u32) -> u32 {
        (((self.next() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// In least..=most.
    pub fn between(&mut self, least: u32, most: u32) -> u32 {
        least + self.below(most - least + 1)
    }

    /// Token ids of the embedded model.
    pub fn tokens(&mut self, count: u32) -> Vec<u32> {
        (0..count).map(|_| self.below(1000)).collect()
    }
}
