//! The training of an encoder, which may be interrupted, and what is shown of it.

use std::error::Error;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use hymba::train::{Dataset, EpochMetrics, Progress, Trained, Trainer, TrainerOptions};
use hymba::{Error as HymbaError, Predictor, Task};
use indicatif::{ProgressBar, ProgressStyle};

use crate::arguments::Arguments;

/// Trains an encoder, from the start or from a checkpoint.
pub fn train_encoder(
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

pub fn time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
