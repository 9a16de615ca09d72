//! Options are judged by folds of the training series.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use hymba::train::Dataset;
use hymba::{Error as HymbaError, Task};

use crate::arguments::{Arguments, Views};
use crate::encoder::time;
use crate::model::{Model, fit};
use crate::outcome::test_with;
use crate::search;

/// Fits to some of the training series and measures on the others, `folds` times. Prints each score and the mean.
pub fn cross_validate(
    arguments: &Arguments,
    task: &Task,
    train: &Dataset,
    folds: usize,
) -> Result<bool, Box<dyn Error>> {
    let mut start = Instant::now();
    let scores = by_folds(arguments, task, train, folds, |fold, fitted, rest| {
        let (score, what) = test_with(&fitted?, rest)?.score();
        println!("fold {fold}: {what} {score:.4} of {} in {}", rest.num_series(), time(start.elapsed()));
        start = Instant::now();
        Ok(score)
    })?;
    println!("mean of {folds} folds: {:.4}", scores.iter().sum::<f64>() / folds.max(1) as f64);
    Ok(true)
}

/// Searches for options of the encoder, by folds of the training series.
pub fn random_search(
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
        let drawn = Arguments { views: Views::Encoder, ..drawn };
        by_folds(&drawn, task, train, folds, |_, fitted, rest| match fitted {
            Ok(model) => Ok(test_with(&model, rest)?.score().0),
            Err(error) if error.downcast_ref().is_some_and(|error| matches!(error, HymbaError::NotFinite { .. })) => {
                Ok(f64::MIN)
            }
            Err(error) => Err(error),
        })
    })?;
    search::table(std::slice::from_ref(&found.results))?;
    Ok(true)
}

/// Fits to all but one in `folds` of the training series, `folds` times. `score` gets what came of it and the other series.
fn by_folds(
    arguments: &Arguments,
    task: &Task,
    train: &Dataset,
    folds: usize,
    mut score: impl FnMut(u64, Result<Model, Box<dyn Error>>, &Dataset) -> Result<f64, Box<dyn Error>>,
) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut scores = Vec::new();
    for fold in 0..folds as u64 {
        let (part, rest) = train.split(1.0 / folds as f32, fold)?;
        let arguments = Arguments { seed: arguments.seed + fold, ..arguments.clone() };
        let fitted = fit(&arguments, task, &part, None).map(|(model, _)| model);
        scores.push(score(fold, fitted, &rest)?);
    }
    Ok(scores)
}

/// FNV-1a
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}
