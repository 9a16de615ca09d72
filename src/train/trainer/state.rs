//! The state of a training between two steps.

use super::report::best_epoch;
use super::{EpochMetrics, Metrics, Progress};
use crate::train::{AdamW, hash_of, hash_of_text, views, views_mut};
use crate::{Error, Predictor, Result};

/// Everything that changes from epoch to epoch.
#[derive(Debug)]
pub(super) struct State {
    pub predictor: Predictor,
    /// The moving average of its weights, if there is one: what is measured and kept.
    pub average: Option<Predictor>,
    /// The predictor after the best epoch; the one at the start before there is any.
    pub best: Predictor,
    pub optimizer: AdamW<Predictor>,
    pub history: Vec<EpochMetrics>,
    /// Epochs that were done when the schedule began: 0 unless the training was prolonged.
    pub before_schedule: usize,
}

impl State {
    /// A hash of all that must be the same on all ranks.
    pub fn hash(&self) -> u64 {
        let [first, second] = self.optimizer.moments();
        let all = [Some(&self.predictor), self.average.as_ref(), Some(first), Some(second)];
        let normalizations = (self.predictor.input_normalization(), self.predictor.output_normalization());
        let numbers = all.into_iter().flatten().map(hash_of).collect::<Vec<_>>();
        hash_of_text(&(numbers, normalizations, self.optimizer.steps()))
    }

    /// The predictor that is measured and kept.
    pub fn current(&self) -> &Predictor {
        self.average.as_ref().unwrap_or(&self.predictor)
    }

    /// Brings the average up to date after a step: average = keep · average + (1 − keep) · weights.
    pub fn update_average(&mut self, decay: Option<f32>) {
        let (Some(average), Some(decay)) = (&mut self.average, decay) else { return };
        let steps = self.optimizer.steps() as f32;
        let keep = decay.min((1.0 + steps) / (10.0 + steps));
        for ((_, mut average), (_, weights)) in views_mut(average).into_iter().zip(views(&self.predictor)) {
            average.zip_mut_with(&weights, |average, weight| *average += (1.0 - keep) * (weight - *average));
        }
    }

    /// Writes an epoch down, and keeps the predictor if it is the best so far.
    pub fn finish(&mut self, progress: Progress, validation: Option<Metrics>) -> Result<Progress> {
        let Progress { train, learning_rate, gradient_norm, skipped, .. } = progress;
        let epoch = EpochMetrics { train, validation, learning_rate, gradient_norm, skipped };
        // the last step of the epoch may have made a parameter infinite or NaN, and nothing has checked them since
        if views(&self.predictor).iter().any(|(_, array)| array.iter().any(|number| !number.is_finite())) {
            return Err(self.not_finite("the steps of an epoch are done"));
        }
        if !epoch.decisive_loss().is_finite() {
            return Err(self.not_finite(&format!("the validation loss is {}", epoch.decisive_loss())));
        }
        self.history.push(epoch.clone());
        if best_epoch(&self.history) == self.history.len() {
            self.best = self.current().clone();
        }
        Ok(Progress { finished: Some(epoch), ..progress })
    }

    /// Refuses a loss that is not finite.
    pub fn check_loss(&self, loss: f32) -> Result<()> {
        if loss.is_finite() { Ok(()) } else { Err(self.not_finite(&format!("the loss is {loss}"))) }
    }

    /// The error of the step that is due, and the parameter that is most to blame.
    pub fn not_finite(&self, what: &str) -> Error {
        let all = views(&self.predictor);
        let numbers = all.iter().flat_map(|(name, array)| array.iter().map(move |number| (name, number)));
        let what = match numbers.clone().find(|(_, number)| !number.is_finite()) {
            Some((name, number)) => format!("{what}, and {name:?} has become {number}"),
            None => match numbers.max_by(|(_, a), (_, b)| a.abs().total_cmp(&b.abs())) {
                Some((name, number)) => format!("{what}; the largest parameter is {number:e} in {name:?}"),
                None => what.to_string(),
            },
        };
        Error::NotFinite { step: self.optimizer.steps() + 1, what }
    }
}
