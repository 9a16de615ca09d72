//! From kernel features to classes and numbers.

use ndarray::{Array2, Axis};

use super::features::KernelFeatures;
use super::ridge::{LeftOut, Ridge, evenly};
use super::{Normalization, Task};
use crate::train::{Dataset, Targets};
use crate::{Error, Result};

mod file;

/// Classes or numbers of whole series, from [`KernelFeatures`] by ridge regression. It is fitted in closed form, within a second or a few:
/// where there are tens or hundreds of series, few methods are more accurate.
///
/// The strength of the penalty is chosen by leaving out each training series in turn. A classifier gives logits: the factor between
/// the regression and them is chosen with the same left-out series, so that [`softmax`](crate::softmax) makes calibrated
/// probabilities of them.
///
/// ```
/// use hymba::ndarray::Array2;
/// use hymba::train::{Dataset, Targets};
/// use hymba::{KernelPredictor, Task, argmax};
///
/// // slow and fast waves
/// let wave = |i: usize| Array2::from_shape_fn((40, 1), |(t, _)| (t as f32 * (0.3 + 0.4 * (i % 2) as f32) + i as f32).sin());
/// let task = Task::classify(["slow", "fast"]);
/// let data = Dataset::new(&task, (0..10).map(wave).collect(), Targets::Classes((0..10).map(|i| i % 2).collect()))?;
///
/// let predictor = KernelPredictor::fit(&data, 0)?;
/// assert_eq!(argmax(&predictor.predict(&[wave(20), wave(21)])?).to_vec(), [0, 1]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KernelPredictor {
    task: Task,
    features: KernelFeatures,
    ridge: Ridge,
}

/// Series that are fitted to, at most; of more, some are taken evenly.
const MOST_SERIES: usize = 6144;
/// Features of all series together, at most: a gigabyte.
const MOST_NUMBERS: usize = 1 << 28;
/// Series whose features are in memory together.
const CHUNK: usize = 64;

impl KernelPredictor {
    /// Fits to the series of a data set. The kernels are drawn from `seed`.
    ///
    /// The features of all series take up to a gigabyte: with more than some 4000 series (fewer if they have several channels) there are
    /// fewer features per series. Of more than 6144 series, 6144 are used.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if each frame has a target of its own, or several labels can be right; [`Error::Shape`] if the features do not
    /// fit into memory.
    pub fn fit(data: &Dataset, seed: u64) -> Result<Self> {
        Ok(Self::fit_left_out(data, seed)?.0)
    }

    /// With what some of the series, by index, would be predicted as if they had not been there: `[series, outputs]`.
    pub(crate) fn fit_left_out(data: &Dataset, seed: u64) -> Result<(Self, Vec<usize>, Array2<f32>)> {
        let task = data.task();
        let targets = match data.targets() {
            Targets::Classes(classes) => {
                Array2::from_shape_fn(
                    (classes.len(), task.outputs()),
                    |(i, class)| if classes[i] == class { 1.0 } else { -1.0 },
                )
            }
            Targets::Values(values) => values.mapv(f64::from),
            Targets::Labels(_) => {
                let reason =
                    "kernels predict one class or numbers; where several labels can be right, train a Predictor";
                return Err(Error::Data(reason.into()));
            }
            Targets::FrameClasses(_) | Targets::FrameValues(_) => {
                let reason = "kernel features are per series; for a target at each frame, train a Predictor";
                return Err(Error::Data(reason.into()));
            }
        };
        let chosen = evenly(data.num_series(), MOST_SERIES);
        let series: Vec<Array2<f32>>;
        let (fitted, targets) = match chosen.len() == data.num_series() {
            true => (data.series(), targets),
            false => {
                series = chosen.iter().map(|&i| data.series()[i].clone()).collect();
                (series.as_slice(), targets.select(Axis(0), &chosen))
            }
        };
        let features = KernelFeatures::fit_within(fitted, seed, MOST_NUMBERS / fitted.len())?;
        let (mut ridge, LeftOut { rows, mut predicted }) =
            Ridge::fit(features.transform(fitted)?, &targets, features.views());
        if task.is_classification() {
            let factor = sharpness(&predicted, &targets.select(Axis(0), &rows));
            predicted *= factor;
            ridge.weight *= factor as f32;
            ridge.bias *= factor as f32;
        }
        let rows = rows.into_iter().map(|row| chosen[row]).collect();
        Ok((KernelPredictor { task: task.clone(), features, ridge }, rows, predicted.mapv(|y| y as f32)))
    }

    /// Predicts from series `[length, channels]` each: `[series, outputs]`; logits in a classification.
    ///
    /// # Errors
    ///
    /// As [`KernelFeatures::transform`].
    pub fn predict(&self, series: &[Array2<f32>]) -> Result<Array2<f32>> {
        let mut predicted = Array2::zeros((series.len(), self.task.outputs()));
        for (series, mut predicted) in series.chunks(CHUNK).zip(predicted.axis_chunks_iter_mut(Axis(0), CHUNK)) {
            predicted.assign(&self.ridge.predict(self.features.transform(series)?.view()));
        }
        Ok(predicted)
    }

    /// The task.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The features it predicts from.
    pub fn features(&self) -> &KernelFeatures {
        &self.features
    }
}

/// The factor that makes logits of a regression to ±1: of these, the one with the least cross-entropy.
fn sharpness(predicted: &Array2<f64>, targets: &Array2<f64>) -> f64 {
    const FACTORS: [f64; 9] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
    let loss = |factor: f64| -> f64 {
        let rows = predicted.outer_iter().zip(targets.outer_iter());
        rows.map(|(predicted, targets)| {
            let most = predicted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let right: f64 = predicted.iter().zip(targets).filter(|(_, target)| **target > 0.0).map(|(y, _)| *y).sum();
            predicted.iter().map(|y| (factor * (y - most)).exp()).sum::<f64>().ln() - factor * (right - most)
        })
        .sum()
    };
    FACTORS
        .into_iter()
        .map(|factor| (loss(factor), factor))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(1.0, |best| best.1)
}
