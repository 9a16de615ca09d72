//! The options of a training of a language model.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::train::{AdamWOptions, Schedule, TrainerOptions};
use crate::{Error, Result};

/// How [`LmTrainer`](super::LmTrainer) trains.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `epochs` | 1 | 1 … 100000 | passes over all rows |
/// | `batch_size` | 16 | ≥ 1 | rows per step |
/// | `pass_size` | 16 | ≥ 1 | rows that pass through the model together; a step adds up several if it has more |
/// | `learning_rate` | 1e-3 | > 0 | its peak |
/// | `warm_up` | 0.05 | 0 ≤ … < 1 | share of all steps that the climb takes |
/// | `floor` | 0.1 | 0 … 1 | share of the peak at which the cosine ends |
/// | `betas` | (0.9, 0.95) | 0 ≤ β < 1 | as in [`AdamWOptions`] |
/// | `weight_decay` | 0.1 | ≥ 0 | of matrices |
/// | `clip_norm` | 1.0 | > 0, or none | the largest norm a gradient keeps |
/// | `patience` | none | ≥ 1 | ends after this many epochs without a better validation loss |
/// | `seed` | 0 | | order of the rows |
/// | `checkpoint` | none | | folder that a killed training goes on from |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LmTrainerOptions {
    /// Passes over all rows.
    pub epochs: usize,
    /// Rows of a step.
    pub batch_size: usize,
    /// Rows that pass through the model together.
    pub pass_size: usize,
    /// The peak of the learning rate.
    pub learning_rate: f32,
    /// Share of all steps that the climb to the peak takes.
    pub warm_up: f64,
    /// Share of the peak at which the cosine ends.
    pub floor: f32,
    /// As in [`AdamWOptions`].
    pub betas: (f32, f32),
    /// Decay of matrices.
    pub weight_decay: f32,
    /// The largest norm a gradient keeps.
    pub clip_norm: Option<f32>,
    /// Ends after this many epochs without a better validation loss.
    pub patience: Option<usize>,
    /// Seed of the order of the rows, and of the dropout of adapters.
    pub seed: u64,
    /// Folder that a killed training goes on from.
    #[serde(skip)]
    pub checkpoint: Option<PathBuf>,
}

impl Default for LmTrainerOptions {
    fn default() -> Self {
        LmTrainerOptions {
            epochs: 1,
            batch_size: 16,
            pass_size: 16,
            learning_rate: 1e-3,
            warm_up: 0.05,
            floor: 0.1,
            betas: (0.9, 0.95),
            weight_decay: 0.1,
            clip_norm: Some(1.0),
            patience: None,
            seed: 0,
            checkpoint: None,
        }
    }
}

/// Setters of the same names.
macro_rules! setters {
    ($($name:ident: $type:ty, $what:literal;)*) => {
        impl LmTrainerOptions {
            $(
                #[doc = concat!("Sets ", $what, ".")]
                pub fn $name(mut self, $name: $type) -> Self {
                    self.$name = $name;
                    self
                }
            )*
        }
    };
}

setters! {
    epochs: usize, "how many passes over all rows there are";
    batch_size: usize, "the rows of a step";
    pass_size: usize, "how many rows pass through the model together";
    learning_rate: f32, "the peak of the learning rate";
    warm_up: f64, "the share of all steps that the climb to the peak takes";
    floor: f32, "the share of the peak at which the cosine ends";
    betas: (f32, f32), "how much of the running means each step keeps";
    weight_decay: f32, "the decay of matrices";
    clip_norm: Option<f32>, "the largest norm a gradient keeps";
    patience: Option<usize>, "after how many epochs without a better validation loss it ends";
    seed: u64, "the seed of the order of the rows and of the dropout of adapters";
}

impl LmTrainerOptions {
    /// Sets the folder into which every epoch is written, so that a training that is killed can go on:
    /// [`LmTrainer::resume`](super::LmTrainer::resume).
    pub fn checkpoint(mut self, folder: impl Into<PathBuf>) -> Self {
        self.checkpoint = Some(folder.into());
        self
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first outside its range.
    pub fn validate(&self) -> Result<()> {
        let bad = |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.into() });
        for (option, count) in [("epochs", self.epochs), ("batch_size", self.batch_size), ("pass_size", self.pass_size)]
        {
            if count == 0 {
                return bad(option, "0".into(), "it must be at least 1");
            }
        }
        if self.epochs > TrainerOptions::MAX_EPOCHS {
            return bad("epochs", self.epochs.to_string(), "it must be at most 100000");
        }
        if !(0.0..1.0).contains(&self.warm_up) {
            return bad("warm_up", self.warm_up.to_string(), "it must be at least 0 and below 1, a share of all steps");
        }
        if !(0.0..=1.0).contains(&self.floor) {
            return bad("floor", self.floor.to_string(), "it must be from 0 to 1, a share of the peak");
        }
        if self.patience == Some(0) {
            return bad("patience", "0".into(), "it must be at least 1, or none");
        }
        self.optimizer(1).validate()
    }

    /// The optimiser's, for so many steps.
    pub(super) fn optimizer(&self, steps: u64) -> AdamWOptions {
        let warm_up = ((steps as f64 * self.warm_up) as u64).min(steps.saturating_sub(1));
        let schedule = Schedule::cosine(self.learning_rate, steps).warm_up(warm_up);
        let options = AdamWOptions::default()
            .schedule(schedule.floor(self.learning_rate * self.floor))
            .betas(self.betas.0, self.betas.1)
            .weight_decay(self.weight_decay);
        AdamWOptions { clip_norm: self.clip_norm, ..options }
    }
}
