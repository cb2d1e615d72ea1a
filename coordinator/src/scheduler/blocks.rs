//! Reference-counted KV block numbers: who may write where, nothing about what is written.

/// Block 0 belongs to nobody: rows that only pad a batch write there.
pub const PADDING_BLOCK: u32 = 0;

/// A claim on a block that its owner does not have. Always a fault of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The number names no block that can be owned.
    #[error("kv block {block} is not one of blocks 1 to {last}")]
    Unknown {
        /// The block.
        block: u32,
        /// The last block of the pool.
        last: u32,
    },
    /// Nobody owns it.
    #[error("kv block {block} is free already")]
    NotOwned {
        /// The block.
        block: u32,
    },
}

/// The group's KV blocks. Every operation takes constant time.
///
/// A block is free or has one or more owners. A prefix cache shares a block by
/// [`retain`](Self::retain): it goes back to the free list with its last owner.
#[derive(Clone, Debug)]
pub struct BlockPool {
    free: Vec<u32>,
    owners: Vec<u32>,
}

impl BlockPool {
    /// A pool over blocks `1..kv_blocks`; low numbers are handed out first.
    pub fn new(kv_blocks: usize) -> Self {
        let end = u32::try_from(kv_blocks).unwrap_or(u32::MAX).max(1);
        Self {
            free: (PADDING_BLOCK + 1..end).rev().collect(),
            owners: vec![0; end as usize],
        }
    }

    /// Takes a free block, with one owner.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        debug_assert_eq!(
            self.owners[block as usize], 0,
            "kv block {block} was free and owned"
        );
        self.owners[block as usize] = 1;
        Some(block)
    }

    /// Adds an owner to a block that has one.
    pub fn retain(&mut self, block: u32) -> Result<(), BlockError> {
        *self.owned(block)? += 1;
        Ok(())
    }

    /// Takes one owner away; true when that was the last and the block is free again.
    pub fn release(&mut self, block: u32) -> Result<bool, BlockError> {
        let owners = self.owned(block)?;
        *owners -= 1;
        let last = *owners == 0;
        if last {
            self.free.push(block);
        }
        Ok(last)
    }

    /// Owners of a block; 0 for one that is free or unknown.
    pub fn owners(&self, block: u32) -> u32 {
        self.owners.get(block as usize).copied().unwrap_or(0)
    }

    /// Blocks that nobody owns.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks with an owner.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Blocks that can be owned: all but the padding block.
    pub fn total(&self) -> usize {
        self.owners.len() - 1
    }

    fn owned(&mut self, block: u32) -> Result<&mut u32, BlockError> {
        let last = self.total() as u32;
        match self.owners.get_mut(block as usize) {
            Some(_) if block == PADDING_BLOCK => Err(BlockError::Unknown { block, last }),
            None => Err(BlockError::Unknown { block, last }),
            Some(0) => Err(BlockError::NotOwned { block }),
            Some(owners) => Ok(owners),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_every_block_but_the_padding_block_once() {
        let mut pool = BlockPool::new(4);
        let taken: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(taken, [1, 2, 3]);
        assert_eq!((pool.free(), pool.used(), pool.total()), (0, 3, 3));
        assert_eq!(pool.release(2), Ok(true));
        assert_eq!(pool.allocate(), Some(2));
    }

    #[test]
    fn a_shared_block_is_free_after_its_last_owner() {
        let mut pool = BlockPool::new(2);
        let block = pool.allocate().unwrap();
        pool.retain(block).unwrap();
        assert_eq!(pool.owners(block), 2);
        assert_eq!(pool.release(block), Ok(false));
        assert_eq!((pool.free(), pool.owners(block), pool.owners(9)), (0, 1, 0));
        assert_eq!(pool.release(block), Ok(true));
        assert_eq!(pool.free(), 1);
    }

    #[test]
    fn a_double_free_and_a_foreign_block_are_named() {
        let mut pool = BlockPool::new(3);
        assert_eq!(pool.release(1), Err(BlockError::NotOwned { block: 1 }));
        assert_eq!(pool.retain(2), Err(BlockError::NotOwned { block: 2 }));
        assert_eq!(
            pool.release(0),
            Err(BlockError::Unknown { block: 0, last: 2 })
        );
        assert_eq!(
            pool.release(3),
            Err(BlockError::Unknown { block: 3, last: 2 })
        );
        assert_eq!(pool.free(), 2);
    }

    #[test]
    fn an_empty_pool_has_nothing() {
        for kv_blocks in [0, 1] {
            let mut pool = BlockPool::new(kv_blocks);
            assert_eq!((pool.total(), pool.allocate()), (0, None));
        }
    }
}
