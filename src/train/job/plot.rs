//! Curves of a job as SVG: losses (of policies: rewards) above, the learning rate below.

use super::{Entry, JobEvent};
use plotters::prelude::*;
use std::error::Error;

const SIZE: (u32, u32) = (900, 640);
/// Pixels of the upper part.
const LOSSES: u32 = 430;
/// A curve has no more points than one can see.
const POINTS: usize = 1_000;
const FONT: &str = "sans-serif";

/// A curve by step.
type Curve = Vec<(f64, f64)>;

/// Draws training and validation loss, and the learning rate, of a job that is called `title`.
/// Without steps the axes are empty.
///
/// # Errors
/// If the drawing library refuses.
pub fn plot(entries: &[Entry], title: &str) -> Result<String, String> {
    let mut svg = String::new();
    draw(&mut svg, entries, title).map_err(|error| error.to_string())?;
    Ok(svg)
}

fn draw(svg: &mut String, entries: &[Entry], title: &str) -> Result<(), Box<dyn Error>> {
    let steps = entries.iter().filter_map(|entry| match &entry.event {
        JobEvent::Step(step) => {
            let shown = step.reward().unwrap_or(step.loss);
            Some((step.step as f64, shown, step.learning_rate))
        }
        _ => None,
    });
    let is_policy = entries
        .iter()
        .any(|entry| matches!(&entry.event, JobEvent::Step(step) if step.reward().is_some()));
    let what = if is_policy { "reward" } else { "loss (nats)" };
    let (losses, rates): (Curve, Curve) =
        steps.map(|(step, loss, rate)| ((step, loss), (step, rate))).unzip();
    let validation: Curve = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            JobEvent::Validation(found) => {
                Some((found.step as f64, found.validation_loss.or_else(|| found.reward())?))
            }
            _ => None,
        })
        .collect();
    let last = losses.last().map_or(1.0, |(step, _)| step.max(1.0));
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (above, below) = root.split_vertically(LOSSES);

    let mut chart = ChartBuilder::on(&above)
        .caption(title, (FONT, 18))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, range(losses.iter().chain(&validation)))?;
    chart.configure_mesh().y_desc(what).light_line_style(WHITE).draw()?;
    let faint = BLUE.mix(0.25);
    chart.draw_series(LineSeries::new(thinned(&losses), &faint))?;
    chart
        .draw_series(LineSeries::new(thinned(&smooth(&losses)), BLUE.stroke_width(2)))?
        .label("training")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLUE.stroke_width(2)));
    if !validation.is_empty() {
        let points = validation.iter().map(|&point| Circle::new(point, 3, RED.filled()));
        chart.draw_series(points)?;
        chart
            .draw_series(LineSeries::new(thinned(&validation), RED.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], RED.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;

    let mut chart = ChartBuilder::on(&below)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, range(rates.iter().chain(&[(0.0, 0.0)])))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("learning rate")
        .y_label_formatter(&|rate| format!("{rate:.0e}"))
        .y_labels(5)
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(LineSeries::new(thinned(&rates), GREEN.stroke_width(2)))?;
    root.present()?;
    Ok(())
}

/// From the least to the greatest, with some room.
fn range<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> std::ops::Range<f64> {
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for (_, y) in points {
        (least, most) = (least.min(*y), most.max(*y));
    }
    if least > most {
        return 0.0..1.0;
    }
    let room = 0.05 * (most - least).max(1e-9 + 1e-3 * most.abs());
    // What is never below 0 has no axis below it.
    let floor = if least >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
    (least - room).max(floor)..most + room
}

/// A running mean, as wide as a fiftieth of the curve.
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
