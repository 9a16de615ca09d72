//! Pictures of what a classifier has learned: how its loss and accuracy went, and what its blocks do.

use std::error::Error;
use std::path::Path;

use hymba::ndarray::{Array2, Axis, s};
use hymba::train::{Dataset, EpochMetrics, Trained};
use hymba::{Predictor, argmax};

use crate::picture::{self, BLUE, Chart, Charts, Corner, GREY, HeatMaps, ORANGE, Panel, Scale, Series, Shape};

/// Series whose gates and attention are drawn, and the most frames of each.
const INSPECTED: usize = 64;
const INSPECTED_FRAMES: usize = 512;

/// Features of which the saliency is drawn.
const FEATURES: usize = 3;

/// Writes the pictures into the folder `out`; `accuracy` is that of the test series. Prints what two of them show.
pub fn draw(trained: &Trained, test: &Dataset, accuracy: f32, out: &Path) -> Result<(), Box<dyn Error>> {
    draw_curves(&trained.history, accuracy, &out.join("curves.svg"))?;
    let seen = inspect(&trained.predictor, test)?;
    println!("\nwhat the blocks do, mean of {} test series:", seen.series);
    for (i, (gate, meta)) in seen.gates.rows().into_iter().zip(&seen.meta).enumerate() {
        let gate = gate.mean().unwrap_or(f32::NAN);
        let shares: Vec<String> = meta.rows().into_iter().map(|head| format!("{:.0} %", 100.0 * head.sum())).collect();
        let shares = if meta.is_empty() { "no meta tokens".into() } else { shares.join(", ") };
        println!("  block {}: gate {gate:.2}; attention on the meta tokens, by head: {shares}", i + 1);
    }
    draw_saliency(&trained.predictor, test, &out.join("saliency.svg"))?;
    draw_gates(&seen, &out.join("gate.svg"))?;
    if seen.meta.iter().all(|meta| !meta.is_empty()) {
        draw_meta(&seen, &out.join("meta.svg"))?;
    }
    Ok(())
}

fn draw_curves(history: &[EpochMetrics], test_accuracy: f32, path: &Path) -> Result<(), Box<dyn Error>> {
    let line = |name: &str, color, value: &dyn Fn(&EpochMetrics) -> Option<f32>| {
        let points = history.iter().enumerate();
        let points = points.filter_map(|(i, epoch)| Some(((i + 1) as f32, value(epoch)?))).collect();
        Series { name: name.into(), points, color, shape: Shape::Line }
    };
    let mut loss = vec![line("training", BLUE, &|epoch| Some(epoch.train.loss))];
    let mut accuracy = vec![line("training", BLUE, &|epoch| epoch.train.accuracy)];
    if history.iter().any(|epoch| epoch.validation.is_some()) {
        loss.push(line("validation", ORANGE, &|epoch| epoch.validation.map(|validation| validation.loss)));
        accuracy.push(line("validation", ORANGE, &|epoch| epoch.validation.and_then(|validation| validation.accuracy)));
    }
    let name = format!("test, at the end: {test_accuracy:.3}");
    let mut test = line(&name, GREY, &|_| Some(test_accuracy));
    test.shape = Shape::Thin;
    accuracy.push(test);
    let chart = |title: &str, y_range, series| Chart {
        title: title.into(),
        x_label: "epoch".into(),
        y_label: String::new(),
        whole_x: true,
        y_range: Some(y_range),
        legend: Corner::MiddleRight,
        series,
    };
    let picture = Charts {
        title: "How the training went".into(),
        subtitle: "Training figures are measured while learning, with dropout, so they look worse than the model is"
            .into(),
        panels: vec![chart("Loss", 0.0..0.1, loss), chart("Accuracy", 0.0..1.0, accuracy)],
        panel_size: (520, 360),
        side_by_side: true,
    };
    picture::charts(path, &picture)
}

/// What the first test series was judged by: gradient × input of the class that it was given, over the series itself.
fn draw_saliency(predictor: &Predictor, test: &Dataset, path: &Path) -> Result<(), Box<dyn Error>> {
    let frames = &test.series()[0];
    let class = argmax(&predictor.predict(&frames.view().insert_axis(Axis(0)), None)?)[0];
    let saliency = predictor.saliency(frames, class)?;
    let weight = |feature: usize| saliency.column(feature).iter().map(|x| x.abs()).sum::<f32>();
    let mut features: Vec<usize> = (0..frames.ncols()).collect();
    features.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
    features.truncate(FEATURES);
    let largest =
        |of: &Array2<f32>, feature: usize| of.column(feature).iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let most = features.first().map_or(1.0, |&feature| largest(&saliency, feature));
    let panel = |&feature: &usize| {
        let line = |name: &str, color, shape, of: &Array2<f32>, scale: f32| Series {
            name: name.into(),
            points: of.column(feature).iter().enumerate().map(|(t, x)| ((t + 1) as f32, x * scale)).collect(),
            color,
            shape,
        };
        let scale = largest(frames, feature) / most;
        Chart {
            title: format!("Feature {}", feature + 1),
            x_label: "frame".into(),
            y_label: String::new(),
            whole_x: true,
            y_range: None,
            legend: Corner::MiddleRight,
            series: vec![
                line("series", GREY, Shape::Line, frames, 1.0),
                line("speaks for the class", BLUE, Shape::Line, &saliency, scale),
            ],
        }
    };
    let picture = Charts {
        title: format!("What speaks for {:?}", predictor.task().labels()[class]),
        subtitle:
            "Gradient × input of one test series, in the height of the series; below 0 it speaks against the class"
                .into(),
        panels: features.iter().map(panel).collect(),
        panel_size: (900, 220),
        side_by_side: false,
    };
    picture::charts(path, &picture)
}

/// What the trained blocks do on some series.
struct Seen {
    series: usize,
    /// Mean gate of every channel, `[blocks, h]`.
    gates: Array2<f32>,
    /// Mean share of the attention, `[heads, meta tokens]` for each block.
    meta: Vec<Array2<f32>>,
}

fn inspect(predictor: &Predictor, test: &Dataset) -> Result<Seen, Box<dyn Error>> {
    let options = predictor.options();
    let (blocks, heads, k) = (options.num_layers, options.num_heads, options.num_meta_tokens);
    let mut gates = Array2::zeros((blocks, options.hidden_size));
    let mut meta = vec![Array2::<f32>::zeros((heads, k)); blocks];
    let chosen = test.series().iter().step_by(test.num_series().div_ceil(INSPECTED));
    let series = chosen.len();
    for frames in chosen {
        let frames = frames.slice(s![..frames.nrows().min(INSPECTED_FRAMES), ..]);
        let inspection = predictor.inspect(&frames.insert_axis(Axis(0)))?;
        for (i, block) in inspection.blocks.iter().enumerate() {
            let gate = block.gate.index_axis(Axis(0), 0);
            let weights = block.attention_weights.slice(s![0, .., .., ..k]); // [a, l, k]
            let share = 1.0 / (series * gate.nrows()) as f32;
            gates.row_mut(i).scaled_add(share, &gate.sum_axis(Axis(0)));
            meta[i].scaled_add(share, &weights.sum_axis(Axis(1)));
        }
    }
    Ok(Seen { series, gates, meta })
}

fn draw_gates(seen: &Seen, path: &Path) -> Result<(), Box<dyn Error>> {
    let mut bars = Vec::new();
    let mut strokes = Vec::new();
    for (i, gates) in seen.gates.rows().into_iter().enumerate() {
        let x = (i + 1) as f32;
        bars.push((x, gates.mean().unwrap_or(f32::NAN)));
        let mut sorted = gates.to_vec();
        sorted.sort_by(f32::total_cmp);
        let at = |share: f32| sorted[(share * (sorted.len() - 1) as f32).round() as usize];
        strokes.extend([(x, at(0.1)), (x, at(0.9))]);
    }
    let blocks = bars.len() as f32;
    let half = Series {
        name: "both branches alike".into(),
        points: vec![(0.5, 0.5), (blocks + 0.5, 0.5)],
        color: GREY,
        shape: Shape::Thin,
    };
    let series = vec![
        Series { name: "mean gate".into(), points: bars, color: BLUE, shape: Shape::Bars },
        Series { name: "8 of 10 channels".into(), points: strokes, color: ORANGE, shape: Shape::Strokes },
        half,
    ];
    let picture = Charts {
        title: "How much each block leans on Mamba".into(),
        subtitle: format!("Gate, mean of {} test series: 1 is all Mamba, 0 is all attention", seen.series),
        panels: vec![Chart {
            title: String::new(),
            x_label: "block".into(),
            y_label: "gate".into(),
            whole_x: true,
            y_range: Some(0.0..1.0),
            legend: Corner::UpperRight,
            series,
        }],
        panel_size: (620, 380),
        side_by_side: true,
    };
    picture::charts(path, &picture)
}

fn draw_meta(seen: &Seen, path: &Path) -> Result<(), Box<dyn Error>> {
    let panel = |(i, meta): (usize, &Array2<f32>)| Panel {
        title: format!(
            "Block {}: {:.1} % on meta tokens",
            i + 1,
            100.0 * meta.sum_axis(Axis(1)).mean().unwrap_or(f32::NAN)
        ),
        values: meta.clone(),
    };
    let panels: Vec<Panel> = seen.meta.iter().enumerate().map(panel).collect();
    let picture = HeatMaps {
        title: "Attention on the meta tokens".into(),
        subtitle: format!(
            "Share of its attention that each head gives to each meta token, mean of all frames of {} test series",
            seen.series
        ),
        x_label: "head".into(),
        y_label: "meta token".into(),
        scale: Scale::from_zero(&panels, "share"),
        panels,
    };
    picture::heat_maps(path, &picture)
}
