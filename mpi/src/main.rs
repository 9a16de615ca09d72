//! `hymba-mpi train`: a predictor of series, trained on many machines. `hymba-mpi train-lm`: a language model.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use hymba::train::{Collective, Dataset, Metrics, Progress, Trainer, TrainerOptions, TrainingData, evaluate};
use hymba::{Predictor, PredictorOptions};
use hymba_mpi::World;

mod data;
mod train_lm;

#[derive(Parser)]
#[command(name = "hymba-mpi", version, about = "Trains hymba models on many machines: mpirun -n 4 hymba-mpi train …")]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a predictor on series, and writes it to a file
    Train(Train),
    /// Trains a small language model on texts
    TrainLm(train_lm::TrainLm),
}

/// Options that are not given follow from the training files that rank 0 reads, by PredictorOptions::recommended_for and
/// TrainerOptions::recommended_for.
#[derive(Args)]
struct Train {
    #[command(flatten)]
    data: data::Source,
    /// Where model.safetensors and the checkpoint go; rank 0 writes, and with --resume every rank reads
    #[arg(long, default_value = "hymba-mpi-run")]
    out: PathBuf,
    /// Continue after the last epoch of the checkpoint, with any number of ranks; begin if there is none. Of the options below, --hidden,
    /// --layers and --plain count only when a training begins, and --validation and --seed must stay as they were
    #[arg(long)]
    resume: bool,
    /// Passes over the series
    #[arg(long)]
    epochs: Option<usize>,
    /// Series per step, of all ranks together; each rank computes its share in pieces that fit into memory. Unless --epochs is given, a new
    /// training has fewer epochs with smaller batches
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: Option<usize>,
    /// Peak of the learning rate
    #[arg(long)]
    learning_rate: Option<f32>,
    /// Share of the series held out to pick the best epoch; 0 by default
    #[arg(long)]
    validation: Option<f32>,
    /// Width of the encoder
    #[arg(long)]
    hidden: Option<usize>,
    /// Blocks of the encoder
    #[arg(long)]
    layers: Option<usize>,
    /// Without dropout and augmentations: nothing is drawn at random on a rank, so any number of ranks gives the same result
    #[arg(long)]
    plain: bool,
    /// Seed of weights, order and dropout; 0 by default
    #[arg(long)]
    seed: Option<u64>,
}

fn main() {
    match Program::parse().command {
        Command::Train(train) => World::run(|world| train.run(world)),
        Command::TrainLm(train) => World::run(|world| train.run(world)),
    }
}

/// Whether a folder has a training to go on with, as rank 0 finds it: each by itself, some would wait for the others for ever.
fn has_training(checkpoint: &Path, world: &mut World) -> bool {
    let own = checkpoint.join("training.json").exists();
    world.of_rank_0(vec![u8::from(own)]) == [1]
}

impl Train {
    fn run(self, world: &mut World) -> Result<(), Box<dyn Error>> {
        let data = self.data.read(world)?;
        let test = if world.rank() == 0 { self.data.test(&data)? } else { None };
        let checkpoint = self.out.join("checkpoint");
        // of ranks with other data these would differ
        let recommended = serde_json::to_vec(&self.recommended(&data))?;
        let recommended: TrainerOptions = serde_json::from_slice(&world.of_rank_0(recommended))?;
        let trainer = match self.resume && has_training(&checkpoint, world) {
            true => {
                let trainer = Trainer::resume(&checkpoint)?;
                let options = self.changed(trainer.options().clone(), &recommended);
                trainer.prolong(options)?
            }
            false => {
                let predictor = Predictor::build(self.predictor_options(&data), data.task().clone())?;
                let predictor = Predictor::from_bytes(&world.of_rank_0(predictor.to_bytes()?))?;
                let options = self.changed(recommended.clone(), &recommended);
                Trainer::new(predictor, options.checkpoint(&checkpoint))?
            }
        };
        let mut series = [data.num_series() as f64];
        if self.data.sharded {
            world.sum_f64(&mut series)?;
        }
        if world.rank() == 0 {
            println!("{} ranks, {} series", world.size(), series[0]);
        }
        let options = trainer.options().clone();
        let mut given = TrainingData::new(&data);
        if self.data.sharded {
            given = given.sharded();
        }
        let mut pace = Pace::start();
        let trained = trainer.fit_on(given, world, |progress, _| {
            match progress.finished {
                Some(_) => tell(progress, pace.of_epoch(series[0])),
                None => pace.step(),
            }
            ControlFlow::Continue(())
        })?;
        if world.rank() == 0 {
            let file = self.out.join("model.safetensors");
            trained.predictor.save(&file)?;
            println!("{}: {}, the best was epoch {}", file.display(), trained.stopped, trained.best_epoch);
            if let Some((test, unknown)) = test {
                let mut metrics = evaluate(&trained.predictor, &test, &options)?;
                // of a class that is not known any answer is wrong, and has no loss
                let share = test.num_series() as f32 / (test.num_series() + unknown) as f32;
                metrics.accuracy = metrics.accuracy.map(|accuracy| accuracy * share);
                println!("test: {}", line(&metrics));
            }
        }
        Ok(())
    }

    fn predictor_options(&self, data: &Dataset) -> PredictorOptions {
        let mut options = PredictorOptions::recommended_for(data);
        let encoder = &mut options.encoder;
        encoder.hidden_size = self.hidden.unwrap_or(encoder.hidden_size);
        encoder.num_layers = self.layers.unwrap_or(encoder.num_layers);
        encoder.dropout = if self.plain { 0.0 } else { encoder.dropout };
        encoder.seed = self.seed.unwrap_or(0);
        options
    }

    fn recommended(&self, data: &Dataset) -> TrainerOptions {
        let mut options = match self.batch {
            Some(batch) => TrainerOptions::recommended_for_steps_of(batch, data),
            None => TrainerOptions::recommended_for(data),
        };
        if self.plain {
            options.augmentations.clear();
        }
        options
    }

    /// The options with those that are given.
    fn changed(&self, mut options: TrainerOptions, recommended: &TrainerOptions) -> TrainerOptions {
        options.epochs = self.epochs.unwrap_or(options.epochs);
        if self.batch.is_some() {
            (options.batch_size, options.accumulation) = (recommended.batch_size, recommended.accumulation);
        }
        options.learning_rate = self.learning_rate.unwrap_or(options.learning_rate);
        options.validation_fraction = self.validation.unwrap_or(options.validation_fraction);
        options.seed = self.seed.unwrap_or(options.seed);
        options
    }
}

/// How fast the steps of an epoch are, without what comes between epochs: validation and checkpoint.
struct Pace {
    began: Instant,
    /// The last step.
    ended: Instant,
}

impl Pace {
    fn start() -> Self {
        Pace { began: Instant::now(), ended: Instant::now() }
    }

    fn step(&mut self) {
        self.ended = Instant::now();
    }

    /// `count` per second of the epoch. The next one begins.
    fn of_epoch(&mut self, count: f64) -> f64 {
        let pace = count / (self.ended - self.began).as_secs_f64();
        self.began = Instant::now();
        pace
    }
}

/// A line for each epoch.
fn tell(progress: &Progress, pace: f64) {
    let Some(epoch) = &progress.finished else { return };
    let validation = epoch.validation.map_or(String::new(), |metrics| format!(", validation {}", line(&metrics)));
    println!("epoch {}: {}{validation}, {pace:.1} series/s", progress.epoch, line(&epoch.train));
}

fn line(metrics: &Metrics) -> String {
    let accuracy = metrics.accuracy.map_or(String::new(), |share| format!(", {:.1} % right", 100.0 * share));
    format!("loss {:.6}{accuracy}", metrics.loss)
}
