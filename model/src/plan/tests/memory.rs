//! Bytes against a count row by row.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::shapes::{INT4, QWEN_0_5B, settings, shape, shape_of, worker};
use crate::capabilities::Layout;
use crate::modules::{DType, GptqFormat, LinearModule, WeightFormat};
use crate::plan::{
    KvDType, LocalWidths, PlanSettings, act_order, buffer_sizes, groups_of, kv_heads_of,
    linear_bytes, plan,
};

/// Every row of the range, put into its group's run.
fn counted(
    module: &LinearModule,
    rows: std::ops::Range<usize>,
    columns: usize,
    layout: &Layout,
) -> (usize, usize, usize) {
    let mut runs: BTreeMap<usize, usize> = BTreeMap::new();
    for row in rows.clone() {
        let group = match &module.format {
            WeightFormat::Gptq(GptqFormat {
                group_size: Some(size),
                ..
            }) => row / size,
            _ => 0,
        };
        *runs.entry(group).or_default() += 1;
    }
    let up = |value: usize, multiple: usize| value.div_ceil(multiple) * multiple;
    let padded_rows: usize = runs.values().map(|run| up(*run, layout.row_multiple)).sum();
    let padded_columns = up(columns, layout.column_multiple);
    let quantised = matches!(module.format, WeightFormat::Gptq(_));
    let scales = if quantised { runs.len() } else { 0 };
    let weights = rows.len() * columns;
    // Half a byte per weight, two per scale: the modules are symmetric.
    (
        weights.div_ceil(2),
        (padded_rows * padded_columns).div_ceil(2) + 2 * scales * padded_columns,
        2 * scales * columns,
    )
}

proptest! {
    #[test]
    fn linear_bytes_are_counted_exactly(
        groups in 1usize..9,
        size in prop::sample::select(vec![32usize, 64, 128]),
        whole in any::<bool>(),
        dense in any::<bool>(),
        cut in (0.0f64..1.0, 0.0f64..1.0),
        columns in 1usize..200,
        row_multiple in prop::sample::select(vec![1usize, 8, 24, 256]),
        column_multiple in prop::sample::select(vec![1usize, 16, 48]),
    ) {
        let k = groups * size;
        let format = GptqFormat { group_size: (!whole).then_some(size), ..INT4 };
        let mut module = shape(QWEN_0_5B, format).linears.swap_remove(6);
        module.k = k;
        if dense {
            module.format = WeightFormat::Dense(DType::F16);
        }
        let ends = [(cut.0 * k as f64) as usize, 1 + (cut.1 * (k - 1) as f64) as usize];
        let rows = ends[0].min(ends[1])..ends[0].max(ends[1]);
        let layout = Layout { bytes_per_weight: 0.5, column_multiple, row_multiple, scale_rows: 0, bytes_per_scale: 4.0 };
        let bytes = linear_bytes(&module, &rows, &(0..columns), &layout, false);
        if rows.is_empty() {
            prop_assert_eq!(bytes.total(), 0);
        } else {
            let (weights, total, scales) = counted(&module, rows, columns, &layout);
            prop_assert_eq!((bytes.weights, bytes.total(), bytes.scales), (weights as u64, total as u64, scales as u64));
        }
    }

    #[test]
    fn act_order_is_counted_at_its_worst(start in 0usize..1024, length in 1usize..1024, seed in any::<u64>()) {
        let rows = start..(start + length).min(1024).max(start + 1);
        let format = GptqFormat { desc_act: true, ..INT4 };
        let mut module = shape(QWEN_0_5B, format).linears.swap_remove(6);
        module.k = 1024;
        let layout = Layout { bytes_per_weight: 0.5, column_multiple: 1, row_multiple: 8, scale_rows: 0, bytes_per_scale: 4.0 };
        let bytes = linear_bytes(&module, &rows, &(0..10), &layout, false);
        prop_assert_eq!(groups_of(&format, 1024, &rows), 0..8);
        // No assignment of the rows to groups takes more.
        let mut random = super::shapes::Random(seed);
        let mut runs = [0usize; 8];
        for _ in rows.clone() {
            runs[random.within(0, 7)] += 1;
        }
        let padded: usize = runs.iter().map(|run| run.next_multiple_of(8)).sum();
        let worst = (padded * 10).div_ceil(2) + 8 * 10 * 2 + rows.len() * 4;
        prop_assert!(rows == (0..1024) || bytes.total() >= worst as u64);
    }

    #[test]
    fn kv_heads_cover_their_queries(kv_heads in 1usize..9, queries in 1usize..9, cut in 0.0f64..1.0) {
        let all = kv_heads * queries;
        let at = (cut * all as f64) as usize;
        let (left, right) = (kv_heads_of(&(0..at), queries), kv_heads_of(&(at..all), queries));
        prop_assert_eq!(left.start, 0);
        prop_assert_eq!(right.end, kv_heads);
        for head in 0..all {
            let held = if head < at { &left } else { &right };
            prop_assert!(held.contains(&(head / queries)));
        }
        let shared = !at.is_multiple_of(queries);
        prop_assert_eq!(left.end as isize - right.start as isize, isize::from(shared));
    }
}

#[test]
fn group_of_all_rows_is_never_act_order() {
    assert!(!act_order(&GptqFormat {
        desc_act: true,
        group_size: None,
        ..INT4
    }));
    assert!(act_order(&GptqFormat {
        desc_act: true,
        ..INT4
    }));
}

#[test]
fn half_billion_bytes_by_hand() {
    let shape = shape(QWEN_0_5B, INT4);
    let plan = plan(&shape, &settings(), &[worker(1 << 34, 1e10)]).expect("fits");
    let memory = plan.ranks[0].memory;
    let layer = 896 * (896 + 128 + 128) + 896 * 896 + 3 * 896 * 4864;
    let biases = 24 * (896 + 128 + 128) * 4;
    let norms = (24 * 2 + 1) * 896 * 4;
    // The tied embedding is counted once.
    assert_eq!(
        memory.weights,
        (24 * layer / 2 + 2 * 151_936 * 896 + biases + norms) as u64
    );
    assert_eq!(memory.padding, 0);
    let scales = 7 * (896 + 128 + 128) + 7 * 896 + 2 * 7 * 4864 + 38 * 896;
    // Symmetric: no zero points.
    assert_eq!(memory.scales, 24 * scales * 2);
    assert_eq!(
        memory.kv_cache,
        2 * 24 * 2 * 64 * 2 * 16 * plan.kv_blocks as u64
    );
    assert_eq!(memory.scratch, 64 * 64 + 1024);
    let buffers: u64 = buffer_sizes(&shape.config, &settings(), &plan.local_widths(&shape, 0))
        .iter()
        .map(|b| b.1)
        .sum();
    assert_eq!(memory.buffers, buffers);
    let rows = 3 * 896 + 896 + 128 + 128 + 896 + 2 * 4864;
    assert_eq!(
        buffers,
        (512 * rows * 4 + 64 * 151_936 * 4 + 4096 * 32 * 2 * 4) as u64
    );
}

#[test]
fn an_int8_cache_is_its_codes_and_a_scale_per_head_and_token() {
    let shape = shape(QWEN_0_5B, INT4);
    let of = |kv_dtype| {
        let settings = PlanSettings {
            kv_dtype,
            ..settings()
        };
        let plan = plan(&shape, &settings, &[worker(1 << 34, 1e10)]).expect("fits");
        plan.ranks[0].memory.kv_cache / plan.kv_blocks as u64
    };
    // 24 layers, keys and values, blocks of 16 tokens, 2 heads of 64 channels.
    assert_eq!(of(KvDType::Int8), 24 * 2 * 16 * 2 * (64 + 4));
    assert_eq!(of(KvDType::F16), 24 * 2 * 16 * 2 * 64 * 2);
}

#[test]
fn untied_embedding_and_head_norms_are_counted() {
    let sizes = super::shapes::Sizes {
        tied: false,
        ..QWEN_0_5B
    };
    let weights = |shape| {
        plan(&shape, &settings(), &[worker(1 << 34, 1e10)])
            .expect("fits")
            .ranks[0]
            .memory
            .weights
    };
    let tied = weights(shape_of(QWEN_0_5B, WeightFormat::Gptq(INT4), false, false));
    let untied = weights(shape_of(sizes, WeightFormat::Gptq(INT4), false, false));
    assert_eq!(untied - tied, 2 * 151_936 * 896);
    let normed = weights(shape_of(sizes, WeightFormat::Gptq(INT4), false, true));
    assert_eq!(normed - untied, 24 * 2 * 64 * 4);
}

#[test]
fn absurd_sizes_saturate() {
    let shape = shape(QWEN_0_5B, INT4);
    let widths = LocalWidths {
        query: usize::MAX,
        kv: 1,
        attention: 1,
        ffn: 1,
        vocab: 1,
    };
    let sizes = buffer_sizes(&shape.config, &settings(), &widths);
    assert!(sizes.contains(&("query", u64::MAX)));
}
