//! What of the device's memory is in use, phase by phase.

use crate::backend::Backend;

/// When device memory was read: after this was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing yet: what the driver, its context, kernels and other users have.
    Before,
    /// Weights are loaded.
    Weights,
    /// The KV cache is made.
    KvCache,
    /// Tables, scratch and activations are made.
    Buffers,
    /// The ranks are joined, and have summed.
    Communicator,
    /// Decoding steps are recorded.
    Recordings,
    /// Steps ran.
    Steps,
}

/// Bytes of device memory in use at these points, where the device can tell.
#[derive(Clone, Debug, Default)]
pub struct Readings(pub Vec<(Phase, u64)>);

impl Readings {
    /// Those of a device before anything is loaded.
    pub fn start<B: Backend>(backend: &B) -> Self {
        let mut readings = Self::default();
        readings.read(backend, Phase::Before);
        readings
    }

    /// Reads the device's memory after `phase`.
    pub fn read<B: Backend>(&mut self, backend: &B, phase: Phase) {
        self.0
            .extend(backend.used_bytes().map(|used| (phase, used)));
    }

    /// Bytes that `phase` took, since the reading before it.
    pub fn taken(&self, phase: Phase) -> Option<u64> {
        let of_phase = self.0.windows(2).find(|pair| pair[1].0 == phase)?;
        Some(of_phase[1].1.saturating_sub(of_phase[0].1))
    }
    /// Bytes that all phases so far took.
    pub fn total(&self) -> u64 {
        match (self.0.first(), self.0.last()) {
            (Some((_, before)), Some((_, now))) => now.saturating_sub(*before),
            _ => 0,
        }
    }
}
