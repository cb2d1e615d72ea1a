//! Tags in a text that comes in pieces.

/// Bytes at the end of `text` that may become `tag`, with the line breaks before them.
pub(super) fn uncertain(text: &str, tag: &str) -> usize {
    let begun = (1..tag.len())
        .rev()
        .find(|&length| text.ends_with(&tag[..length]))
        .unwrap_or(0);
    let before = &text[..text.len() - begun];
    begun + before.len() - before.trim_end_matches('\n').len()
}
