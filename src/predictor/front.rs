//! What happens to frames before they are read: their form, normalization, and the stem.

use ndarray::{Array1, Array2, Array3, ArrayRef3, ArrayView2, ArrayViewMut2, Axis, Zip, s};
use serde::{Deserialize, Serialize};

/// Whether a predictor reads frames, their differences from the frame before, or both. How a series changes often tells its class
/// better than where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Differences {
    /// The frames as they are.
    #[default]
    None,
    /// x_t − x_{t−1} in place of x_t; 0 for the first frame.
    Only,
    /// Both, side by side: frames of twice the width.
    Beside,
}

impl Differences {
    /// The width of frames that were this wide.
    pub(super) fn width(self, width: usize) -> usize {
        if self == Differences::Beside { width.saturating_mul(2) } else { width }
    }

    /// x `[l, width]` → `[l, width]` or `[l, 2·width]`
    pub(super) fn apply(self, x: ArrayView2<f32>, mut y: ArrayViewMut2<f32>) {
        let (l, width) = x.dim();
        if self != Differences::Only {
            y.slice_mut(s![.., ..width]).assign(&x);
        }
        if self != Differences::None {
            let mut y = y.slice_mut(s![.., -(width as isize)..]);
            y.row_mut(0).fill(0.0);
            Zip::from(y.slice_mut(s![1.., ..]))
                .and(x.slice(s![1.., ..]))
                .and(x.slice(s![..l - 1, ..]))
                .for_each(|y, x, before| *y = x - before);
        }
    }

    /// The gradient of [`apply`](Self::apply): dy `[l, …]` → dx `[l, width]`.
    pub(super) fn backward(self, dy: ArrayView2<f32>, mut dx: ArrayViewMut2<f32>) {
        let (l, width) = dx.dim();
        match self {
            Differences::Only => dx.fill(0.0),
            _ => dx.assign(&dy.slice(s![.., ..width])),
        }
        if self != Differences::None {
            let dy = dy.slice(s![1.., -(width as isize)..]);
            let mut later = dx.slice_mut(s![1.., ..]);
            later += &dy;
            let mut earlier = dx.slice_mut(s![..l - 1, ..]);
            earlier -= &dy;
        }
    }
}

/// Brings each feature of a series x `[l, width]` to mean 0 and variance 1 over its own frames. Returns the scales, 1 where a feature
/// does not vary.
pub(super) fn normalize_series(mut x: ArrayViewMut2<f32>) -> Array1<f32> {
    /// A feature that varies less, relative to its size, holds nothing but rounding.
    const CONSTANT: f64 = 1e-6;
    let l = x.nrows() as f64;
    let scales = x.columns_mut().into_iter().map(|mut x| {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / l;
        let deviation = (x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / l).sqrt();
        let varies = (deviation as f32).is_normal() && deviation > CONSTANT * mean.abs();
        let scale = if varies { deviation } else { 1.0 };
        x.mapv_inplace(|x| ((f64::from(x) - mean) / scale) as f32);
        scale as f32
    });
    scales.collect()
}

/// The gradient of [`normalize_series`] for its result y and its scales: dy `[l, width]` becomes dx.
///
/// dx = (dy − mean(dy) − y · mean(dy · y)) / scale
pub(super) fn normalize_series_backward(y: ArrayView2<f32>, scales: &Array1<f32>, mut dy: ArrayViewMut2<f32>) {
    let l = y.nrows() as f64;
    for ((mut dy, y), scale) in dy.columns_mut().into_iter().zip(y.columns()).zip(scales) {
        let mean = |numbers: &mut dyn Iterator<Item = f64>| numbers.sum::<f64>() / l;
        let of_dy = mean(&mut dy.iter().map(|&dy| f64::from(dy)));
        let of_both = mean(&mut dy.iter().zip(y).map(|(&dy, &y)| f64::from(dy) * f64::from(y)));
        for (dy, y) in dy.iter_mut().zip(y) {
            *dy = ((f64::from(*dy) - of_dy - f64::from(*y) * of_both) / f64::from(*scale)) as f32;
        }
    }
}

/// The frames of each row in the other order, padding where it was.
pub(super) fn reversed(x: &ArrayRef3<f32>, lengths: &[usize]) -> Array3<f32> {
    let mut y = Array3::zeros(x.dim());
    for ((x, mut y), &length) in x.outer_iter().zip(y.outer_iter_mut()).zip(lengths) {
        y.slice_mut(s![..length, ..]).assign(&x.slice(s![..length;-1, ..]));
    }
    y
}

/// The form of a series: its own normalization, then differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    pub normalize_series: bool,
    pub differences: Differences,
}

/// What [`Form::backward`] reads: normalized series `[b, l, width]` and their scales `[b, width]`, where they are normalized.
#[derive(Debug)]
pub(super) struct FormCache(Option<(Array3<f32>, Array2<f32>)>);

impl Form {
    pub fn is_plain(self) -> bool {
        !self.normalize_series && self.differences == Differences::None
    }

    /// x `[b, l, width]` → `[b, l, …]`, zeros past the end of each row.
    pub fn apply(self, x: &ArrayRef3<f32>, lengths: &[usize]) -> (Array3<f32>, FormCache) {
        let (batch, l, width) = x.dim();
        let mut y = Array3::zeros((batch, l, self.differences.width(width)));
        let mut kept = self.normalize_series.then(|| (Array3::zeros(x.dim()), Array2::zeros((batch, width))));
        for (row, &length) in lengths.iter().enumerate() {
            let x = x.slice(s![row, ..length, ..]);
            let y = y.slice_mut(s![row, ..length, ..]);
            match &mut kept {
                Some((normalized, scales)) => {
                    let mut here = normalized.slice_mut(s![row, ..length, ..]);
                    here.assign(&x);
                    scales.row_mut(row).assign(&normalize_series(here.view_mut()));
                    self.differences.apply(here.view(), y);
                }
                None => self.differences.apply(x, y),
            }
        }
        (y, FormCache(kept))
    }

    /// The gradient of [`apply`](Self::apply): dy `[b, l, …]` → dx `[b, l, width]`.
    pub fn backward(self, cache: &FormCache, dy: Array3<f32>, lengths: &[usize], width: usize) -> Array3<f32> {
        let (batch, l, _) = dy.dim();
        let mut dx = Array3::zeros((batch, l, width));
        for (row, &length) in lengths.iter().enumerate() {
            let mut dx = dx.slice_mut(s![row, ..length, ..]);
            self.differences.backward(dy.slice(s![row, ..length, ..]), dx.view_mut());
            if let FormCache(Some((y, scales))) = cache {
                let scales = scales.index_axis(Axis(0), row).to_owned();
                normalize_series_backward(y.slice(s![row, ..length, ..]), &scales, dx);
            }
        }
        dx
    }
}
