//! What the fuzz targets of this crate do with their input; `model/tests/fuzz_smoke.rs` runs the same
//! functions over the committed seeds and seeded mutations of it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::checkpoint::{Checkpoint, WEIGHTS_FILE};
use crate::config::CONFIG_FILE;
use crate::gptq::{check_scales, dequantise, group_indices, suspicious_zeros, unpack_zeros};
use crate::modules::{GptqFormat, ZeroPoints};

/// Opens a checkpoint of two files held in memory: a u32 (little-endian) with the length of `config.json`,
/// that file, and `model.safetensors`. What opens is verified and dequantised.
pub fn checkpoint_files(input: &[u8]) {
    let Some((length, rest)) = input.split_first_chunk::<4>() else {
        return;
    };
    let length = (u32::from_le_bytes(*length) as usize).min(rest.len());
    let (config, weights) = rest.split_at(length);
    let files = BTreeMap::from([
        (CONFIG_FILE.to_owned(), Cow::Owned(config.to_vec())),
        (WEIGHTS_FILE.to_owned(), Cow::Owned(weights.to_vec())),
    ]);
    let Ok(checkpoint) = Checkpoint::from_memory("fuzz", files) else {
        return;
    };
    if checkpoint.verify().is_ok() {
        for module in checkpoint.linears() {
            if let Ok(weights) = checkpoint.dequantise(module) {
                assert_eq!(weights.len(), module.k * module.n);
            }
        }
    }
}

/// Reads GPTQ tensors whose form (bits, group size, K, N, flags: five bytes) and contents are the input's, and
/// checks that what is accepted is in range and that parts agree with the whole.
pub fn gptq_tensors(input: &[u8]) {
    let Some((form, contents)) = input.split_first_chunk::<5>() else {
        return;
    };
    let format = GptqFormat {
        bits: [2, 3, 4, 8][usize::from(form[0] % 4)],
        group_size: [None, Some(32), Some(64), Some(128)][usize::from(form[1] % 4)],
        sym: form[4] & 1 != 0,
        desc_act: form[4] & 2 != 0,
        zeros: if form[4] & 4 != 0 {
            ZeroPoints::Exact
        } else {
            ZeroPoints::MinusOne
        },
    };
    // Widths that do not fill words are tried too.
    let (k, n) = (usize::from(form[2]), usize::from(form[3] % 65));
    let groups = format.groups(k);
    let mut contents = contents.iter().copied().chain(std::iter::repeat(0));
    let mut words = |count: usize| -> Vec<u32> {
        let mut word = || u32::from_le_bytes(std::array::from_fn(|_| contents.next().unwrap_or(0)));
        (0..count).map(|_| word()).collect()
    };
    let qzeros = words(groups * format.packed_words(n).unwrap_or(1));
    let order = words(k);
    let scales: Vec<f32> = words(groups * n).into_iter().map(f32::from_bits).collect();
    let qweight = words(n * format.packed_words(k).unwrap_or(1));

    let groups_read = group_indices("g_idx", &order, groups);
    if let Ok(read) = &groups_read {
        assert!(read.iter().all(|group| (*group as usize) < groups));
    }
    let zeros = unpack_zeros("qzeros", &format, n, &qzeros, 0..n);
    if let Ok(zeros) = &zeros {
        assert!(zeros.iter().all(|zero| u32::from(*zero) < 1 << format.bits));
        let columns = n / 3..n - n / 4;
        let part = unpack_zeros("qzeros", &format, n, &qzeros, columns.clone());
        let whole: Vec<u8> = zeros
            .chunks(n.max(1))
            .flat_map(|row| row[columns.clone()].to_vec())
            .collect();
        assert_eq!(part, Ok(whole));
    }
    suspicious_zeros(&format, n, &qzeros);
    let finite = check_scales("scales", n, 0, &scales);
    let in_order: Vec<u32> = order
        .iter()
        .map(|word| word % groups.max(1) as u32)
        .collect();
    let weights = dequantise(
        "module",
        &format,
        (k, n),
        &qweight,
        &qzeros,
        &scales,
        &in_order,
    );
    if let Ok(weights) = weights {
        assert!(finite.is_ok() && zeros.is_ok() && weights.len() == k * n);
    }
}
