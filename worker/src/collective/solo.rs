//! A world of one.

use super::{Collective, CollectiveBuffer, CollectiveError};

/// The collective of a single rank: everything is already everywhere.
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _: CollectiveBuffer<'_>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather_to_root(&mut self, data: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![data])
    }

    fn broadcast(&mut self, data: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        Ok(data)
    }
}
