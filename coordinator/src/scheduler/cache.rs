//! The group's KV blocks, and which of them hold a prefix that another sequence may share.
//!
//! A block enters the cache when the step that filled it is committed. It is found again by what it
//! holds: the tokens of the block, and the cached block before it, which stands for all tokens before.
//! Both are compared, not only hashed, so that no collision can serve the KV of another prefix.
//! Realms share nothing: the first block of a prefix is keyed by its tenant and the salt of its request.
//!
//! The cache owns its blocks beside the sequences that use them. A block *rests* while only the cache
//! owns it; resting blocks are as good as free, and the one that came to rest first is evicted first.
//! Whoever owns a cached block owns the one before it, and lets go of it last: so a block never rests
//! before, and is never evicted before, those that follow it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::blocks::{BlockPool, PADDING_BLOCK};
use crate::request::CacheSalt;

/// Who shares prefixes: sequences of one tenant, and of those with a salt the ones with the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Realm {
    pub tenant: u32,
    pub salt: Option<CacheSalt>,
}

/// A cached block.
#[derive(Clone, Debug)]
struct Entry {
    /// As [`write_key`] makes it.
    key: Arc<[u32]>,
    /// When it came to rest.
    rests_since: Option<u64>,
}

/// Blocks with their owners, and the prefix cache over them.
#[derive(Clone, Debug)]
pub(super) struct KvCache {
    pool: BlockPool,
    block_tokens: usize,
    keeps_prefixes: bool,
    index: HashMap<Arc<[u32]>, u32>,
    entries: HashMap<u32, Entry>,
    /// Resting blocks by the time of their rest.
    resting: BTreeMap<u64, u32>,
    /// Counts rests.
    clock: u64,
    evictions: u64,
}

impl KvCache {
    /// Nothing owned, nothing cached. Without `keeps_prefixes` nothing ever will be.
    pub fn new(kv_blocks: usize, block_tokens: usize, keeps_prefixes: bool) -> Self {
        Self {
            pool: BlockPool::new(kv_blocks),
            block_tokens,
            keeps_prefixes,
            index: HashMap::new(),
            entries: HashMap::new(),
            resting: BTreeMap::new(),
            clock: 0,
            evictions: 0,
        }
    }

    /// Blocks that can be owned.
    pub fn total(&self) -> usize {
        self.pool.total()
    }

    /// Blocks that [`allocate`](Self::allocate) can give: free and resting ones.
    pub fn available(&self) -> usize {
        self.pool.free() + self.resting.len()
    }

    /// Blocks that sequences own.
    pub fn in_use(&self) -> usize {
        self.total() - self.available()
    }

    /// Blocks that only the cache owns.
    pub fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Sum: cached blocks taken for something else.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Takes a block, with one owner: a free one, or the one that has rested longest.
    pub fn allocate(&mut self) -> Option<u32> {
        if self.pool.free() == 0
            && let Some((_, block)) = self.resting.pop_first()
        {
            if let Some(entry) = self.entries.remove(&block) {
                self.index.remove(&entry.key);
            }
            self.give_back(block);
            self.evictions += 1;
        }
        self.pool.allocate()
    }

    /// Takes a sequence's ownership away. Of one sequence, the last block goes first.
    pub fn release(&mut self, block: u32) {
        self.give_back(block);
        if self.pool.owners(block) == 1
            && let Some(entry) = self.entries.get_mut(&block)
        {
            self.clock += 1;
            entry.rests_since = Some(self.clock);
            self.resting.insert(self.clock, block);
        }
    }

    /// Adds a sequence to the owners of a block that [`find`](Self::find) found.
    pub fn share(&mut self, block: u32) {
        let retained = self.pool.retain(block);
        debug_assert!(retained.is_ok(), "{retained:?}");
        if let Some(entry) = self.entries.get_mut(&block)
            && let Some(since) = entry.rests_since.take()
        {
            self.resting.remove(&since);
        }
    }

    /// Cached blocks that hold the KV of `tokens` from their first on, as many as there are.
    pub fn find(&self, realm: &Realm, tokens: &[u32]) -> Vec<u32> {
        let mut found = Vec::new();
        let mut key = Vec::with_capacity(2 + self.block_tokens);
        for tokens in tokens.chunks_exact(self.block_tokens) {
            write_key(&mut key, last_or_padding(&found), realm, tokens);
            match self.index.get(key.as_slice()) {
                Some(&block) => found.push(block),
                None => break,
            }
        }
        found
    }

    /// How many of `blocks` rest.
    pub fn resting_among(&self, blocks: &[u32]) -> usize {
        let rests = |block: &&u32| {
            let entry = self.entries.get(block);
            entry.is_some_and(|entry| entry.rests_since.is_some())
        };
        blocks.iter().filter(rests).count()
    }

    /// Caches the last of a sequence's leading `blocks`, which is full of `tokens`. Nothing happens if
    /// another block is cached for the same prefix already, or if the block before it is such a copy and
    /// not cached itself.
    pub fn register(&mut self, realm: &Realm, tokens: &[u32], blocks: &[u32]) {
        let Some((&block, before)) = blocks.split_last() else {
            return;
        };
        let parent = last_or_padding(before);
        if !self.keeps_prefixes || (parent != PADDING_BLOCK && !self.entries.contains_key(&parent))
        {
            return;
        }
        let mut key = Vec::new();
        write_key(&mut key, parent, realm, tokens);
        let key = Arc::<[u32]>::from(key);
        if self.index.contains_key(&key) || self.entries.contains_key(&block) {
            return;
        }
        let retained = self.pool.retain(block);
        debug_assert!(retained.is_ok(), "{retained:?}");
        self.index.insert(key.clone(), block);
        let rests_since = None;
        self.entries.insert(block, Entry { key, rests_since });
    }

    /// True if a block can be allocated as soon as the one sequence that owns it lets go.
    pub fn has_one_user(&self, block: u32) -> bool {
        self.pool.owners(block) == 1 + u32::from(self.entries.contains_key(&block))
    }

    /// Forgets every prefix.
    pub fn forget_prefixes(&mut self) {
        for block in std::mem::take(&mut self.entries).into_keys() {
            self.give_back(block);
        }
        self.index.clear();
        self.resting.clear();
    }

    fn give_back(&mut self, block: u32) {
        let released = self.pool.release(block);
        debug_assert!(released.is_ok(), "{released:?}");
    }
}

/// What a block holds: the block before it, or the padding block and, as that stands for nothing yet, the salt;
/// the tenant; the tokens. Keys with a salt are longer than all others.
fn write_key(key: &mut Vec<u32>, parent: u32, realm: &Realm, tokens: &[u32]) {
    key.clear();
    key.extend([parent, realm.tenant]);
    let salt = realm.salt.as_ref().filter(|_| parent == PADDING_BLOCK);
    key.extend(salt.into_iter().flatten());
    key.extend(tokens);
}

fn last_or_padding(blocks: &[u32]) -> u32 {
    blocks.last().copied().unwrap_or(PADDING_BLOCK)
}

#[cfg(test)]
impl KvCache {
    /// Holds the books against the tables of all sequences.
    pub fn check(&self, tables: &BTreeMap<u64, &[u32]>) {
        let mut users = HashMap::<u32, u32>::new();
        for table in tables.values() {
            for (index, &block) in table.iter().enumerate() {
                *users.entry(block).or_default() += 1;
                if self.entries.contains_key(&block) {
                    let parent = last_or_padding(&table[..index]);
                    assert_eq!(self.entries[&block].key[0], parent, "whoever owns a block");
                }
            }
        }
        for block in 1..=self.total() as u32 {
            let users = users.get(&block).copied().unwrap_or(0);
            let entry = self.entries.get(&block);
            assert_eq!(
                self.pool.owners(block),
                users + u32::from(entry.is_some()),
                "owners of block {block}"
            );
            let Some(entry) = entry else { continue };
            assert_eq!(self.index[&entry.key], block);
            let rests = entry.rests_since.map(|since| self.resting[&since]);
            assert_eq!(rests, (users == 0).then_some(block));
            let parent = entry.key[0];
            if parent != PADDING_BLOCK {
                let before = &self.entries[&parent];
                assert!(before.rests_since.is_none() || before.rests_since > entry.rests_since);
            }
        }
        assert_eq!(self.index.len(), self.entries.len());
        assert!(self.keeps_prefixes || self.entries.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a tenant, without a salt.
    fn of(tenant: u32) -> Realm {
        let salt = None;
        Realm { tenant, salt }
    }

    fn cache() -> KvCache {
        KvCache::new(6, 2, true)
    }

    /// A sequence that computed `tokens` in blocks of its own.
    fn compute(cache: &mut KvCache, realm: &Realm, tokens: &[u32]) -> Vec<u32> {
        let mut blocks = Vec::new();
        for tokens in tokens.chunks(2) {
            blocks.push(cache.allocate().unwrap());
            if tokens.len() == 2 {
                cache.register(realm, tokens, &blocks);
            }
        }
        blocks
    }

    fn release(cache: &mut KvCache, blocks: Vec<u32>) {
        for block in blocks.into_iter().rev() {
            cache.release(block);
        }
    }

    #[test]
    fn a_prefix_is_found_by_all_its_tokens_and_its_tenant() {
        let mut cache = cache();
        let blocks = compute(&mut cache, &of(0), &[1, 2, 3, 4, 5]);
        assert_eq!(cache.find(&of(0), &[1, 2, 3, 4, 5, 6]), blocks[..2]);
        assert_eq!(cache.find(&of(0), &[1, 2, 3]), blocks[..1]);
        assert_eq!(cache.find(&of(0), &[1, 2, 3, 5]), blocks[..1]);
        // The second block's tokens after others, and the same tokens of another tenant.
        assert!(
            cache.find(&of(0), &[3, 4]).is_empty() && cache.find(&of(0), &[9, 9, 3, 4]).is_empty()
        );
        assert!(cache.find(&of(1), &[1, 2, 3, 4]).is_empty());
    }

    #[test]
    fn a_salt_shares_with_itself_alone() {
        let salted = |salt| Realm {
            salt: Some([salt; 8]),
            ..of(1)
        };
        let mut cache = cache();
        let blocks = compute(&mut cache, &salted(7), &[1, 2, 3, 4]);
        assert_eq!(cache.find(&salted(7), &[1, 2, 3, 4]), blocks);
        for other in [salted(8), of(1), of(0)] {
            assert!(cache.find(&other, &[1, 2, 3, 4]).is_empty(), "{other:?}");
        }
        // A prompt that spells the salt out is another prompt.
        let spelled = [[7; 8].as_slice(), &[1, 2]].concat();
        assert!(cache.find(&of(1), &spelled).is_empty());
        let own = compute(&mut cache, &of(1), &[1, 2]);
        assert_ne!(own[0], blocks[0]);
    }

    #[test]
    fn resting_blocks_are_available_and_go_the_last_of_a_prefix_first() {
        let mut cache = cache();
        let blocks = compute(&mut cache, &of(0), &[1, 2, 3, 4, 5]);
        assert_eq!((cache.available(), cache.in_use()), (2, 3));
        release(&mut cache, blocks.clone());
        assert_eq!(
            (cache.available(), cache.resting(), cache.in_use()),
            (5, 2, 0)
        );
        for _ in 0..3 {
            cache.allocate().unwrap();
        }
        assert_eq!((cache.resting(), cache.evictions()), (2, 0));
        assert_eq!(cache.allocate(), Some(blocks[1]));
        assert_eq!(cache.find(&of(0), &[1, 2, 3, 4]), blocks[..1]);
        assert_eq!(cache.allocate(), Some(blocks[0]));
        assert_eq!((cache.allocate(), cache.evictions()), (None, 2));
        assert!(cache.find(&of(0), &[1, 2]).is_empty());
    }

    #[test]
    fn a_shared_block_is_not_evicted_and_the_one_used_last_stays_longest() {
        let mut cache = cache();
        let old = compute(&mut cache, &of(0), &[1, 2, 3, 4]);
        let new = compute(&mut cache, &of(0), &[5, 6]);
        release(&mut cache, old.clone());
        release(&mut cache, new.clone());
        cache.share(old[0]);
        assert_eq!((cache.resting_among(&old), cache.in_use()), (1, 1));
        assert!(cache.has_one_user(old[0]));
        cache.share(old[0]);
        assert!(!cache.has_one_user(old[0]));
        cache.release(old[0]);
        cache.release(old[0]);
        let order: Vec<_> = std::iter::from_fn(|| cache.allocate()).skip(2).collect();
        assert_eq!(order, [old[1], new[0], old[0]]);
    }

    #[test]
    fn a_copy_is_not_cached_and_neither_is_what_follows_it() {
        let mut cache = cache();
        let first = compute(&mut cache, &of(0), &[1, 2]);
        let copy = compute(&mut cache, &of(0), &[1, 2, 7, 8]);
        assert_eq!(cache.find(&of(0), &[1, 2, 7, 8]), first);
        release(&mut cache, copy);
        assert_eq!((cache.in_use(), cache.resting()), (1, 0));
    }

    #[test]
    fn what_is_forgotten_is_free() {
        let mut cache = cache();
        let blocks = compute(&mut cache, &of(0), &[1, 2, 3, 4]);
        let kept = compute(&mut cache, &of(0), &[5, 6]);
        release(&mut cache, blocks);
        cache.forget_prefixes();
        assert_eq!(
            (cache.resting(), cache.in_use(), cache.available()),
            (0, 1, 4)
        );
        release(&mut cache, kept);
        assert_eq!((cache.available(), cache.resting()), (5, 0));
    }

    #[test]
    fn a_cache_that_is_off_keeps_nothing() {
        let mut cache = KvCache::new(6, 2, false);
        let blocks = compute(&mut cache, &of(0), &[1, 2, 3, 4]);
        assert!(cache.find(&of(0), &[1, 2, 3, 4]).is_empty());
        release(&mut cache, blocks);
        assert_eq!((cache.resting(), cache.available()), (0, 5));
    }
}
