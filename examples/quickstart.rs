//! Encodes 640 spoken utterances of 7 to 29 frames into vectors of 256 numbers, and draws what the gate does.
//!
//! ```sh
//! cargo run --release --example quickstart                        # the Japanese Vowels of examples/data
//! cargo run --release --example quickstart -- --out DIR FILE.ts…  # your own series, the picture in DIR
//! ```
//!
//! The weights are random here: the example shows shapes, speed and the calls, not a trained model.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hymba::ndarray::{Array2, Axis, s};
use hymba::{Hymba, HymbaOptions};

#[path = "support/picture.rs"]
mod picture;
#[path = "support/ts.rs"]
mod ts;

use picture::{HeatMaps, Panel, Scale};
use ts::{Case, Dataset};

/// Utterances encoded together.
const BATCH: usize = 32;
/// Two encodings of one utterance may differ by rounding, not by more.
const TOLERANCE: f32 = 1e-5;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went as it should.
fn run() -> Result<bool, Box<dyn Error>> {
    let (files, out) = arguments()?;
    let cases = read(&files)?;
    let dims = cases[0].frames.ncols();
    let lengths = || cases.iter().map(|case| case.frames.nrows());
    let (shortest, longest) = (lengths().min().unwrap_or(1), lengths().max().unwrap_or(1));

    let options = HymbaOptions::new(dims).window_size(longest.max(HymbaOptions::DEFAULT_WINDOW_SIZE));
    let model = Hymba::build(options)?;
    println!("{}", model.summary());

    let (encodings, spent) = encode(&model, &cases)?;
    let frames: usize = lengths().sum();
    let seconds = spent.as_secs_f64();
    println!(
        "encoded {} series of {shortest} to {longest} frames of {dims} numbers into {:?}",
        cases.len(),
        encodings.dim()
    );
    println!(
        "{:.2} ms a series, {:.0} series/s, {:.0} frames/s, in batches of {BATCH}",
        1e3 * seconds / cases.len() as f64,
        cases.len() as f64 / seconds,
        frames as f64 / seconds
    );

    let longest_case = cases.iter().max_by_key(|case| case.frames.nrows()).unwrap_or(&cases[0]);
    std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let picture = out.join("gate.svg");
    draw_gate(&model, longest_case, &picture)?;
    println!("drew the gate of the longest series into {}", picture.display());

    report(&model, &cases, &encodings)
}

/// `[--out DIR] [FILE.ts …]`
fn arguments() -> Result<(Vec<PathBuf>, PathBuf), String> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut out = project.join("target/quickstart");
    let mut files = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--out" => out = arguments.next().ok_or("--out needs a folder")?.into(),
            _ if argument.starts_with('-') => {
                return Err(format!("unknown option {argument}; usage: quickstart [--out DIR] [FILE.ts …]"));
            }
            _ => files.push(argument.into()),
        }
    }
    if files.is_empty() {
        let data = project.join("examples/data");
        files = ["JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"].map(|name| data.join(name)).into();
    }
    Ok((files, out))
}

/// The series of all files; at least one, all of one width.
fn read(files: &[PathBuf]) -> Result<Vec<Case>, Box<dyn Error>> {
    let mut dims = None;
    let mut cases = Vec::new();
    for file in files {
        let mut data = Dataset::read(file)?;
        let name = if data.name.is_empty() { "series" } else { &data.name };
        println!("{name}: {} series, {} numbers a frame", data.cases.len(), data.dims);
        data.notes.iter().for_each(|note| println!("  {note}"));
        if *dims.get_or_insert(data.dims) != data.dims {
            return Err(format!(
                "{}: frames are {} wide, those of the files before are not",
                file.display(),
                data.dims
            )
            .into());
        }
        for case in &mut data.cases {
            ts::fill_missing(&mut case.frames);
        }
        cases.append(&mut data.cases);
    }
    Ok(cases)
}

/// `[number of cases, hidden_size]`, and the time it took.
fn encode(model: &Hymba, cases: &[Case]) -> Result<(Array2<f32>, Duration), Box<dyn Error>> {
    let mut encodings = Array2::zeros((cases.len(), model.options().output_size()));
    let start = Instant::now();
    for (batch, mut rows) in cases.chunks(BATCH).zip(encodings.axis_chunks_iter_mut(Axis(0), BATCH)) {
        let (frames, lengths) = ts::pad(batch);
        rows.assign(&model.forward_ragged(&frames, &lengths)?);
    }
    Ok((encodings, start.elapsed()))
}

/// One panel per block: time to the right, the channels upwards, by their mean gate.
fn draw_gate(model: &Hymba, case: &Case, path: &Path) -> Result<(), Box<dyn Error>> {
    let inspection = model.inspect(&case.frames.view().insert_axis(Axis(0)))?;
    let panels: Vec<Panel> = inspection
        .blocks
        .iter()
        .enumerate()
        .map(|(index, block)| Panel {
            title: format!("Block {}", index + 1),
            values: sorted_by_mean(&block.gate.slice(s![0, .., ..]).to_owned()),
        })
        .collect();
    let scale = Scale::around(0.5, &panels, "attention", "Mamba");
    let picture = HeatMaps {
        title: "Which branch each channel listens to".into(),
        subtitle: format!(
            "Gate of every block for one series of {} frames, random weights: 1 is all Mamba, 0 is all attention",
            case.frames.nrows()
        ),
        x_label: "frame".into(),
        y_label: "channel, by mean gate".into(),
        panels,
        scale,
    };
    picture::heat_maps(path, &picture)
}

/// The columns of `values`, the one with the smallest mean first.
fn sorted_by_mean(values: &Array2<f32>) -> Array2<f32> {
    let mean = |column: usize| values.column(column).sum();
    let mut order: Vec<usize> = (0..values.ncols()).collect();
    order.sort_by(|&a, &b| mean(a).total_cmp(&mean(b)));
    values.select(Axis(1), &order)
}

/// Prints what success looks like, and whether it was reached.
fn report(model: &Hymba, cases: &[Case], encodings: &Array2<f32>) -> Result<bool, Box<dyn Error>> {
    let finite = encodings.iter().all(|value| value.is_finite());

    let alone = cases.iter().step_by(BATCH);
    let mut largest = 0.0f32;
    for (case, together) in alone.clone().zip(encodings.axis_iter(Axis(0)).step_by(BATCH)) {
        let encoding = model.forward(&case.frames.view().insert_axis(Axis(0)))?;
        for (one, other) in encoding.row(0).iter().zip(together) {
            largest = if (one - other).abs() <= largest { largest } else { (one - other).abs() };
        }
    }
    let same = largest <= TOLERANCE;

    println!();
    println!("{} all {} numbers are finite", mark(finite), encodings.len());
    println!(
        "{} {} series encoded alone are as in their batch (largest difference {largest:.0e}, allowed {TOLERANCE:.0e})",
        mark(same),
        alone.count()
    );
    Ok(finite && same)
}

fn mark(good: bool) -> &'static str {
    if good { "ok    " } else { "FAILED" }
}
