//! Losses. Each gives its value and its gradient together, computed in f64: the arrays are small beside the model.
//!
//! All are means over the frames that count, and say how much counted: means over parts of a batch can be put together again
//! only with their weights. Non-finite predictions are no error here: they give a non-finite loss, which
//! a training loop checks anyway.

use ndarray::{Array, Array3, ArrayRef2, ArrayRef3, ArrayView1, ArrayView2, ArrayView3, Axis, Dimension, Ix2, Ix3, s};
use serde::{Deserialize, Serialize};

mod binary;

pub use binary::BinaryCrossEntropy;

use super::Targets;
use crate::encoder::{check_fits, check_lengths};
use crate::{Error, Result};

/// The value of a loss, and what [`backward`](crate::Hymba::backward) starts from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss<D: Dimension> {
    /// The mean over all frames that count.
    pub value: f32,
    /// The gradient of the value with respect to the predictions, in their shape. Exactly zero for frames that do not count.
    pub gradient: Array<f32, D>,
    /// The divisor of the mean: the number of these frames, or with class weights the sum of the weights of their labels. The mean
    /// over several batches is Σ value·weight / Σ weight.
    pub weight: f64,
}

impl<D: Dimension> Loss<D> {
    /// The gradient of the sum in place of the mean, gradient·weight: what adds up over the batches of one step. See
    /// [`AdamW::step_accumulated`](crate::train::AdamW::step_accumulated).
    pub fn sum_gradient(&self) -> Array<f32, D> {
        self.gradient.mapv(|gradient| (f64::from(gradient) * self.weight) as f32)
    }
}

/// Sums over the frames that count, before they become a mean.
pub(super) struct Sums {
    pub loss: f64,
    /// As [`Loss::weight`].
    pub weight: f64,
    /// Σ −ln p of the right classes, in a classification: without label smoothing and class weights.
    pub plain: f64,
    /// The gradient of `loss` / `divisor`.
    pub gradient: Array3<f32>,
}

impl Sums {
    fn mean(self) -> Loss<Ix3> {
        let Sums { loss, weight, gradient, .. } = self;
        Loss { value: (loss * reciprocal(weight)) as f32, gradient, weight }
    }
}

/// 1/x; 0 where nothing has any weight, so that a loss is 0 then.
fn reciprocal(x: f64) -> f64 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

/// The loss of predicted numbers: the mean of a function of the error e = prediction − target over all numbers of all frames that
/// count.
///
/// ```
/// use hymba::ndarray::array;
/// use hymba::train::RegressionLoss;
///
/// let (predictions, targets) = (array![[1.0, 2.0]], array![[0.0, 2.0]]);
/// let loss = RegressionLoss::MeanSquaredError.evaluate(&predictions, &targets)?;
/// assert_eq!((loss.value, loss.weight, loss.gradient), (0.5, 1.0, array![[1.0, 0.0]]));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RegressionLoss {
    /// e², as PyTorch's `MSELoss`.
    MeanSquaredError,
    /// e²/2 up to |e| = delta, and from there on straight, delta·(|e| − delta/2): single wild targets pull less. As
    /// PyTorch's `HuberLoss`.
    Huber {
        /// Where the straight part begins, in the unit of the targets; above 0.
        delta: f32,
    },
}

impl RegressionLoss {
    /// Predictions and targets `[b, c]` → the loss, with a gradient `[b, c]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if b or c is 0, the shapes differ, or the gradient does not fit into memory; [`Error::Targets`] if a
    /// target is not finite (in sequences, if it is infinite); [`Error::Option`] if `delta` is not finite and above 0.
    pub fn evaluate(&self, predictions: &ArrayRef2<f32>, targets: &ArrayRef2<f32>) -> Result<Loss<Ix2>> {
        self.validate()?;
        check_usable("predictions", predictions.shape())?;
        check_shape("targets", targets.shape(), predictions.shape())?;
        if let Some(((row, i), target)) = targets.indexed_iter().find(|(_, target)| !target.is_finite()) {
            return Err(bad_target(&[row, i], *target));
        }
        let lengths = vec![1; predictions.nrows()];
        let (predictions, targets) = (predictions.view().insert_axis(Axis(1)), targets.view().insert_axis(Axis(1)));
        Ok(single_frames(self.sums(predictions, targets, &lengths, None).mean()))
    }

    /// Predictions and targets `[b, l, c]`, of which the first `lengths[i]` frames of row i count, or all without lengths →
    /// the loss, with a gradient `[b, l, c]`. Every frame has the same weight, whatever the length of its sequence. Other
    /// frames are ignored, and so are numbers whose target is NaN: the mean is over those that are left, and the weight their number
    /// divided by c.
    ///
    /// ```
    /// use hymba::ndarray::array;
    /// use hymba::train::RegressionLoss;
    ///
    /// let predictions = array![[[1.0], [2.0]], [[4.0], [f32::NAN]]];
    /// let targets = array![[[1.0], [5.0]], [[4.0], [f32::NAN]]];
    /// let huber = RegressionLoss::Huber { delta: 1.0 };
    /// let loss = huber.evaluate_sequences(&predictions, &targets, Some(&[2, 1]))?;
    /// assert!((loss.value - 2.5 / 3.0).abs() < 1e-6);
    /// assert_eq!(loss.gradient, array![[[0.0], [-1.0 / 3.0]], [[0.0], [0.0]]]);
    ///
    /// // nobody knows what the last frame of the second should be
    /// let gap = huber.evaluate_sequences(&predictions, &targets, Some(&[2, 2]))?;
    /// assert_eq!((gap.value, gap.weight), (loss.value, 3.0));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`evaluate`](Self::evaluate), and [`Error::Lengths`] unless there are b lengths, each from 1 to l.
    pub fn evaluate_sequences(
        &self,
        predictions: &ArrayRef3<f32>,
        targets: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
    ) -> Result<Loss<Ix3>> {
        self.evaluate_sums(predictions, targets, lengths, None).map(Sums::mean)
    }

    /// As [`evaluate_sequences`](Self::evaluate_sequences), with a gradient of the sum divided by `divisor` in place of its own
    /// weight.
    pub(super) fn evaluate_sums(
        &self,
        predictions: &ArrayRef3<f32>,
        targets: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        divisor: Option<f64>,
    ) -> Result<Sums> {
        self.validate()?;
        check_usable("predictions", predictions.shape())?;
        check_shape("targets", targets.shape(), predictions.shape())?;
        let lengths = counting(lengths, predictions.shape())?;
        let bad = |&((row, frame, _), target): &(_, &f32)| frame < lengths[row] && target.is_infinite();
        if let Some(((row, frame, i), target)) = targets.indexed_iter().find(bad) {
            return Err(bad_target(&[row, frame, i], *target));
        }
        Ok(self.sums(predictions.view(), targets.view(), &lengths, divisor))
    }

    fn validate(&self) -> Result<()> {
        match *self {
            RegressionLoss::Huber { delta } if !(delta > 0.0 && delta.is_finite()) => Err(Error::Option {
                option: "delta",
                given: delta.to_string(),
                allowed: "it must be a finite number above 0; 1 is usual for targets of variance 1".into(),
            }),
            _ => Ok(()),
        }
    }

    fn sums(
        &self,
        predictions: ArrayView3<f32>,
        targets: ArrayView3<f32>,
        lengths: &[usize],
        divisor: Option<f64>,
    ) -> Sums {
        let mut gradient = Array3::zeros(predictions.dim());
        let numbers = |(row, &length): (usize, &usize)| {
            targets.slice(s![row, ..length, ..]).iter().filter(|target| !target.is_nan()).count()
        };
        let outputs = predictions.dim().2 as f64;
        let weight = lengths.iter().enumerate().map(numbers).sum::<usize>() as f64 / outputs;
        let count = divisor.unwrap_or(weight) * outputs;
        let mut sum = 0.0;
        for (row, &length) in lengths.iter().enumerate() {
            let frames = s![row, ..length, ..];
            let mut gradient = gradient.slice_mut(frames);
            let numbers = predictions.slice_move(frames).into_iter().zip(targets.slice_move(frames));
            for (gradient, (&prediction, &target)) in gradient.iter_mut().zip(numbers).filter(|of| !of.1.1.is_nan()) {
                let (value, slope) = self.value_and_slope(f64::from(prediction) - f64::from(target));
                sum += value;
                *gradient = (slope / count) as f32;
            }
        }
        Sums { loss: sum / outputs, weight, plain: 0.0, gradient }
    }

    fn value_and_slope(&self, e: f64) -> (f64, f64) {
        match *self {
            RegressionLoss::MeanSquaredError => (e * e, 2.0 * e),
            RegressionLoss::Huber { delta } if e.abs() <= f64::from(delta) => (0.5 * e * e, e),
            RegressionLoss::Huber { delta } => {
                let delta = f64::from(delta);
                (delta * (e.abs() - 0.5 * delta), delta * e.signum())
            }
        }
    }
}

/// Cross-entropy of the logits z: the mean of −ln softmax(z)\[label\] over all frames that count.
///
/// With class weights w and label smoothing ε it is PyTorch's `CrossEntropyLoss` with the reduction "mean". For a frame of
/// label y, of c classes,
///
/// ```text
/// t_i   = w_i·(1 − ε)·[i = y] + w_i·ε/c         what is wanted of class i
/// loss  = −Σ_i t_i · ln softmax(z)_i            summed over the frames and divided by the sum of their w_y
/// ```
///
/// ```
/// use hymba::ndarray::array;
/// use hymba::train::CrossEntropy;
///
/// let loss = CrossEntropy::new().evaluate(&array![[0.0, 0.0], [0.0, 0.0]], &[0, 1])?;
/// assert_eq!(loss.value, 2f32.ln());
/// assert_eq!(loss.gradient, array![[-0.25, 0.25], [0.25, -0.25]]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CrossEntropy {
    label_smoothing: f32,
    class_weights: Option<Vec<f32>>,
}

impl CrossEntropy {
    /// Without label smoothing, all classes of the same weight.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets ε, from 0 to 1: the share of each target that is spread evenly over all classes, typically 0.1.
    pub fn label_smoothing(mut self, label_smoothing: f32) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    /// Sets one weight for each class, 0 or more: rare classes are often given larger ones. A batch that has only labels of
    /// weight 0 has a loss of 0.
    ///
    /// The mean is over the weights of this batch, as in PyTorch. So in a batch of one frame, or of frames of one class, weights
    /// change nothing. For weights that matter whatever is in a batch, take [`Loss::sum_gradient`], and give
    /// [`AdamW::step_accumulated`](crate::train::AdamW::step_accumulated) the weight that is expected of that many frames, which
    /// is what [`Trainer`](crate::train::Trainer) does.
    ///
    /// ```
    /// use hymba::ndarray::array;
    /// use hymba::train::CrossEntropy;
    ///
    /// let loss = CrossEntropy::new().class_weights([3.0, 1.0]).evaluate(&array![[0.0, 0.0], [0.0, 0.0]], &[0, 1])?;
    /// assert_eq!(loss.gradient, array![[-0.375, 0.375], [0.125, -0.125]]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn class_weights(mut self, class_weights: impl Into<Vec<f32>>) -> Self {
        self.class_weights = Some(class_weights.into());
        self
    }

    /// Logits `[b, c]` and b labels, each from 0 to c − 1 → the loss, with a gradient `[b, c]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if b or c is 0, there are not b labels, or the gradient does not fit into memory; [`Error::Targets`] if a
    /// label is neither below c nor [`Targets::IGNORED`]; [`Error::Option`] if the label smoothing is not from 0 to 1, or if class
    /// weights are not c finite numbers of 0 or more, one of them above 0.
    pub fn evaluate(&self, logits: &ArrayRef2<f32>, labels: &[usize]) -> Result<Loss<Ix2>> {
        let (b, classes) = logits.dim();
        check_usable("logits", logits.shape())?;
        self.validate(classes)?;
        check_shape("labels", &[labels.len()], &[b])?;
        if let Some(row) = labels.iter().position(|&label| label >= classes && label != Targets::IGNORED) {
            return Err(bad_label(&[row], labels[row], classes));
        }
        let (logits, labels) = (logits.view().insert_axis(Axis(1)), ArrayView1::from(labels).insert_axis(Axis(1)));
        Ok(single_frames(self.sums(logits, labels, &vec![1; b], None).mean()))
    }

    /// Logits `[b, l, c]` and labels `[b, l]`, of which the first `lengths[i]` frames of row i count, or all without lengths →
    /// the loss, with a gradient `[b, l, c]`. Other frames are ignored, and so are those with the label
    /// [`Targets::IGNORED`].
    ///
    /// ```
    /// use hymba::ndarray::{Array3, array};
    /// use hymba::train::CrossEntropy;
    ///
    /// // the second sequence has one frame; its second label is a filler
    /// let labels = array![[0, 1], [1, 99]];
    /// let loss = CrossEntropy::new().evaluate_sequences(&Array3::zeros((2, 2, 2)), &labels, Some(&[2, 1]))?;
    /// assert_eq!(loss.value, 2f32.ln());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`evaluate`](Self::evaluate), and [`Error::Lengths`] unless there are b lengths, each from 1 to l.
    pub fn evaluate_sequences(
        &self,
        logits: &ArrayRef3<f32>,
        labels: &ArrayRef2<usize>,
        lengths: Option<&[usize]>,
    ) -> Result<Loss<Ix3>> {
        self.evaluate_sums(logits, labels, lengths, None).map(Sums::mean)
    }

    /// As [`RegressionLoss::evaluate_sums`].
    pub(super) fn evaluate_sums(
        &self,
        logits: &ArrayRef3<f32>,
        labels: &ArrayRef2<usize>,
        lengths: Option<&[usize]>,
        divisor: Option<f64>,
    ) -> Result<Sums> {
        let (b, l, classes) = logits.dim();
        check_usable("logits", logits.shape())?;
        self.validate(classes)?;
        check_shape("labels", labels.shape(), &[b, l])?;
        let lengths = counting(lengths, logits.shape())?;
        let bad = |&((row, frame), label): &(_, &usize)| {
            frame < lengths[row] && *label >= classes && *label != Targets::IGNORED
        };
        if let Some(((row, frame), label)) = labels.indexed_iter().find(bad) {
            return Err(bad_label(&[row, frame], *label, classes));
        }
        Ok(self.sums(logits.view(), labels.view(), &lengths, divisor))
    }

    fn validate(&self, classes: usize) -> Result<()> {
        check_options(self.label_smoothing, [("class_weights", &self.class_weights)], classes, "classes")?;
        match &self.class_weights {
            Some(weights) if weights.iter().all(|&weight| weight == 0.0) => Err(Error::Option {
                option: "class_weights",
                given: "all 0".into(),
                allowed: "at least one weight must be above 0".into(),
            }),
            _ => Ok(()),
        }
    }

    fn sums(
        &self,
        logits: ArrayView3<f32>,
        labels: ArrayView2<usize>,
        lengths: &[usize],
        divisor: Option<f64>,
    ) -> Sums {
        let classes = logits.dim().2;
        let smoothing = f64::from(self.label_smoothing);
        let weights: Vec<f64> = match &self.class_weights {
            Some(weights) => weights.iter().map(|&weight| f64::from(weight)).collect(),
            None => vec![1.0; classes],
        };
        // what is wanted of each class, whatever the label, and what is wanted of a label besides
        let of_any: Vec<f64> = weights.iter().map(|weight| weight * smoothing / classes as f64).collect();
        let of_label: Vec<f64> = weights.iter().map(|weight| weight * (1.0 - smoothing)).collect();

        let frames = || {
            let all = lengths.iter().enumerate().flat_map(|(row, &length)| (0..length).map(move |frame| [row, frame]));
            all.filter(|frame| labels[*frame] != Targets::IGNORED)
        };
        let weight: f64 = frames().map(|frame| weights[labels[frame]]).sum();
        let scale = reciprocal(divisor.unwrap_or(weight));
        let mut gradient = Array3::zeros(logits.dim());
        let (mut sum, mut plain) = (0.0, 0.0);
        for [row, frame] in frames() {
            let label = labels[[row, frame]];
            let z: Vec<f64> = logits.slice(s![row, frame, ..]).iter().map(|&z| f64::from(z)).collect();
            let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = largest + z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
            let wanted = |class| of_any[class] + if class == label { of_label[class] } else { 0.0 };
            plain += log_sum - z[label];
            let wanted_of_all: f64 = (0..classes).map(wanted).sum();
            for (class, gradient) in gradient.slice_mut(s![row, frame, ..]).iter_mut().enumerate() {
                let log_probability = z[class] - log_sum;
                // not left out where nothing is wanted: a logit of −∞ must show in the sum
                sum -= wanted(class) * log_probability;
                *gradient = (scale * (wanted_of_all * log_probability.exp() - wanted(class))) as f32;
            }
        }
        Sums { loss: sum, weight, plain, gradient }
    }
}

/// Checks label smoothing, and lists of weights for so many `outputs`.
fn check_options<const N: usize>(
    label_smoothing: f32,
    lists: [(&'static str, &Option<Vec<f32>>); N],
    count: usize,
    outputs: &str,
) -> Result<()> {
    let bad = |option, given: String, allowed: String| Err(Error::Option { option, given, allowed });
    if !(0.0..=1.0).contains(&label_smoothing) {
        return bad("label_smoothing", label_smoothing.to_string(), "it must be from 0 to 1; 0.1 is usual".into());
    }
    for (option, weights) in lists {
        let Some(weights) = weights else { continue };
        if weights.len() != count {
            return bad(option, format!("{} weights", weights.len()), format!("the logits have {count} {outputs}"));
        }
        if let Some(weight) = weights.iter().find(|&&weight| !(weight >= 0.0 && weight.is_finite())) {
            return bad(option, weight.to_string(), "each weight must be finite and 0 or more".into());
        }
    }
    Ok(())
}

/// How many frames of each row of `[b, l, c]` count.
fn counting(lengths: Option<&[usize]>, shape: &[usize]) -> Result<Vec<usize>> {
    let (b, l) = (shape[0], shape[1]);
    let Some(lengths) = lengths else { return Ok(vec![l; b]) };
    check_lengths(lengths, b, l)?;
    Ok(lengths.to_vec())
}

/// `[b, 1, c]` → `[b, c]`
fn single_frames(loss: Loss<Ix3>) -> Loss<Ix2> {
    let Loss { value, gradient, weight } = loss;
    Loss { value, gradient: gradient.index_axis_move(Axis(1), 0), weight }
}

/// Checks that there is something, and that there is room for a gradient of that shape.
fn check_usable(argument: &'static str, given: &[usize]) -> Result<()> {
    /// Of the length of a row, and of what is kept of a class.
    const ROW_BYTES: usize = 16;
    const CLASS_BYTES: usize = 48;
    if given.contains(&0) {
        let expected = "at least one row, one frame and one number in it".into();
        return Err(Error::Shape { argument, expected, given: given.to_vec() });
    }
    let count = |sizes: &[usize]| sizes.iter().fold(1, |product: usize, size| product.saturating_mul(*size));
    let (rows, classes) = (given.first().copied().unwrap_or(1), given.last().copied().unwrap_or(1));
    let lists = count(&[rows, ROW_BYTES]).saturating_add(count(&[classes, CLASS_BYTES]));
    check_fits(argument, given, count(&[count(given), size_of::<f32>()]).saturating_add(lists))
}

fn check_shape(argument: &'static str, given: &[usize], expected: &[usize]) -> Result<()> {
    if given != expected {
        let expected = format!("{expected:?}, to go with the predictions");
        return Err(Error::Shape { argument, expected, given: given.to_vec() });
    }
    Ok(())
}

fn bad_target(index: &[usize], given: f32) -> Error {
    Error::Targets(format!(
        "targets{index:?} = {given}, but every target must be finite, and that of a label from 0 to 1; leave out the row, or \
         fill the gap"
    ))
}

fn bad_label(index: &[usize], given: usize, classes: usize) -> Error {
    Error::Targets(format!(
        "labels{index:?} = {given}, but there are {classes} classes: a label is from 0 to {}",
        classes - 1
    ))
}
