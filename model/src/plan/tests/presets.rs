//! The cards of the data file.

use super::shapes::paths;
use crate::capabilities::WeightKind;
use crate::plan::{PresetError, card_names, parse_bytes, preset};

#[test]
fn every_card_is_there_and_sane() {
    let names: Vec<_> = card_names().collect();
    assert_eq!(
        names,
        ["p40", "p100", "v100-16", "v100-32", "t4", "2080ti", "3090"]
    );
    for name in names {
        let card = preset(name).expect("known");
        assert!(
            card.usable_bytes() > 10 << 30 && card.usable_bytes() < card.memory_bytes,
            "{name}"
        );
        assert!((3e11..1e12).contains(&card.read_bytes_per_second), "{name}");
        assert!(card.operations_per_second.fp32 > 1e12, "{name}");
        let integer = card.operations_per_second.dp4a.is_some();
        assert_eq!(integer, card.compute_capability != "6.0", "{name}");
    }
}

#[test]
fn memory_may_be_given() {
    let card = preset(" 2080Ti:22GiB").expect("known");
    assert_eq!(card.memory_bytes, 22 << 30);
    assert_eq!(card.usable_bytes(), (22 << 30) - 314_572_800);
    assert_eq!(
        preset("p40").expect("known").usable_bytes(),
        (24 << 30) / 16 * 15 - 314_572_800
    );
    assert_eq!(
        preset("p40:24GiB").expect("known").usable_bytes(),
        (24 << 30) - 314_572_800
    );
}

#[test]
fn unknown_cards_and_amounts_are_named() {
    let unknown = preset("p4000").expect_err("no such card").to_string();
    assert!(
        unknown.contains("`p4000`") && unknown.contains("p40, p100") && unknown.contains("2080ti"),
        "{unknown}"
    );
    assert_eq!(
        preset("t4:lots"),
        Err(PresetError::BadMemory {
            text: "lots".to_owned()
        })
    );
    for text in [
        "",
        "0",
        "0GiB",
        "-1GiB",
        "GiB",
        "1.2.3GB",
        "99999999999TiB",
        "nan",
        "inf GB",
    ] {
        assert!(preset(&format!("t4:{text}")).is_err(), "{text}");
    }
}

#[test]
fn amounts_of_memory() {
    let amounts = [
        ("1024", 1024),
        ("22GiB", 22 << 30),
        ("22 gib", 22 << 30),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("16GB", 16_000_000_000),
        ("8kb", 8_000),
    ];
    for (text, bytes) in amounts {
        assert_eq!(parse_bytes(text), Some(bytes), "{text}");
    }
}

#[test]
fn capabilities_are_bound_by_reading_then_by_arithmetic() {
    let card = preset("p40").expect("known");
    let worker = card.capabilities(|kind, rows| {
        (kind == WeightKind::Gptq { bits: 4 }).then(|| paths(kind, rows))?
    });
    assert_eq!(worker.device, "Tesla P40");
    let int4 = WeightKind::Gptq { bits: 4 };
    let one = worker.linear(int4, 1).expect("a path");
    assert!((one.seconds_per_byte - 1.0 / (0.65 * 347e9)).abs() < 1e-18);
    let many = worker.linear(int4, 400).expect("a path");
    assert_eq!((many.max_rows, many.path.as_str()), (512, "gemm"));
    assert!((many.seconds_per_byte - 2.0 * 512.0 / (0.35 * 47e12 * 0.5)).abs() < 1e-15);
    assert_eq!(worker.linear(WeightKind::Dense16, 1), None);
    // More rows than any bucket's are passes of the largest.
    assert_eq!(
        worker.linear(int4, 4096).map(|entry| entry.max_rows),
        Some(512)
    );
}
