use half::f16;
use proptest::prelude::*;

use super::*;

/// A packer that knows nothing but bits: bit b of value i of a stream is bit i * bits + b of its words.
fn pack_stream(bits: u8, values: &[u8]) -> Vec<u32> {
    let bits = usize::from(bits);
    let mut words = vec![0; (values.len() * bits).div_ceil(32)];
    for (i, value) in values.iter().enumerate() {
        for b in 0..bits {
            if value >> b & 1 == 1 {
                words[(i * bits + b) / 32] |= 1 << ((i * bits + b) % 32);
            }
        }
    }
    words
}

/// `qweight` of (k, n) codes.
fn pack_rows(bits: u8, n: usize, codes: &[u8]) -> Vec<u32> {
    let columns: Vec<Vec<u32>> = (0..n)
        .map(|column| {
            pack_stream(
                bits,
                &codes
                    .iter()
                    .skip(column)
                    .step_by(n)
                    .copied()
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    (0..columns[0].len())
        .flat_map(|row| columns.iter().map(move |column| column[row]))
        .collect()
}

/// `qzeros` of (groups, n) zero points as GPTQModel exports them.
fn pack_zeros(format: &GptqFormat, n: usize, zeros: &[u8]) -> Vec<u32> {
    let bits = format.bits;
    let export = |row: &[u8]| match (format.zeros, bits) {
        (ZeroPoints::Exact, _) => pack_stream(bits, row),
        (ZeroPoints::MinusOne, 3) => pack_stream(
            bits,
            &row.iter()
                .map(|zero| zero.wrapping_sub(1) & 7)
                .collect::<Vec<_>>(),
        ),
        (ZeroPoints::MinusOne, _) => {
            let ones = pack_stream(bits, &vec![1; n]);
            pack_stream(bits, row)
                .iter()
                .zip(ones)
                .map(|(word, one)| word.wrapping_sub(one))
                .collect()
        }
    };
    zeros.chunks(n).flat_map(export).collect()
}

#[derive(Clone, Debug)]
struct Module {
    format: GptqFormat,
    k: usize,
    n: usize,
    codes: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f32>,
    groups: Vec<u32>,
}

fn module() -> impl Strategy<Value = Module> {
    let format = (
        prop::sample::select(vec![2_u8, 3, 4, 8]),
        prop::sample::select(vec![Some(32), Some(64), Some(128), None]),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(vec![ZeroPoints::MinusOne, ZeroPoints::Exact]),
    );
    let sized = (format, 1..7_usize, 1..4_usize);
    sized.prop_flat_map(|((bits, group_size, sym, desc_act, zeros), k, n)| {
        let format = GptqFormat {
            bits,
            group_size,
            sym,
            desc_act,
            zeros,
        };
        let (k, n) = (k * 32, n * 32);
        let groups = format.groups(k);
        let value = 0..=((1_u16 << bits) - 1) as u8;
        let order = if desc_act {
            prop::collection::vec(0..groups as u32, k).boxed()
        } else {
            Just(
                (0..k)
                    .map(|row| (row / group_size.unwrap_or(k)) as u32)
                    .collect(),
            )
            .boxed()
        };
        let scale = (-60_000.0_f32..60_000.0).prop_map(|scale| f16::from_f32(scale).to_f32());
        let parts = (
            prop::collection::vec(value.clone(), k * n),
            prop::collection::vec(value, groups * n),
            prop::collection::vec(scale, groups * n),
            order,
        );
        parts.prop_map(move |(codes, zeros, scales, groups)| Module {
            format,
            k,
            n,
            codes,
            zeros,
            scales,
            groups,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn dequantises_what_a_bitwise_packer_packed(module in module()) {
        let Module { format, k, n, codes, zeros, scales, groups } = module;
        let qweight = pack_rows(format.bits, n, &codes);
        let qzeros = pack_zeros(&format, n, &zeros);
        let found = dequantise("m", &format, (k, n), &qweight, &qzeros, &scales, &groups).unwrap();
        for row in 0..k {
            for column in 0..n {
                let group = groups[row] as usize * n + column;
                let zero = if format.sym { 1 << (format.bits - 1) } else { i32::from(zeros[group]) };
                let expected = (i32::from(codes[row * n + column]) - zero) as f32 * scales[group];
                prop_assert_eq!(found[row * n + column].to_bits(), expected.to_bits());
            }
        }
        prop_assert_eq!(unpack_codes("m", &format, k, n, &qweight).unwrap(), codes);
    }

    #[test]
    fn zeros_of_any_columns(module in module(), start in 0..96_usize, width in 0..96_usize) {
        let Module { mut format, n, zeros, .. } = module;
        format.sym = false;
        let qzeros = pack_zeros(&format, n, &zeros);
        let columns = start.min(n)..(start + width).min(n).max(start.min(n));
        let expected: Vec<u8> = zeros.chunks(n).flat_map(|row| row[columns.clone()].to_vec()).collect();
        prop_assert_eq!(unpack_zeros("m", &format, n, &qzeros, columns).unwrap(), expected);
    }
}

const FORMAT: GptqFormat = GptqFormat {
    bits: 4,
    group_size: Some(32),
    sym: false,
    desc_act: false,
    zeros: ZeroPoints::MinusOne,
};

/// A stored 15 is 16 with the carry going into the neighbour, as GPTQModel adds one to whole words.
#[test]
fn overflow_carries_like_gptqmodel() {
    let zeros = unpack_zeros("m", &FORMAT, 8, &[0x7777_77ff], 0..8).unwrap();
    assert_eq!(zeros, [0, 1, 9, 8, 8, 8, 8, 8]);
    let three = GptqFormat { bits: 3, ..FORMAT };
    let stored = pack_stream(3, &[7; 32]);
    assert_eq!(
        unpack_zeros("m", &three, 32, &stored, 0..32).unwrap(),
        [0; 32]
    );
}

#[test]
fn symmetric_ignores_what_is_stored() {
    let sym = GptqFormat {
        sym: true,
        ..FORMAT
    };
    assert_eq!(
        unpack_zeros("m", &sym, 8, &[0x1234_5678, 0], 2..5).unwrap(),
        [8; 6]
    );
}

#[test]
fn suspicion() {
    assert!(suspicious_zeros(&FORMAT, 8, &[0x8888_8888, 0x8888_8888]));
    assert!(!suspicious_zeros(&FORMAT, 8, &[0x8888_8888, 0x8888_7888]));
    assert!(!suspicious_zeros(
        &GptqFormat {
            zeros: ZeroPoints::Exact,
            ..FORMAT
        },
        8,
        &[0x8888_8888]
    ));
    assert!(!suspicious_zeros(
        &GptqFormat {
            sym: true,
            ..FORMAT
        },
        8,
        &[0x8888_8888]
    ));
}

#[test]
fn refusals_name_the_tensor() {
    let text = |error: GptqError| error.to_string();
    let out = group_indices("m.g_idx", &[0, 1, 2], 2).unwrap_err();
    assert_eq!(
        text(out),
        "tensor m.g_idx: row 2 belongs to group 2, but there are 2 groups; the checkpoint is damaged"
    );
    assert!(text(group_indices("m.g_idx", &[0, u32::MAX], 2).unwrap_err()).contains("group -1"));
    let scale = check_scales("m.scales", 2, 3, &[1.0, 1.0, f32::INFINITY]).unwrap_err();
    assert_eq!(
        text(scale),
        "tensor m.scales: scale of group 4, column 0 is inf; the checkpoint is damaged"
    );
    assert!(check_scales("m.scales", 2, 0, &[f32::NAN]).is_err());
    assert!(
        text(unpack_zeros("m.qzeros", &FORMAT, 8, &[0], 0..9).unwrap_err())
            .contains("columns 0..9")
    );
    assert!(unpack_zeros("m.qzeros", &FORMAT, 16, &[0], 0..9).is_err());
    assert!(unpack_zeros("m.qzeros", &FORMAT, 7, &[0], 0..7).is_err());
    assert!(unpack_codes("m.qweight", &FORMAT, 8, 2, &[0]).is_err());
    let short = dequantise("m", &FORMAT, (8, 8), &[0; 8], &[0], &[1.0; 7], &[0; 8]).unwrap_err();
    assert_eq!(text(short), "tensor m.scales: 7 elements, expected 8");
}

#[test]
fn order_is_read_not_believed() {
    assert!(ordered_groups(
        &FORMAT,
        &(0..96).map(|row| row / 32).collect::<Vec<_>>()
    ));
    assert!(!ordered_groups(&FORMAT, &[1; 32]));
    assert!(ordered_groups(
        &GptqFormat {
            group_size: None,
            ..FORMAT
        },
        &[0; 500]
    ));
}

#[test]
fn raw_values() {
    assert_eq!(words(&[1, 0, 0, 0x80]), [0x8000_0001]);
    assert_eq!(floats(DType::F16, &[0x00, 0x3c, 0x00, 0xc0]), [1.0, -2.0]);
    assert_eq!(floats(DType::Bf16, &[0x80, 0x3f]), [1.0]);
    assert_eq!(floats(DType::F32, &1.5_f32.to_le_bytes()), [1.5]);
}
