//! The roofline picture: what a card reaches, under what it could reach, by multiply-adds per byte.

use std::fmt::Write;

/// The rate of one kind of instruction.
pub struct Ceiling {
    pub name: &'static str,
    pub multiply_adds_per_second: f64,
}

/// One measurement.
pub struct Point {
    pub name: String,
    pub rows: usize,
    pub multiply_adds_per_byte: f64,
    pub multiply_adds_per_second: f64,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// A logarithmic axis: decades `from..to` over pixels `start..end`.
struct Axis {
    from: i32,
    to: i32,
    start: f64,
    end: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Self {
        let (least, most) = values
            .filter(|value| value.is_finite() && *value > 0.0)
            .fold((f64::MAX, f64::MIN), |(least, most), value| {
                (least.min(value), most.max(value))
            });
        let (from, to) = match least <= most {
            true => (least.log10().floor() as i32, most.log10().ceil() as i32),
            false => (0, 1),
        };
        Self {
            from,
            to: to.max(from + 1),
            start,
            end,
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    fn decades(&self) -> impl Iterator<Item = (i32, f64)> + '_ {
        (self.from..=self.to).map(|decade| (decade, self.at(10f64.powi(decade))))
    }
}

/// Draws it.
pub fn svg(title: &str, bytes_per_second: f64, ceilings: &[Ceiling], points: &[Point]) -> String {
    let rates = ceilings
        .iter()
        .map(|ceiling| ceiling.multiply_adds_per_second)
        .chain(points.iter().map(|point| point.multiply_adds_per_second));
    let x = Axis::over(
        points.iter().map(|point| point.multiply_adds_per_byte),
        LEFT,
        WIDTH - RIGHT,
    );
    let y = Axis::over(rates, HEIGHT - BOTTOM, TOP);
    let mut out = String::new();
    // Writing to a string does not fail.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
    ));
    put(format_args!(
        "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
    ));
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>",
        escaped(title)
    ));
    for (decade, at) in x.decades() {
        let (top, bottom, label) = (y.end, y.start, y.start + 18.0);
        put(format_args!(
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{label}\" text-anchor=\"middle\">{}</text>",
            power(decade)
        ));
    }
    for (decade, at) in y.decades() {
        let (left, right, label) = (x.start, x.end, x.start - 8.0);
        put(format_args!(
            "<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{label}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            at + 4.0,
            power(decade - 12)
        ));
    }
    put(format_args!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">multiply-adds per byte</text>",
        (x.start + x.end) / 2.0,
        HEIGHT - 10.0
    ));
    put(format_args!(
        "<text transform=\"translate(18 {:.1}) rotate(-90)\" text-anchor=\"middle\">T multiply-adds per second</text>",
        (y.start + y.end) / 2.0
    ));
    let most = ceilings
        .iter()
        .map(|ceiling| ceiling.multiply_adds_per_second)
        .fold(0.0, f64::max);
    let least = 10f64.powi(x.from);
    // Without a ceiling there is nothing that the slope could end at.
    let ridge = match ceilings {
        [] => 10f64.powi(x.to),
        _ => most / bytes_per_second,
    };
    put(format_args!(
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#333\" stroke-width=\"1.5\"><title>copy bandwidth, {:.0} GB/s</title></line>",
        x.at(least),
        y.at(least * bytes_per_second),
        x.at(ridge),
        y.at(ridge * bytes_per_second),
        bytes_per_second / 1e9
    ));
    for ceiling in ceilings {
        let rate = ceiling.multiply_adds_per_second;
        let at = y.at(rate);
        put(format_args!(
            "<line x1=\"{:.1}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#333\" stroke-width=\"1.5\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x.at(rate / bytes_per_second),
            x.end,
            x.end + 6.0,
            at + 4.0,
            escaped(ceiling.name)
        ));
    }
    let largest = points.iter().map(|point| point.rows).max().unwrap_or(1);
    for point in points {
        // Few rows are blue, many are red.
        let share = (point.rows as f64).ln() / (largest.max(2) as f64).ln();
        put(format_args!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"hsl({:.0} 70% 45%)\" fill-opacity=\"0.8\"><title>{}: {:.2} T multiply-adds/s</title></circle>",
            x.at(point.multiply_adds_per_byte),
            y.at(point.multiply_adds_per_second),
            220.0 * (1.0 - share),
            escaped(&point.name),
            point.multiply_adds_per_second / 1e12
        ));
    }
    out.push_str("</svg>\n");
    out
}

fn power(decade: i32) -> String {
    match decade {
        -3..=4 => format!("{}", 10f64.powi(decade)),
        _ => format!("1e{decade}"),
    }
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
    fn points_lie_under_their_ceilings() {
        let (x, y) = (
            Axis::over([1.0, 900.0].into_iter(), 0.0, 300.0),
            Axis::over([2e9, 5e12].into_iter(), 400.0, 0.0),
        );
        assert_eq!((x.from, x.to, y.from, y.to), (0, 3, 9, 13));
        assert_eq!((x.at(10.0), y.at(1e11)), (100.0, 200.0));
        let point = Point {
            name: "a < b".into(),
            rows: 1,
            multiply_adds_per_byte: 2.0,
            multiply_adds_per_second: 1e12,
        };
        let ceiling = Ceiling {
            name: "dp4a",
            multiply_adds_per_second: 2e13,
        };
        let picture = svg("card", 1e12, &[ceiling], &[point]);
        assert!(picture.contains("a &lt; b: 1.00 T") && picture.ends_with("</svg>\n"));
        // Nothing measured is no reason to fail.
        assert!(svg("card", 1e12, &[], &[]).contains("</svg>"));
    }
}
