//! What is laid out, read as the kernels read it.

use half::f16;

use super::{rows::PADDING, *};

/// The value at (stored row, column), read as the kernels do.
fn stored_value(staging: &QuantStaging, stored: usize, column: usize) -> i32 {
    let (rows, codes, ..) = staging.parts();
    let bits = staging.bits;
    let (tile, lane) = (column / 8, column % 8 * 4 + stored % 32 / 8);
    let (superblock, t, i) = (stored / 128, stored % 128 / 32, stored % 8);
    let base = (tile * rows.superblocks + superblock) * superblock_bytes(bits);
    let word = |at: usize| u32::from_le_bytes(codes[base + at..][..4].try_into().unwrap());
    let high = i / 4;
    let packed = match bits {
        4 => {
            let w = word(lane * 16 + t * 4);
            if high == 1 {
                w & 0xf0f0_f0f0
            } else {
                (w << 4) & 0xf0f0_f0f0
            }
        }
        8 => word(t / 2 * 512 + lane * 16 + t % 2 * 8 + high * 4),
        _ => {
            let m = t % 2 * 2 + high;
            let low = word(lane * 8 + t / 2 * 4);
            if bits == 2 {
                (low << (6 - 2 * m)) & 0xc0c0_c0c0
            } else {
                let sign = (word(256 + lane * 4) << (7 - (2 * t + high))) & 0x8080_8080;
                let field = if m == 3 { low >> 1 } else { low << (5 - 2 * m) };
                sign | field & 0x6060_6060
            }
        }
    };
    i32::from((packed >> (8 * (i % 4))) as u8 as i8) >> (8 - bits)
}

#[test]
fn codes_come_back_at_every_width_order_and_cut() {
    let mut state = 1u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    for bits in [2usize, 3, 4, 8] {
        for (k, n, group_of) in [
            (256usize, 16usize, (|row| row / 128) as fn(usize) -> usize),
            (96, 9, |row| row / 32),
            (160, 3, |row| (row * 7) % 5),
            (128, 8, |_| 0),
            (72, 5, |row| (row + 24) / 64),
        ] {
            let source: Vec<Vec<u32>> = (0..k)
                .map(|_| (0..n).map(|_| random() & ((1 << bits) - 1)).collect())
                .collect();
            // A window that begins 8 rows before the shard.
            let skip = 8;
            let mut words = vec![0u32; (k + skip).next_multiple_of(32) * bits / 32 * n];
            for (row, codes) in source.iter().enumerate() {
                for (column, code) in codes.iter().enumerate() {
                    for bit in 0..bits {
                        let at = (row + skip) * bits + bit;
                        words[at / 32 * n + column] |= (code >> bit & 1) << (at % 32);
                    }
                }
            }
            let groups: Vec<u32> = (0..k).map(|row| group_of(row) as u32).collect();
            let count = *groups.iter().max().unwrap() as usize + 1;
            let scales: Vec<f16> = (0..count * n)
                .map(|i| f16::from_f32(1.0 + i as f32))
                .collect();
            let zeros: Vec<u16> = (0..count * n)
                .map(|i| (i % ((1 << bits) + 1)) as u16)
                .collect();
            let mut staging = QuantStaging::new(QuantSpec {
                bits: bits as u8,
                k,
                n,
                group_of_row: &groups,
                scales: &scales,
                zeros: &zeros,
                bias: None,
            })
            .unwrap();
            let half = k / 2 / 8 * 8;
            staging.write_words(0, skip, half, &words).unwrap();
            assert!(staging.write_words(0, skip, 8, &words).is_err());
            staging
                .write_words(half, skip + half, k - half, &words)
                .unwrap();
            let (rows, _, stored_scales, stored_zeros) = staging.parts();
            let per_superblock = rows.scales_per_superblock;
            for (row, source) in source.iter().enumerate() {
                let stored = rows.positions[row] as usize;
                let scale_block =
                    stored / 128 * per_superblock + stored % 128 / 32 * per_superblock / 4;
                for (column, &code) in source.iter().enumerate() {
                    let expected = code as i32 - (1 << (bits - 1));
                    let what = format!("{bits} bits, ({k}, {n}), row {row}, column {column}");
                    assert_eq!(stored_value(&staging, stored, column), expected, "{what}");
                    let at = (column / 8 * rows.superblocks * per_superblock + scale_block) * 8
                        + column % 8;
                    let of = groups[row] as usize * n + column;
                    assert_eq!(stored_scales[at], scales[of].to_bits(), "{what}");
                    let zero = i32::from(zeros[of]) - (1 << (bits - 1));
                    assert_eq!(stored_zeros.map_or(0, |z| i32::from(z[at])), zero, "{what}");
                }
            }
        }
    }
}

#[test]
fn scales_are_as_fine_as_the_runs_need() {
    let groups = |k: usize, size: usize| (0..k).map(|row| (row / size) as u32).collect::<Vec<_>>();
    for (k, size, expected, superblocks) in [
        (256, 128, 1, 2),
        (256, 64, 2, 2),
        (256, 32, 4, 2),
        (300, 1000, 1, 3),
        (100, 25, 4, 1),
    ] {
        let rows = Rows::new(&groups(k, size));
        assert_eq!(
            (rows.scales_per_superblock, rows.superblocks),
            (expected, superblocks)
        );
    }
    assert!(Rows::new(&groups(300, 128)).order().is_none());
    let shuffled = Rows::new(&[1, 0, 1, 0]);
    let order = shuffled.order().unwrap();
    assert_eq!(
        (order[0], order[1], order[2], order[32]),
        (1, 3, PADDING, 0)
    );
}
