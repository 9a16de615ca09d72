//! `hymba train DATA`: trains a predictor of classes or numbers on series.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hymba::train::{Dataset, Progress, Stopped, Trainer, TrainerOptions};
use hymba::{Differences, Ensemble, Error, KernelPredictor, Pooling, Predictor, PredictorOptions, Task};

use crate::checkpoint;
use crate::interrupt::{self, Interrupted};
use crate::load::ThreadArgs;
use crate::output;
use crate::series::{Model, ReadArgs};

/// Options that are not given follow from the series. An interrupted training continues when the same command is run again.
#[derive(clap::Args)]
pub struct Args {
    /// Series with their classes or numbers: .ts, .csv or .tsv.
    data: PathBuf,
    /// The model to write.
    #[arg(long, short, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,
    /// Kind of model: ridge regression on features of fixed kernels, a Hymba encoder, or both, mixed as held out series show to be
    /// best.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = View::Both)]
    view: View,
    /// Train an encoder that predicts after every frame, for `predict --stream`.
    #[arg(long, conflicts_with = "view")]
    streaming: bool,
    /// Passes over the series.
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// Width of the encoder.
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Blocks of the encoder.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Peak of the learning rate.
    #[arg(long, value_name = "X")]
    learning_rate: Option<f32>,
    /// Share of the series held out to pick the best epoch.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    validation: f32,
    /// Seed of kernels, weights, dropout and order.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Start over even if there is an interrupted training.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    threads: ThreadArgs,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum View {
    Both,
    Kernels,
    Encoder,
}

/// The most frames that attention of a streaming encoder sees; earlier ones are in the state only.
const WINDOW: usize = 128;

pub fn run(args: Args) -> Result<()> {
    args.threads.start()?;
    let set = args.reading.read(&args.data)?;
    let task = set.task()?;
    let data = set.into_dataset(&task)?;
    let checkpoint = checkpoint::of(&args.out);
    if args.restart {
        checkpoint::remove(&checkpoint)?;
    }
    // one for each training: of an ensemble, with a part of the series, and then with all
    let mut trainings = 0;
    let mut train = |part: &Dataset| {
        trainings += 1;
        eprintln!("training an encoder on {} series", part.num_series());
        train_encoder(&args, &task, part, &checkpoint.join(trainings.to_string()))
    };
    let model = match (args.view, args.streaming) {
        (View::Encoder, _) | (_, true) => Model::Encoder(Box::new(train(&data)?)),
        (View::Kernels, _) => Model::Kernels(Box::new(KernelPredictor::fit(&data, args.seed)?)),
        (View::Both, _) => {
            let ensemble = Ensemble::fit(&data, args.seed, train)?;
            match ensemble.encoder() {
                Some(_) => eprintln!("the encoder has a share of {:.1} beside the kernels", ensemble.share()),
                None => eprintln!("kernels alone: an encoder would not add to them"),
            }
            Model::Ensemble(Box::new(ensemble))
        }
    };
    model.save(&args.out)?;
    // the model is safe now
    checkpoint::remove(&checkpoint)?;
    eprintln!("the model is in {}", args.out.display());
    Ok(())
}

fn train_encoder(args: &Args, task: &Task, data: &Dataset, checkpoint: &Path) -> Result<Predictor> {
    let options = training(args, data).checkpoint(checkpoint);
    let trainer = match Trainer::resume(checkpoint) {
        Err(Error::Checkpoint { .. }) => None,
        other => Some(other?),
    };
    let trainer = match trainer {
        Some(trainer) if *trainer.options() != options => bail!(
            "{}: a training with other options was interrupted; give the same, or --restart",
            checkpoint.display()
        ),
        Some(trainer) => {
            eprintln!("continuing the training in {}", checkpoint.display());
            trainer
        }
        None => {
            if let Some(folder) = checkpoint.parent() {
                fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            }
            Trainer::new(Predictor::build(model(args, data), task.clone())?, options)?
        }
    };
    // not before: kernels, which come first, are fitted in one go
    interrupt::listen()?;
    let bar = output::progress_bar(0, "{wide_bar} {msg}");
    let trained = trainer.fit(data, |progress| {
        show(&bar, progress);
        interrupt::flow()
    })?;
    bar.finish_and_clear();
    match trained.stopped {
        Stopped::Callback => Err(Interrupted::TRAINING.into()),
        _ => Ok(trained.predictor),
    }
}

fn show(bar: &indicatif::ProgressBar, progress: &Progress) {
    bar.set_length((progress.epochs * progress.batches) as u64);
    bar.set_position(((progress.epoch - 1) * progress.batches + progress.batch) as u64);
    let accuracy = progress.train.accuracy.map_or(String::new(), |accuracy| format!(", accuracy {accuracy:.3}"));
    let line = format!("epoch {}/{}, loss {:.3}{accuracy}", progress.epoch, progress.epochs, progress.train.loss);
    // some twenty lines where there is no bar
    let every = progress.epochs.div_ceil(20);
    if bar.is_hidden() && progress.finished.is_some() && progress.epoch.is_multiple_of(every) {
        eprintln!("{line}");
    }
    bar.set_message(format!("{line}, {} s left", progress.remaining.as_secs()));
}

fn model(args: &Args, data: &Dataset) -> PredictorOptions {
    let mut options = PredictorOptions::recommended_for(data);
    if args.streaming {
        options.encoder.window_size = data.longest().clamp(1, WINDOW);
        let differences = Differences::None;
        options = options.stem(None).normalize_series(false).bidirectional(false).differences(differences);
        options = options.pooling(Pooling::Last);
    }
    let encoder = &mut options.encoder;
    encoder.seed = args.seed;
    encoder.hidden_size = args.hidden.unwrap_or(encoder.hidden_size);
    encoder.num_layers = args.layers.unwrap_or(encoder.num_layers);
    options
}

fn training(args: &Args, data: &Dataset) -> TrainerOptions {
    let mut options = TrainerOptions::recommended_for(data).seed(args.seed).validation_fraction(args.validation);
    options.epochs = args.epochs.unwrap_or(options.epochs);
    options.learning_rate = args.learning_rate.unwrap_or(options.learning_rate);
    options
}
