//! Plots of a job as SVG: the loss (for policies the reward), other metrics of the kind of job, and
//! the learning rate.

use super::{Entry, JobEvent, StepMetrics};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error;

const WIDTH: u32 = 900;
/// Panel heights in pixels: the first panel, a panel of other metrics, the learning rate's panel.
const MAIN: u32 = 400;
const FURTHER: u32 = 200;
const RATE: u32 = 180;
/// Maximum number of points drawn for a curve.
const POINTS: usize = 1_000;
const FONT: &str = "sans-serif";
/// Metrics that have their own panel, with their names in the legend.
const MEASURED: [(&str, &str); 10] = [
    ("accuracy", "accuracy"),
    ("divergence", "divergence from the teacher (nats)"),
    ("cross_entropy", "cross-entropy (nats)"),
    ("reward_margin", "reward margin"),
    ("reward_std", "spread of rewards"),
    ("kl", "KL to the reference"),
    ("entropy", "entropy (nats)"),
    ("completion_length", "answer tokens"),
    ("clip_ratio", "clipped share"),
    ("value_loss", "value loss"),
];

/// (step, value) points of a curve.
type Curve = Vec<(f64, f64)>;

/// Curves that share their axes.
struct Panel {
    height: u32,
    what: &'static str,
    curves: Vec<(&'static str, RGBColor, Curve)>,
    /// Also draws a running mean of each curve.
    smoothed: bool,
}

/// Draws the curves of the job named `title`. Without steps the axes are empty.
///
/// # Errors
/// If the drawing library fails.
pub fn plot(entries: &[Entry], title: &str) -> Result<String, String> {
    let mut svg = String::new();
    draw(&mut svg, &panels(entries), title).map_err(|error| error.to_string())?;
    Ok(svg)
}

fn panels(entries: &[Entry]) -> Vec<Panel> {
    let steps: Vec<&StepMetrics> = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            JobEvent::Step(step) => Some(step),
            _ => None,
        })
        .collect();
    let of_steps = |value: &dyn Fn(&StepMetrics) -> Option<f64>| -> Curve {
        steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
    };
    let is_policy = steps.iter().any(|step| step.reward().is_some());
    let validation = entries.iter().filter_map(|entry| match &entry.event {
        JobEvent::Validation(found) => {
            Some((found.step as f64, found.loss.or_else(|| found.reward())?))
        }
        _ => None,
    });
    let validation: Curve = validation.collect();
    let training = of_steps(&|step| if is_policy { step.reward() } else { Some(step.loss) });
    let mut curves = vec![("training", BLUE, training)];
    if !validation.is_empty() {
        curves.push(("validation", RED, validation));
    }
    let what = if is_policy { "reward" } else { "loss (nats)" };
    let mut panels = vec![Panel { height: MAIN, what, curves, smoothed: true }];
    // Supervised fine-tuning and pretraining have no further metrics.
    if steps.iter().any(|step| !step.metrics.is_empty()) {
        for ((name, what), color) in
            MEASURED.into_iter().zip([MAGENTA, CYAN, BLACK].into_iter().cycle())
        {
            let curve = of_steps(&|step| match name {
                "accuracy" => step.accuracy,
                _ => step.metrics.get(name).copied(),
            });
            if !curve.is_empty() {
                let curves = vec![(what, color, curve)];
                panels.push(Panel { height: FURTHER, what, curves, smoothed: true });
            }
        }
    }
    let curves = vec![("learning rate", GREEN, of_steps(&|step| Some(step.learning_rate)))];
    panels.push(Panel { height: RATE, what: "learning rate", curves, smoothed: false });
    panels
}

fn draw(svg: &mut String, panels: &[Panel], title: &str) -> Result<(), Box<dyn Error>> {
    let height = panels.iter().map(|panel| panel.height).sum();
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = panels.iter().flat_map(|panel| &panel.curves).flat_map(|(_, _, curve)| curve);
    let last = steps.map(|(step, _)| *step).fold(1.0, f64::max);
    let mut rest = root.clone();
    for (number, panel) in panels.iter().enumerate() {
        let (area, below) = rest.split_vertically(panel.height);
        rest = below;
        let title = (number == 0).then_some(title);
        draw_panel(&area, panel, title, last)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(
    area: &DrawingArea<SVGBackend, Shift>,
    panel: &Panel,
    title: Option<&str>,
    last: f64,
) -> Result<(), Box<dyn Error>> {
    let mut builder = ChartBuilder::on(area);
    builder.margin(12).x_label_area_size(36).y_label_area_size(72);
    if let Some(title) = title {
        builder.caption(title, (FONT, 18));
    }
    let points = panel.curves.iter().flat_map(|(_, _, curve)| curve);
    let from_zero = [(0.0, 0.0)];
    let points = points.chain(if panel.smoothed { &[][..] } else { &from_zero });
    let mut chart = builder.build_cartesian_2d(0.0..last, range(points))?;
    let rate = |value: &f64| format!("{value:.0e}");
    let plain =
        |value: &f64| format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned();
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc(panel.what)
        // Labels at whole steps only.
        .x_labels((last as usize + 1).min(11))
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(if panel.smoothed { &plain } else { &rate })
        .y_labels(if panel.height == MAIN { 9 } else { 5 })
        .label_style((FONT, 12))
        .light_line_style(WHITE)
        .draw()?;
    for (label, color, curve) in &panel.curves {
        let line = color.stroke_width(2);
        // Curves with few points, such as validation, are drawn without smoothing.
        let shown = if panel.smoothed && curve.len() > 50 {
            chart.draw_series(LineSeries::new(thinned(curve), color.mix(0.25)))?;
            smooth(curve)
        } else {
            if curve.len() <= 50 {
                let points = curve.iter().map(|&point| Circle::new(point, 3, color.filled()));
                chart.draw_series(points)?;
            }
            curve.clone()
        };
        chart
            .draw_series(LineSeries::new(thinned(&shown), line))?
            .label(*label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], line));
    }
    if panel.curves.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font((FONT, 13))
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.4))
            .draw()?;
    }
    Ok(())
}

/// The range from the smallest to the largest value, with a margin.
fn range<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> std::ops::Range<f64> {
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for (_, y) in points {
        (least, most) = (least.min(*y), most.max(*y));
    }
    if least > most {
        return 0.0..1.0;
    }
    let room = 0.05 * (most - least).max(1e-9 + 1e-3 * most.abs());
    // The axis of values that are never negative does not extend below 0.
    let floor = if least >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
    (least - room).max(floor)..most + room
}

/// A running mean over about a fiftieth of the curve.
fn smooth(points: &[(f64, f64)]) -> Curve {
    let share = 1.0 / (points.len() as f64 / 50.0).max(1.0);
    let mut mean = points.first().map_or(0.0, |(_, y)| *y);
    let each = points.iter().map(|&(x, y)| {
        mean += share * (y - mean);
        (x, mean)
    });
    each.collect()
}

fn thinned(points: &[(f64, f64)]) -> Curve {
    let every = points.len().div_ceil(POINTS).max(1);
    points.iter().step_by(every).chain(points.last()).copied().collect()
}
