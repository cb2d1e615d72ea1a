//! Weights for measurements.

use secondwind_kernels::{
    KernelError,
    cuda::{self, Linear, Table, Weights},
    weights::{Dtype, WeightFormat},
};

use super::CudaBackend;
use crate::backend::Backend;

impl CudaBackend {
    /// A linear of random weights, for measurements: no file and no layout in between.
    ///
    /// # Errors
    /// The card's.
    pub fn random_linear(
        &mut self,
        format: WeightFormat,
        extent: (usize, usize),
        group: usize,
        seed: u32,
    ) -> Result<Linear, KernelError> {
        let linear = cuda::bench::random_linear(&self.device, format, extent, group, seed)?;
        if let Weights::Quantised(weights) = &linear.weights {
            self.superblocks = self.superblocks.max(weights.superblocks);
        }
        Ok(linear)
    }

    /// An embedding of random rows.
    ///
    /// # Errors
    /// The card's.
    pub fn random_embedding(&mut self, rows: usize, width: usize) -> Result<Table, KernelError> {
        let format = WeightFormat::Dense(Dtype::F16);
        let linear = self.random_linear(format, (width, rows), width, 1)?;
        self.tied_embedding(&linear)
    }
}
