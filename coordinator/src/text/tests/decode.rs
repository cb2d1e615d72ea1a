use std::sync::Arc;

use proptest::prelude::*;

use crate::text::decode::{StreamDecoder, Utf8Decoder};
use crate::text::fixture::{IM_END, THINK, UNUSED, tokenizer};
use crate::text::stop::StopMatcher;

fn decoder(stops: &[&str]) -> StreamDecoder {
    StreamDecoder::new(
        tokenizer(),
        stops.iter().map(|stop| (*stop).to_owned()).collect(),
    )
}

#[test]
fn characters_come_whole() {
    let mut decoder = decoder(&[]);
    // The fixture's first 256 ids are the bytes.
    let pieces: Vec<String> = "a😀é"
        .bytes()
        .map(|byte| decoder.push(byte.into()).text)
        .collect();
    assert_eq!(pieces, ["a", "", "", "", "😀", "", "é"]);
    assert_eq!(decoder.finish().text, "");
}

#[test]
fn what_is_not_utf8_becomes_replacement_characters_as_in_python() {
    let cases: [(&[u8], &str); 8] = [
        (b"\xffa", "\u{fffd}a"),
        (b"\xe2\x82", "\u{fffd}"),
        (b"\xe2\x82a", "\u{fffd}a"),
        (b"\xf0\x9f\x98", "\u{fffd}"),
        (b"\xed\xa0\x80", "\u{fffd}\u{fffd}\u{fffd}"),
        (b"\xf5\x80\x80\x80", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
        (b"\xc0\xaf", "\u{fffd}\u{fffd}"),
        (b"\xe2\xe2\x82\xac", "\u{fffd}€"),
    ];
    for (bytes, expected) in cases {
        let mut decoder = decoder(&[]);
        let mut text: String = bytes
            .iter()
            .map(|&byte| decoder.push(byte.into()).text)
            .collect();
        text.push_str(&decoder.finish().text);
        assert_eq!(text, expected, "{bytes:x?}");
    }
}

#[test]
fn no_stop_string_ends_within_the_least_length() {
    let stop_after = |tokens| {
        let mut decoder = decoder(&["ab"]).not_before(tokens);
        let mut text = String::new();
        for byte in "abcab".bytes() {
            let piece = decoder.push(byte.into());
            text.push_str(&piece.text);
            if piece.stop.is_some() {
                return text;
            }
        }
        text + &decoder.finish().text
    };
    assert_eq!(stop_after(0), "");
    assert_eq!(stop_after(1), "");
    assert_eq!(stop_after(2), "abc");
    assert_eq!(stop_after(4), "abc");
    assert_eq!(stop_after(5), "abcab");
}

#[test]
fn special_tokens_have_no_text_and_do_not_cut_characters() {
    let mut decoder = decoder(&[]);
    let tokens = [0xc3, IM_END, 0xa9, THINK, UNUSED, u32::from(b'x')];
    let text: String = tokens
        .iter()
        .map(|&token| decoder.push(token).text)
        .collect();
    assert_eq!(text, "é<think>x");
}

#[test]
fn a_stop_string_across_tokens_is_held_back_and_cut() {
    let mut decoder = decoder(&["END", "low"]);
    assert_eq!(decoder.push(259).text, "hel");
    // Not "low" after all, but it may begin anew.
    assert_eq!(decoder.push(u32::from(b'l')).text, "lo");
    assert_eq!(decoder.push(u32::from(b'o')).text, "");
    let piece = decoder.push(u32::from(b'w'));
    assert_eq!(
        (piece.text.as_str(), piece.stop.as_deref()),
        ("", Some("low"))
    );
    assert_eq!(decoder.push(259), Default::default());
    assert_eq!(decoder.finish(), Default::default());
}

#[test]
fn the_beginning_of_a_stop_string_is_text_after_all_at_the_end() {
    let mut decoder = decoder(&["stop"]);
    for byte in "sto".bytes() {
        assert_eq!(decoder.push(byte.into()).text, "");
    }
    // And a character that never came is one that cannot be read.
    assert_eq!(decoder.push(0xc3).text, "");
    assert_eq!(decoder.finish().text, "sto\u{fffd}");
}

#[test]
fn the_stop_string_that_is_complete_first_wins_and_the_longest_of_those() {
    let cases = [
        (&["bcd", "c"][..], "abcd", "ab", Some("c")),
        (&["c", "bc", "xbc"], "abcd", "a", Some("bc")),
        (&["ab", "abc"], "xabc", "x", Some("ab")),
        (&["é"], "caf\u{e9}s", "caf", Some("é")),
        (&["nope"], "abc", "abc", None),
    ];
    for (stops, text, expected, stop) in cases {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let piece = matcher.push(text);
        assert_eq!(
            (piece.text + &matcher.finish(), piece.stop.as_deref()),
            (expected.to_owned(), stop)
        );
    }
}

/// The definition: cut the text before the first stop string that is complete after `exempt` bytes, the longest
/// of those.
fn stopped(text: &str, stops: &[String], exempt: usize) -> (String, Option<String>) {
    let ends = text.char_indices().skip(1).chain([(text.len(), ' ')]);
    for (end, _) in ends.filter(|(end, _)| *end > exempt) {
        let longest = stops
            .iter()
            .filter(|stop| text[..end].ends_with(stop.as_str()))
            .max_by_key(|stop| stop.len());
        if let Some(stop) = longest {
            return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #[test]
    fn any_split_of_any_bytes_gives_the_same_text(bytes in prop::collection::vec(any::<u8>(), 0..64), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let mut decoder = Utf8Decoder::default();
        let mut text = String::new();
        let mut start = 0;
        for end in cuts.into_iter().chain([bytes.len()]) {
            decoder.push(&bytes[start..end], &mut text);
            start = end;
        }
        decoder.finish(&mut text);
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}") {
        let tokenizer = tokenizer();
        let mut decoder = StreamDecoder::new(Arc::clone(&tokenizer), Vec::new());
        let mut back = String::new();
        for byte in text.bytes() {
            back.push_str(&decoder.push(byte.into()).text);
        }
        back.push_str(&decoder.finish().text);
        prop_assert_eq!(back, text);
    }

    #[test]
    fn stops_are_found_iff_they_are_in_the_whole_text(
        pieces in prop::collection::vec("[abé]{0,4}", 0..8),
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
        exempt in prop_oneof![Just(0_usize), 0_usize..8],
    ) {
        let whole = pieces.concat();
        let exempt = exempt.min(pieces.len());
        let exempt_bytes = pieces[..exempt].concat().len();
        let mut matcher = StopMatcher::new(stops.clone());
        let (mut text, mut found) = (String::new(), None);
        for piece in &pieces[..exempt] {
            text.push_str(&matcher.pass(piece));
        }
        for piece in &pieces[exempt..] {
            let piece = matcher.push(piece);
            text.push_str(&piece.text);
            found = found.or(piece.stop);
        }
        text.push_str(&matcher.finish());
        if exempt == 0 {
            prop_assert_eq!(found.is_some(), stops.iter().any(|stop| whole.contains(stop.as_str())));
        }
        prop_assert_eq!((text, found), stopped(&whole, &stops, exempt_bytes));
    }
}
