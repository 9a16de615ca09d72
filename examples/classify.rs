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
use std::fmt;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hymba::ndarray::Array2;
use hymba::series::{ReadOptions, SeriesSet};
use hymba::train::{Augmentation, Dataset, EpochMetrics, Progress, Targets, Trained, Trainer, TrainerOptions};
use hymba::{
    Differences, Ensemble, Error as HymbaError, KernelPredictor, Pooling, Predictor, PredictorOptions, Stem, Task,
    argmax,
};
use indicatif::{ProgressBar, ProgressStyle};

#[path = "support/confusion.rs"]
mod confusion;
#[path = "support/learned.rs"]
mod learned;
#[path = "support/numbers.rs"]
mod numbers;
#[path = "support/picture.rs"]
mod picture;
#[path = "support/reading.rs"]
mod reading;
#[path = "support/search.rs"]
mod search;
#[path = "support/trials.rs"]
mod trials;

use confusion::Confusion;
use numbers::Numbers;

const USAGE: &str = "usage: classify [TRAIN TEST] [options]
Files end in .ts; with the feature csv also in .csv and .tsv:
  --target COLUMN     name, or place from 0, of what is to be predicted (target, class or label)
  --classes, --numbers     what that is (numbers if there are fractions)
  --id COLUMN --time-column COLUMN     of a table with a frame in each row (id; time or timestamp)
  --wide, --long      a series or a frame in each row (long with id and time)
  --no-header --delimiter C     first row with values; what separates columns
  --time T            what becomes of timestamps: even (dropped), delta or log-delta (an input)
What no option sets follows from the training series: see PredictorOptions and TrainerOptions::recommended_for.
  --views V           kernels: ridge regression on features of fixed kernels; encoder: a Hymba encoder; both: the kernels, and the
                      encoder with the share that training series say (both)
  --seed N            of kernels, weights, dropout and order (0)
  --epochs N          how often each series is seen
  --hidden N          hidden_size
  --layers N          num_layers
  --heads N           num_heads
  --window N          window_size
  --dropout X         of what branches and FFN add
  --pooling P         last, mean, max, or a number of attention queries
  --stride N          frames to a token of the stem; 0 for no stem
  --widths N,N,...    frames that the stem's convolutions look at
  --channels N        features of each convolution of the stem
  --directions N      1, or 2 for a second encoder that reads from the end
  --differences D     none, only, or beside: of each frame to the one before
  --normalize-series  each series to mean 0 and variance 1
  --learning-rate X   the highest one
  --weight-decay X    decay of the matrices
  --batch N           series in a step
  --average X         what a moving average of the weights keeps in a step; 0 for none
  --slice X --jitter X --scale X --warp X --mixup X     augmentations by their numbers; 0 for none
  --validation X      share of the training series that only picks the best epoch (0)
  --folds K           K times trains on all but one in K of the training series, and measures on these; no test
  --search N          random search of N trials by --folds (3) of the training series, the encoder alone, with successive halving: see
                      support/search.rs for the ranges; no test. Killed, it goes on where it was
  --trial K/N         of a search only every Nth trial, from the Kth on, counted from 1
  --results FILE      of a search, to which lines are added (results.jsonl in the folder of --out)
  --table FILE...     only prints the table of these results
  --out DIR           for model, pictures and checkpoint (target/classify/<name of the data>)
  --resume            goes on where a training with the same options was interrupted
  --restart           begins anew although there is one to go on with";

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

/// What came of a test.
#[derive(PartialEq)]
enum Outcome {
    Classes(Confusion),
    Numbers(Numbers),
}

impl Outcome {
    /// The higher the better, and what it is.
    fn score(&self) -> (f64, &'static str) {
        match self {
            Outcome::Classes(confusion) => (confusion.accuracy().into(), "accuracy"),
            Outcome::Numbers(numbers) => (numbers.metrics.r2, "R²"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Classes(confusion) => write!(f, "confusion matrix of the test series:\n{confusion}"),
            Outcome::Numbers(numbers) => write!(f, "{numbers}"),
        }
    }
}

/// What series are told apart by.
#[derive(Default, Clone, Copy, PartialEq)]
enum Views {
    #[default]
    Both,
    Kernels,
    Encoder,
}

/// What is saved.
enum Model {
    Ensemble(Box<Ensemble>),
    Encoder(Box<Predictor>),
}

impl Model {
    fn save(&self, path: &Path) -> hymba::Result<()> {
        match self {
            Model::Ensemble(ensemble) => ensemble.save(path),
            Model::Encoder(predictor) => predictor.save(path),
        }
    }

    fn load(path: &Path, views: Views) -> hymba::Result<Model> {
        Ok(match views {
            Views::Encoder => Model::Encoder(Box::new(Predictor::load(path)?)),
            Views::Both | Views::Kernels => Model::Ensemble(Box::new(Ensemble::load(path)?)),
        })
    }

    /// `[series, outputs]`
    fn predict(&self, data: &Dataset) -> hymba::Result<Array2<f32>> {
        match self {
            Model::Ensemble(ensemble) => ensemble.predict(data.series()),
            Model::Encoder(predictor) => predictor.predict_series(data.series()),
        }
    }
}

#[derive(Default, Clone)]
struct Arguments {
    train: PathBuf,
    test: PathBuf,
    reading: ReadOptions,
    views: Views,
    seed: u64,
    epochs: Option<usize>,
    hidden: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    window: Option<usize>,
    dropout: Option<f32>,
    pooling: Option<Pooling>,
    stride: Option<usize>,
    widths: Option<Vec<usize>>,
    channels: Option<usize>,
    directions: Option<usize>,
    differences: Option<Differences>,
    normalize_series: bool,
    learning_rate: Option<f32>,
    weight_decay: Option<f32>,
    batch: Option<usize>,
    average: Option<f32>,
    augmentations: Vec<(String, f32)>,
    validation: f32,
    folds: Option<usize>,
    search: Option<usize>,
    trial: Option<(usize, usize)>,
    results: Option<PathBuf>,
    table: Option<Vec<PathBuf>>,
    out: Option<PathBuf>,
    resume: bool,
    restart: bool,
}

impl Arguments {
    /// `None` if help is asked for.
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut parsed = Arguments::default();
        let mut files = Vec::new();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            if reading::option(&mut parsed.reading, &argument, &mut value)? {
                continue;
            }
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                "--resume" => parsed.resume = true,
                "--restart" => parsed.restart = true,
                "--views" => {
                    parsed.views = match value()?.as_str() {
                        "both" => Views::Both,
                        "kernels" => Views::Kernels,
                        "encoder" => Views::Encoder,
                        other => return Err(format!("--views is both, kernels or encoder, found {other:?}")),
                    }
                }
                "--out" => parsed.out = Some(value()?.into()),
                "--seed" => parsed.seed = number(&argument, &value()?)?,
                "--epochs" => parsed.epochs = Some(number(&argument, &value()?)?),
                "--hidden" => parsed.hidden = Some(number(&argument, &value()?)?),
                "--layers" => parsed.layers = Some(number(&argument, &value()?)?),
                "--heads" => parsed.heads = Some(number(&argument, &value()?)?),
                "--window" => parsed.window = Some(number(&argument, &value()?)?),
                "--dropout" => parsed.dropout = Some(number(&argument, &value()?)?),
                "--pooling" => parsed.pooling = Some(pooling(&value()?)?),
                "--stride" => parsed.stride = Some(number(&argument, &value()?)?),
                "--widths" => {
                    let widths = value()?.split(',').map(|width| number(&argument, width)).collect::<Result<_, _>>()?;
                    parsed.widths = Some(widths);
                }
                "--channels" => parsed.channels = Some(number(&argument, &value()?)?),
                "--directions" => match number(&argument, &value()?)? {
                    directions @ 1..=2 => parsed.directions = Some(directions),
                    other => return Err(format!("--directions is 1 or 2, found {other}")),
                },
                "--differences" => {
                    parsed.differences = Some(match value()?.as_str() {
                        "none" => Differences::None,
                        "only" => Differences::Only,
                        "beside" => Differences::Beside,
                        other => return Err(format!("--differences is none, only or beside, found {other:?}")),
                    });
                }
                "--normalize-series" => parsed.normalize_series = true,
                "--weight-decay" => parsed.weight_decay = Some(number(&argument, &value()?)?),
                "--average" => parsed.average = Some(number(&argument, &value()?)?),
                "--slice" | "--jitter" | "--scale" | "--warp" | "--mixup" => {
                    let amount = number(&argument, &value()?)?;
                    parsed.augmentations.push((argument, amount));
                }
                "--search" => parsed.search = Some(number(&argument, &value()?)?),
                "--trial" => parsed.trial = Some(trials::share(&value()?)?),
                "--results" => parsed.results = Some(value()?.into()),
                "--table" => parsed.table = Some(Vec::new()),
                "--folds" => parsed.folds = Some(number(&argument, &value()?)?),
                "--learning-rate" => parsed.learning_rate = Some(number(&argument, &value()?)?),
                "--batch" => parsed.batch = Some(number(&argument, &value()?)?),
                "--validation" => parsed.validation = number(&argument, &value()?)?,
                _ if argument.starts_with('-') => return Err(format!("unknown option {argument}\n{USAGE}")),
                _ => files.push(PathBuf::from(argument)),
            }
        }
        if let Some(table) = &mut parsed.table {
            table.append(&mut files);
        }
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
        [parsed.train, parsed.test] = match files.len() {
            0 => ["TRAIN", "TEST"].map(|part| shipped.join(format!("JapaneseVowels_{part}.ts"))),
            _ => files.try_into().map_err(|_| format!("give two files, to train with and to test with\n{USAGE}"))?,
        };
        if parsed.resume && parsed.restart {
            return Err("--resume and --restart say the opposite of each other".into());
        }
        Ok(Some(parsed))
    }

    fn model(&self, train: &Dataset) -> PredictorOptions {
        let mut options = PredictorOptions::recommended_for(train);
        let encoder = &mut options.encoder;
        encoder.seed = self.seed;
        encoder.hidden_size = self.hidden.unwrap_or(encoder.hidden_size);
        encoder.num_layers = self.layers.unwrap_or(encoder.num_layers);
        encoder.num_heads = self.heads.unwrap_or(encoder.num_heads);
        encoder.window_size = self.window.unwrap_or(encoder.window_size);
        encoder.dropout = self.dropout.unwrap_or(encoder.dropout);
        match self.stride {
            Some(0) => options.stem = None,
            Some(stride) => options.stem = Some(Stem::new(stride)),
            None => {}
        }
        if let Some(stem) = &mut options.stem {
            stem.widths = self.widths.clone().unwrap_or_else(|| stem.widths.clone());
            stem.channels = self.channels.unwrap_or(stem.channels);
        }
        options.pooling = self.pooling.unwrap_or(options.pooling);
        options.bidirectional = self.directions.map_or(options.bidirectional, |directions| directions == 2);
        options.differences = self.differences.unwrap_or(options.differences);
        options.normalize_series |= self.normalize_series;
        options
    }

    fn training(&self, train: &Dataset) -> TrainerOptions {
        let usual = TrainerOptions::recommended_for(train);
        let epochs = usual.epochs;
        let (rate, average) = (usual.learning_rate, self.average.or(usual.average).filter(|average| *average != 0.0));
        let mut options = usual
            .epochs(self.epochs.unwrap_or(epochs))
            .learning_rate(self.learning_rate.unwrap_or(rate))
            .average(average)
            .validation_fraction(self.validation)
            .seed(self.seed);
        if let Some(decay) = self.weight_decay {
            options = options.weight_decay(decay);
        }
        if let Some(batch) = self.batch {
            options = options.batch_size(batch).accumulation(1);
        }
        for (name, amount) in &self.augmentations {
            let (amount, same): (f32, fn(&Augmentation) -> bool) = (
                *amount,
                match name.as_str() {
                    "--slice" => |augmentation| matches!(augmentation, Augmentation::Slice { .. }),
                    "--jitter" => |augmentation| matches!(augmentation, Augmentation::Jitter { .. }),
                    "--scale" => |augmentation| matches!(augmentation, Augmentation::Scale { .. }),
                    "--warp" => |augmentation| matches!(augmentation, Augmentation::TimeWarp { .. }),
                    _ => |augmentation| matches!(augmentation, Augmentation::Mixup { .. }),
                },
            );
            options.augmentations.retain(|augmentation| !same(augmentation));
            if amount != 0.0 {
                options.augmentations.push(match name.as_str() {
                    "--slice" => Augmentation::Slice { fraction: amount },
                    "--jitter" => Augmentation::Jitter { deviation: amount },
                    "--scale" => Augmentation::Scale { deviation: amount },
                    "--warp" => Augmentation::TimeWarp { strength: amount },
                    _ => Augmentation::Mixup { alpha: amount },
                });
            }
        }
        options
    }
}

fn pooling(text: &str) -> Result<Pooling, String> {
    Ok(match text {
        "last" => Pooling::Last,
        "mean" => Pooling::Mean,
        "max" => Pooling::Max,
        queries => Pooling::Attention { queries: number("--pooling", queries)? },
    })
}

/// Fits to some of the training series and measures on the others, `folds` times. Prints each score and the mean.
fn cross_validate(arguments: &Arguments, task: &Task, train: &Dataset, folds: usize) -> Result<bool, Box<dyn Error>> {
    let mut scores = Vec::new();
    for fold in 0..folds as u64 {
        let start = Instant::now();
        let (part, rest) = train.split(1.0 / folds as f32, fold)?;
        let arguments = Arguments { seed: arguments.seed + fold, ..arguments.clone() };
        let (model, _) = fit(&arguments, task, &part, None)?;
        let (score, what) = test_with(&model, &rest)?.score();
        println!("fold {fold}: {what} {score:.4} of {} in {}", rest.num_series(), time(start.elapsed()));
        scores.push(score);
    }
    println!("mean of {folds} folds: {:.4}", scores.iter().sum::<f64>() / folds.max(1) as f64);
    Ok(true)
}

/// Searches for options of the encoder, by folds of the training series.
fn random_search(
    arguments: &Arguments,
    trials: usize,
    task: &Task,
    train: &Dataset,
    out: &Path,
) -> Result<bool, Box<dyn Error>> {
    let results = arguments.results.clone().unwrap_or_else(|| out.join("results.jsonl"));
    search::make_folder(&results)?;
    let folds = arguments.folds.unwrap_or(3);
    let (model, training) = (arguments.model(train), arguments.training(train));
    // options that are given hold in all trials that do not draw them
    let given = hash(&format!("{model:?} {training:?}"));
    let (path, count, width) = (arguments.train.display(), train.num_series(), train.width());
    let data = format!("{path}: {count} series of width {width}, options {given:08x}");
    let found = search::Search { trials, share: arguments.trial, folds, seed: arguments.seed, results, data };
    found.run(training.epochs, |options, epochs| {
        let words =
            std::env::args().skip(1).chain(options.iter().cloned()).chain(["--epochs".into(), epochs.to_string()]);
        let drawn = Arguments::parse(words)?.ok_or("no help is asked for")?;
        let mut scores = Vec::new();
        for fold in 0..folds as u64 {
            let (part, rest) = train.split(1.0 / folds as f32, fold)?;
            let drawn = Arguments { seed: drawn.seed + fold, views: Views::Encoder, ..drawn.clone() };
            scores.push(match fit(&drawn, task, &part, None) {
                Ok((model, _)) => test_with(&model, &rest)?.score().0,
                Err(error)
                    if error.downcast_ref().is_some_and(|error| matches!(error, HymbaError::NotFinite { .. })) =>
                {
                    f64::MIN
                }
                Err(error) => return Err(error),
            });
        }
        Ok(scores)
    })?;
    search::table(std::slice::from_ref(&found.results))?;
    Ok(true)
}

/// FNV-1a
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Fits the views that are asked for; with the training of the encoder, if one was trained with all series and has a checkpoint.
fn fit(
    arguments: &Arguments,
    task: &Task,
    data: &Dataset,
    checkpoint: Option<&Path>,
) -> Result<(Model, Option<Trained>), Box<dyn Error>> {
    let train = |part: &Dataset, checkpoint: Option<&Path>| match checkpoint {
        Some(checkpoint) => train_encoder(arguments, task, part, checkpoint),
        None => {
            let predictor = Predictor::build(arguments.model(part), task.clone())?;
            Ok(Trainer::new(predictor, arguments.training(part))?.fit(part, |_| ControlFlow::Continue(()))?)
        }
    };
    let mut trained = None;
    let model = match arguments.views {
        Views::Encoder => {
            let encoder = trained.insert(train(data, checkpoint)?);
            Model::Encoder(Box::new(encoder.predictor.clone()))
        }
        Views::Kernels => Model::Ensemble(Box::new(Ensemble::new(KernelPredictor::fit(data, arguments.seed)?, None)?)),
        Views::Both => {
            let ensemble = Ensemble::fit(data, arguments.seed, |part| -> Result<Predictor, Box<dyn Error>> {
                let whole = part.num_series() == data.num_series();
                println!("trains an encoder with {} of {} series", part.num_series(), data.num_series());
                let encoder = train(part, checkpoint.filter(|_| whole))?;
                let predictor = encoder.predictor.clone();
                trained = whole.then_some(encoder);
                Ok(predictor)
            })?;
            match ensemble.encoder() {
                Some(_) => println!("the encoder has a share of {:.1} beside the kernels", ensemble.share()),
                None => println!("kernels alone: an encoder promises nothing more"),
            }
            Model::Ensemble(Box::new(ensemble))
        }
    };
    Ok((model, trained))
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{option} needs a number, found {text:?}\n{USAGE}"))
}

/// `target/classify/<name>` in the project.
fn default_folder(name: &str, train: &Path) -> PathBuf {
    let of_file = || train.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = if name.is_empty() { of_file() } else { name.to_string() };
    let safe = |c: char| if c.is_alphanumeric() || "-_".contains(c) { c } else { '_' };
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/classify").join(name.chars().map(safe).collect::<String>())
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

/// Trains an encoder, from the start or from a checkpoint.
fn train_encoder(
    arguments: &Arguments,
    task: &Task,
    train: &Dataset,
    checkpoint: &Path,
) -> Result<Trained, Box<dyn Error>> {
    let model = arguments.model(train);
    let options = arguments.training(train).checkpoint(checkpoint);
    if arguments.restart && checkpoint.exists() {
        std::fs::remove_dir_all(checkpoint).map_err(|error| format!("{}: {error}", checkpoint.display()))?;
    }
    let resumed = match arguments.resume {
        true => match Trainer::resume(checkpoint) {
            Err(HymbaError::Checkpoint { .. }) => {
                println!("no training to go on with in {}: begins a new one", checkpoint.display());
                None
            }
            other => Some(other?),
        },
        false => None,
    };
    let trainer = match resumed {
        Some(trainer) if *trainer.options() != options => {
            return Err("the training to go on with has other options; give the same, or --restart".into());
        }
        Some(trainer) => {
            println!("goes on with the training in {}", checkpoint.display());
            trainer
        }
        None => {
            let predictor = Predictor::build(model.clone(), task.clone())?;
            println!("\n{}", predictor.summary());
            Trainer::new(predictor, options.clone())?
        }
    };
    println!(
        "{} epochs of {} series in batches of {}; whenever it is interrupted, --resume goes on after the last whole epoch",
        options.epochs,
        train.num_series(),
        options.batch_size * options.accumulation
    );
    let mut display = Display::new(&options);
    let trained = trainer.fit(train, |progress| {
        display.show(progress);
        ControlFlow::Continue(())
    });
    display.bar.finish_and_clear();
    match trained {
        Err(HymbaError::Checkpoint { path, .. }) => Err(format!(
            "there is an unfinished training in {}: --resume goes on with it, --restart begins anew",
            path.display()
        )
        .into()),
        other => {
            let trained = other?;
            if *trained.predictor.predictor_options() != model {
                println!("the model has the options it began with, not those given now");
            }
            Ok(trained)
        }
    }
}

/// A bar on a terminal, and some twenty lines elsewhere.
struct Display {
    bar: ProgressBar,
    terminal: bool,
    every: usize,
}

impl Display {
    fn new(options: &TrainerOptions) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{wide_bar} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        Display { bar: bar.with_style(style), terminal, every: options.epochs.div_ceil(20) }
    }

    fn show(&mut self, progress: &Progress) {
        let line = |loss: f32, accuracy: Option<f32>| {
            let accuracy = accuracy.map_or(String::new(), |accuracy| format!("accuracy {accuracy:.3}  "));
            let (epoch, epochs) = (progress.epoch, progress.epochs);
            format!("epoch {epoch}/{epochs}  loss {loss:.3}  {accuracy}{} left", time(progress.remaining))
        };
        if self.terminal {
            self.bar.set_length((progress.epochs * progress.batches) as u64);
            self.bar.set_position(((progress.epoch - 1) * progress.batches + progress.batch) as u64);
            self.bar.set_message(line(progress.train.loss, progress.train.accuracy));
        } else if let Some(epoch) = &progress.finished
            && (progress.epoch == 1 || progress.epoch == progress.epochs || progress.epoch.is_multiple_of(self.every))
        {
            println!("{}{}", line(epoch.train.loss, epoch.train.accuracy), of_validation(epoch));
        }
    }
}

fn of_validation(epoch: &EpochMetrics) -> String {
    match &epoch.validation {
        Some(validation) => {
            let accuracy = validation.accuracy.map_or(String::new(), |accuracy| format!(", accuracy {accuracy:.3}"));
            format!("  validation: loss {:.3}{accuracy}", validation.loss)
        }
        None => String::new(),
    }
}

fn time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

fn test_with(model: &Model, test: &Dataset) -> Result<Outcome, Box<dyn Error>> {
    let predicted = model.predict(test)?;
    match test.targets() {
        Targets::Classes(classes) => {
            // the labels of the test series may be more
            let mut confusion = Confusion::new(test.task().labels());
            classes.iter().zip(argmax(&predicted)).for_each(|(&class, predicted)| confusion.count(class, predicted));
            Ok(Outcome::Classes(confusion))
        }
        Targets::Values(values) => Ok(Outcome::Numbers(Numbers::new(predicted, values.clone())?)),
        _ => Err("the series have neither classes nor numbers".into()),
    }
}

/// Prints what success looks like, and whether it was reached by the model that was read again.
fn report(model: &Model, test: &Dataset, outcome: &Outcome, shipped: bool) -> Result<bool, Box<dyn Error>> {
    let read_again = test_with(model, test)? == *outcome;
    println!("\n{} the saved model, read again, gives the same answers", mark(read_again));
    let learned = match outcome {
        Outcome::Classes(confusion) => {
            let most_frequent = confusion.share_of_most_frequent();
            let learned = confusion.accuracy() > most_frequent;
            println!(
                "{} test accuracy {:.4} ({} of {}); always the most frequent class would be {most_frequent:.4}",
                mark(learned),
                confusion.accuracy(),
                confusion.right(),
                test.num_series()
            );
            learned
        }
        Outcome::Numbers(numbers) => {
            let (learned, r2) = (numbers.metrics.r2 > 0.0, numbers.metrics.r2);
            println!("{} test R² {r2:.4} of {} series; always their mean would be 0", mark(learned), test.num_series());
            learned
        }
    };
    if shipped {
        println!("       (with the default options 0.98 to 0.99 is usual on these data)");
    }
    Ok(read_again && learned)
}

fn mark(good: bool) -> &'static str {
    if good { "ok    " } else { "FAILED" }
}
