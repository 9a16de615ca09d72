//! Two views of a series: kernel features, and an encoder that was trained.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};

use super::{KernelPredictor, Predictor, Task, softmax};
use crate::train::{Dataset, Targets};
use crate::{Error, Result};

mod file;

/// Classes or numbers of whole series from two views: a [`KernelPredictor`] and, where that makes it better, a [`Predictor`].
///
/// ```text
/// classes:  p = (1 − share) · softmax(kernels) + share · softmax(factor · encoder),  result: ln p
/// numbers:  y = (1 − share) · kernels + share · encoder
/// ```
///
/// Share and factor are chosen on training series only, see [`fit`](Self::fit). Few series give an encoder little to learn from, and little
/// to judge it by: below about a hundred, or where it does not make the kernels better, there is none.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use hymba::ndarray::Array2;
/// use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
/// use hymba::{Ensemble, HymbaOptions, Predictor, Task, argmax};
///
/// // slow and fast waves
/// let wave = |i: usize| Array2::from_shape_fn((40, 1), |(t, _)| (t as f32 * (0.3 + 0.4 * (i % 2) as f32) + i as f32).sin());
/// let task = Task::classify(["slow", "fast"]);
/// let data = Dataset::new(&task, (0..10).map(wave).collect(), Targets::Classes((0..10).map(|i| i % 2).collect()))?;
///
/// let ensemble = Ensemble::fit(&data, 0, |part| {
///     let predictor = Predictor::build(HymbaOptions::recommended(1).hidden_size(8).num_layers(1), task.clone())?;
///     Ok::<_, hymba::Error>(Trainer::new(predictor, TrainerOptions::default().epochs(2))?.fit(part, |_| ControlFlow::Continue(()))?.predictor)
/// })?;
/// assert_eq!(argmax(&ensemble.predict(&[wave(20), wave(21)])?).to_vec(), [0, 1]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Ensemble {
    kernels: KernelPredictor,
    /// With its share and the factor of its logits.
    encoder: Option<(Predictor, Mix)>,
}

/// How an encoder takes part.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Mix {
    share: f32,
    factor: f32,
}

const SHARES: [f32; 6] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6];
const FACTORS: [f32; 5] = [0.25, 0.5, 1.0, 1.5, 2.0];
/// The part of the series that share and factor are chosen with.
const HELD_OUT: f32 = 0.25;
/// Fewer series do not tell whether an encoder makes anything better.
const FEWEST_HELD_OUT: usize = 24;
/// How much the loss of all held out series together must fall for an encoder, which is two numbers to choose: as in Akaike's
/// criterion, one for each.
const LEAST_GAIN: f64 = 2.0;

impl Ensemble {
    /// Fits both views. `train` trains an encoder on the series it is given, and is called twice at most: first with three quarters of
    /// the series, to see on the others whether an encoder improves on the kernels (which have then seen all series but the one asked
    /// for), and if it does, with all.
    ///
    /// # Errors
    ///
    /// As [`KernelPredictor::fit`], and those of `train`; [`Error::Data`] if what it trained has another task.
    pub fn fit<E: From<Error>>(
        data: &Dataset,
        seed: u64,
        mut train: impl FnMut(&Dataset) -> Result<Predictor, E>,
    ) -> Result<Self, E> {
        let (kernels, rows, left_out) = KernelPredictor::fit_left_out(data, seed)?;
        let none = Ensemble { kernels, encoder: None };
        // one series of each class cannot be split
        let Ok((learned, held_out)) = data.split_indices(HELD_OUT, seed) else { return Ok(none) };
        // places in rows, which ascend
        let (held_out, places): (Vec<usize>, Vec<usize>) =
            held_out.into_iter().filter_map(|i| Some((i, rows.binary_search(&i).ok()?))).unzip();
        if places.len() < FEWEST_HELD_OUT {
            return Ok(none);
        }
        let held_out = data.subset(&held_out);
        let left_out = left_out.select(Axis(0), &places);
        // no loss of classes is below 0
        let least = if data.task().is_classification() { 0.0 } else { f64::NEG_INFINITY };
        if loss(left_out.view(), held_out.targets()) - LEAST_GAIN <= least {
            return Ok(none);
        }
        let predictor = checked(train(&data.subset(&learned))?, data.task())?;
        let Some(mix) = choose(&left_out, &predictor.predict_series(held_out.series())?, &held_out) else {
            return Ok(none);
        };
        let predictor = checked(train(data)?, data.task())?;
        Ok(Ensemble { encoder: Some((predictor, mix)), ..none })
    }

    /// Combines two fitted views. The encoder has this share, from 0 to 1, and the factor 1.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if the share is not in its range; [`Error::Data`] if the encoder has another task, or reads frames of
    /// another width than the kernels.
    pub fn new(kernels: KernelPredictor, encoder: Option<(Predictor, f32)>) -> Result<Self> {
        let Some((predictor, share)) = encoder else { return Ok(Ensemble { kernels, encoder: None }) };
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Option { option: "share", given: share.to_string(), allowed: "from 0 to 1".into() });
        }
        let predictor = checked(predictor, kernels.task())?;
        check_width(&predictor, &kernels)?;
        Ok(Ensemble { kernels, encoder: Some((predictor, Mix { share, factor: 1.0 })) })
    }

    /// Predicts from series `[length, channels]` each: `[series, outputs]`; in a classification logits.
    ///
    /// # Errors
    ///
    /// As [`KernelPredictor::predict`] and [`Predictor::predict`].
    pub fn predict(&self, series: &[Array2<f32>]) -> Result<Array2<f32>> {
        let kernels = self.kernels.predict(series)?;
        match &self.encoder {
            Some((predictor, mix)) => Ok(mix.apply(self.task(), &kernels, &predictor.predict_series(series)?)),
            None => Ok(kernels),
        }
    }

    /// The task.
    pub fn task(&self) -> &Task {
        self.kernels.task()
    }

    /// The view of kernel features.
    pub fn kernels(&self) -> &KernelPredictor {
        &self.kernels
    }

    /// The trained encoder with its head, if there is one.
    pub fn encoder(&self) -> Option<&Predictor> {
        self.encoder.as_ref().map(|(predictor, _)| predictor)
    }

    /// The share of the encoder, from 0 to 1; 0 without one.
    pub fn share(&self) -> f32 {
        self.encoder.as_ref().map_or(0.0, |(_, mix)| mix.share)
    }
}

impl Mix {
    fn apply(self, task: &Task, kernels: &Array2<f32>, encoder: &Array2<f32>) -> Array2<f32> {
        if !task.is_classification() {
            return kernels * (1.0 - self.share) + encoder * self.share;
        }
        let mixed = softmax(kernels) * (1.0 - self.share) + softmax(&(encoder * self.factor)) * self.share;
        mixed.mapv(|p| p.max(f32::MIN_POSITIVE).ln())
    }
}

/// The share and factor of least loss, if they are better than the kernels alone.
fn choose(kernels: &Array2<f32>, encoder: &Array2<f32>, held_out: &Dataset) -> Option<Mix> {
    let task = held_out.task();
    let of = |y: &Array2<f32>| loss(y.view(), held_out.targets());
    let factors = if task.is_classification() { &FACTORS[..] } else { &[1.0] };
    let mixes = SHARES.into_iter().flat_map(|share| factors.iter().map(move |&factor| Mix { share, factor }));
    let losses = mixes.map(|mix| (of(&mix.apply(task, kernels, encoder)), mix));
    let (least, mix) = losses.min_by(|a, b| a.0.total_cmp(&b.0))?;
    (least + LEAST_GAIN < of(kernels)).then_some(mix)
}

/// Minus the logarithm of the likelihood of all targets; of numbers, that of normal ones whose variance is the mean square of the errors.
fn loss(predicted: ArrayView2<f32>, targets: &Targets) -> f64 {
    match targets {
        Targets::Classes(classes) => {
            let of = |(logits, &class): (ArrayView1<f32>, &usize)| {
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
                sum.ln() - f64::from(logits[class] - most)
            };
            predicted.outer_iter().zip(classes).map(of).sum()
        }
        Targets::Values(values) => {
            let squares = (&predicted - values).mapv(|error| f64::from(error).powi(2));
            let n = values.nrows() as f64;
            squares
                .mean_axis(Axis(0))
                .map_or(0.0, |means| means.iter().map(|mean| 0.5 * n * mean.max(1e-30).ln()).sum())
        }
        Targets::FrameClasses(_) | Targets::FrameValues(_) | Targets::Labels(_) => 0.0,
    }
}

/// That both read frames of one width.
fn check_width(predictor: &Predictor, kernels: &KernelPredictor) -> Result<()> {
    match (predictor.options().embed_dim, kernels.features().channels()) {
        (a, b) if a == b => Ok(()),
        (a, b) => Err(Error::Data(format!("the encoder reads frames of width {a}, the kernels of width {b}"))),
    }
}

fn checked(predictor: Predictor, task: &Task) -> Result<Predictor> {
    match predictor.task() == task {
        true => Ok(predictor),
        false => Err(Error::Data("the encoder was trained for another task than the kernels".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the classes i % 2 of 40 series: right by `by`, and wrong by as much in every `wrong`th.
    fn logits(by: f32, wrong: usize) -> Array2<f32> {
        let right = |i: usize| if i % wrong == wrong - 1 { -by } else { by };
        Array2::from_shape_fn((40, 2), |(i, class)| if i % 2 == class { right(i) } else { 0.0 })
    }

    #[test]
    fn an_encoder_takes_part_where_it_makes_the_kernels_better() {
        let targets = Targets::Classes((0..40).map(|i| i % 2).collect());
        let data = Dataset::new(&Task::classify(["a", "b"]), vec![Array2::zeros((1, 1)); 40], targets).unwrap();
        let good = logits(4.0, 40);
        assert_eq!(choose(&good, &logits(4.0, 3), &data), None, "worse than the kernels");
        assert_eq!(choose(&good, &good, &data), None, "nothing new");
        let mix = choose(&logits(1.0, 3), &good, &data).unwrap();
        assert!(mix.share >= 0.5, "{mix:?}");
        // logits that are right more often, but by far too much
        assert!(choose(&logits(1.0, 3), &logits(40.0, 8), &data).is_some(), "right more often, but far too sure");

        let values = Targets::Values(Array2::from_shape_fn((40, 1), |(i, _)| i as f32));
        let data = Dataset::new(&Task::Regress { outputs: 1 }, vec![Array2::zeros((1, 1)); 40], values).unwrap();
        let near = |by: f32| Array2::from_shape_fn((40, 1), |(i, _)| i as f32 + by * (i as f32 * 2.3).sin());
        assert_eq!(choose(&near(1.0), &near(5.0), &data), None);
        assert_eq!(choose(&near(5.0), &near(-5.0), &data).map(|mix| mix.share), Some(0.5));
    }
}
