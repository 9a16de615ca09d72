//! Random search with successive halving.
//!
//! Trial 0 is the options as they are; every other draws each of these by its own number, from the seed:
//!
//! | option | range |
//! |---|---|
//! | `--hidden` | 32, 64, 96, 128 |
//! | `--layers` | 1, 2, 3 |
//! | `--dropout` | 0, 0.1, 0.2, 0.3, 0.4 |
//! | `--pooling` | mean, max, 1, 4 (attention queries) |
//! | `--differences` | none, beside |
//! | `--learning-rate` | 0.0005 to 0.008, even in its logarithm |
//! | `--weight-decay` | 0.01 to 0.3, even in its logarithm |
//! | `--jitter` | 0, 0.05, 0.1 |
//! | `--mixup` | 0, 0.2 |
//!
//! In round 1 all trials train for a part of the epochs, in each further round the better half trains anew for twice as many, until the
//! last round trains for all. A share of the trials (`--trial`) is halved by itself, so that shares need not know of each other.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::trials::{append, load};

/// Rounds, at most: the first trains for an eighth of the epochs.
const ROUNDS: usize = 4;

/// What is searched.
pub struct Search {
    pub trials: usize,
    /// As `--trial`.
    pub share: Option<(usize, usize)>,
    pub folds: usize,
    pub seed: u64,
    pub results: PathBuf,
    /// Of the training data: results of other data, and of other options given by the user, do not count.
    pub data: String,
}

/// What came of a trial in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub data: String,
    pub seed: u64,
    pub trial: usize,
    /// From 1.
    pub round: usize,
    pub epochs: usize,
    /// Arguments of `classify`.
    pub options: Vec<String>,
    /// Of the folds; the higher the better.
    pub scores: Vec<f64>,
    pub seconds: f64,
}

impl Record {
    pub fn mean(&self) -> f64 {
        self.scores.iter().sum::<f64>() / self.scores.len().max(1) as f64
    }

    fn deviation(&self) -> f64 {
        let (mean, n) = (self.mean(), self.scores.len() as f64);
        (self.scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt()
    }
}

/// The options of a trial.
pub fn drawn(seed: u64, trial: usize) -> Vec<String> {
    if trial == 0 {
        return Vec::new();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(trial as u64);
    let mut words = Vec::new();
    for (option, choices) in [
        ("--hidden", &["32", "64", "96", "128"][..]),
        ("--layers", &["1", "2", "3"]),
        ("--dropout", &["0", "0.1", "0.2", "0.3", "0.4"]),
        ("--pooling", &["mean", "max", "1", "4"]),
        ("--differences", &["none", "beside"]),
        ("--jitter", &["0", "0.05", "0.1"]),
        ("--mixup", &["0", "0.2"]),
    ] {
        words.extend([option.to_string(), choices[rng.random_range(0..choices.len())].to_string()]);
    }
    for (option, low, high) in [("--learning-rate", 5e-4f64, 8e-3f64), ("--weight-decay", 0.01, 0.3)] {
        let number = (low.ln() + rng.random::<f64>() * (high / low).ln()).exp();
        words.extend([option.to_string(), format!("{number:.2e}")]);
    }
    words
}

impl Search {
    /// The trials of this share.
    fn share(&self) -> Vec<usize> {
        let (k, n) = self.share.unwrap_or((1, 1));
        (0..self.trials).skip(k - 1).step_by(n).collect()
    }

    /// Runs what the file lacks. `evaluate` gets the options of a trial and its epochs, and returns the score of each fold.
    pub fn run(
        &self,
        all_epochs: usize,
        mut evaluate: impl FnMut(&[String], usize) -> Result<Vec<f64>, Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let fault = |error: std::io::Error| format!("{}: {error}", self.results.display());
        let mut trials = self.share();
        let rounds = (trials.len().max(1).ilog2() as usize + 1).min(ROUNDS);
        for round in 1..=rounds {
            let epochs = (all_epochs >> (rounds - round)).max(1);
            let mut found = Vec::new();
            for &trial in &trials {
                let options = drawn(self.seed, trial);
                let (done, _) = load::<Record>(&self.results).map_err(fault)?;
                let is = |other: &&Record| {
                    (&other.data, other.seed, other.trial, other.epochs) == (&self.data, self.seed, trial, epochs)
                        && (other.scores.len(), &other.options) == (self.folds, &options)
                };
                if let Some(record) = done.iter().find(is) {
                    found.push(record.clone());
                    continue;
                }
                let start = Instant::now();
                let scores = evaluate(&options, epochs)?;
                let (data, seconds) = (self.data.clone(), start.elapsed().as_secs_f64());
                let record = Record { data, seed: self.seed, trial, round, epochs, options, scores, seconds };
                println!(
                    "round {round} of {rounds}, trial {trial}: {:.4} after {epochs} epochs ({seconds:.0} s)",
                    record.mean()
                );
                append(&self.results, &record).map_err(fault)?;
                found.push(record);
            }
            // a score that is no number comes last; of equals the first stays
            let score = |record: &Record| if record.mean().is_finite() { record.mean() } else { f64::NEG_INFINITY };
            found.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.trial.cmp(&b.trial)));
            trials = found.iter().take(trials.len().div_ceil(2)).map(|record| record.trial).collect();
        }
        Ok(())
    }
}

/// Prints the best trials of some files.
pub fn table(files: &[PathBuf]) -> Result<(), Box<dyn Error>> {
    const SHOWN: usize = 12;
    let mut all: Vec<Record> = Vec::new();
    for file in files {
        let (records, none) = load(file).map_err(|error| format!("{}: {error}", file.display()))?;
        if none > 0 {
            println!("{}: {none} lines are no results, and are left out", file.display());
        }
        all.extend(records);
    }
    // of copies of one file
    let mut seen = Vec::new();
    all.retain(|record: &Record| {
        let is_new = !seen.contains(record);
        seen.push(record.clone());
        is_new
    });
    let sets: std::collections::BTreeSet<String> = all.iter().map(|record| record.data.clone()).collect();
    if sets.is_empty() {
        return Err("there are no results".into());
    }
    for data in sets {
        let mut some: Vec<&Record> = all.iter().filter(|record| record.data == data).collect();
        some.sort_by(|a, b| b.epochs.cmp(&a.epochs).then(b.mean().total_cmp(&a.mean())));
        println!("\n{data}: {} results; those of most epochs first\n", some.len());
        println!("| trial | epochs | mean of folds | ± | seconds | options |\n|---|---|---|---|---|---|");
        for record in some.iter().take(SHOWN) {
            let options = if record.options.is_empty() { "(as given)".into() } else { record.options.join(" ") };
            println!(
                "| {} | {} | {:.4} | {:.4} | {:.0} | {options} |",
                record.trial,
                record.epochs,
                record.mean(),
                record.deviation(),
                record.seconds
            );
        }
    }
    Ok(())
}

/// Makes the folder that a file is to be in.
pub fn make_folder(file: &Path) -> Result<(), String> {
    match file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display())),
        None => Ok(()),
    }
}
