use super::*;

fn parse(header: &str, data_bytes: u64) -> Result<Vec<HeaderEntry>, String> {
    parse_header(header.as_bytes(), header.len() as u64 + 8 + data_bytes)
        .map_err(|error| error.to_string())
}

#[test]
fn entries_come_in_order_of_their_data() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]},
        "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},
        "a":{"dtype":"I32","shape":[1,2],"data_offsets":[0,8]}}   "#;
    let entries = parse(header, 14).unwrap();
    let start = header.len() as u64 + 8;
    let seen: Vec<_> = entries
        .iter()
        .map(|e| (e.name.as_str(), e.offset - start, e.bytes))
        .collect();
    assert_eq!(seen, [("a", 0, 8), ("empty", 8, 0), ("b", 8, 6)]);
    assert_eq!(entries[2].shape, [3]);
    assert_eq!(entries[2].dtype, StoredType::F16);
}

#[test]
fn contradictions_are_refused() {
    let one = |fields: &str| format!("{{\"t\":{{{fields}}}}}");
    let cases = [
        (String::new(), 0, "does not begin with a brace"),
        ("[]".to_owned(), 0, "does not begin with a brace"),
        ("{".to_owned(), 0, "header cannot be read"),
        ("{\"t\":3}".to_owned(), 0, "t: invalid type"),
        (one(r#""dtype":"F32","shape":[1]"#), 4, "missing field `data_offsets`"),
        (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), 4, "t: invalid value"),
        (one(r#""dtype":"Q4","shape":[1],"data_offsets":[0,4]"#), 4, "tensor t: element type \"Q4\" is not read"),
        (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4, "tensor t: shape [2] needs 8 bytes but its offsets span 4"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), 4, "offsets span -4"),
        (one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#), 4, "overflows"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 3, "download it again"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 5, "download it again"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#), 8, "tensor t: data starts at 4, expected 0"),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#.to_owned(),
            6,
            "tensor b: data starts at 2, expected 4",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#.to_owned(),
            8,
            "a stands there twice",
        ),
        (r#"{"__metadata__":{"n":1}}"#.to_owned(), 0, "__metadata__"),
    ];
    for (header, data, expected) in cases {
        let error = parse(&header, data).expect_err(&header);
        assert!(error.contains(expected), "{header}: {error}");
    }
}

#[test]
fn header_lengths() {
    assert_eq!(header_length(20_u64.to_le_bytes(), 28), Ok(20));
    assert_eq!(
        header_length(20_u64.to_le_bytes(), 27),
        Err(SafetensorsError::HeaderTruncated {
            needed: 28,
            found: 27
        })
    );
    let error = header_length(u64::MAX.to_le_bytes(), u64::MAX).unwrap_err();
    assert!(
        error.to_string().contains("over the limit of 100000000"),
        "{error}"
    );
}
