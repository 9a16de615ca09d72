//! The options of a training: name, default, range and meaning in one place.

use std::path::PathBuf;

use ndarray::Array2;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::train::{AdamWOptions, Augmentation, BinaryCrossEntropy, CrossEntropy, RegressionLoss, Schedule};
use crate::{Error, Result};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Decay {
    /// It does not.
    Constant,
    /// In a straight line to 0.
    Linear,
    /// Along half a period of the cosine to 0.
    #[default]
    Cosine,
}

/// How a [`Trainer`](super::Trainer) trains.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `epochs` | 60 | 1 to 100000 | how often every series is seen |
/// | `batch_size` | 16 | ≥ 1 | series in a batch |
/// | `accumulation` | 1 | ≥ 1 | batches in a step of the optimiser, at most |
/// | `learning_rate` | 0.001 | > 0 | the highest one |
/// | `warm_up` | 0.1 | 0 ≤ share < 1 | share of all steps in which the rate climbs to it |
/// | `decay` | cosine | | how it falls after that |
/// | `adamw` | decay 0.01, gradients clipped to 1 | see [`AdamWOptions`] | how the optimiser steps, but for its schedule |
/// | `label_smoothing` | 0.1 | 0 to 1 | of the cross-entropy, in a classification |
/// | `class_weights` | none | ≥ 0, one per class | of the cross-entropy |
/// | `regression_loss` | mean squared error | | the loss of a regression |
/// | `augmentations` | none | see [`Augmentation`], at most 16 | what is done to series each time they are seen |
/// | `average` | none | 0 < decay < 1, or none | exponential moving average of the weights |
/// | `normalize` | yes | | fit input and output normalization to the training part where the predictor has none |
/// | `skip_not_finite` | 0 | any | steps with a loss or gradient that is not finite to leave out before it is an error |
/// | `validation_fraction` | 0 | 0 ≤ fraction < 1 | share of the series that is only measured on |
/// | `patience` | none | ≥ 1, or none | stop after this many epochs without a better loss |
/// | `seed` | 0 | any | of the validation part, the order of the series and dropout |
/// | `checkpoint` | none | a folder of its own | where to write everything after each epoch |
///
/// The defaults suit a few hundred to a few thousand short series and the default model.
///
/// The fields can be read and written; nothing is checked until [`validate`](Self::validate), which
/// [`Trainer::new`](super::Trainer::new) calls.
///
/// ```
/// use hymba::train::{Decay, TrainerOptions};
///
/// let options = TrainerOptions::default().epochs(20).decay(Decay::Linear).validation_fraction(0.2).patience(5);
/// assert!(options.validate().is_ok());
/// assert!(options.warm_up(1.0).validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainerOptions {
    /// How often every series is seen.
    pub epochs: usize,
    /// Series in a batch.
    pub batch_size: usize,
    /// Batches in a step of the optimiser, at most.
    pub accumulation: usize,
    /// The highest learning rate.
    pub learning_rate: f32,
    /// Share of all steps in which the learning rate climbs.
    pub warm_up: f32,
    /// How the learning rate falls after that.
    pub decay: Decay,
    /// How the optimiser steps. Its schedule is not used: it follows from `learning_rate`, `warm_up` and `decay`.
    pub adamw: AdamWOptions,
    /// Label smoothing of the cross-entropy.
    pub label_smoothing: f32,
    /// Class weights of the cross-entropy.
    pub class_weights: Option<Vec<f32>>,
    /// The loss of a regression.
    pub regression_loss: RegressionLoss,
    /// What is done to series each time they are seen.
    pub augmentations: Vec<Augmentation>,
    /// How much the moving average of the weights keeps in a step.
    pub average: Option<f32>,
    /// Whether to fit input and output normalization on the training part where the predictor has none.
    pub normalize: bool,
    /// How many steps with a loss or gradient that is not finite to leave out before it is an error.
    pub skip_not_finite: usize,
    /// Share of the series that is only measured on.
    pub validation_fraction: f32,
    /// Stop after this many epochs without a better loss.
    pub patience: Option<usize>,
    /// Seed of the validation part, the order of the series, augmentations and dropout.
    pub seed: u64,
    /// The folder to write everything to after each epoch. Its path is not among what is written, so that the folder may be moved.
    #[serde(skip)]
    pub checkpoint: Option<PathBuf>,
}

impl Serialize for TrainerOptions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        TrainerOptions::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for TrainerOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        // in old files these two stand outside
        for name in ["weight_decay", "clip_norm"] {
            if let Some(old) = fields.remove(name) {
                let adamw = serde_json::to_value(TrainerOptions::default().adamw).map_err(D::Error::custom)?;
                if let Value::Object(adamw) = fields.entry("adamw").or_insert(adamw) {
                    adamw.insert(name.into(), old);
                }
            }
        }
        TrainerOptions::deserialize(Value::Object(fields)).map_err(D::Error::custom)
    }
}

impl Default for TrainerOptions {
    fn default() -> Self {
        TrainerOptions {
            epochs: 60,
            batch_size: 16,
            accumulation: 1,
            learning_rate: 1e-3,
            warm_up: 0.1,
            decay: Decay::Cosine,
            adamw: AdamWOptions::default().weight_decay(0.01).clip_norm(1.0),
            label_smoothing: 0.1,
            class_weights: None,
            regression_loss: RegressionLoss::MeanSquaredError,
            augmentations: Vec::new(),
            average: None,
            normalize: true,
            skip_not_finite: 0,
            validation_fraction: 0.0,
            patience: None,
            seed: 0,
            checkpoint: None,
        }
    }
}

impl TrainerOptions {
    /// The largest number of epochs.
    pub const MAX_EPOCHS: usize = 100_000;

    /// Sets how often every series is seen.
    pub fn epochs(mut self, epochs: usize) -> Self {
        self.epochs = epochs;
        self
    }

    /// Sets how many series are in a batch.
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }

    /// Sets how many batches are in a step of the optimiser, at most: a large batch in pieces that fit into memory. Steps are the same
    /// as with one batch of `batch_size`·`accumulation` series, up to rounding and to which numbers dropout hits, whatever the
    /// lengths of the series and the class weights.
    pub fn accumulation(mut self, accumulation: usize) -> Self {
        self.accumulation = accumulation;
        self
    }

    /// Sets the highest learning rate.
    pub fn learning_rate(mut self, learning_rate: f32) -> Self {
        self.learning_rate = learning_rate;
        self
    }

    /// Sets the share of all steps in which the learning rate climbs.
    pub fn warm_up(mut self, warm_up: f32) -> Self {
        self.warm_up = warm_up;
        self
    }

    /// Sets how the learning rate falls after the warm-up.
    pub fn decay(mut self, decay: Decay) -> Self {
        self.decay = decay;
        self
    }

    /// Sets how the optimiser steps: betas, decay and learning rate by name, and so on. Its schedule is not used.
    ///
    /// ```
    /// use hymba::train::{AdamWOptions, TrainerOptions};
    ///
    /// let frozen = AdamWOptions::default().clip_norm(1.0).rate_for("blocks.*", 0.0);
    /// assert!(TrainerOptions::default().adamw(frozen).validate().is_ok());
    /// ```
    pub fn adamw(mut self, adamw: AdamWOptions) -> Self {
        self.adamw = adamw;
        self
    }

    /// Sets the decay of the matrices; see [`AdamWOptions::decay_of`] for which these are.
    pub fn weight_decay(mut self, weight_decay: f32) -> Self {
        self.adamw.weight_decay = weight_decay;
        self
    }

    /// Sets the largest norm a gradient keeps, or `None` for any.
    pub fn clip_norm(mut self, clip_norm: impl Into<Option<f32>>) -> Self {
        self.adamw.clip_norm = clip_norm.into();
        self
    }

    /// Sets the label smoothing of the cross-entropy.
    pub fn label_smoothing(mut self, label_smoothing: f32) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    /// Sets the class weights of the cross-entropy, one for each class: larger ones for classes that are rare or matter more. With
    /// the weight w of each target's class,
    ///
    /// ```text
    /// loss that is measured      Σ w·loss / Σ w           over the whole training or validation part
    /// loss that a step follows   Σ w·loss / (n·mean w)    over the n targets of its batches, the mean over the training part
    /// ```
    ///
    /// So every target counts with its own weight, whatever else is in its batch, and the learning rate means the same as without
    /// class weights. Targets are series, or frames where each has a class.
    ///
    /// Where several labels can be right ([`Task::MultiLabel`](crate::Task::MultiLabel)) they are the weights of a label's being right,
    /// [`BinaryCrossEntropy::positive_weights`], and the mean is over all labels.
    pub fn class_weights(mut self, class_weights: impl Into<Vec<f32>>) -> Self {
        self.class_weights = Some(class_weights.into());
        self
    }

    /// Sets the loss of a regression. With normalized targets its unit is their standard deviation.
    pub fn regression_loss(mut self, regression_loss: RegressionLoss) -> Self {
        self.regression_loss = regression_loss;
        self
    }

    /// Sets what is done to the series of the training part each time they are seen, in this order. The loss on the training
    /// part is then that on changed series.
    pub fn augmentations(mut self, augmentations: impl Into<Vec<Augmentation>>) -> Self {
        self.augmentations = augmentations.into();
        self
    }

    /// Sets how much an exponential moving average of the weights keeps in a step, or `None` for no such average. The average is what
    /// is validated and returned: it lies in the middle of what the last steps went back and forth between, and is often
    /// better. After t steps no more than (1 + t) / (10 + t) is kept, so that it forgets the start.
    pub fn average(mut self, decay: impl Into<Option<f32>>) -> Self {
        self.average = decay.into();
        self
    }

    /// Sets whether to fit input and output normalization on the training part where the predictor has none.
    pub fn normalize(mut self, normalize: bool) -> Self {
        self.normalize = normalize;
        self
    }

    /// Sets how many steps, in all epochs together, are left out because their loss or their gradient is not finite. One more is
    /// [`Error::NotFinite`]; with 0, the default, the first is. A step that is left out changes nothing, and
    /// [`EpochMetrics::skipped`](super::EpochMetrics::skipped) counts it.
    pub fn skip_not_finite(mut self, steps: usize) -> Self {
        self.skip_not_finite = steps;
        self
    }

    /// Sets the share of the series that is only measured on: the best model is the one with the lowest loss there.
    pub fn validation_fraction(mut self, validation_fraction: f32) -> Self {
        self.validation_fraction = validation_fraction;
        self
    }

    /// Sets after how many epochs without a better loss to stop, or `None` for never.
    pub fn patience(mut self, patience: impl Into<Option<usize>>) -> Self {
        self.patience = patience.into();
        self
    }

    /// Sets the seed of the validation part, the order of the series, augmentations and dropout.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the folder to write everything to after each epoch, for [`Trainer::resume`](super::Trainer::resume). It is made if
    /// there is none, and should have nothing else in it.
    pub fn checkpoint(mut self, folder: impl Into<PathBuf>) -> Self {
        self.checkpoint = Some(folder.into());
        self
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first option outside its range (see the table above), the value given, and what is
    /// allowed.
    pub fn validate(&self) -> Result<()> {
        let bad =
            |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.to_string() });
        for (option, given) in
            [("epochs", self.epochs), ("batch_size", self.batch_size), ("accumulation", self.accumulation)]
        {
            if given == 0 {
                return bad(option, "0".into(), "it must be at least 1");
            }
        }
        if self.epochs > Self::MAX_EPOCHS {
            return bad("epochs", self.epochs.to_string(), "it must be at most 100000");
        }
        if !(0.0..1.0).contains(&self.warm_up) {
            return bad("warm_up", self.warm_up.to_string(), "it is a share of all steps, at least 0 and below 1");
        }
        if !(0.0..1.0).contains(&self.validation_fraction) {
            let given = self.validation_fraction.to_string();
            return bad("validation_fraction", given, "it must be at least 0 and below 1; 0.2 is usual");
        }
        // written so that NaN fails
        if self.average.is_some_and(|decay| !(decay > 0.0 && decay < 1.0)) {
            let given = format!("{:?}", self.average);
            return bad("average", given, "it must be above 0 and below 1; 0.99 is usual for some hundred steps");
        }
        if self.augmentations.len() > Augmentation::MOST {
            return bad("augmentations", self.augmentations.len().to_string(), "at most 16 are allowed");
        }
        self.augmentations.iter().try_for_each(Augmentation::validate)?;
        if self.patience == Some(0) {
            return bad("patience", "0".into(), "it must be at least 1; leave it out to train all epochs");
        }
        // the losses check their own options, whatever they are asked
        let classes = self.class_weights.as_ref().map_or(2, |weights| weights.len().max(1));
        self.cross_entropy().evaluate(&Array2::zeros((1, classes)), &[0])?;
        self.regression_loss.evaluate(&Array2::zeros((1, 1)), &Array2::zeros((1, 1)))?;
        self.optimizer(2).validate()
    }

    /// Series in a step of the optimiser, at most.
    pub(super) fn step_size(&self) -> usize {
        self.batch_size.saturating_mul(self.accumulation)
    }

    /// The first option, with its value, because of which losses are not those of a training by `other` options.
    pub(super) fn incomparable(&self, other: &Self) -> Option<(&'static str, String)> {
        let all = |options: &Self| {
            [
                ("seed", format!("{:?}", options.seed)),
                ("validation_fraction", format!("{:?}", options.validation_fraction)),
                ("label_smoothing", format!("{:?}", options.label_smoothing)),
                ("class_weights", format!("{:?}", options.class_weights)),
                ("regression_loss", format!("{:?}", options.regression_loss)),
                ("average", format!("{:?}", options.average.is_some())),
            ]
        };
        all(self).into_iter().zip(all(other)).find(|(own, other)| own != other).map(|(own, _)| own)
    }

    /// The options of the optimiser for so many `steps` in all.
    pub(super) fn optimizer(&self, steps: u64) -> AdamWOptions {
        let schedule = match self.decay {
            Decay::Constant => Schedule::constant(self.learning_rate),
            Decay::Linear => Schedule::linear(self.learning_rate, steps),
            Decay::Cosine => Schedule::cosine(self.learning_rate, steps),
        };
        let warm_up = (f64::from(self.warm_up) * steps as f64) as u64;
        let schedule = schedule.warm_up(warm_up.min(steps.saturating_sub(1)));
        self.adamw.clone().schedule(schedule)
    }

    pub(super) fn binary_cross_entropy(&self) -> BinaryCrossEntropy {
        let loss = BinaryCrossEntropy::new().label_smoothing(self.label_smoothing);
        match &self.class_weights {
            Some(weights) => loss.positive_weights(weights.as_slice()),
            None => loss,
        }
    }

    pub(super) fn cross_entropy(&self) -> CrossEntropy {
        let loss = CrossEntropy::new().label_smoothing(self.label_smoothing);
        match &self.class_weights {
            Some(weights) => loss.class_weights(weights.as_slice()),
            None => loss,
        }
    }
}
