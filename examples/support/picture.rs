//! Pictures for the examples, as SVG files: heat maps side by side under one colour scale, and lines over one axis.

#![allow(dead_code, reason = "each example uses a part of this file")]

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use hymba::ndarray::Array2;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

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

/// One heat map. In one of few cells each is labelled with its number in percent, and rows and columns count from 1.
pub struct Panel {
    pub title: String,
    /// `[columns, rows]`: the first axis goes right, the second up.
    pub values: Array2<f32>,
}

impl Panel {
    /// Most cells with a number in each.
    const FEW: usize = 64;

    fn has_few_cells(&self) -> bool {
        self.values.len() <= Self::FEW
    }
}

/// Colours for the values around `middle`: blue below, white at it, orange above, fully coloured `reach` away from it.
pub struct Scale {
    pub middle: f32,
    pub reach: f32,
    /// What the two ends mean; nothing below where no value is.
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

    /// Orange from 0 to the largest value.
    pub fn from_zero(panels: &[Panel], above: &str) -> Scale {
        let largest = panels.iter().flat_map(|panel| panel.values.iter().copied()).fold(0.0, f32::max);
        Scale { middle: 0.0, reach: largest.max(1e-3), below: String::new(), above: above.into() }
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
    let below_title = draw_title(&root, &picture.title, &picture.subtitle)?;
    let (maps, legend) = below_title.split_horizontally(columns as u32 * PANEL_SIZE.0);
    for (panel, area) in picture.panels.iter().zip(maps.split_evenly((rows, columns))) {
        draw_panel(&area, panel, picture)?;
    }
    draw_legend(&legend, &picture.scale)?;
    root.present()?;
    Ok(())
}

/// Returns what is left below it.
fn draw_title<'a>(root: &Drawing<'a>, title: &str, subtitle: &str) -> Result<Drawing<'a>, Box<dyn Error>> {
    root.fill(&WHITE)?;
    root.draw_text(title, &text(22), (24, 18))?;
    root.draw_text(subtitle, &text(14), (24, 48))?;
    Ok(root.split_vertically(TITLE_HEIGHT).1)
}

fn text(size: u32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}

fn draw_panel(area: &Drawing, panel: &Panel, picture: &HeatMaps) -> Result<(), Box<dyn Error>> {
    let (columns, rows) = panel.values.dim();
    let few = panel.has_few_cells();
    let corner = if few { 0.5 } else { 0.0 };
    let axis = |count: usize| corner..count.max(1) as f32 + corner;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, text(16))
        .margin(14)
        .x_label_area_size(38)
        .y_label_area_size(52)
        .build_cartesian_2d(axis(columns), axis(rows))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(INK)
        .label_style(text(12))
        .axis_desc_style(text(14))
        .x_desc(&picture.x_label)
        .y_desc(&picture.y_label)
        .x_labels(if few { columns } else { 10 })
        .y_labels(if few { rows } else { 10 })
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for (row, values) in panel.values.columns().into_iter().enumerate() {
        let y = row as f32 + corner;
        let colors: Vec<RGBColor> = values.iter().map(|&value| picture.scale.color(value)).collect();
        let mut x = corner;
        // one rectangle for a run of one colour: the file has a third of the size
        chart.draw_series(colors.chunk_by(|a, b| a == b).map(|run| {
            let left = x;
            x += run.len() as f32;
            Rectangle::new([(left, y), (x, y + 1.0)], run[0].filled())
        }))?;
    }
    if few {
        let middle = Pos::new(HPos::Center, VPos::Center);
        chart.draw_series(panel.values.indexed_iter().map(|((column, row), &value)| {
            let dark = (value - picture.scale.middle).abs() > 0.6 * picture.scale.reach;
            let style = text(13).color(if dark { &WHITE } else { &INK }).pos(middle);
            Text::new(format!("{:.1} %", 100.0 * value), (column as f32 + 1.0, row as f32 + 1.0), style)
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
    let span = if scale.below.is_empty() { 1.0 } else { 2.0 };
    let top = (area.dim_in_pixel().1 as i32 - STEPS * STEP_HEIGHT) / 2;
    for step in 0..STEPS {
        let distance = 1.0 - span * (step as f32 + 0.5) / STEPS as f32;
        let color = scale.color(scale.middle + distance * scale.reach);
        let y = top + step * STEP_HEIGHT;
        area.draw(&Rectangle::new([(LEFT, y), (RIGHT, y + STEP_HEIGHT)], color.filled()))?;
    }
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let y = top + (share * (STEPS * STEP_HEIGHT) as f32) as i32;
        area.draw(&PathElement::new([(RIGHT, y), (RIGHT + 5, y)], INK))?;
        let value = scale.middle + (1.0 - span * share) * scale.reach;
        area.draw_text(&format!("{value:.2}"), &text(12), (RIGHT + 10, y - 6))?;
    }
    area.draw_text(&scale.above, &text(14), (LEFT, top - 28))?;
    area.draw_text(&scale.below, &text(14), (LEFT, top + STEPS * STEP_HEIGHT + 14))?;
    Ok(())
}

/// Panels of lines, one below the other or side by side.
pub struct Charts {
    pub title: String,
    /// One line under the title: how to read the picture.
    pub subtitle: String,
    pub panels: Vec<Chart>,
    /// Width and height of a panel.
    pub panel_size: (u32, u32),
    pub side_by_side: bool,
}

/// Lines over one axis.
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// Whole numbers along x.
    pub whole_x: bool,
    /// What y spans at least.
    pub y_range: Option<Range<f32>>,
    /// Where the legend hides the least.
    pub legend: Corner,
    pub series: Vec<Series>,
}

/// One line, or something like it.
pub struct Series {
    /// For the legend; nothing for a series that is not to be in it.
    pub name: String,
    pub points: Vec<(f32, f32)>,
    pub color: RGBColor,
    pub shape: Shape,
}

/// How the points of a series are drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Line,
    /// A thin line in front of which others stand out.
    Thin,
    /// A dot at each point.
    Dots,
    /// A bar from 0 to each point.
    Bars,
    /// A vertical stroke between each two points, from the lower to the upper.
    Strokes,
}

pub use plotters::chart::SeriesLabelPosition as Corner;

pub const BLUE: RGBColor = RGBColor(18, 84, 155);
pub const ORANGE: RGBColor = RGBColor(214, 96, 20);
pub const GREEN: RGBColor = RGBColor(38, 132, 82);
pub const GREY: RGBColor = RGBColor(150, 150, 150);
const GRID: RGBColor = RGBColor(228, 228, 228);
/// Half the width of a bar, where the next is 1 away.
const HALF_BAR: f32 = 0.3;

/// Writes the panels.
pub fn charts(path: &Path, picture: &Charts) -> Result<(), Box<dyn Error>> {
    let count = picture.panels.len().max(1);
    let (columns, rows) = if picture.side_by_side { (count, 1) } else { (1, count) };
    let size = (columns as u32 * picture.panel_size.0, rows as u32 * picture.panel_size.1 + TITLE_HEIGHT);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let below_title = draw_title(&root, &picture.title, &picture.subtitle)?;
    for (chart, area) in picture.panels.iter().zip(below_title.split_evenly((rows, columns))) {
        draw_chart(&area, chart)?;
    }
    root.present()?;
    Ok(())
}

fn draw_chart(area: &Drawing, chart: &Chart) -> Result<(), Box<dyn Error>> {
    let points = || chart.series.iter().flat_map(|series| &series.points).filter(|(_, y)| y.is_finite());
    let bars = || chart.series.iter().filter(|series| series.shape == Shape::Bars).flat_map(|series| &series.points);
    let x = match bars().next() {
        Some(_) => {
            bars().fold(f32::INFINITY, |least, (x, _)| least.min(*x)) - 0.5
                ..bars().fold(f32::NEG_INFINITY, |most, (x, _)| most.max(*x)) + 0.5
        }
        None => span(points().map(|&(x, _)| x), 0.0),
    };
    let y = span(points().map(|&(_, y)| y), 0.06);
    let y = chart.y_range.as_ref().map_or(y.clone(), |range| range.start.min(y.start)..range.end.max(y.end));
    let digits = |axis: &Range<f32>| match axis.end - axis.start {
        ..0.1 => 3,
        0.1..10.0 => 2,
        _ => 0,
    };
    let (y_digits, x_digits) = (digits(&y), if chart.whole_x { 0 } else { digits(&x) });
    let ticks = (x.end - x.start).round() as usize + usize::from(bars().next().is_none());
    let x_labels = if chart.whole_x { ticks.clamp(1, 12) } else { 12 };
    let mut context = ChartBuilder::on(area)
        .caption(&chart.title, text(16))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(38)
        .y_label_area_size(58)
        .build_cartesian_2d(x, y)?;
    context
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(text(12))
        .axis_desc_style(text(14))
        .x_desc(&chart.x_label)
        .y_desc(&chart.y_label)
        .x_labels(x_labels)
        .x_label_formatter(&|x| format!("{x:.x_digits$}"))
        .y_label_formatter(&|y| format!("{y:.y_digits$}"))
        .draw()?;
    for series in &chart.series {
        let style = series.color.stroke_width(if series.shape == Shape::Thin { 1 } else { 2 });
        let points = series.points.iter().copied().filter(|(_, y)| y.is_finite());
        let drawn =
            match series.shape {
                Shape::Line | Shape::Thin => context.draw_series(LineSeries::new(points, style))?,
                Shape::Dots => {
                    context.draw_series(points.map(|point| Circle::new(point, 3, series.color.mix(0.6).filled())))?
                }
                Shape::Bars => context
                    .draw_series(points.map(|(x, y)| {
                        Rectangle::new([(x - HALF_BAR, 0.0), (x + HALF_BAR, y)], series.color.filled())
                    }))?,
                Shape::Strokes => context
                    .draw_series(series.points.chunks_exact(2).map(|ends| PathElement::new(ends.to_vec(), style)))?,
            };
        if !series.name.is_empty() {
            drawn.label(&series.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
    }
    if chart.series.iter().any(|series| !series.name.is_empty()) {
        context
            .configure_series_labels()
            .label_font(text(13))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .position(chart.legend.clone())
            .draw()?;
    }
    Ok(())
}

/// The smallest and the largest number, with some air around them.
fn span(numbers: impl Iterator<Item = f32>, air: f32) -> Range<f32> {
    let (low, high) = numbers.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    match high - low {
        width if width > 0.0 && width.is_finite() => low - air * width..high + air * width,
        _ if low.is_finite() => low - 0.5..low + 0.5,
        _ => 0.0..1.0,
    }
}
