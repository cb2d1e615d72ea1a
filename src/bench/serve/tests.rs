use clap::Parser;

use super::{
    record::{Outcome, Piece, Record, Usage},
    *,
};
use crate::bench::percentiles::Percentiles;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    flags: ServeFlags,
}

fn sweep(flags: &[&str]) -> Result<Sweep> {
    Line::parse_from(["serve"].iter().chain(flags))
        .flags
        .sweep()
}

/// An answer whose pieces of so many tokens come at these times.
fn done(start: f64, pieces: &[(f64, u32)]) -> Record {
    let pieces: Vec<Piece> = pieces
        .iter()
        .map(|&(at, tokens)| Piece {
            at,
            tokens: Some(tokens),
        })
        .collect();
    Record {
        start,
        end: pieces.last().unwrap().at,
        outcome: Outcome::Done(Usage {
            prompt_tokens: 10,
            cached_prompt_tokens: 4,
            completion_tokens: pieces
                .iter()
                .filter_map(|it| it.tokens)
                .map(u64::from)
                .sum(),
        }),
        pieces,
    }
}

fn failed(kind: &str) -> Record {
    Record {
        start: 0.0,
        pieces: Vec::new(),
        end: 0.5,
        outcome: Outcome::Failed(kind.into()),
    }
}

#[test]
fn figures_are_those_of_the_records() {
    // Binary fractions of seconds, so that sums are exact.
    let slow = done(1.0, &[(1.5, 1), (1.75, 1), (2.5, 3)]);
    let quick = done(2.0, &[(2.125, 1), (2.25, 1)]);
    let single = done(3.0, &[(4.0, 1)]);
    let cancelled = Record {
        outcome: Outcome::Cancelled,
        ..done(0.0, &[(0.25, 1), (0.375, 1)])
    };
    let records = [
        slow,
        quick,
        single,
        cancelled,
        failed("HTTP 429"),
        failed("timeout"),
        failed("HTTP 429"),
    ];
    let slo = Slo {
        ttft_ms: Some(1000.0),
        itl_ms: Some(200.0),
    };
    let report = LevelReport::of(&records, &slo);
    assert_eq!((report.done, report.cancelled, report.failed), (3, 1, 3));
    assert_eq!(report.errors["HTTP 429"], 2);
    assert_eq!(report.errors["timeout"], 1);
    assert_eq!(report.seconds, 4.0);
    assert_eq!(report.requests_per_second, 3.0 / 4.0);
    assert_eq!(report.output_tokens_per_second, (5.0 + 2.0 + 1.0) / 4.0);
    assert_eq!(report.prompt_tokens_per_second, 30.0 / 4.0);
    assert_eq!(report.cached_prompt_share, 12.0 / 30.0);
    let all = |it: Option<Percentiles>| it.map(|it| (it.p50, it.p90, it.p99));
    // Sorted: 125, 250, 500, 1000. Half of four are two.
    assert_eq!(all(report.ttft_ms), Some((250.0, 1000.0, 1000.0)));
    // Sorted: 125, 125, and 250 four times, three of them of one piece that took 750.
    assert_eq!(all(report.itl_ms), Some((250.0, 250.0, 250.0)));
    // 1000 ms for four tokens, and 125 for one; the answer of one token has none.
    assert_eq!(all(report.tpot_ms), Some((125.0, 250.0, 250.0)));
    assert_eq!(all(report.e2e_ms), Some((1000.0, 1500.0, 1500.0)));
    // The quick one and the one of a single token; the slow one needs 250 ms a token.
    assert_eq!(report.within_slo, Some(2.0 / 6.0));
    assert_eq!(report.goodput_requests_per_second, Some(2.0 / 4.0));
}

#[test]
fn what_was_not_asked_or_not_measured_is_absent() {
    let report = LevelReport::of(&[failed("no connection")], &Slo::default());
    assert_eq!(
        (report.within_slo, report.goodput_requests_per_second),
        (None, None)
    );
    assert_eq!((report.ttft_ms, report.e2e_ms), (None, None));
    let strict = Slo {
        ttft_ms: Some(124.0),
        itl_ms: None,
    };
    let record = done(2.0, &[(2.125, 1), (2.25, 1)]);
    let report = LevelReport::of(&[record], &strict);
    assert_eq!(report.within_slo, Some(0.0));
    assert_eq!(LevelReport::of(&[], &strict).requests_per_second, 0.0);
}

#[test]
fn over_http_a_piece_counts_once_and_usage_tells_the_mean() {
    let mut record = done(0.0, &[(1.0, 1), (2.0, 4), (3.0, 4)]);
    for piece in &mut record.pieces {
        piece.tokens = None;
    }
    let report = LevelReport::of(&[record], &Slo::default());
    assert_eq!(report.itl_ms.map(|it| it.p50), Some(1000.0));
    // Nine tokens by usage, of which eight came after the first.
    assert_eq!(report.tpot_ms.map(|it| it.p50), Some(250.0));
}

#[test]
fn flags_make_a_sweep_or_are_refused_by_name() {
    let it = sweep(&["--rate", "2,0.5", "--duration", "3", "--seed", "9"]).unwrap();
    assert_eq!(it.paces, [2.0, 0.5].map(|rate| Pace::Open { rate }));
    assert_eq!((it.until, it.load.seed), (Until::Seconds(3.0), 9));
    let it = sweep(&["--requests", "7"]).unwrap();
    assert_eq!(it.paces.len(), CONCURRENCIES.len());
    assert_eq!(it.until, Until::Requests(7));
    let error = sweep(&["--rate", "0", "--cancel", "2", "--slo-itl-ms", "nan"]);
    let error = error.err().unwrap().to_string();
    for words in ["--rate: ", "--cancel: 2", "--slo-itl-ms: NaN"] {
        assert!(error.contains(words), "{error}");
    }
    for (url, words) in [
        ("https://host", "TLS"),
        ("ftp://host", "not of the form"),
        ("http://", "not of the form"),
    ] {
        let error = address(url).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(
        address("host:7700").unwrap().authority().unwrap(),
        "host:7700"
    );
}

/// Without the texts around it; the whole command is run by the tests of the command line.
#[test]
fn the_table_has_a_row_a_level() {
    let slo = Slo {
        ttft_ms: Some(1.0),
        itl_ms: None,
    };
    let mut level = LevelReport::of(&[done(0.0, &[(0.5, 1)]), failed("timeout")], &slo);
    level.concurrency = Some(8);
    let report = Report {
        api: "grpc",
        url: "http://host:1".into(),
        model: "m".into(),
        seed: 3,
        prompt_tokens: "fixed:4".into(),
        shared_prefix_tokens: 2,
        output_tokens: "fixed:1".into(),
        cancel: 0.0,
        slo,
        levels: vec![level],
    };
    let text = report.render();
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].contains("fixed:4 tokens after 2 that all share"),
        "{text}"
    );
    let cells: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(
        cells,
        [
            "8", "1", "1", "2.00", "2", "500", "500", "500", "-", "-", "-", "500", "500", "500",
            "0.00", "0", "%"
        ]
    );
    assert_eq!(lines[4], "8: 1 x timeout");
}
