//! A picture of how a training went.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Loss by step.
#[derive(Default)]
pub struct Curve {
    /// Loss of the batch of every step, before the update.
    pub train: Vec<(f64, f64)>,
    /// Loss of the rows held out, at the end of every epoch.
    pub held_out: Vec<(f64, f64)>,
}

impl Curve {
    /// Writes it as SVG, if there is anything to be seen.
    pub fn draw(&self, path: &Path) -> Result<()> {
        self.try_draw(path).map_err(|error| anyhow!("{}: {error}", path.display()))
    }

    fn try_draw(&self, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
        let [(first, _), .., (last, _)] = self.train[..] else { return Ok(()) };
        let losses = || self.train.iter().chain(&self.held_out).map(|(_, loss)| *loss);
        let (least, most) = (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
        let room = 0.05 * (most - least).max(1e-3);
        let root = SVGBackend::new(path, (720, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(first..last, least - room..most + room)?;
        let mesh = |x: &f64| format!("{x:.0}");
        chart.configure_mesh().x_label_formatter(&mesh).x_desc("step").y_desc("nats per token").draw()?;
        for (name, points, color) in [("training", &self.train, &BLUE), ("held out", &self.held_out, &RED)] {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), color))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
        Ok(root.present()?)
    }
}
