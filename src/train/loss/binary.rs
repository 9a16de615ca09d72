//! The loss of labels of which any number may be right.

use ndarray::{Array3, ArrayRef2, ArrayRef3, Axis, Ix2, Ix3, s};

use super::{Loss, Sums, bad_target, check_options, check_shape, check_usable, counting, single_frames};
use crate::Result;

/// Binary cross-entropy of the logits z, for labels that do not exclude each other: the mean, over all labels of all frames that count, of
///
/// ```text
/// loss = −w · (p · t · ln sigmoid(z) + (1 − t) · ln(1 − sigmoid(z)))       t from 0 to 1
/// ```
///
/// with the weight w of the label, and the weight p of its being right: as PyTorch's `BCEWithLogitsLoss` with `weight` and `pos_weight`.
///
/// ```
/// use hymba::ndarray::array;
/// use hymba::train::BinaryCrossEntropy;
///
/// let loss = BinaryCrossEntropy::new().evaluate(&array![[0.0, 0.0]], &array![[1.0, 0.0]])?;
/// assert_eq!((loss.value, loss.gradient), (2f32.ln(), array![[-0.25, 0.25]]));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BinaryCrossEntropy {
    label_smoothing: f32,
    weights: Option<Vec<f32>>,
    positive_weights: Option<Vec<f32>>,
}

impl BinaryCrossEntropy {
    /// All labels of weight 1.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets ε, from 0 to 1: targets become (1 − ε)·t + ε/2.
    pub fn label_smoothing(mut self, label_smoothing: f32) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    /// Sets a weight for each label, 0 or more. The mean is still over the number of labels.
    pub fn weights(mut self, weights: impl Into<Vec<f32>>) -> Self {
        self.weights = Some(weights.into());
        self
    }

    /// Sets a weight for each label where it is right, 0 or more: above 1 for labels that are rare.
    pub fn positive_weights(mut self, weights: impl Into<Vec<f32>>) -> Self {
        self.positive_weights = Some(weights.into());
        self
    }

    /// Logits and targets `[b, c]` → the loss, with a gradient `[b, c]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`](crate::Error::Shape) if b or c is 0, the shapes differ, or the gradient does not fit into memory;
    /// [`Error::Targets`](crate::Error::Targets) if a target is not from 0 to 1; [`Error::Option`](crate::Error::Option) if the label smoothing
    /// is not from 0 to 1, or there are not c weights that are finite and 0 or more.
    pub fn evaluate(&self, logits: &ArrayRef2<f32>, targets: &ArrayRef2<f32>) -> Result<Loss<Ix2>> {
        let (logits, targets) = (logits.view().insert_axis(Axis(1)), targets.view().insert_axis(Axis(1)));
        Ok(single_frames(self.evaluate_sequences(&logits, &targets, None)?))
    }

    /// Logits and targets `[b, l, c]`, of which the first `lengths[i]` frames of row i count, or all without lengths → the loss, with a
    /// gradient `[b, l, c]`.
    ///
    /// # Errors
    ///
    /// Those of [`evaluate`](Self::evaluate), and [`Error::Lengths`](crate::Error::Lengths) unless there are b lengths, each from 1
    /// to l.
    pub fn evaluate_sequences(
        &self,
        logits: &ArrayRef3<f32>,
        targets: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
    ) -> Result<Loss<Ix3>> {
        self.evaluate_sums(logits, targets, lengths, None).map(Sums::mean)
    }

    /// As [`RegressionLoss::evaluate_sums`](super::RegressionLoss::evaluate_sums).
    pub(in crate::train) fn evaluate_sums(
        &self,
        logits: &ArrayRef3<f32>,
        targets: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        divisor: Option<f64>,
    ) -> Result<Sums> {
        check_usable("logits", logits.shape())?;
        let labels = logits.dim().2;
        let lists = [("weights", &self.weights), ("positive_weights", &self.positive_weights)];
        check_options(self.label_smoothing, lists, labels, "labels")?;
        check_shape("targets", targets.shape(), logits.shape())?;
        let lengths = counting(lengths, logits.shape())?;
        let bad = |&((row, frame, _), target): &(_, &f32)| frame < lengths[row] && !(0.0..=1.0).contains(target);
        if let Some(((row, frame, i), target)) = targets.indexed_iter().find(bad) {
            return Err(bad_target(&[row, frame, i], *target));
        }
        let of = |weights: &Option<Vec<f32>>, label: usize| weights.as_ref().map_or(1.0, |all| f64::from(all[label]));
        let weight = lengths.iter().sum::<usize>() as f64;
        let count = divisor.unwrap_or(weight) * labels as f64;
        let smoothing = f64::from(self.label_smoothing);
        let mut gradient = Array3::zeros(logits.dim());
        let (mut loss, mut plain) = (0.0, 0.0);
        for (row, &length) in lengths.iter().enumerate() {
            let frames = s![row, ..length, ..];
            let mut gradient = gradient.slice_mut(frames);
            let numbers = logits.slice(frames).into_iter().zip(targets.slice(frames));
            for (i, (gradient, (&z, &t))) in gradient.iter_mut().zip(numbers).enumerate() {
                let (z, t) = (f64::from(z), f64::from(t));
                let (w, p) = (of(&self.weights, i % labels), of(&self.positive_weights, i % labels));
                // −ln sigmoid(z) and −ln(1 − sigmoid(z)), of z of any size
                let rest = (-z.abs()).exp().ln_1p();
                let (yes, no) = (rest + (-z).max(0.0), rest + z.max(0.0));
                plain += t * yes + (1.0 - t) * no;
                let t = (1.0 - smoothing) * t + 0.5 * smoothing;
                loss += w * (p * t * yes + (1.0 - t) * no);
                let sigmoid = (-yes).exp();
                *gradient = (w * ((1.0 - t) * sigmoid - p * t * (1.0 - sigmoid)) / count) as f32;
            }
        }
        let labels = labels as f64;
        Ok(Sums { loss: loss / labels, weight, plain: plain / labels, gradient })
    }
}
