//! What the results say: a table, what each pattern costs, and a picture.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

use plotters::style::RGBColor;

use crate::picture::{BLUE, Chart, Charts, Corner, GREEN, GREY, ORANGE, Series, Shape, charts};
use crate::results::Record;
use crate::trial::{PATTERNS, median};

/// The scores of all seeds at one rate.
pub struct Cell {
    pub rate: f32,
    /// Mean, least and largest.
    pub mean: f64,
    pub least: f64,
    pub most: f64,
    pub seeds: usize,
}

/// The trials of one rate, by seed.
type Seeds<'a> = BTreeMap<u64, &'a Record>;
/// A task at one of its test lengths.
type Column = (String, usize);

/// Cells by task and pattern. Of several rates that one counts whose mean on validation data is best; the lower of equals. A trial
/// that is there twice counts once.
pub fn cells(records: &[Record]) -> BTreeMap<Column, BTreeMap<String, Cell>> {
    let mut by_rate: BTreeMap<(&str, &str), BTreeMap<u32, Seeds>> = BTreeMap::new();
    for record in records {
        let of = by_rate.entry((&record.trial.task, &record.trial.pattern)).or_default();
        of.entry(record.trial.rate.to_bits()).or_default().insert(record.trial.seed, record);
    }
    let mut cells: BTreeMap<Column, BTreeMap<String, Cell>> = BTreeMap::new();
    for ((task, pattern), rates) in by_rate {
        let validation = |seeds: &Seeds| mean(seeds.values().map(|record| record.outcome.validation));
        let mut best: Option<(f64, u32, &Seeds)> = None;
        for (rate, seeds) in &rates {
            if best.as_ref().is_none_or(|(most, ..)| validation(seeds) > *most) {
                best = Some((validation(seeds), *rate, seeds));
            }
        }
        let Some((_, rate, seeds)) = best else { continue };
        let mut scores: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (length, score) in seeds.values().flat_map(|record| &record.outcome.scores) {
            scores.entry(*length).or_default().push(*score);
        }
        for (length, scores) in scores {
            let cell = Cell {
                rate: f32::from_bits(rate),
                mean: mean(scores.iter().copied()),
                least: scores.iter().copied().fold(f64::INFINITY, f64::min),
                most: scores.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                seeds: scores.len(),
            };
            cells.entry((task.into(), length)).or_default().insert(pattern.into(), cell);
        }
    }
    cells
}

/// The table in Markdown. The best mean of a task is bold; where the seeds of another pattern overlap with those of the best, an = says
/// that the two cannot be told apart.
pub fn table(records: &[Record]) -> String {
    let cells = cells(records);
    let mut text =
        format!("| task | test length | {} |\n|---|---|{}\n", PATTERNS.join(" | "), "---|".repeat(PATTERNS.len()));
    for ((task, length), row) in &cells {
        let best = row.values().max_by(|a, b| a.mean.total_cmp(&b.mean));
        let _ = write!(text, "| {task} | {length} |");
        for pattern in PATTERNS {
            let Some((cell, best)) = row.get(pattern).zip(best) else {
                text.push_str(" |");
                continue;
            };
            let mean = format!("{:.3}", cell.mean);
            let mean = match (std::ptr::eq(cell, best), cell.most >= best.least) {
                (true, _) => format!("**{mean}**"),
                (false, true) => format!("= {mean}"),
                (false, false) => mean,
            };
            let _ = write!(text, " {mean} ({:.3} to {:.3}; {} × {:e}) |", cell.least, cell.most, cell.seeds, cell.rate);
        }
        text.push('\n');
    }
    text.push_str("\nMean of the seeds (least to most; seeds × learning rate, which validation data chose).\n\n");
    text + &costs(records)
}

/// What the models of each task and pattern cost: medians over their trials.
fn costs(records: &[Record]) -> String {
    let mut text = String::from(
        "| task | pattern | hidden_size | parameters | of | training step, ms | a stream's frame, µs | its state, bytes |\n|---|---|---|---|---|---|---|---|\n",
    );
    let mut groups: BTreeMap<(&str, usize), Vec<&Record>> = BTreeMap::new();
    for record in records {
        if let Some(place) = PATTERNS.iter().position(|pattern| *pattern == record.trial.pattern) {
            groups.entry((&record.trial.task, place)).or_default().push(record);
        }
    }
    for ((task, place), group) in groups {
        let of = |number: fn(&Record) -> f64| median(group.iter().map(|record| number(record)).collect());
        let first = &group[0];
        let _ = writeln!(
            text,
            "| {task} | {} | {} | {} | {} | {:.1} | {:.0} | {} |",
            PATTERNS[place],
            first.outcome.hidden_size,
            first.outcome.parameters,
            first.settings.parameters,
            of(|record| record.outcome.step_ms),
            of(|record| record.outcome.stream_us),
            first.outcome.state_bytes,
        );
    }
    text
}

/// A panel per task and test length: a bar for each pattern's mean, and a stroke from its worst seed to its best.
pub fn draw(records: &[Record], path: &Path) -> Result<(), Box<dyn Error>> {
    let colors = [BLUE, ORANGE, GREEN, GREY, RGBColor(126, 68, 160)];
    let panel = |((task, length), row): (&Column, &BTreeMap<String, Cell>)| {
        let mut series = Vec::new();
        for (place, (pattern, color)) in PATTERNS.into_iter().zip(colors).enumerate() {
            let Some(cell) = row.get(pattern) else { continue };
            let (x, name) = (place as f32 + 1.0, pattern.to_string());
            series.push(Series { name, points: vec![(x, cell.mean as f32)], color, shape: Shape::Bars });
            let points = vec![(x, cell.least as f32), (x, cell.most as f32)];
            series.push(Series { name: String::new(), points, color: RGBColor(20, 20, 20), shape: Shape::Strokes });
        }
        Chart {
            title: format!("{task}, tested at {length}"),
            x_label: "pattern".into(),
            y_label: "share of right answers".into(),
            whole_x: true,
            y_range: Some(0.0..1.05),
            legend: Corner::LowerRight,
            series,
        }
    };
    let cells = cells(records);
    charts(
        path,
        &Charts {
            title: "Patterns of blocks at equal numbers of parameters".into(),
            subtitle: "bars: mean over the seeds at the rate that validation data chose; strokes: least to most".into(),
            panels: cells.iter().map(panel).collect(),
            panel_size: (640, 260),
            side_by_side: false,
        },
    )
}

fn mean(numbers: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = numbers.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    sum / f64::from(count.max(1))
}
