//! Throughput against latency: a panel for the time to the first token, one for the time between tokens.

use std::fmt::Write;

use super::report::LevelReport;
use crate::bench::percentiles::Percentiles;

const WIDTH: f64 = 940.0;
const HEIGHT: f64 = 420.0;
const TOP: f64 = 70.0;
const BOTTOM: f64 = 56.0;
/// Left and right end of each panel.
const PANELS: [(f64, f64); 2] = [(74.0, 440.0), (554.0, 920.0)];

/// A line of a panel: its name, its colour, and which percentile it is.
type Line = (&'static str, &'static str, fn(&Percentiles) -> f64);

/// What a panel shows of a level.
type Latency = fn(&LevelReport) -> Option<Percentiles>;

const LINES: [Line; 3] = [
    ("p50", "#1b6ca8", |it| it.p50),
    ("p90", "#b8860b", |it| it.p90),
    ("p99", "#b22222", |it| it.p99),
];

/// Draws it. Points are labelled with their level's setting.
pub fn svg(title: &str, levels: &[LevelReport]) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">"
    ));
    put(format_args!(
        "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
    ));
    put(format_args!(
        "<text x=\"{}\" y=\"26\" font-size=\"16\">{}</text>",
        PANELS[0].0,
        escaped(title)
    ));
    let latencies: [(&str, Latency); 2] = [
        ("time to first token, ms", |level| level.ttft_ms),
        ("time between tokens, ms", |level| level.itl_ms),
    ];
    let most_tokens = levels.iter().map(|level| level.output_tokens_per_second);
    let tokens = ticks(most_tokens.fold(0.0, f64::max));
    for ((left, right), (label, latency)) in PANELS.into_iter().zip(latencies) {
        let points: Vec<(&LevelReport, Percentiles)> = levels
            .iter()
            .filter_map(|level| Some((level, latency(level)?)))
            .collect();
        let values = ticks(points.iter().map(|(_, it)| it.p99).fold(0.0, f64::max));
        let end = |ticks: &[f64]| ticks.last().copied().unwrap_or(1.0);
        let (most_x, most_y) = (end(&tokens), end(&values));
        let x = |value: f64| left + value / most_x * (right - left);
        let y = |value: f64| HEIGHT - BOTTOM - value / most_y * (HEIGHT - BOTTOM - TOP);
        for &tick in &tokens {
            let (at, foot) = (x(tick), HEIGHT - BOTTOM);
            put(format_args!(
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{foot}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
                foot + 18.0
            ));
        }
        for &tick in &values {
            let at = y(tick);
            put(format_args!(
                "<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
                left - 8.0,
                at + 4.0
            ));
        }
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">output tokens per second</text>",
            (left + right) / 2.0,
            HEIGHT - 14.0
        ));
        put(format_args!(
            "<text transform=\"translate({} {:.1}) rotate(-90)\" text-anchor=\"middle\">{label}</text>",
            left - 54.0,
            (TOP + HEIGHT - BOTTOM) / 2.0
        ));
        for (index, (name, colour, of)) in LINES.into_iter().enumerate() {
            let at = right - 44.0 * (LINES.len() - index) as f64 + 10.0;
            put(format_args!(
                "<text x=\"{at}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
                TOP - 14.0
            ));
            let path: Vec<String> = points
                .iter()
                .map(|(level, it)| {
                    let (x, y) = (x(level.output_tokens_per_second), y(of(it)));
                    format!("{x:.1},{y:.1}")
                })
                .collect();
            put(format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
                path.join(" ")
            ));
            for (level, it) in &points {
                let (x, y) = (x(level.output_tokens_per_second), y(of(it)));
                put(format_args!(
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"><title>{}: {name} {:.2} ms at {:.0} tokens/s</title></circle>",
                    level.setting(),
                    of(it),
                    level.output_tokens_per_second
                ));
                // One label a level, above its highest point.
                if name == "p99" {
                    put(format_args!(
                        "<text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"12\" fill=\"#444\" stroke=\"white\" stroke-width=\"3\" paint-order=\"stroke\" text-anchor=\"middle\">{}</text>",
                        y - 8.0,
                        level.setting()
                    ));
                }
            }
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Round values from 0 to at least `most`, five to ten of them.
fn ticks(most: f64) -> Vec<f64> {
    let most = if most > 0.0 && most.is_finite() {
        most
    } else {
        1.0
    };
    let decade = 10_f64.powf((most / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * decade);
    let step = steps.into_iter().find(|step| most / step <= 8.0);
    let step = step.unwrap_or(10.0 * decade);
    let count = (most / step).ceil() as u32;
    // 3 * 0.1 is not 0.3 as it prints.
    let digits = (-decade.log10()).max(0.0) as usize;
    (0..=count)
        .filter_map(|index| format!("{:.digits$}", f64::from(index) * step).parse().ok())
        .collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_begin_at_zero_and_hold_everything() {
        assert_eq!(ticks(0.7), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
        assert_eq!(ticks(1234.0).last(), Some(&1400.0));
        for most in [0.0, 1e-3, 0.011, 1.0, 9.9, 10.0, 11.0, 73.0, 1e6] {
            let ticks = ticks(most);
            assert!(
                ticks[0] == 0.0 && *ticks.last().unwrap() >= most,
                "{most}: {ticks:?}"
            );
            assert!((3..=10).contains(&ticks.len()), "{most}: {ticks:?}");
        }
    }

    #[test]
    fn every_level_is_in_both_panels() {
        let level = |rate: f64, ms: f64| LevelReport {
            rate: Some(rate),
            output_tokens_per_second: 40.0 * rate,
            ttft_ms: Percentiles::of(vec![ms]),
            itl_ms: Percentiles::of(vec![ms / 10.0]),
            ..LevelReport::default()
        };
        let picture = svg("a < b", &[level(1.0, 30.0), level(2.5, 70.0)]);
        for words in [
            "a &lt; b",
            ">output tokens per second<",
            ">time to first token, ms<",
            ">time between tokens, ms<",
            "2.5/s: p99 70.00 ms at 100 tokens/s",
            "2.5/s: p50 7.00 ms at 100 tokens/s",
        ] {
            assert!(picture.contains(words), "no {words}");
        }
        assert_eq!(picture.matches("<circle").count(), 12);
        // The last level has the most tokens, and its p99 is 70 of 70 ms: the upper right corner, on a tick.
        assert!(picture.contains("cx=\"440.0\" cy=\"70.0\""), "{picture}");
        // Nothing measured is no reason to fail.
        assert!(svg("none", &[LevelReport::default()]).ends_with("</svg>\n"));
    }
}
