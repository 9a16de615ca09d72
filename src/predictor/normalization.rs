//! Bringing features of any unit to mean 0 and variance 1.

use std::convert::Infallible;

use ndarray::{Array1, ArrayBase, ArrayView2, ArrayViewD, ArrayViewMutD, DataMut, Dimension};

use crate::files::tensors::Tensors;
use crate::{Error, Result};

/// A mean and a scale for each feature: x becomes (x − mean) / scale.
///
/// ```
/// use hymba::Normalization;
/// use hymba::ndarray::array;
///
/// // from °C and hPa
/// let weather = Normalization::new(array![15.0, 1013.0], array![10.0, 8.0])?;
/// assert_eq!(weather.scale()[1], 8.0);
/// assert!(Normalization::new(array![15.0], array![0.0]).is_err());
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Normalization {
    mean: Array1<f32>,
    scale: Array1<f32>,
}

impl Normalization {
    /// With a mean and a scale for each feature.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not as many of both; [`Error::Option`] if a number is not finite, or a scale is subnormal or not
    /// above 0.
    pub fn new(mean: Array1<f32>, scale: Array1<f32>) -> Result<Self> {
        if mean.len() != scale.len() {
            let expected = format!("[{}], as the mean has", mean.len());
            return Err(Error::Shape { argument: "scale", expected, given: scale.shape().to_vec() });
        }
        let bad = |option, i: usize, number: f32, allowed: &str| {
            Err(Error::Option { option, given: format!("{number} (feature {i})"), allowed: allowed.into() })
        };
        if let Some((i, &number)) = mean.iter().enumerate().find(|(_, mean)| !mean.is_finite()) {
            return bad("mean", i, number, "it must be finite");
        }
        if let Some((i, &number)) = scale.iter().enumerate().find(|(_, scale)| !(scale.is_normal() && **scale > 0.0)) {
            return bad("scale", i, number, "it must be a finite number above 0; 1 for a constant feature");
        }
        Ok(Normalization { mean, scale })
    }

    /// To be read from a file.
    pub(super) fn zeros(width: usize) -> Self {
        Normalization { mean: Array1::zeros(width), scale: Array1::zeros(width) }
    }

    /// Checks numbers that were read from a file and that are divided by: those of the `name` of a model.
    pub(super) fn check(&self, tensors: &Tensors, name: &str) -> Result<()> {
        let checked = Self::new(self.mean.clone(), self.scale.clone());
        checked.map(drop).map_err(|error| tensors.error(format!("its {name} normalization is not usable: {error}")))
    }

    /// Fitted to frames `[.., width]`: mean and standard deviation of each feature, a scale of 1 where it does not vary.
    /// Numbers that are not finite are passed over.
    pub(crate) fn fit<'a>(width: usize, frames: impl Iterator<Item = ArrayView2<'a, f32>> + Clone) -> Self {
        let Ok(fitted) = Self::fit_over(width, frames, None::<fn(&mut [f64]) -> Result<(), Infallible>>);
        fitted
    }

    /// As [`fit`](Self::fit), to frames of which others have some, too: `sum` adds up the numbers of all who have.
    pub(crate) fn fit_over<'a, E>(
        width: usize,
        frames: impl Iterator<Item = ArrayView2<'a, f32>> + Clone,
        mut sum: Option<impl FnMut(&mut [f64]) -> Result<(), E>>,
    ) -> Result<Self, E> {
        /// A feature that varies less, relative to its size, holds nothing but rounding.
        const CONSTANT: f64 = 1e-7;
        let mut count = vec![0f64; width];
        let mut mean = vec![0f64; width];
        let mut variance = vec![0f64; width];
        let each = |f: &mut dyn FnMut(usize, f64)| {
            for frames in frames.clone() {
                for row in frames.rows() {
                    row.iter().enumerate().filter(|(_, x)| x.is_finite()).for_each(|(i, &x)| f(i, f64::from(x)));
                }
            }
        };
        each(&mut |i, x| {
            count[i] += 1.0;
            mean[i] += (x - mean[i]) / count[i];
        });
        if let Some(sum) = &mut sum {
            mean.iter_mut().zip(&count).for_each(|(mean, count)| *mean *= count);
            sum(&mut count)?;
            sum(&mut mean)?;
            mean.iter_mut().zip(&count).filter(|(_, count)| **count > 0.0).for_each(|(mean, count)| *mean /= count);
        }
        each(&mut |i, x| variance[i] += (x - mean[i]).powi(2) / count[i]);
        if let Some(sum) = &mut sum {
            sum(&mut variance)?;
        }
        let scale = mean.iter().zip(&variance).map(|(mean, variance)| {
            let deviation = variance.sqrt();
            let scale = deviation as f32;
            if scale.is_normal() && deviation > CONSTANT * mean.abs() { scale } else { 1.0 }
        });
        Ok(Normalization { scale: scale.collect(), mean: mean.iter().map(|&mean| mean as f32).collect() })
    }

    /// The mean of each feature.
    pub fn mean(&self) -> &Array1<f32> {
        &self.mean
    }

    /// The scale of each feature.
    pub fn scale(&self) -> &Array1<f32> {
        &self.scale
    }

    /// Both, under their names in files.
    pub(super) fn tensors(&self, of: &str) -> [(String, ArrayViewD<'_, f32>); 2] {
        let (mean, scale) = (self.mean.view().into_dyn(), self.scale.view().into_dyn());
        [(format!("{of}_mean"), mean), (format!("{of}_scale"), scale)]
    }

    /// As [`tensors`](Self::tensors), for reading them.
    pub(super) fn tensors_mut(&mut self, of: &str) -> [(String, ArrayViewMutD<'_, f32>); 2] {
        let (mean, scale) = (self.mean.view_mut().into_dyn(), self.scale.view_mut().into_dyn());
        [(format!("{of}_mean"), mean), (format!("{of}_scale"), scale)]
    }

    /// x `[.., width]` → (x − mean) / scale
    pub(crate) fn apply<S: DataMut<Elem = f32>, D: Dimension>(&self, x: &mut ArrayBase<S, D>) {
        self.each(x, |x, mean, scale| (x - mean) / scale);
    }

    /// x `[.., width]` → x · scale + mean
    pub(crate) fn undo<S: DataMut<Elem = f32>, D: Dimension>(&self, x: &mut ArrayBase<S, D>) {
        self.each(x, |x, mean, scale| x * scale + mean);
    }

    /// The gradient of [`apply`](Self::apply).
    pub(crate) fn apply_backward<S: DataMut<Elem = f32>, D: Dimension>(&self, dx: &mut ArrayBase<S, D>) {
        self.each(dx, |dx, _, scale| dx / scale);
    }

    /// The gradient of [`undo`](Self::undo).
    pub(crate) fn undo_backward<S: DataMut<Elem = f32>, D: Dimension>(&self, dx: &mut ArrayBase<S, D>) {
        self.each(dx, |dx, _, scale| dx * scale);
    }

    /// In f64: the difference of two numbers may be past what f32 holds.
    fn each<S: DataMut<Elem = f32>, D: Dimension>(&self, x: &mut ArrayBase<S, D>, f: impl Fn(f64, f64, f64) -> f64) {
        for mut row in x.rows_mut() {
            for ((x, &mean), &scale) in row.iter_mut().zip(&self.mean).zip(&self.scale) {
                *x = f(f64::from(*x), f64::from(mean), f64::from(scale)) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;

    fn fit(frames: &Array2<f32>) -> Normalization {
        Normalization::fit(frames.ncols(), [frames.view()].into_iter())
    }

    #[test]
    fn any_unit_becomes_mean_0_and_variance_1() {
        let wave = |t: usize, size: f32, mean: f32| mean + size * (t as f32).sin();
        let mut x = Array2::from_shape_fn((500, 4), |(t, i)| match i {
            0 => wave(t, 1e-30, 0.0),
            1 => wave(t, 3e38, 0.0),
            2 => wave(t, 1.0, 1e4),
            _ => wave(t, 2.0, 0.0),
        });
        let given = x.clone();
        let normalization = fit(&x);
        normalization.apply(&mut x);
        for column in x.columns() {
            assert!(column.mean().unwrap().abs() < 1e-3, "{column}");
            assert!((column.var(0.0) - 1.0).abs() < 1e-3, "{column}");
        }
        normalization.undo(&mut x);
        for (x, given) in x.rows().into_iter().zip(given.rows()) {
            for ((x, given), size) in x.iter().zip(given).zip([1e-30, 3e38, 1e4, 2.0]) {
                assert!((x - given).abs() <= 1e-6 * size, "{x} {given}");
            }
        }
    }

    #[test]
    fn what_does_not_vary_has_scale_1() {
        let x = Array2::from_shape_fn((7, 5), |(t, i)| match i {
            0 => 0.1,
            1 => 16_777_216.0,
            2 => f32::NAN,
            3 if t == 3 => f32::INFINITY,
            3 => -1e-3,
            _ => 1e-44 * t as f32,
        });
        let normalization = fit(&x);
        assert_eq!(normalization.scale(), &array![1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(normalization.mean().slice(ndarray::s![..4]), array![0.1, 16_777_216.0, 0.0, -1e-3]);
        assert_eq!(Normalization::new(normalization.mean.clone(), normalization.scale.clone()).unwrap(), normalization);
    }

    #[test]
    fn numbers_that_cannot_be_divided_by() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-44] {
            assert!(Normalization::new(array![0.0], array![scale]).is_err(), "{scale}");
        }
        assert!(Normalization::new(array![f32::NAN], array![1.0]).is_err());
        assert!(Normalization::new(array![1.0, 1.0], array![1.0]).is_err());
    }
}
