//! Learns to tell classes of series apart, or to predict a number of each, from one file, and measures on another how well it does.
//!
//! ```sh
//! cargo run --release --example classify                             # the Japanese Vowels of examples/data
//! cargo run --release --example classify -- TRAIN.ts TEST.ts         # your own series, of any lengths and widths
//! cargo run --release --features csv --example classify -- TRAIN.csv TEST.csv --target price --numbers      # tables
//! cargo run --release --example classify -- TRAIN.ts TEST.ts --resume     # goes on after Ctrl-C, or after a power cut
//! cargo run --release --example classify -- TRAIN.ts TEST.ts --search 32     # random search on the training series
//! parallel -j 8 target/release/examples/classify TRAIN.ts TEST.ts --search 64 --trial {}/8 --results {}.jsonl ::: $(seq 8)
//! cargo run --release --example classify -- --table *.jsonl          # merges what all have found
//! cargo run --release --example classify -- --help                   # all options
//! ```
//!
//! The files are those of the UEA and UCR time series archives (<https://www.timeseriesclassification.com>), or tables: see
//! `hymba::series`. It prints the accuracy and the confusion matrix of the test file, for numbers RMSE, MAE and R² (and draws
//! `scatter.svg`), and writes into the folder of `--out` the model
//! (`model.safetensors`, for `Ensemble::load`) and, where an encoder is part of it, pictures: how loss and accuracy went
//! (`curves.svg`), how much each block leans on its Mamba branch (`gate.svg`), how much of its attention goes to the meta tokens
//! (`meta.svg`), and which frames of a series its class was read from (`saliency.svg`).
//!
//! Nothing but the classes, widths and lengths of the test file is looked at before the model is trained.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use hymba::series::{ReadOptions, SeriesSet};

mod arguments;
mod confusion;
mod encoder;
mod folds;
mod learned;
mod model;
mod numbers;
mod outcome;
#[path = "../support/picture.rs"]
mod picture;
mod reading;
mod search;
#[path = "../support/trials.rs"]
mod trials;

use arguments::{Arguments, USAGE};
use folds::{cross_validate, random_search};
use model::{Model, fit};
use outcome::{Outcome, report, test_with};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("classify: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went as it should.
fn run() -> Result<bool, Box<dyn Error>> {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(true);
    };
    if let Some(files) = &arguments.table {
        search::table(files)?;
        return Ok(true);
    }
    let read = |path| read(path, &arguments.reading);
    let (train_file, test_file) = (read(&arguments.train)?, read(&arguments.test)?);
    if let (Some(train), Some(test)) = (train_file.spacing, test_file.spacing)
        && !train.is_like(test)
    {
        println!("  NOTE: the training frames are {} apart, the test frames {}", train.amount(), test.amount());
    }
    let (task, name) = (train_file.task()?, test_file.name.clone());
    test_file.compare_labels(&task).iter().for_each(|note| println!("  {note}"));
    let (train, test) = (train_file.into_dataset(&task)?, test_file.into_dataset(&task)?);
    if train.width() != test.width() {
        let (train, test) = (train.width(), test.width());
        return Err(
            format!("the frames of the training series are {train} wide, those of the test series {test}").into()
        );
    }
    let out = arguments.out.clone().unwrap_or_else(|| default_folder(&name, &arguments.train));
    std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;

    if let Some(trials) = arguments.search {
        return random_search(&arguments, trials, &task, &train, &out);
    }
    if let Some(folds) = arguments.folds {
        return cross_validate(&arguments, &task, &train, folds);
    }
    let start = Instant::now();
    let checkpoint = out.join("checkpoint");
    let (model, trained) = fit(&arguments, &task, &train, Some(&checkpoint))?;
    println!("fitted in {:.1} s", start.elapsed().as_secs_f64());

    let start = Instant::now();
    let outcome = test_with(&model, &test)?;
    let spent = start.elapsed().as_secs_f64();
    println!("predicted {} test series, {:.1} ms a series", test.num_series(), 1e3 * spent / test.num_series() as f64);
    print!("\n{outcome}");

    let file = out.join("model.safetensors");
    model.save(&file)?;
    match (&outcome, &trained) {
        (Outcome::Classes(confusion), Some(trained)) => learned::draw(trained, &test, confusion.accuracy(), &out)?,
        (Outcome::Classes(_), None) => {}
        (Outcome::Numbers(numbers), _) => numbers.draw(&name, &out.join("scatter.svg"))?,
    }
    println!("the model is in {}", out.display());
    // the model is safe now
    if checkpoint.exists() {
        std::fs::remove_dir_all(&checkpoint).map_err(|error| format!("checkpoint: {error}"))?;
    }
    report(&Model::load(&file, arguments.views)?, &test, &outcome, name == "JapaneseVowels")
}

/// The series of a file, without gaps. Says what is in it.
fn read(path: &Path, options: &ReadOptions) -> Result<SeriesSet, Box<dyn Error>> {
    let mut data = SeriesSet::read(path, options)?;
    data.fill_missing();
    let lengths = || data.cases.iter().map(|case| case.frames.nrows());
    let (shortest, longest) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
    let lengths = if shortest == longest { longest.to_string() } else { format!("{shortest} to {longest}") };
    println!("{}: {} series of {lengths} frames of {} numbers", path.display(), data.cases.len(), data.width());
    data.notes.iter().for_each(|note| println!("  {note}"));
    Ok(data)
}

/// `target/classify/<name>` in the project.
fn default_folder(name: &str, train: &Path) -> PathBuf {
    let of_file = || train.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = if name.is_empty() { of_file() } else { name.to_string() };
    let safe = |c: char| if c.is_alphanumeric() || "-_".contains(c) { c } else { '_' };
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/classify").join(name.chars().map(safe).collect::<String>())
}
