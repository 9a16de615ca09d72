//! How far predicted numbers are from the true ones.

use ndarray::{ArrayRef2, Axis};

use crate::{Error, Result};

/// How well numbers are predicted, in the units of the targets. NaN stands for a missing target, which does not count.
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
    /// the mean of theirs (of those that have a target); of an output whose targets are all the same 1 if there is no error, and else 0.
    pub r2: f64,
}

impl RegressionMetrics {
    /// Compares predictions with targets, both `[series, outputs]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are none, or the shapes differ; [`Error::Targets`] if all are NaN.
    pub fn of(predictions: &ArrayRef2<f32>, targets: &ArrayRef2<f32>) -> Result<Self> {
        if targets.is_empty() || predictions.shape() != targets.shape() {
            let expected = format!("the shape of the targets, {:?}, with at least one target", targets.shape());
            return Err(Error::Shape { argument: "predictions", expected, given: predictions.shape().to_vec() });
        }
        let (mut count, mut outputs) = (0.0, 0.0);
        let (mut squares, mut absolute, mut r2) = (0.0, 0.0, 0.0);
        for (predicted, wanted) in predictions.axis_iter(Axis(1)).zip(targets.axis_iter(Axis(1))) {
            let pairs =
                || predicted.iter().zip(wanted).filter(|(_, y)| !y.is_nan()).map(|(x, y)| [*x, *y].map(f64::from));
            let own = pairs().count() as f64;
            if own == 0.0 {
                continue;
            }
            let mean = pairs().map(|[_, wanted]| wanted).sum::<f64>() / own;
            let (mut errors, mut spread) = (0.0, 0.0);
            for [predicted, wanted] in pairs() {
                let error = predicted - wanted;
                errors += error * error;
                absolute += error.abs();
                spread += (wanted - mean).powi(2);
            }
            (count, outputs) = (count + own, outputs + 1.0);
            squares += errors;
            r2 += match spread > 0.0 {
                true => 1.0 - errors / spread,
                false if errors.is_nan() => f64::NAN,
                false => f64::from(errors == 0.0),
            };
        }
        if count == 0.0 {
            return Err(Error::Targets("all targets are NaN: there is nothing to measure on".into()));
        }
        Ok(RegressionMetrics { rmse: (squares / count).sqrt(), mae: absolute / count, r2: r2 / outputs })
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

    #[test]
    fn targets_that_are_not_there() {
        const NONE: f32 = f32::NAN;
        let predictions = array![[1.0, 5.0, 7.0], [2.0, 1.0, 7.0], [6.0, 0.0, 7.0], [9.0, 3.0, 7.0]];
        let targets = array![[1.0, NONE, NONE], [3.0, 2.0, NONE], [5.0, NONE, NONE], [NONE, 3.0, NONE]];
        let found = RegressionMetrics::of(&predictions, &targets).unwrap();
        let [first, second] = [
            RegressionMetrics::of(&array![[1.0], [2.0], [6.0]], &array![[1.0], [3.0], [5.0]]).unwrap(),
            RegressionMetrics::of(&array![[1.0], [3.0]], &array![[2.0], [3.0]]).unwrap(),
        ];
        assert_eq!(found.r2, (first.r2 + second.r2) / 2.0);
        assert!((found.mae - 3.0 / 5.0).abs() < 1e-12 && (found.rmse - 0.6f64.sqrt()).abs() < 1e-12, "{found:?}");
        assert!(matches!(RegressionMetrics::of(&array![[1.0]], &array![[NONE]]), Err(Error::Targets(_))));
    }
}
