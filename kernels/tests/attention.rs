//! Paged attention: every path against the reference over odd shapes, and a row's bits alone,
//! batched, chunked and threaded.

mod common;

use common::{Random, assert_close, assert_same_bits, attention_paths};
use secondwind_kernels::cpu::{AttentionScratch, attention, kv_write};
use secondwind_kernels::heads::{AttentionRows, HeadRows};
use secondwind_kernels::kv::{KvCache, KvDtype, KvShape};
use secondwind_kernels::pool::ThreadPool;
use secondwind_kernels::reference;
use secondwind_kernels::select::AttentionPath;

/// Sequences over shuffled blocks, a cache that holds them, and query rows.
struct Case {
    cache: KvCache,
    heads: usize,
    head_dim: usize,
    kv_of: Vec<u32>,
    tables: Vec<u32>,
    offsets: Vec<u32>,
    sequences: Vec<u32>,
    contexts: Vec<u32>,
    /// (rows, heads * head_dim + 3): a wider buffer.
    q: Vec<f32>,
}

impl Case {
    fn new(
        random: &mut Random,
        dtype: KvDtype,
        (kv_heads, group): (usize, usize),
        head_dim: usize,
        block_tokens: usize,
    ) -> Self {
        let lengths = [1, 15, 16, 17, 70 + random.below(60)];
        let blocks_of = |length: usize| length.div_ceil(block_tokens);
        let blocks = lengths.iter().copied().map(blocks_of).sum::<usize>() + 2;
        let shape = KvShape {
            blocks,
            block_tokens,
            kv_heads,
            head_dim,
            dtype,
        };
        let mut cache = KvCache::new(shape).unwrap();
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..blocks).rev() {
            free.swap(i, random.below(i + 1));
        }
        let (mut tables, mut offsets, mut sequences, mut contexts) =
            (Vec::new(), vec![0], Vec::new(), Vec::new());
        for (sequence, length) in lengths.into_iter().enumerate() {
            let table: Vec<u32> = (0..blocks_of(length))
                .map(|_| free.pop().unwrap())
                .collect();
            let slots: Vec<u32> = (0..length)
                .map(|token| {
                    table[token / block_tokens] * block_tokens as u32
                        + (token % block_tokens) as u32
                })
                .collect();
            let layout = HeadRows::packed(length, kv_heads, head_dim);
            let k = random.floats(length * layout.width());
            let v = random.floats(length * layout.width());
            kv_write(&mut cache, &slots, &k, &v, layout).unwrap();
            let rows = length.min(1 + random.below(20));
            for row in 0..rows {
                sequences.push(sequence as u32);
                contexts.push((length - rows + row + 1) as u32);
            }
            tables.extend(table);
            offsets.push(tables.len() as u32);
        }
        contexts[0] = 0;
        // What lies beyond a context must not matter, not even this.
        let poison = vec![f32::NAN; kv_heads * head_dim];
        let layout = HeadRows::packed(1, kv_heads, head_dim);
        for (sequence, length) in lengths.into_iter().enumerate() {
            if length % block_tokens != 0 {
                let block = tables[offsets[sequence + 1] as usize - 1];
                let slot = block * block_tokens as u32 + (length % block_tokens) as u32;
                kv_write(&mut cache, &[slot], &poison, &poison, layout).unwrap();
            }
        }
        let heads = kv_heads * group;
        let q = random.floats(sequences.len() * (heads * head_dim + 3));
        let kv_of = (0..heads).map(|head| (head / group) as u32).collect();
        Self {
            cache,
            heads,
            head_dim,
            kv_of,
            tables,
            offsets,
            sequences,
            contexts,
            q,
        }
    }

    fn rows(&self) -> usize {
        self.sequences.len()
    }

    fn run(&self, path: AttentionPath, rows: std::ops::Range<usize>, threads: usize) -> Vec<f32> {
        let (layout, scale) = (self.layout(rows.len()), 0.3);
        let q = &self.q[rows.start * layout.row_stride..];
        let spec = self.spec(rows);
        let mut out = vec![f32::NAN; layout.rows * layout.width()];
        let pool = ThreadPool::new(threads).unwrap();
        let mut scratch = AttentionScratch::new();
        attention(
            &self.cache,
            path,
            q,
            layout,
            &spec,
            &self.kv_of,
            scale,
            &mut out,
            &mut scratch,
            &pool,
        )
        .unwrap();
        out
    }

    fn layout(&self, rows: usize) -> HeadRows {
        let (heads, head_dim) = (self.heads, self.head_dim);
        HeadRows {
            rows,
            heads,
            head_dim,
            row_stride: heads * head_dim + 3,
        }
    }

    fn spec(&self, rows: std::ops::Range<usize>) -> AttentionRows<'_> {
        AttentionRows {
            tables: &self.tables,
            table_offsets: &self.offsets,
            sequence_of_row: &self.sequences[rows.clone()],
            context_len: &self.contexts[rows],
        }
    }
}

fn cases(seed: u64) -> Vec<(Case, String)> {
    let mut random = Random(seed);
    let mut cases = Vec::new();
    for dtype in KvDtype::ALL {
        for (heads, head_dim, block_tokens) in [
            ((1, 1), 16, 16),
            ((2, 7), 64, 16),
            ((3, 2), 40, 32),
            ((1, 12), 128, 48),
        ] {
            let case = Case::new(&mut random, dtype, heads, head_dim, block_tokens);
            let what = format!(
                "seed {seed}, {dtype}, heads {heads:?} x {head_dim}, blocks of {block_tokens}"
            );
            cases.push((case, what));
        }
    }
    cases
}

#[test]
fn every_path_agrees_with_the_reference() {
    for (case, what) in cases(1) {
        let layout = case.layout(case.rows());
        let mut expected = vec![f32::NAN; layout.rows * layout.width()];
        let spec = case.spec(0..case.rows());
        reference::attention(
            &case.cache,
            &case.q,
            layout,
            &spec,
            &case.kv_of,
            0.3,
            &mut expected,
        )
        .unwrap();
        assert!(
            expected[..layout.width()].iter().all(|&x| x == 0.0),
            "context 0: {what}"
        );
        for path in attention_paths() {
            let got = case.run(path, 0..case.rows(), 2);
            assert_close(&got, &expected, 2e-6, &format!("{path}, {what}"));
        }
    }
}

#[test]
fn bits_of_a_row_do_not_depend_on_rows_chunks_or_threads() {
    for (case, what) in cases(2) {
        for path in attention_paths() {
            let whole = case.run(path, 0..case.rows(), 1);
            for (chunk, threads) in [(1, 1), (1, 3), (2, 2), (5, 1), (13, 4), (100, 3)] {
                let mut pieces = Vec::new();
                for first in (0..case.rows()).step_by(chunk) {
                    let end = (first + chunk).min(case.rows());
                    pieces.extend(case.run(path, first..end, threads));
                }
                let what = format!("{path}, chunks of {chunk}, {threads} threads, {what}");
                assert_same_bits(&pieces, &whole, &what);
            }
        }
    }
}

#[test]
fn indices_outside_the_cache_are_refused() {
    let mut random = Random(3);
    let mut case = Case::new(&mut random, KvDtype::F32, (1, 2), 16, 16);
    let run = |case: &Case| {
        let layout = case.layout(case.rows());
        let mut out = vec![0.0; layout.rows * layout.width()];
        let spec = case.spec(0..case.rows());
        reference::attention(
            &case.cache,
            &case.q,
            layout,
            &spec,
            &case.kv_of,
            1.0,
            &mut out,
        )
        .map_err(|error| error.to_string())
    };
    let context = std::mem::replace(&mut case.contexts[1], 17);
    assert!(
        run(&case)
            .unwrap_err()
            .contains("context_len[1] is 17, must be below 17")
    );
    case.contexts[1] = context;
    let block = std::mem::replace(&mut case.tables[2], 999);
    assert!(run(&case).unwrap_err().contains("tables[2] is 999"));
    case.tables[2] = block;
    case.kv_of[1] = 1;
    assert!(
        run(&case)
            .unwrap_err()
            .contains("kv_head_of_query_head[1] is 1")
    );
    let layout = HeadRows::packed(1, 1, 16);
    let error = kv_write(&mut case.cache, &[9999], &[0.0; 16], &[0.0; 16], layout).unwrap_err();
    assert!(error.to_string().contains("slots[0] is 9999"), "{error}");
}

#[test]
fn bytes_are_foretold_and_odd_blocks_refused() {
    for dtype in KvDtype::ALL {
        let shape = KvShape {
            blocks: 7,
            block_tokens: 32,
            kv_heads: 3,
            head_dim: 40,
            dtype,
        };
        assert_eq!(KvCache::new(shape).unwrap().bytes(), shape.bytes());
        let odd = KvShape {
            block_tokens: 24,
            ..shape
        };
        assert!(
            KvCache::new(odd)
                .unwrap_err()
                .to_string()
                .contains("multiple of 16")
        );
        let absurd = KvShape {
            blocks: usize::MAX / 64,
            ..shape
        };
        assert!(KvCache::new(absurd).is_err());
    }
}
