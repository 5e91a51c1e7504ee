//! The report of an evaluation as one HTML page, which loads nothing from elsewhere.

use super::{EvalReport, ModelReport};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context};
use plotters::prelude::*;
use std::error::Error;

const PAGE: &str = include_str!("evaluation.html");
const WIDTH: u32 = 900;
const HEIGHT: u32 = 380;
const FONT: &str = "sans-serif";
/// Lowest KL that is drawn, on a logarithmic axis.
const LEAST_KL: f64 = 1e-7;

impl EvalReport {
    /// The report as HTML.
    ///
    /// # Errors
    /// If the drawing library or the template fails.
    pub fn html(&self) -> Result<String, String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.add_filter("number", number);
        environment.add_filter("percent", |value: f64| format!("{:.2}%", 100.0 * value));
        environment.add_filter("mb", |bytes: f64| format!("{:.1} MB", bytes / 1e6));
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        environment.add_template("evaluation.html", PAGE).map_err(|error| failed(&error))?;
        let compared = self.models.iter().filter(|model| model.divergence.is_some());
        let compared: Vec<&ModelReport> = compared.collect();
        let plots = match compared.is_empty() {
            true => Vec::new(),
            false => vec![
                drawn(|svg| quantiles(svg, &compared)).map_err(|error| failed(&error))?,
                drawn(|svg| sizes(svg, &compared)).map_err(|error| failed(&error))?,
            ],
        };
        let mut tasks: Vec<String> =
            self.models.iter().flat_map(|model| model.tasks.keys().cloned()).collect();
        tasks.sort();
        tasks.dedup();
        let page = environment.get_template("evaluation.html").map_err(|error| failed(&error))?;
        let report = Serde(self);
        page.render(context! { report, plots, tasks }).map_err(|error| failed(&error))
    }
}

/// Four significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 1e-3 => format!("{value:.2e}"),
        small if small < 1.0 => format!("{value:.4}"),
        small if small < 1e3 => format!("{value:.3}"),
        _ => format!("{value:.0}"),
    }
}

fn drawn(
    draw: impl FnOnce(&mut String) -> Result<(), Box<dyn Error>>,
) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    draw(&mut svg)?;
    Ok(svg)
}

/// The KL that a share of the predictions does not exceed.
fn quantiles(svg: &mut String, models: &[&ModelReport]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let curves: Vec<Vec<(f64, f64)>> = models
        .iter()
        .filter_map(|model| model.divergence.as_ref())
        .map(|found| {
            found.kl_quantiles.iter().map(|&(x, kl)| (100.0 * x, kl.max(LEAST_KL))).collect()
        })
        .collect();
    let most = curves.iter().flatten().map(|(_, kl)| *kl).fold(10.0 * LEAST_KL, f64::max).min(1e6);
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..100.0, (LEAST_KL..2.0 * most).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("percent of the predictions")
        .y_desc("KL to the reference, at most (nats)")
        .y_label_formatter(&|kl| format!("{kl:.0e}"))
        .label_style((FONT, 12))
        .light_line_style(WHITE)
        .draw()?;
    for (number, (model, curve)) in models.iter().zip(curves).enumerate() {
        let line = Palette99::pick(number).stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve, line))?
            .label(model.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], line));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 13))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    root.present()?;
    Ok(())
}

/// The mean KL by the size of the file, with intervals.
fn sizes(svg: &mut String, models: &[&ModelReport]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    // A text in the drawing outlives the borrow of the models.
    let points: Vec<(String, f64, [f64; 3])> = models
        .iter()
        .filter_map(|model| {
            let kl = model.divergence.as_ref()?.mean_kl;
            Some((model.name.clone(), model.bytes as f64 / 1e6, [kl.low, kl.value, kl.high]))
        })
        .collect();
    let largest = points.iter().map(|(_, size, _)| *size).fold(1.0, f64::max);
    let most = points.iter().map(|(_, _, kl)| kl[2]).fold(LEAST_KL, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..1.25 * largest, 0.0..1.1 * most)?;
    chart
        .configure_mesh()
        .x_desc("size of the file (MB)")
        .y_desc("mean KL (nats), 95% interval")
        .y_label_formatter(&|kl| number(*kl))
        .label_style((FONT, 12))
        .light_line_style(WHITE)
        .draw()?;
    for (number, (name, size, [low, value, high])) in points.into_iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let line = color.stroke_width(2);
        chart.draw_series([PathElement::new([(size, low), (size, high)], line)])?;
        chart.draw_series([Circle::new((size, value), 4, color.filled())])?;
        chart.draw_series([Text::new(name, (size + 0.01 * largest, value), (FONT, 13))])?;
    }
    root.present()?;
    Ok(())
}
