//! A line chart on two logarithmic axes, written as SVG by hand: a plotting library would be
//! the largest dependency of the program.

use std::fmt::Write as _;

/// Size of the picture.
const WIDTH: f64 = 720.0;
/// As above.
const HEIGHT: f64 = 440.0;
/// The plot's place in it: left, top, right, bottom.
const PLOT: (f64, f64, f64, f64) = (70.0, 60.0, 700.0, 380.0);
/// Text around its point; other text begins there.
const MIDDLE: &str = "text-anchor=\"middle\"";
/// Readable on white and on black, and apart for colour-blind eyes (Okabe and Ito 2008).
const COLOURS: &[&str] =
    &["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555"];

/// A curve. Its points lie above zero.
pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub dashed: bool,
}

/// What is drawn.
pub(super) struct Chart {
    pub title: String,
    pub subtitle: String,
    pub x_label: String,
    pub y_label: String,
    pub series: Vec<Series>,
}

/// A logarithmic axis from one power of its base to another, laid over pixels.
struct Axis {
    base: f64,
    low: i32,
    high: i32,
    from: f64,
    to: f64,
}

impl Axis {
    /// The least range of whole powers that holds all values.
    fn over(values: impl Iterator<Item = f64>, base: f64, from: f64, to: f64) -> Axis {
        let exponents = values.map(|value| value.log(base));
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for exponent in exponents.filter(|exponent| exponent.is_finite()) {
            low = low.min(exponent);
            high = high.max(exponent);
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        // A power that is met exactly must not be missed by the rounding of a logarithm.
        let (low, high) = ((low + 1e-9).floor() as i32, (high - 1e-9).ceil() as i32);
        Axis { base, low, high: high.max(low + 1), from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value.log(self.base) - f64::from(self.low)) / f64::from(self.high - self.low);
        self.from + share * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (self.low..=self.high).map(|exponent| self.base.powi(exponent))
    }
}

impl Chart {
    /// The picture.
    pub fn svg(&self) -> String {
        let (left, top, right, bottom) = PLOT;
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let x = Axis::over(points().map(|point| point.0), 2.0, left, right);
        let y = Axis::over(points().map(|point| point.1), 10.0, bottom, top);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        text(&mut svg, (left, 24.0), "font-size=\"16\"", &self.title);
        text(&mut svg, (left, 44.0), "fill=\"#555\"", &self.subtitle);
        text(&mut svg, ((left + right) / 2.0, HEIGHT - 18.0), MIDDLE, &self.x_label);
        let turned = format!("{MIDDLE} transform=\"rotate(-90 18 {})\"", (top + bottom) / 2.0);
        text(&mut svg, (18.0, (top + bottom) / 2.0), &turned, &self.y_label);
        grid(&mut svg, &x, &y);
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            curve(&mut svg, series, colour, &x, &y);
            let at = (left + 16.0, top + 20.0 + 20.0 * i as f64);
            text(&mut svg, at, &format!("fill=\"{colour}\""), &series.name);
        }
        svg + "</svg>\n"
    }
}

fn grid(svg: &mut String, x: &Axis, y: &Axis) {
    let (left, top, right, bottom) = PLOT;
    for tick in x.ticks() {
        let at = x.place(tick);
        line(svg, (at, top), (at, bottom));
        text(svg, (at, bottom + 20.0), MIDDLE, &tick.to_string());
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        line(svg, (left, at), (right, at));
        text(svg, (left - 8.0, at + 4.0), "text-anchor=\"end\"", &tick.to_string());
    }
}

fn curve(svg: &mut String, series: &Series, colour: &str, x: &Axis, y: &Axis) {
    let at = |&(px, py): &(f64, f64)| (x.place(px), y.place(py));
    let path: Vec<String> =
        series.points.iter().map(at).map(|(px, py)| format!("{px:.1},{py:.1}")).collect();
    let dashes = if series.dashed { " stroke-dasharray=\"7 5\"" } else { "" };
    push(
        svg,
        format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\n",
            path.join(" ")
        ),
    );
    for (px, py) in series.points.iter().map(at).filter(|_| !series.dashed) {
        push(
            svg,
            format_args!("<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" fill=\"{colour}\"/>\n"),
        );
    }
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    push(
        svg,
        format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\n",
            from.0, from.1, to.0, to.1
        ),
    );
}

fn text(svg: &mut String, at: (f64, f64), attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    push(
        svg,
        format_args!("<text x=\"{:.1}\" y=\"{:.1}\" {attributes}>{content}</text>\n", at.0, at.1),
    );
}

fn push(svg: &mut String, part: std::fmt::Arguments<'_>) {
    svg.write_fmt(part).expect("writing to memory does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_spans_whole_powers() {
        let axis = Axis::over([1.0, 2.0, 128.0].into_iter(), 2.0, 0.0, 70.0);
        assert_eq!((axis.low, axis.high), (0, 7));
        assert!((axis.place(8.0) - 30.0).abs() < 1e-6);
        let axis = Axis::over([0.3, 40.0].into_iter(), 10.0, 100.0, 0.0);
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [0.1, 1.0, 10.0, 100.0]);
        assert!((axis.place(0.1) - 100.0).abs() < 1e-6 && axis.place(100.0).abs() < 1e-6);
        let axis = Axis::over([5.0].into_iter(), 10.0, 0.0, 1.0);
        assert_eq!((axis.low, axis.high), (0, 1), "one value still has a range");
    }

    #[test]
    fn a_chart_draws_every_point_and_escapes_text() {
        let series = |name: &str, dashed| Series {
            name: name.to_owned(),
            points: vec![(1.0, 10.0), (2.0, 20.0), (4.0, 30.0)],
            dashed,
        };
        let chart = Chart {
            title: "a < b & c".to_owned(),
            subtitle: String::new(),
            x_label: "x".to_owned(),
            y_label: "y".to_owned(),
            series: vec![series("measured", false), series("roof", true)],
        };
        let svg = chart.svg();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("stroke-dasharray").count(), 1);
        assert!(svg.contains("a &lt; b &amp; c"));
    }

    #[test]
    fn a_chart_without_points_is_still_a_picture() {
        let chart = Chart {
            title: String::new(),
            subtitle: String::new(),
            x_label: String::new(),
            y_label: String::new(),
            series: vec![],
        };
        assert!(!chart.svg().contains("NaN"));
    }
}
