//! Predicting series of any lengths.

use ndarray::{Array2, Array3, s};

use super::Predictor;
use crate::{Error, Result};

/// Series, and frames with padding, that are predicted together.
const BATCH: usize = 32;
const BATCH_FRAMES: usize = 1 << 15;

impl Predictor {
    /// As [`predict`](Self::predict), from series `[length, embed_dim]` of any lengths: `[series, outputs]`. Series of similar
    /// length are put into batches together.
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
    /// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// assert_eq!(predictor.predict_series(&[Array2::ones((50, 6)), Array2::ones((31, 6))])?.dim(), (2, 2));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`predict`](Self::predict).
    pub fn predict_series(&self, series: &[Array2<f32>]) -> Result<Array2<f32>> {
        let channels = self.options().embed_dim;
        if let Some(i) = series.iter().position(|series| series.nrows() == 0 || series.ncols() != channels) {
            let expected = format!("[length, embed_dim = {channels}] with 1 frame at least, for series {i}");
            return Err(Error::Shape { argument: "series", expected, given: series[i].shape().to_vec() });
        }
        let mut order: Vec<usize> = (0..series.len()).collect();
        order.sort_by_key(|&i| series[i].nrows());
        let mut predicted = Array2::zeros((series.len(), self.task().outputs()));
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            // the last one of a batch is its longest
            let fits = |count: &usize| series[rest[count - 1]].nrows().saturating_mul(*count) <= BATCH_FRAMES;
            let count = (1..=BATCH.min(rest.len())).rev().find(fits).unwrap_or(1);
            let (batch, others) = rest.split_at(count);
            rest = others;
            let lengths: Vec<usize> = batch.iter().map(|&i| series[i].nrows()).collect();
            let mut x = Array3::zeros((count, lengths[count - 1], channels));
            for (row, &i) in batch.iter().enumerate() {
                x.slice_mut(s![row, ..lengths[row], ..]).assign(&series[i]);
            }
            for (&i, row) in batch.iter().zip(self.predict(&x, Some(&lengths))?.rows()) {
                predicted.row_mut(i).assign(&row);
            }
        }
        Ok(predicted)
    }
}
