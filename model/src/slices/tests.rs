//! Slices of all ranks tile what is split, and agree with each other.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::modules::{Axis, DType, Split};
use crate::plan::tests::shapes::{
    INT4, QWEN_0_5B, QWEN_7B, Random, Sizes, cards, settings, shape, shape_of, worker,
};
use crate::plan::{PlanSettings, plan};

/// A random shape with a plan of random shares.
fn planned(seed: u64) -> (ModelShape, ShardPlan) {
    let mut random = Random(seed);
    let kv_heads = random.within(1, 6);
    let query_heads = kv_heads * random.within(1, 7);
    let world = random.within(1, query_heads.min(9));
    let gptq = GptqFormat {
        bits: random.one_of(&[2, 3, 4, 8]),
        group_size: random.one_of(&[Some(32), Some(64), Some(128), None]),
        desc_act: random.within(0, 2) == 0,
        ..INT4
    };
    let format = if random.within(0, 4) == 0 {
        WeightFormat::Dense(DType::Bf16)
    } else {
        WeightFormat::Gptq(gptq)
    };
    let sizes = Sizes {
        hidden: 32 * random.within(1, 9),
        intermediate: 32 * random.within(1, 40),
        layers: random.within(1, 3),
        query_heads,
        kv_heads,
        head_dim: random.one_of(&[32, 64]),
        vocab: random.within(world, 900),
        tied: random.within(0, 1) == 1,
    };
    let mut shape = shape_of(
        sizes,
        format,
        random.within(0, 1) == 1,
        random.within(0, 1) == 1,
    );
    for linear in &mut shape.linears {
        // A bias on a row-parallel module belongs to rank 0.
        linear.bias |= linear.role == LinearRole::Output && random.within(0, 1) == 1;
    }
    let shares = (0..world).map(|_| random.between(0.1, 5.0)).collect();
    let settings = PlanSettings {
        forced_split: Some(shares),
        ..settings()
    };
    let workers = vec![worker(1 << 40, 1e10); world];
    let plan = plan(&shape, &settings, &workers).expect("fits");
    (shape, plan)
}

/// Ranks' ranges are in order and tile `0..all`; with `shared`, neighbours may overlap.
fn tiles(ranges: &[Range<usize>], all: usize, shared: usize) -> bool {
    let joined = ranges
        .windows(2)
        .all(|pair| pair[1].start <= pair[0].end && pair[0].end - pair[1].start <= shared);
    joined
        && ranges.first().is_some_and(|first| first.start == 0)
        && ranges.last().is_some_and(|last| last.end == all)
}

fn extents(of_ranks: &[Vec<ModuleSlice>], index: usize) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    of_ranks
        .iter()
        .map(|slices| (slices[index].rows.clone(), slices[index].columns.clone()))
        .unzip()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn slices_tile_every_split_module(seed in any::<u64>()) {
        let (shape, plan) = planned(seed);
        let world = plan.world_size();
        let of_ranks: Vec<_> = (0..world).map(|rank| slices(&shape, &plan, rank)).collect();
        let plain = shape.plain.len();
        for (index, linear) in shape.linears.iter().enumerate() {
            let (rows, columns) = extents(&of_ranks, plain + index);
            let shared = if linear.axis == Axis::KvHeads { linear.unit } else { 0 };
            match linear.split {
                Split::Column => {
                    prop_assert!(tiles(&columns, linear.n, shared), "{}: {columns:?}", linear.name);
                    prop_assert!(rows.iter().all(|rows| *rows == (0..linear.k)));
                }
                Split::Row => {
                    prop_assert!(tiles(&rows, linear.k, 0), "{}: {rows:?}", linear.name);
                    prop_assert!(columns.iter().all(|columns| *columns == (0..linear.n)));
                }
                Split::Replicated => unreachable!("no module of these shapes"),
            }
            let biased = of_ranks.iter().filter(|slices| slices[plain + index].bias).count();
            let expected = match (linear.bias, linear.split) {
                (false, _) => 0,
                (true, Split::Row) => 1,
                (true, _) => world,
            };
            prop_assert_eq!(biased, expected);
            prop_assert!(!linear.bias || of_ranks[0][plain + index].bias);
        }
        let (_, vocab) = extents(&of_ranks, 0);
        prop_assert!(tiles(&vocab, shape.config.vocab_size, 0));
        for slices in &of_ranks {
            for layer in slices[plain..].chunks_exact(7) {
                let [query, key, value, output, gate, up, down] = layer else { unreachable!("seven linears") };
                prop_assert_eq!(&query.columns, &output.rows);
                prop_assert_eq!(&key.columns, &value.columns);
                prop_assert_eq!(&gate.columns, &down.rows);
                prop_assert_eq!(&up.columns, &down.rows);
            }
            let norms = slices.iter().filter(|slice| matches!(slice.kind, SliceKind::Norm { .. }));
            prop_assert_eq!(norms.count(), plain - 1);
        }
    }

    #[test]
    fn tensors_cover_what_a_rank_holds(seed in any::<u64>()) {
        let (shape, plan) = planned(seed);
        // Per tensor, how many bytes of it some rank reads.
        let mut read: BTreeMap<String, (Vec<bool>, usize)> = BTreeMap::new();
        for rank in 0..plan.world_size() {
            for slice in slices(&shape, &plan, rank) {
                for tensor in &slice.tensors {
                    prop_assert_eq!(&tensor.name, &[slice.module.as_str(), tensor.part.suffix()].join("."));
                    prop_assert!(tensor.elements() > 0 && tensor.rows.end <= tensor.shape[0], "{tensor:?}");
                    prop_assert!(tensor.columns.end <= tensor.shape[1], "{tensor:?}");
                    check_packed(&shape, &slice, tensor)?;
                    let all = tensor.shape[0] * tensor.shape[1];
                    let (bytes, _) = read.entry(tensor.name.clone()).or_insert_with(|| (vec![false; 2 * all], all));
                    let mut end = 0;
                    for run in byte_runs(tensor.shape, 2, tensor.rows.clone(), tensor.columns.clone()) {
                        prop_assert!(run.start >= end && run.end > run.start && run.end <= bytes.len() as u64);
                        end = run.end;
                        bytes[run.start as usize..run.end as usize].fill(true);
                    }
                }
            }
        }
        for (name, (bytes, _)) in &read {
            prop_assert!(bytes.iter().all(|byte| *byte), "{name} is not read whole by all ranks together");
        }
        // Every stored tensor is read by somebody.
        let quantised = |linear: &LinearModule| matches!(linear.format, WeightFormat::Gptq(_));
        let tied = usize::from(shape.shares_embedding());
        let expected: usize = shape.linears.iter().map(|l| if quantised(l) { 4 } else { 1 } + usize::from(l.bias)).sum();
        prop_assert_eq!(read.len(), expected - tied + shape.plain.len());
    }

    #[test]
    fn byte_runs_are_the_elements(
        shape in (1usize..9, 1usize..9), rows in (0usize..10, 0usize..10), columns in (0usize..10, 0usize..10), size in 1usize..5,
    ) {
        let mut expected = Vec::new();
        for row in rows.0..rows.1.min(shape.0) {
            for column in columns.0..columns.1.min(shape.1) {
                let at = (row * shape.1 + column) * size;
                expected.extend(at as u64..(at + size) as u64);
            }
        }
        let runs: Vec<_> = byte_runs([shape.0, shape.1], size, rows.0..rows.1, columns.0..columns.1).collect();
        prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), expected);
        if columns.0 == 0 && columns.1 >= shape.1 {
            prop_assert!(runs.len() <= 1);
        }
    }
}

/// What a packed or grouped tensor covers contains what the rank holds, in whole units.
fn check_packed(
    shape: &ModelShape,
    slice: &ModuleSlice,
    tensor: &TensorSlice,
) -> Result<(), TestCaseError> {
    let SliceKind::Linear { index, .. } = slice.kind else {
        return Ok(());
    };
    let linear = &shape.linears[index];
    let WeightFormat::Gptq(format) = &linear.format else {
        return Ok(());
    };
    let contains = |outer: &Range<usize>, inner: &Range<usize>| {
        outer.start <= inner.start && outer.end >= inner.end
    };
    let bits = usize::from(format.bits);
    match tensor.part {
        TensorPart::Qweight => {
            prop_assert!(
                contains(&tensor.covered_rows, &slice.rows) && tensor.columns == slice.columns
            );
            prop_assert_eq!(tensor.covered_rows.start % 32, 0);
            prop_assert!(slice.rows.start - tensor.covered_rows.start < 32);
            prop_assert_eq!(tensor.covered_rows.start * bits, tensor.rows.start * 32);
            prop_assert_eq!(tensor.covered_rows.end * bits, tensor.rows.end * 32);
        }
        TensorPart::Qzeros => {
            prop_assert!(contains(&tensor.covered_columns, &slice.columns));
            prop_assert_eq!(
                tensor.covered_columns.start * bits,
                tensor.columns.start * 32
            );
            prop_assert!(tensor.columns.end * 32 >= tensor.covered_columns.end * bits);
        }
        TensorPart::Scales => {
            let size = format.group_size.unwrap_or(linear.k);
            let all = 0..linear.k.div_ceil(size);
            let touched = slice.rows.start / size..(slice.rows.end - 1) / size + 1;
            let act_order = format.desc_act && format.group_size.is_some();
            prop_assert_eq!(&tensor.rows, if act_order { &all } else { &touched });
            prop_assert_eq!(&tensor.columns, &slice.columns);
        }
        TensorPart::GroupIndex => prop_assert_eq!(&tensor.columns, &slice.rows),
        TensorPart::Bias | TensorPart::Weight => {}
    }
    Ok(())
}

#[test]
fn seven_billion_at_three() {
    let shape = shape(QWEN_7B, INT4);
    let plan = plan(&shape, &settings(), &cards(&["p40", "p40", "p40"])).expect("fits");
    let slice = slices(&shape, &plan, 1)
        .into_iter()
        .find(|slice| slice.module == "model.layers.5.mlp.down_proj");
    let slice = slice.expect("it is there");
    let by_part = |part| {
        slice
            .tensors
            .iter()
            .find(|tensor| tensor.part == part)
            .expect("it is there")
    };
    let qweight = by_part(TensorPart::Qweight);
    assert_eq!(qweight.name, "model.layers.5.mlp.down_proj.qweight");
    assert_eq!(qweight.shape, [18944 / 8, 3584]);
    assert_eq!(qweight.rows, slice.rows.start / 8..slice.rows.end / 8);
    assert_eq!(
        by_part(TensorPart::Scales).rows,
        slice.rows.start / 128..slice.rows.end / 128
    );
    // Whole rows are one read.
    assert_eq!(
        byte_runs(
            qweight.shape,
            4,
            qweight.rows.clone(),
            qweight.columns.clone()
        )
        .count(),
        1
    );
}

#[test]
fn tied_head_reads_nothing_of_its_own() {
    let shape = shape(QWEN_0_5B, INT4);
    let plan = plan(&shape, &settings(), &cards(&["p40", "t4"])).expect("fits");
    let slices = slices(&shape, &plan, 1);
    let head = slices.last().expect("lm_head is last but for nothing");
    let embedding = &slices[0];
    assert!(matches!(head.kind, SliceKind::TiedHead { .. }) && head.tensors.is_empty());
    assert_eq!(embedding.kind, SliceKind::Embedding);
    assert_eq!(
        (&head.columns, &head.rows),
        (&embedding.columns, &embedding.rows)
    );
    assert_eq!(embedding.tensors[0].name, "model.embed_tokens.weight");
    assert_eq!(embedding.tensors[0].rows, plan.vocab[1]);
}

#[test]
fn three_bit_columns_are_widened_to_three_words() {
    let (words, values) = packed(&(40..50), 128, 3);
    assert_eq!((words, values), (3..6, 32..64));
    let (words, values) = packed(&(40..50), 44, 8);
    assert_eq!((words, values), (8..11, 32..44));
}
