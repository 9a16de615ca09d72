//! How far predicted numbers are from the true ones.

use ndarray::{ArrayRef2, Axis};

use crate::{Error, Result};

/// How well numbers are predicted, in the units of the targets.
///
/// ```
/// use hymba::ndarray::array;
/// use hymba::train::RegressionMetrics;
///
/// let metrics = RegressionMetrics::of(&array![[1.0], [2.0], [6.0]], &array![[1.0], [3.0], [5.0]])?;
/// assert!((metrics.rmse - (2.0f64 / 3.0).sqrt()).abs() < 1e-12);
/// assert!((metrics.mae - 2.0 / 3.0).abs() < 1e-12);
/// assert!((metrics.r2 - 0.75).abs() < 1e-12); // 1 − (1 + 1) / (2² + 0 + 2²)
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RegressionMetrics {
    /// The root of the mean square of all errors.
    pub rmse: f64,
    /// The mean of the absolute errors.
    pub mae: f64,
    /// 1 − Σ error² / Σ (target − mean target)²: 1 for no error at all, 0 for what the mean of these targets would do. Of several outputs,
    /// the mean of theirs; of an output whose targets are all the same 1 if there is no error, and else 0.
    pub r2: f64,
}

impl RegressionMetrics {
    /// Of predictions and targets `[series, outputs]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are none, or the shapes differ.
    pub fn of(predictions: &ArrayRef2<f32>, targets: &ArrayRef2<f32>) -> Result<Self> {
        if targets.is_empty() || predictions.shape() != targets.shape() {
            let expected = format!("that of the targets, {:?}, and one target at least", targets.shape());
            return Err(Error::Shape { argument: "predictions", expected, given: predictions.shape().to_vec() });
        }
        let count = targets.len() as f64;
        let (mut squares, mut absolute, mut r2) = (0.0, 0.0, 0.0);
        for (predicted, wanted) in predictions.axis_iter(Axis(1)).zip(targets.axis_iter(Axis(1))) {
            let mean = wanted.iter().map(|&y| f64::from(y)).sum::<f64>() / wanted.len() as f64;
            let (mut errors, mut spread) = (0.0, 0.0);
            for (&predicted, &wanted) in predicted.iter().zip(wanted) {
                let error = f64::from(predicted) - f64::from(wanted);
                errors += error * error;
                absolute += error.abs();
                spread += (f64::from(wanted) - mean).powi(2);
            }
            squares += errors;
            r2 += match spread > 0.0 {
                true => 1.0 - errors / spread,
                false if errors.is_nan() => f64::NAN,
                false => f64::from(errors == 0.0),
            };
        }
        Ok(RegressionMetrics { rmse: (squares / count).sqrt(), mae: absolute / count, r2: r2 / targets.ncols() as f64 })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn targets_that_are_all_the_same() {
        let r2 = |predicted: f32| RegressionMetrics::of(&array![[2.0], [predicted]], &array![[2.0], [2.0]]).unwrap().r2;
        assert_eq!((r2(2.0), r2(3.0)), (1.0, 0.0));
        assert!(r2(f32::NAN).is_nan());
    }
}
