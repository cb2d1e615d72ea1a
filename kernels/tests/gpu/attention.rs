//! Rotation, the paged cache and every attention path, over ragged batches of shuffled blocks.

use std::ops::Range;

use secondwind_kernels::{
    cuda::*,
    heads::{AttentionRows, HeadRows},
    kv::{KvCache, KvDtype, KvShape},
    reference,
    select::{AttentionPath, AttentionTask, DeviceFacts, Phase, Precision, select_attention},
};

use crate::{close, common::Random, download, poisoned, some, told};

/// Sequences of one call: (tokens in the cache before, tokens that come).
type Batch = &'static [(usize, usize)];

const DECODING: [Batch; 4] = [
    &[(0, 1)],
    &[(15, 1), (16, 1), (17, 1)],
    &[(700, 1), (3, 1), (0, 1), (64, 1)],
    &[(30, 2), (0, 4), (5, 3)],
];
const PROMPTS: [Batch; 4] = [
    &[(0, 5)],
    &[(0, 70)],
    &[(33, 40), (0, 17), (9, 1)],
    &[(100, 130), (0, 64)],
];

/// (query heads, KV heads, channels): every size of a group up to one more than a block takes, a group
/// cut by a rank's edge, one head.
const HEADS: [(usize, usize, usize); 12] = [
    (4, 2, 64),
    (7, 1, 128),
    (5, 1, 128),
    (8, 8, 64),
    (3, 2, 256),
    (14, 2, 16),
    (6, 3, 32),
    (10, 2, 128),
    (3, 1, 128),
    (4, 1, 256),
    (8, 1, 128),
    (9, 1, 64),
];

pub fn paths(device: &Device, random: &mut Random) -> Result<(), String> {
    let cases = HEADS.into_iter().flat_map(|heads| {
        let dtypes = KvDtype::ALL.into_iter();
        dtypes.flat_map(move |dtype| {
            let batches = |batches: [Batch; 4], phase| batches.map(|batch| (batch, phase));
            let (decoding, prompts) = (
                batches(DECODING, Phase::Decode),
                batches(PROMPTS, Phase::Prefill),
            );
            let both = decoding.into_iter().chain(prompts);
            both.map(move |(batch, phase)| (heads, dtype, batch, phase))
        })
    });
    for (heads, dtype, batch, phase) in some(cases) {
        check(device, random, heads, dtype, batch, phase)?;
    }
    Ok(())
}

fn check(
    device: &Device,
    random: &mut Random,
    (query_heads, kv_heads, head_dim): (usize, usize, usize),
    dtype: KvDtype,
    batch: Batch,
    phase: Phase,
) -> Result<(), String> {
    let block_tokens = 16 * (1 + random.below(3));
    // The last head may read a KV head that the others do not.
    let kv_of: Vec<u32> = (0..query_heads)
        .map(|head| (head * kv_heads / query_heads) as u32)
        .collect();
    let lengths: Vec<usize> = batch.iter().map(|(before, now)| before + now).collect();
    let blocks: usize = lengths
        .iter()
        .map(|length| length.div_ceil(block_tokens))
        .sum();
    let mut free: Vec<u32> = (1..=blocks as u32).collect();
    for at in (1..free.len()).rev() {
        free.swap(at, random.below(at + 1));
    }
    let shape = KvShape {
        blocks: blocks + 1,
        block_tokens,
        kv_heads,
        head_dim,
        dtype,
    };
    let mut cache = KvCache::new(shape).map_err(told)?;
    let pages = KvPages::new(device, shape).map_err(told)?;

    // Everything is given twice: what lies before, then what comes now.
    let mut tables = Vec::new();
    let mut offsets = vec![0u32];
    for length in &lengths {
        tables.extend(free.drain(..length.div_ceil(block_tokens)));
        offsets.push(tables.len() as u32);
    }
    let positions_most = lengths.iter().copied().max().unwrap_or(1);
    let half = head_dim / 2;
    let (cos, sin) = (
        random.floats(positions_most * half),
        random.floats(positions_most * half),
    );
    let (query_norm, key_norm) = (random.floats(head_dim), random.floats(head_dim));
    let norms = random.below(2) == 1;
    let uploaded = |values: &[f32]| device.upload(values, "a test").map_err(told);
    let (cos_on, sin_on) = (uploaded(&cos)?, uploaded(&sin)?);
    let (query_norm_on, key_norm_on) = (uploaded(&query_norm)?, uploaded(&key_norm)?);
    let kv_of_on = device.upload(&kv_of, "a test").map_err(told)?;
    let largest_group = kv_of
        .chunk_by(|a, b| a == b)
        .map(<[u32]>::len)
        .max()
        .unwrap_or(1);
    let layer = Attention {
        query_heads,
        kv_head_of_query_head: &kv_of_on,
        largest_group,
    };

    poison(device, layer, &pages, (&cos_on, &sin_on))?;
    for part in [0, 1] {
        let mut rows: Vec<u32> = Vec::new();
        let mut positions: Vec<u32> = Vec::new();
        for (row, &(before, now)) in batch.iter().enumerate() {
            let range = if part == 0 {
                0..before
            } else {
                before..before + now
            };
            rows.extend(range.clone().map(|_| row as u32));
            positions.extend(range.map(|at| at as u32));
        }
        let tokens = rows.len();
        if tokens == 0 {
            continue;
        }
        let slots: Vec<u32> = rows
            .iter()
            .zip(&positions)
            .map(|(&row, &position)| {
                let block =
                    tables[offsets[row as usize] as usize + position as usize / block_tokens];
                block * block_tokens as u32 + position % block_tokens as u32
            })
            .collect();
        let context: Vec<u32> = positions.iter().map(|position| position + 1).collect();
        let (queries, keys) = (
            HeadRows::packed(tokens, query_heads, head_dim),
            HeadRows::packed(tokens, kv_heads, head_dim),
        );
        let mut q = random.floats(tokens * query_heads * head_dim);
        let mut k = random.floats(tokens * kv_heads * head_dim);
        let v = random.floats(tokens * kv_heads * head_dim);
        let (q_on, k_on, v_on) = (uploaded(&q)?, uploaded(&k)?, uploaded(&v)?);
        let words = |values: &[u32]| device.upload(values, "a test").map_err(told);
        let (tables_on, offsets_on) = (words(&tables)?, words(&offsets)?);
        let (rows_on, context_on) = (words(&rows)?, words(&context)?);
        let (positions_on, slots_on) = (words(&positions)?, words(&slots)?);
        // A prompt's step may be worked on in two parts.
        let cut = match phase {
            Phase::Prefill if tokens > 1 => random.below(tokens),
            _ => 0,
        };
        let parts: Vec<_> = [0..cut, cut..tokens]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        let on_card = |part: &Range<usize>| AttentionBatch {
            block_tables: &tables_on,
            table_offsets: &offsets_on,
            row_of_token: &rows_on,
            context_lengths: &context_on,
            positions: &positions_on,
            slots: &slots_on,
            tokens: part.clone(),
            max_context: positions_most,
        };
        let card_norms = HeadNorms {
            query: &query_norm_on,
            key: &key_norm_on,
            eps: 1e-6,
        };
        let card_norms = norms.then_some(&card_norms);
        for part in &parts {
            rope_kv(
                device,
                &q_on,
                &k_on,
                &v_on,
                card_norms,
                (&cos_on, &sin_on),
                &on_card(part),
                layer,
                &pages,
            )
            .map_err(told)?;
        }

        if norms {
            reference::head_norm(&mut q, queries, &query_norm, 1e-6).map_err(told)?;
            reference::head_norm(&mut k, keys, &key_norm, 1e-6).map_err(told)?;
        }
        let rows_of = |table: &[f32]| -> Vec<f32> {
            let row = |position: &u32| &table[*position as usize * half..][..half];
            positions
                .iter()
                .flat_map(|position| row(position).to_vec())
                .collect()
        };
        let (cos, sin) = (rows_of(&cos), rows_of(&sin));
        reference::rope(&mut q, queries, &cos, &sin).map_err(told)?;
        reference::rope(&mut k, keys, &cos, &sin).map_err(told)?;
        reference::kv_write(&mut cache, &slots, &k, &v, keys).map_err(told)?;
        if part == 0 {
            continue;
        }
        let what = format!(
            "({query_heads}, {kv_heads}, {head_dim}) {dtype} in blocks of {block_tokens}, {batch:?}"
        );
        let wanted = q.iter().map(|&q| (f64::from(q), 1.0));
        close(
            &format!("rope {what}"),
            &download(device, &q_on, q.len())?,
            wanted,
            1e-5,
        )?;
        let mut expected = vec![0.0; q.len()];
        let cpu_rows = AttentionRows {
            tables: &tables,
            table_offsets: &offsets,
            sequence_of_row: &rows,
            context_len: &context,
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        reference::attention(&cache, &q, queries, &cpu_rows, &kv_of, scale, &mut expected)
            .map_err(told)?;
        let limits = AttentionLimits {
            tokens,
            decode_tokens: tokens,
            rows: batch.len(),
            query_heads,
            kv_heads,
            largest_group,
            head_dim,
            max_context: positions_most,
        };
        let mut scratch = AttentionScratch::new(device, &limits).map_err(told)?;
        scratch
            .write_tiles(device, batch.iter().copied(), &parts)
            .map_err(told)?;
        let mut eager = None;
        for &path in AttentionPath::ALL {
            let task = AttentionTask {
                phase,
                head_dim,
                kv: dtype,
                precision: Precision::Fast,
            };
            let facts = DeviceFacts::Cuda {
                arch: device.arch(),
            };
            let choice = select_attention(facts, task, Some(path));
            if !choice.is_ok_and(|choice| choice.path == path) {
                continue;
            }
            let out = poisoned(device, q.len())?;
            let guard = Guard::new(device).map_err(told)?;
            for part in &parts {
                let on_card = on_card(part);
                attention(
                    device, path, &q_on, &pages, &on_card, layer, &scratch, &out, &guard, 1,
                )
                .map_err(|error| format!("{path} {what}: {error}"))?;
            }
            // A rotated key may round to another half or code than on the host, which moves a score
            // by a few ten-thousandths or a hundredth. On the card all paths read the same cache.
            let rounded: f64 = match dtype {
                KvDtype::F32 => 0.0,
                KvDtype::F16 => 1e-3,
                KvDtype::Int8 => 5e-3,
            };
            const FP32: f64 = 2e-5;
            let own = match path {
                AttentionPath::PrefillMma => 4e-3,
                _ => FP32,
            };
            let got = download(device, &out, q.len())?;
            let wanted = |values: &[f32]| {
                let values = values.iter().map(|&value| (f64::from(value), 1.0));
                values.collect::<Vec<_>>()
            };
            let name = format!("{path} {what}");
            close(&name, &got, wanted(&expected).into_iter(), rounded + own)?;
            let eager = eager.get_or_insert_with(|| got.clone());
            close(
                &format!("{name} against eager"),
                &got,
                wanted(eager).into_iter(),
                own + FP32,
            )?;
            if let Some(found) = guard.read(device).map_err(told)? {
                return Err(format!(
                    "{path} {what}: the guard found {found:?} in finite numbers"
                ));
            }
        }
    }
    Ok(())
}

/// Fills the whole cache with what is not a number: nothing may read beyond a sequence's end.
fn poison(
    device: &Device,
    layer: Attention<'_>,
    pages: &KvPages,
    rotary: (&Memory<f32>, &Memory<f32>),
) -> Result<(), String> {
    let KvShape {
        kv_heads, head_dim, ..
    } = pages.shape;
    let tokens = pages.shape.slots();
    let floats = |heads: usize| {
        let values = vec![f32::NAN; tokens * heads * head_dim];
        device.upload(&values, "a test").map_err(told)
    };
    let (query, key, value) = (
        floats(layer.query_heads)?,
        floats(kv_heads)?,
        floats(kv_heads)?,
    );
    let words = |values: Vec<u32>| device.upload(&values, "a test").map_err(told);
    let zeros = words(vec![0; tokens])?;
    let slots = words((0..tokens as u32).collect())?;
    let batch = AttentionBatch {
        block_tables: &zeros,
        table_offsets: &zeros,
        row_of_token: &zeros,
        context_lengths: &zeros,
        positions: &zeros,
        slots: &slots,
        tokens: 0..tokens,
        max_context: 1,
    };
    rope_kv(
        device, &query, &key, &value, None, rotary, &batch, layer, pages,
    )
    .map_err(told)
}
