//! Learns to tell nine speakers apart from 270 utterances, tests itself on 370 others, and saves what it learned.
//!
//! ```sh
//! cargo run --release --example quickstart
//! ```
//!
//! Success looks like `accuracy 0.98`, or some hundredths beside it. `classify` is the same with options, pictures and checkpoints.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::series::{ReadOptions, SeriesSet};
use hymba::train::{Targets, Trainer, TrainerOptions};
use hymba::{Predictor, PredictorOptions, argmax};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |part: &str| {
        let path = folder.join(format!("examples/data/JapaneseVowels_{part}.ts"));
        SeriesSet::read(path, &ReadOptions::default())
    };
    let (train, test) = (read("TRAIN")?, read("TEST")?);
    let task = train.task()?; // to tell the nine speakers apart
    let (train, test) = (train.into_dataset(&task)?, test.into_dataset(&task)?); // series [length, 12], each with a class

    let predictor = Predictor::build(PredictorOptions::recommended_for(&train), task)?;
    let trained = Trainer::new(predictor, TrainerOptions::recommended_for(&train))?.fit(&train, |progress| {
        if let Some(epoch) = &progress.finished {
            println!("epoch {}/{}: loss {:.3}", progress.epoch, progress.epochs, epoch.train.loss);
        }
        ControlFlow::Continue(())
    })?;
    let path = folder.join("target/speakers.safetensors");
    trained.predictor.save(&path)?;

    let predictor = Predictor::load(&path)?; // later, elsewhere
    let (x, lengths) = test.pad(&Vec::from_iter(0..test.num_series()))?; // [370, 29, 12], padded
    let predicted = argmax(&predictor.predict(&x, Some(&lengths))?);
    let Targets::Classes(speakers) = test.targets() else { return Err("the utterances have no speakers".into()) };
    let right = predicted.iter().zip(speakers).filter(|(predicted, speaker)| predicted == speaker).count();
    println!("accuracy {:.4} of {} utterances", right as f64 / speakers.len() as f64, speakers.len());
    Ok(())
}
