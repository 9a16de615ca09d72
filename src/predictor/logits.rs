//! What logits say.

use ndarray::{Array, ArrayRef, Dimension, Zip};

use crate::Result;
use crate::encoder::check_fits;

/// Logits → probabilities: e^z / Σ e^z over the last axis.
///
/// # Errors
///
/// [`Error::Shape`](crate::Error::Shape) if so many do not fit into memory, which a view that repeats itself can ask for.
///
/// ```
/// use hymba::ndarray::array;
///
/// assert_eq!(hymba::softmax(&array![[0.0, 0.0], [1000.0, 0.0]])?, array![[0.5, 0.5], [1.0, 0.0]]);
/// # Ok::<(), hymba::Error>(())
/// ```
pub fn softmax<D: Dimension>(logits: &ArrayRef<f32, D>) -> Result<Array<f32, D>> {
    check_fits("logits", logits.shape(), bytes(logits.shape(), size_of::<f32>()))?;
    let mut probabilities = logits.as_standard_layout().into_owned();
    for mut row in probabilities.rows_mut() {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.mapv_inplace(|z| (z - largest).exp());
        let sum = row.sum();
        row.mapv_inplace(|e| e / sum);
    }
    Ok(probabilities)
}

/// The place of the largest number on the last axis, the first of equals: the class that logits or probabilities speak for.
/// NaN counts as smaller than any number.
///
/// # Errors
///
/// [`Error::Shape`](crate::Error::Shape) if so many places do not fit into memory, which a view that repeats itself can ask for.
///
/// ```
/// use hymba::ndarray::array;
///
/// assert_eq!(hymba::argmax(&array![[0.1, 0.7, 0.2], [0.9, 0.0, 0.9]])?, array![1, 0]);
/// # Ok::<(), hymba::Error>(())
/// ```
pub fn argmax<D: Dimension>(numbers: &ArrayRef<f32, D>) -> Result<Array<usize, D::Smaller>> {
    let rows = numbers.shape().split_last().map_or(&[][..], |(_, rows)| rows);
    check_fits("numbers", numbers.shape(), bytes(rows, size_of::<usize>()))?;
    Ok(Zip::from(numbers.rows()).map_collect(|row| {
        let mut largest = (0, f32::NEG_INFINITY);
        for (i, &number) in row.iter().enumerate() {
            if number > largest.1 {
                largest = (i, number);
            }
        }
        largest.0
    }))
}

fn bytes(shape: &[usize], of_one: usize) -> usize {
    shape.iter().fold(of_one, |bytes, size| bytes.saturating_mul(*size))
}
