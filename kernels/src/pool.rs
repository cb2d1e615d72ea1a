//! A fixed set of threads with a static partition of the work.
//!
//! The caller is the first thread; the others sleep in the operating system between calls, so
//! nothing spins when idle. Which thread computes a value never changes its bits.

use std::ops::Range;

use crate::error::KernelError;

/// A pool of `threads` threads, the calling one included.
#[derive(Debug)]
pub struct ThreadPool {
    threads: usize,
    others: Option<rayon::ThreadPool>,
}

impl ThreadPool {
    /// A pool of `threads` threads (at least 1), the caller of [`ThreadPool::run`] being one.
    ///
    /// # Errors
    /// [`KernelError::Threads`] if `threads` is 0 or the operating system gives no thread.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        let refuse = |problem: String| KernelError::Threads { threads, problem };
        let others = match threads {
            0 => return Err(refuse("at least 1 is needed".to_owned())),
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads - 1)
                    .thread_name(|index| format!("kernel-{}", index + 1))
                    .build()
                    .map_err(|error| refuse(error.to_string()))?,
            ),
        };
        Ok(Self { threads, others })
    }

    /// Threads that share the work of one call, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` once on every element of `parts` and returns when all are done.
    ///
    /// The first part runs on the calling thread. Give as many parts as there are
    /// [`threads`](Self::threads), each of about the same cost.
    pub fn run<T: Send>(&self, parts: Vec<T>, work: impl Fn(T) + Sync) {
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return };
        let work = &work;
        match &self.others {
            Some(pool) if parts.len() > 0 => pool.in_place_scope(|scope| {
                for part in parts {
                    scope.spawn(move |_| work(part));
                }
                work(first);
            }),
            _ => {
                work(first);
                parts.for_each(work);
            }
        }
    }
}

/// The `part`-th of `parts` nearly equal contiguous pieces of `0..items`.
pub fn partition(items: usize, parts: usize, part: usize) -> Range<usize> {
    let edge = |index: usize| items * index / parts.max(1);
    edge(part)..edge(part + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn partitions_tile_the_items() {
        for items in [0, 1, 5, 64, 2368] {
            for parts in 1..9 {
                let mut next = 0;
                for part in 0..parts {
                    let range = partition(items, parts, part);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, items);
            }
        }
    }

    #[test]
    fn every_part_runs_once_whatever_the_threads() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads).unwrap();
            for parts in [0, 1, 2, 7, 40] {
                let sum = AtomicUsize::new(0);
                pool.run((1..=parts).collect(), |part| {
                    sum.fetch_add(part, Ordering::Relaxed);
                });
                assert_eq!(sum.load(Ordering::Relaxed), parts * (parts + 1) / 2);
            }
        }
        assert!(matches!(
            ThreadPool::new(0),
            Err(KernelError::Threads { threads: 0, .. })
        ));
    }
}
