//! Probabilities and classes from logits.

use ndarray::{Array, ArrayRef, Dimension, Zip};

/// Logits → probabilities: e^z / Σ e^z over the last axis.
///
/// ```
/// use hymba::ndarray::array;
///
/// assert_eq!(hymba::softmax(&array![[0.0, 0.0], [1000.0, 0.0]]), array![[0.5, 0.5], [1.0, 0.0]]);
/// ```
pub fn softmax<D: Dimension>(logits: &ArrayRef<f32, D>) -> Array<f32, D> {
    let mut probabilities = logits.as_standard_layout().into_owned();
    for mut row in probabilities.rows_mut() {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.mapv_inplace(|z| (z - largest).exp());
        let sum = row.sum();
        row.mapv_inplace(|e| e / sum);
    }
    probabilities
}

/// The index of the largest number on the last axis, the first of equals: the predicted class, of logits or probabilities.
/// NaN counts as smaller than any number.
///
/// ```
/// use hymba::ndarray::array;
///
/// assert_eq!(hymba::argmax(&array![[0.1, 0.7, 0.2], [0.9, 0.0, 0.9]]), array![1, 0]);
/// ```
pub fn argmax<D: Dimension>(numbers: &ArrayRef<f32, D>) -> Array<usize, D::Smaller> {
    Zip::from(numbers.rows()).map_collect(|row| {
        let mut largest = (0, f32::NEG_INFINITY);
        for (i, &number) in row.iter().enumerate() {
            if number > largest.1 {
                largest = (i, number);
            }
        }
        largest.0
    })
}
