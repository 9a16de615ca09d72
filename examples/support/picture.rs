//! Pictures for the examples, as SVG files: heat maps side by side under one colour scale.

#![allow(dead_code, reason = "each example uses a part of this file")]

use std::error::Error;
use std::path::Path;

use hymba::ndarray::Array2;
use plotters::coord::Shift;
use plotters::prelude::*;

/// Several heat maps that share their axes and their colours.
pub struct HeatMaps {
    pub title: String,
    /// One line under the title: how to read the picture.
    pub subtitle: String,
    pub x_label: String,
    pub y_label: String,
    pub panels: Vec<Panel>,
    pub scale: Scale,
}

/// One heat map.
pub struct Panel {
    pub title: String,
    /// `[columns, rows]`: the first axis goes right, the second up.
    pub values: Array2<f32>,
}

/// Colours for the values around `middle`: blue below, white at it, orange above, fully coloured `reach` away from it.
pub struct Scale {
    pub middle: f32,
    pub reach: f32,
    /// What the two ends mean.
    pub below: String,
    pub above: String,
}

impl Scale {
    /// The largest distance of any value from `middle` (rounded up to a tenth) becomes the reach.
    pub fn around(middle: f32, panels: &[Panel], below: &str, above: &str) -> Scale {
        let distances = panels.iter().flat_map(|panel| panel.values.iter().map(|value| (value - middle).abs()));
        let reach = (distances.fold(0.0, f32::max) * 10.0).ceil().max(1.0) / 10.0;
        Scale { middle, reach, below: below.into(), above: above.into() }
    }

    fn color(&self, value: f32) -> RGBColor {
        const BELOW: [RGBColor; 3] = [RGBColor(247, 246, 243), RGBColor(112, 165, 210), RGBColor(18, 64, 125)];
        const ABOVE: [RGBColor; 3] = [RGBColor(247, 246, 243), RGBColor(240, 150, 80), RGBColor(150, 45, 10)];
        const SHADES: f32 = 12.0;
        const NOT_A_NUMBER: RGBColor = RGBColor(90, 90, 90);
        let distance = (value - self.middle) / self.reach;
        if distance.is_nan() {
            return NOT_A_NUMBER;
        }
        let [near, half, far] = if distance < 0.0 { BELOW } else { ABOVE };
        let distance = (distance.abs().min(1.0) * SHADES).round() / SHADES;
        if distance < 0.5 { mix(near, half, distance * 2.0) } else { mix(half, far, distance * 2.0 - 1.0) }
    }
}

/// `from` at 0, `to` at 1.
fn mix(from: RGBColor, to: RGBColor, share: f32) -> RGBColor {
    let channel = |from: u8, to: u8| (f32::from(from) + (f32::from(to) - f32::from(from)) * share).round() as u8;
    RGBColor(channel(from.0, to.0), channel(from.1, to.1), channel(from.2, to.2))
}

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(50, 50, 50);
const PANEL_SIZE: (u32, u32) = (430, 350);
const TITLE_HEIGHT: u32 = 74;
const LEGEND_WIDTH: u32 = 130;

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the heat maps, two in a row.
pub fn heat_maps(path: &Path, picture: &HeatMaps) -> Result<(), Box<dyn Error>> {
    let columns = picture.panels.len().clamp(1, 2);
    let rows = picture.panels.len().div_ceil(columns).max(1);
    let size = (columns as u32 * PANEL_SIZE.0 + LEGEND_WIDTH, rows as u32 * PANEL_SIZE.1 + TITLE_HEIGHT);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    root.draw_text(&picture.title, &text(22), (24, 18))?;
    root.draw_text(&picture.subtitle, &text(14), (24, 48))?;

    let (_, below_title) = root.split_vertically(TITLE_HEIGHT);
    let (maps, legend) = below_title.split_horizontally(columns as u32 * PANEL_SIZE.0);
    for (panel, area) in picture.panels.iter().zip(maps.split_evenly((rows, columns))) {
        draw_panel(&area, panel, picture)?;
    }
    draw_legend(&legend, &picture.scale)?;
    root.present()?;
    Ok(())
}

fn text(size: u32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}

fn draw_panel(area: &Drawing, panel: &Panel, picture: &HeatMaps) -> Result<(), Box<dyn Error>> {
    let (columns, rows) = panel.values.dim();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, text(16))
        .margin(14)
        .x_label_area_size(38)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..columns.max(1) as f32, 0.0..rows.max(1) as f32)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(INK)
        .label_style(text(12))
        .axis_desc_style(text(14))
        .x_desc(&picture.x_label)
        .y_desc(&picture.y_label)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for (row, values) in panel.values.columns().into_iter().enumerate() {
        let y = row as f32;
        let colors: Vec<RGBColor> = values.iter().map(|&value| picture.scale.color(value)).collect();
        let mut x = 0.0;
        // one rectangle for a run of one colour: the file has a third of the size
        chart.draw_series(colors.chunk_by(|a, b| a == b).map(|run| {
            let left = x;
            x += run.len() as f32;
            Rectangle::new([(left, y), (x, y + 1.0)], run[0].filled())
        }))?;
    }
    Ok(())
}

/// The colour bar at the right edge.
fn draw_legend(area: &Drawing, scale: &Scale) -> Result<(), Box<dyn Error>> {
    const STEPS: i32 = 100;
    const STEP_HEIGHT: i32 = 2;
    const LEFT: i32 = 14;
    const RIGHT: i32 = 34;
    let top = (area.dim_in_pixel().1 as i32 - STEPS * STEP_HEIGHT) / 2;
    for step in 0..STEPS {
        let distance = 1.0 - 2.0 * (step as f32 + 0.5) / STEPS as f32;
        let color = scale.color(scale.middle + distance * scale.reach);
        let y = top + step * STEP_HEIGHT;
        area.draw(&Rectangle::new([(LEFT, y), (RIGHT, y + STEP_HEIGHT)], color.filled()))?;
    }
    for mark in [1.0, 0.5, 0.0, -0.5, -1.0] {
        let y = top + ((1.0 - mark) / 2.0 * (STEPS * STEP_HEIGHT) as f32) as i32;
        area.draw(&PathElement::new([(RIGHT, y), (RIGHT + 5, y)], INK))?;
        area.draw_text(&format!("{:.2}", scale.middle + mark * scale.reach), &text(12), (RIGHT + 10, y - 6))?;
    }
    area.draw_text(&scale.above, &text(14), (LEFT, top - 28))?;
    area.draw_text(&scale.below, &text(14), (LEFT, top + STEPS * STEP_HEIGHT + 14))?;
    Ok(())
}
