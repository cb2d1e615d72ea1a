use crate::error::{KernelError, expect_length};
use crate::heads::{AttentionRows, HeadRows, check_indices};
use crate::kv::KvCache;

/// Attention with materialised scores, one query at a time, in f64; see
/// [`crate::cpu::attention`].
///
/// # Errors
/// As the fast twin.
pub fn attention(
    cache: &KvCache,
    q: &[f32],
    layout: HeadRows,
    rows: &AttentionRows<'_>,
    kv_head_of_query_head: &[u32],
    scale: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    check_attention(cache, q, layout, rows, kv_head_of_query_head, out)?;
    let (head_dim, block_tokens) = (layout.head_dim, cache.shape().block_tokens);
    for row in 0..layout.rows {
        let table = rows.table(row);
        for head in 0..layout.heads {
            let kv_head = kv_head_of_query_head[head] as usize;
            let query = layout.head(q, row, head);
            let place = |token: usize| (table[token / block_tokens] as usize, token % block_tokens);
            let scores: Vec<f64> = (0..rows.context_len[row] as usize)
                .map(|token| {
                    let (block, token) = place(token);
                    let dot: f64 = (0..head_dim)
                        .map(|d| {
                            f64::from(query[d]) * f64::from(cache.key(block, token, kv_head, d))
                        })
                        .sum();
                    dot * f64::from(scale)
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let out = &mut out[(row * layout.heads + head) * head_dim..][..head_dim];
            for (d, out) in out.iter_mut().enumerate() {
                let mut mixed = 0.0;
                for (token, weight) in weights.iter().enumerate() {
                    let (block, token) = place(token);
                    mixed += weight / sum * f64::from(cache.value(block, token, kv_head, d));
                }
                *out = mixed as f32;
            }
        }
    }
    Ok(())
}

/// The checks of both twins.
pub(crate) fn check_attention(
    cache: &KvCache,
    q: &[f32],
    layout: HeadRows,
    rows: &AttentionRows<'_>,
    kv_head_of_query_head: &[u32],
    out: &[f32],
) -> Result<(), KernelError> {
    const OP: &str = "attention";
    let shape = cache.shape();
    layout.check(OP, "q", q.len())?;
    expect_length(OP, "head_dim", shape.head_dim, layout.head_dim)?;
    expect_length(OP, "out", layout.rows * layout.width(), out.len())?;
    expect_length(
        OP,
        "kv_head_of_query_head",
        layout.heads,
        kv_head_of_query_head.len(),
    )?;
    check_indices(
        OP,
        "kv_head_of_query_head",
        kv_head_of_query_head,
        shape.kv_heads,
    )?;
    rows.check(layout.rows, shape)
}
