//! Writing for people and pipes.

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

use crate::exit::StdoutClosed;

/// Writes `text` to standard output at once. A reader that went away ends the command quietly.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        other => other.context("cannot write to standard output"),
    }
}

/// As [`print()`], with a line end.
pub fn print_line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Tells the user something beside the answer, on standard error.
pub fn note(text: &str) {
    // A closed standard error must not end the answer.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A piece of what stands beside the answer, on standard error.
pub fn aside(text: &str) {
    let mut err = std::io::stderr();
    // As in `note`.
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// Bytes for people, in units of 1024.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// Rows under a header, columns padded to their widest cell; the columns of `right` align to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .chain([header[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                if right.contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let header = line(header.to_vec());
    let rows = rows
        .iter()
        .map(|row| line(row.iter().map(String::as_str).collect()));
    [header]
        .into_iter()
        .chain(rows)
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [
            vec!["0".into(), "p40".into()],
            vec!["10".into(), "2080ti".into()],
        ];
        assert_eq!(
            table(&["rank", "card"], &rows, &[0]),
            "rank  card\n   0  p40\n  10  2080ti"
        );
    }

    #[test]
    fn bytes_carry_units() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
    }
}
