//! Attention over the paged cache: online softmax over tiles of 16 tokens.
//!
//! Tiles start at multiples of 16 tokens of the sequence and are taken in order, and a query's
//! arithmetic never mixes with another's, so a row's bits depend on its own query, context and
//! the cache only. Queries of one sequence and KV head share the reads of keys and values.

use crate::buffer::Aligned;
use crate::error::KernelError;
use crate::heads::{AttentionRows, HeadRows};
use crate::kv::{KEY_TOKENS, KvCache, KvShape, KvStore};
use crate::pool::ThreadPool;
use crate::reference::{self, check_attention};
use crate::select::AttentionPath;

use super::exp::exp;
use super::lanes::{Available, Kernel, LANES, Lanes, dispatch, unroll};

/// Most queries of one task on any instruction set.
const MOST_QUERIES: usize = 8;

/// Buffers that [`attention`] reuses between calls.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    threads: Vec<ThreadScratch>,
}

#[derive(Debug, Default)]
struct ThreadScratch {
    /// (head_dim, queries)
    queries: Aligned<f32>,
    /// (queries, head_dim padded to 16)
    mixed: Aligned<f32>,
}

impl AttentionScratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Upper bound of the heap bytes that [`attention`] keeps in its scratch.
pub fn attention_scratch_bytes(head_dim: usize, threads: usize) -> u64 {
    let width = head_dim.next_multiple_of(LANES) * MOST_QUERIES;
    2 * threads as u64 * Aligned::<f32>::heap_bytes(width)
}

/// `out = softmax(scale * q * K^T) * V` over the first `context_len` tokens of each row's sequence.
///
/// `q`: rows of query heads as `layout` says; `kv_head_of_query_head`: (heads) local indices;
/// `out`: (rows, heads, head_dim), overwritten. Keys and values of the rows themselves must be in
/// the cache already.
///
/// # Errors
/// Shapes that disagree, an index outside the cache or the tables, or a path that this machine
/// cannot run.
#[expect(clippy::too_many_arguments, reason = "an op names each of its tensors")]
pub fn attention(
    cache: &KvCache,
    path: AttentionPath,
    q: &[f32],
    layout: HeadRows,
    rows: &AttentionRows<'_>,
    kv_head_of_query_head: &[u32],
    scale: f32,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    if path == AttentionPath::CpuReference {
        return reference::attention(cache, q, layout, rows, kv_head_of_query_head, scale, out);
    }
    let isa = Available::new(path.isa(), path.name())?;
    check_attention(cache, q, layout, rows, kv_head_of_query_head, out)?;
    let queries = (layout.rows * layout.heads).div_ceil(pool.threads());
    let most = isa.queries().min(queries).max(1);
    let tasks = tasks(layout, rows, kv_head_of_query_head, out, most);
    let parts = share(tasks, pool.threads());
    scratch
        .threads
        .resize_with(parts.len().max(scratch.threads.len()), Default::default);
    let parts = parts.into_iter().zip(&mut scratch.threads).collect();
    pool.run(
        parts,
        |(tasks, buffers): (Vec<Task<'_>>, &mut ThreadScratch)| {
            let call = Call {
                shape: cache.shape(),
                q,
                layout,
                scale,
                tasks,
                buffers,
            };
            match (&cache.keys, &cache.values) {
                (KvStore::F32(keys), KvStore::F32(values)) => call.run(isa, keys, values, None),
                (KvStore::F16(keys), KvStore::F16(values)) => call.run(isa, keys, values, None),
                (
                    KvStore::Int8 {
                        codes: keys,
                        scales: key_scales,
                    },
                    KvStore::Int8 {
                        codes: values,
                        scales: value_scales,
                    },
                ) => call.run(isa, keys, values, Some((key_scales, value_scales))),
                _ => unreachable!("keys and values are made with one dtype"),
            }
        },
    );
    Ok(())
}

/// What a thread does, whatever the cache holds.
struct Call<'a, 'b> {
    shape: &'a KvShape,
    q: &'a [f32],
    layout: HeadRows,
    scale: f32,
    tasks: Vec<Task<'b>>,
    buffers: &'a mut ThreadScratch,
}

impl Call<'_, '_> {
    fn run<E: Element>(
        self,
        isa: Available,
        keys: &[E],
        values: &[E],
        scales: Option<(&[f32], &[f32])>,
    ) {
        let run = Run {
            keys,
            values,
            scales,
            call: self,
        };
        dispatch(isa, run);
    }
}

/// One query head of one row.
struct Query<'a> {
    row: usize,
    head: usize,
    context: usize,
    out: &'a mut [f32],
}

/// Queries that share a sequence and a KV head.
struct Task<'a> {
    table: &'a [u32],
    kv_head: usize,
    queries: Vec<Query<'a>>,
}

impl Task<'_> {
    fn context(&self) -> usize {
        self.queries
            .iter()
            .map(|query| query.context)
            .max()
            .unwrap_or(0)
    }
}

fn tasks<'a>(
    layout: HeadRows,
    rows: &AttentionRows<'a>,
    kv_head_of_query_head: &[u32],
    out: &'a mut [f32],
    most: usize,
) -> Vec<Task<'a>> {
    let mut outs: Vec<Option<&mut [f32]>> = out.chunks_mut(layout.head_dim).map(Some).collect();
    let mut tasks = Vec::new();
    let mut kv_heads = kv_head_of_query_head.to_vec();
    kv_heads.sort_unstable();
    kv_heads.dedup();
    let all: Vec<usize> = (0..layout.rows).collect();
    for group in all.chunk_by(|&a, &b| rows.sequence_of_row[a] == rows.sequence_of_row[b]) {
        for &kv_head in &kv_heads {
            let mut queries = Vec::with_capacity(most);
            for &row in group {
                let context = rows.context_len[row] as usize;
                for head in (0..layout.heads).filter(|&h| kv_head_of_query_head[h] == kv_head) {
                    let Some(out) = outs[row * layout.heads + head].take() else {
                        continue;
                    };
                    if context == 0 {
                        out.fill(0.0);
                        continue;
                    }
                    queries.push(Query {
                        row,
                        head,
                        context,
                        out,
                    });
                    if queries.len() == most {
                        let queries = std::mem::replace(&mut queries, Vec::with_capacity(most));
                        let (table, kv_head) = (rows.table(row), kv_head as usize);
                        tasks.push(Task {
                            table,
                            kv_head,
                            queries,
                        });
                    }
                }
            }
            if !queries.is_empty() {
                let table = rows.table(queries[0].row);
                tasks.push(Task {
                    table,
                    kv_head: kv_head as usize,
                    queries,
                });
            }
        }
    }
    tasks
}

/// Cuts the tasks into at most `threads` runs of about equal cost.
fn share(tasks: Vec<Task<'_>>, threads: usize) -> Vec<Vec<Task<'_>>> {
    let cost = |task: &Task<'_>| task.context() * (task.queries.len() + 2);
    let total: usize = tasks.iter().map(cost).sum();
    let mut parts: Vec<Vec<Task<'_>>> = (0..threads).map(|_| Vec::new()).collect();
    let mut done = 0;
    for task in tasks {
        let middle = done + cost(&task) / 2;
        done += cost(&task);
        parts[(middle * threads / total.max(1)).min(threads - 1)].push(task);
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// An element of the cache.
trait Element: Copy + Sync {
    fn widen<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::F;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::F {
        lanes.load(x)
    }
}

/// f16 bits.
impl Element for u16 {
    #[inline(always)]
    fn widen<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::F {
        lanes.widen_f16(x)
    }
}

/// Codes of an int8 cache, not yet scaled.
impl Element for i8 {
    #[inline(always)]
    fn widen<L: Lanes>(lanes: L, x: &[Self; LANES]) -> L::F {
        lanes.widen_i8(x)
    }
}

struct Run<'a, 'b, E> {
    keys: &'a [E],
    values: &'a [E],
    /// Of every row of an int8 cache's keys and values. They multiply scores and weights, one number
    /// a row, so that the loops over channels only convert integers.
    scales: Option<(&'a [f32], &'a [f32])>,
    call: Call<'a, 'b>,
}

impl<E: Element> Kernel for Run<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        for mut task in std::mem::take(&mut self.call.tasks) {
            match task.queries.len() {
                1 => self.task::<L, 1>(lanes, &mut task),
                2 => self.task::<L, 2>(lanes, &mut task),
                3 => self.task::<L, 3>(lanes, &mut task),
                4 => self.task::<L, 4>(lanes, &mut task),
                5 if const { L::QUERIES > 4 } => self.task::<L, 5>(lanes, &mut task),
                6 if const { L::QUERIES > 4 } => self.task::<L, 6>(lanes, &mut task),
                7 if const { L::QUERIES > 4 } => self.task::<L, 7>(lanes, &mut task),
                8 if const { L::QUERIES > 4 } => self.task::<L, 8>(lanes, &mut task),
                count => unreachable!("{count} queries in a task of at most {}", L::QUERIES),
            }
        }
    }
}

impl<E: Element> Run<'_, '_, E> {
    #[inline(always)]
    fn task<L: Lanes, const R: usize>(&mut self, lanes: L, task: &mut Task<'_>) {
        let Call {
            shape,
            q,
            layout,
            scale,
            ref mut buffers,
            ..
        } = self.call;
        let (head_dim, width) = (shape.head_dim, shape.value_width());
        buffers.queries.reserve(head_dim * MOST_QUERIES);
        buffers.mixed.reserve(width * MOST_QUERIES);
        let queries = &mut buffers.queries.as_chunks_mut::<R>().0[..head_dim];
        let mixed = &mut buffers.mixed.as_chunks_mut::<LANES>().0[..R * width / LANES];
        mixed.fill([0.0; LANES]);
        for (r, query) in task.queries.iter().enumerate() {
            let head = layout.head(q, query.row, query.head);
            for (slot, &x) in queries.iter_mut().zip(head) {
                slot[r] = x;
            }
        }

        let mut max = [f32::NEG_INFINITY; R];
        let mut sum = [lanes.zero(); R];
        let context = task.context();
        for start in (0..context).step_by(KEY_TOKENS) {
            let block = task.table[start / shape.block_tokens] as usize;
            let token = start % shape.block_tokens;
            let tokens = KEY_TOKENS.min(context - start);
            let keys = &self.keys[shape.key_tile(block, task.kv_head, token)..];
            let keys = &keys.as_chunks::<LANES>().0[..head_dim];
            let values = &self.values[shape.value_row(block, task.kv_head, token)..];
            let values = &values.as_chunks::<LANES>().0[..tokens * width / LANES];
            let scales = self.scales.map(|(keys, values)| {
                let row = shape.row(block, task.kv_head, token);
                let of_tile = |scales: &[f32]| lanes.load(&scales[row..].as_chunks::<LANES>().0[0]);
                (of_tile(keys), of_tile(values))
            });

            let mut scores = [lanes.zero(); R];
            for (key, query) in keys.iter().zip(&*queries) {
                let key = E::widen(lanes, key);
                unroll!(
                    r < R,
                    scores[r] = lanes.mul_add(lanes.splat(query[r]), key, scores[r])
                );
            }
            let mut weights = [[0.0; LANES]; R];
            let mut decay = [0.0; R];
            unroll!(r < R, {
                let visible = task.queries[r].context.saturating_sub(start);
                let mut score = lanes.mul(scores[r], lanes.splat(scale));
                if let Some((of_keys, _)) = scales {
                    score = lanes.mul(score, of_keys);
                }
                let score = mask(lanes, score, visible);
                let largest = lanes.largest(score);
                let next = if largest > max[r] { largest } else { max[r] };
                decay[r] = if next == max[r] {
                    1.0
                } else {
                    lanes.to_array(exp(lanes, lanes.splat(max[r] - next)))[0]
                };
                let weight = exp(lanes, lanes.sub(score, lanes.splat(next)));
                sum[r] = lanes.mul_add(sum[r], lanes.splat(decay[r]), weight);
                max[r] = next;
                let weight = match scales {
                    Some((_, of_values)) => lanes.mul(weight, of_values),
                    None => weight,
                };
                lanes.store(weight, &mut weights[r]);
            });
            for d in 0..width / LANES {
                let mut total = [lanes.zero(); R];
                unroll!(r < R, {
                    let old = lanes.load(&mixed[r * width / LANES + d]);
                    total[r] = lanes.mul(old, lanes.splat(decay[r]));
                });
                for token in 0..tokens {
                    let value = E::widen(lanes, &values[token * width / LANES + d]);
                    unroll!(r < R, {
                        let weight = lanes.splat(weights[r][token]);
                        total[r] = lanes.mul_add(weight, value, total[r]);
                    });
                }
                unroll!(
                    r < R,
                    lanes.store(total[r], &mut mixed[r * width / LANES + d])
                );
            }
        }

        for (r, query) in task.queries.iter_mut().enumerate() {
            let total = lanes.splat(lanes.sum(sum[r]));
            let mixed = &mixed[r * width / LANES..];
            for (out, mixed) in query.out.chunks_mut(LANES).zip(mixed) {
                // A masked token of weight 0 may have turned -0 into 0; adding 0 hides which.
                let mean = lanes.div(lanes.load(mixed), total);
                lanes.store_part(lanes.add(mean, lanes.zero()), out);
            }
        }
    }
}

/// Negative infinity in the lanes from `visible` on.
#[inline(always)]
fn mask<L: Lanes>(lanes: L, scores: L::F, visible: usize) -> L::F {
    if visible >= LANES {
        return scores;
    }
    let mut array = lanes.to_array(scores);
    array[visible..].fill(f32::NEG_INFINITY);
    lanes.load(&array)
}
