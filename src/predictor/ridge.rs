//! Ridge regression in the dual, its strength chosen by leaving out each row in turn.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis};

use crate::kernels::matmul::{Packed, matmul};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::{Team, with_team, work};

mod cholesky;

use cholesky::Cholesky;

/// A linear map of features, fitted with a penalty λ on the squares of its weights.
///
/// ```text
/// z = (x − mean) / deviation / √m       of each of the m features of a view
/// K = Σ share · Z·Zᵀ over the views     [n, n], of the training rows
/// α = (K + λI)⁻¹ (Y − mean of Y)        [n, outputs]
/// e_i = α_i / ((K + λI)⁻¹_ii − 1/(λn))  the error at row i of the map that is fitted to all others
/// ```
///
/// Shares and λ are those of the smallest Σ e². Features outnumber the rows by far, so that everything but K is small.
#[derive(Debug, Clone)]
pub(super) struct Ridge {
    /// `[outputs, features]`, of features as they are.
    pub weight: Array2<f32>,
    pub bias: Array1<f32>,
}

/// Predictions for rows by maps that are fitted to all others.
#[derive(Debug, Clone)]
pub(super) struct LeftOut {
    /// Which rows: all, or some of many.
    pub rows: Vec<usize>,
    /// `[rows, outputs]`
    pub predicted: Array2<f64>,
}

/// λ, relative to the mean of K's diagonal.
const STRENGTHS: [f64; 8] = [1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0];
/// How much the views of [`KernelFeatures`](super::KernelFeatures) count.
const SHARES: [[f64; 3]; 4] = [[1.0, 1.0, 0.0], [1.0, 0.2, 0.0], [1.0, 1.0, 0.5], [1.0, 0.2, 1.0]];
/// Factor of the loss of the first shares: others must be better than by chance.
const PREFERENCE: f64 = 0.95;
/// Rows that are left out, at most: each strength takes their number to the power of three.
const MOST_LEFT_OUT: usize = 512;

impl Ridge {
    /// Fits x `[n, features]` to y `[n, outputs]`. `views`: how many of the features belong together.
    pub(super) fn fit(mut x: Array2<f32>, y: &Array2<f64>, views: [usize; 3]) -> (Ridge, LeftOut) {
        let (n, features) = x.dim();
        with_team(work([n, features, y.ncols()]), |team| {
            let (mean, scale) = standardize(team, &mut x, &views);
            let grams = grams(team, &x, views);
            let y_mean = y.mean_axis(Axis(0)).expect("there are rows");
            let centered = y - &y_mean;

            let rows = evenly(n, MOST_LEFT_OUT);
            let mut some_y = centered.select(Axis(0), &rows);
            let is_part = rows.len() < n;
            if is_part {
                some_y -= &some_y.mean_axis(Axis(0)).expect("there are rows");
            }
            let mut best: Option<(f64, [f64; 3], f64, Array2<f64>)> = None;
            for (i, shares) in SHARES.into_iter().enumerate() {
                let k = combined(&grams, shares);
                let mut k = Array2::from_shape_fn((rows.len(), rows.len()), |(i, j)| k[[rows[i], rows[j]]]);
                if is_part {
                    center(&mut k);
                }
                let diagonal = k.diag().sum() / rows.len() as f64;
                let unit = if diagonal > 0.0 { diagonal } else { 1.0 }; // of rows that are all alike
                for strength in STRENGTHS {
                    let errors = left_out(team, &k, strength * unit, &some_y);
                    let loss =
                        errors.iter().map(|error| error * error).sum::<f64>() * if i == 0 { PREFERENCE } else { 1.0 };
                    if best.as_ref().is_none_or(|best| loss < best.0) {
                        best = Some((loss, shares, strength * unit, errors));
                    }
                }
            }
            let (_, shares, lambda, errors) = best.expect("there are shares and strengths");

            let alpha = factor(team, &combined(&grams, shares), lambda).solve(&centered);
            let sizes =
                views.into_iter().zip(shares).flat_map(|(count, share)| std::iter::repeat_n(share as f32, count));
            let scale: Array1<f32> = scale.iter().zip(sizes).map(|(scale, share)| scale * share).collect();
            let mut weight = Array2::<f32>::zeros((y.ncols(), features));
            team.for_each(weight.outer_iter_mut().zip(alpha.columns()).collect::<Vec<_>>(), |(mut weight, alpha)| {
                for (z, &alpha) in x.outer_iter().zip(alpha) {
                    weight.scaled_add(alpha as f32, &z);
                }
                weight *= &scale;
            });
            let bias =
                y_mean.iter().zip(weight.outer_iter()).map(|(y, weight)| (y - product(weight, mean.view())) as f32);
            let left_out = LeftOut { predicted: y.select(Axis(0), &rows) - &errors, rows };
            (Ridge { bias: bias.collect(), weight }, left_out)
        })
    }

    /// x `[n, features]` → `[n, outputs]`
    pub(super) fn predict(&self, x: ArrayView2<f32>) -> Array2<f32> {
        Array2::from_shape_fn((x.nrows(), self.bias.len()), |(row, output)| {
            (product(x.row(row), self.weight.row(output)) + f64::from(self.bias[output])) as f32
        })
    }
}

/// Σ a·b, as eight sums.
fn product(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f64 {
    let mut sums = [0.0; 8];
    for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
        sums[i % 8] += f64::from(a) * f64::from(b);
    }
    sums.iter().sum()
}

/// At most `most` of `count` numbers, evenly spaced.
pub(super) fn evenly(count: usize, most: usize) -> Vec<usize> {
    if count <= most {
        (0..count).collect()
    } else {
        (0..most).map(|i| (i as u64 * count as u64 / most as u64) as usize).collect()
    }
}

/// x becomes z. The mean of each feature, and what its difference from that is multiplied by: 0 where it does not vary.
fn standardize(team: &Team, x: &mut Array2<f32>, views: &[usize]) -> (Array1<f32>, Array1<f32>) {
    /// Features less wide than this hold nothing but rounding.
    const CONSTANT: f64 = 1e-6;
    let (n, features) = x.dim();
    let mut sums = Array1::<f64>::zeros(features);
    x.outer_iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x)));
    let mean = sums.mapv(|sum| (sum / n as f64) as f32);
    let mut squares = Array1::<f64>::zeros(features);
    for row in x.outer_iter() {
        let each = squares.iter_mut().zip(row).zip(&mean);
        each.for_each(|((square, x), mean)| *square += f64::from(x - mean).powi(2));
    }
    let sizes = views.iter().flat_map(|&count| std::iter::repeat_n((count as f64).sqrt(), count));
    let scale: Array1<f32> = squares
        .iter()
        .zip(sizes)
        .map(|(square, size)| {
            let deviation = (square / n as f64).sqrt();
            if deviation > CONSTANT { (1.0 / (deviation * size)) as f32 } else { 0.0 }
        })
        .collect();
    team.for_each(x.outer_iter_mut().collect::<Vec<ArrayViewMut1<f32>>>(), |mut row| {
        row.iter_mut().zip(&mean).zip(&scale).for_each(|((x, mean), scale)| *x = (*x - mean) * scale);
    });
    (mean, scale)
}

/// Z·Zᵀ of each view.
fn grams(team: &Team, z: &Array2<f32>, views: [usize; 3]) -> [Array2<f64>; 3] {
    let mut end = 0;
    views.map(|count| {
        end += count;
        gram(team, z, end - count..end)
    })
}

fn combined(grams: &[Array2<f64>; 3], shares: [f64; 3]) -> Array2<f64> {
    grams.iter().zip(shares).fold(Array2::zeros(grams[0].dim()), |mut sum, (gram, share)| {
        sum.scaled_add(share, gram);
        sum
    })
}

/// Z·Zᵀ over some features. The mean of every row and column is taken away, which that of z being 0 leaves little of.
fn gram(team: &Team, z: &Array2<f32>, of: std::ops::Range<usize>) -> Array2<f64> {
    /// Features packed at a time.
    const STRIP: usize = 4096;
    let (n, features) = z.dim();
    let flat = z.as_slice().expect("rows one after the other");
    let mut k = vec![0.0f32; n * n];
    for first in of.clone().step_by(STRIP) {
        let width = STRIP.min(of.end - first);
        let packed = Packed::from_rows(n, width, |i| &flat[i * features + first..][..width], None);
        matmul(team, Rows { data: &flat[first..], stride: features }, n, &packed, &mut k, Out::Add);
    }
    let mut k = Array2::from_shape_vec((n, n), k).expect("n·n numbers").mapv(f64::from);
    center(&mut k);
    k
}

/// Takes away the mean of every row and column: what z gives whose mean over these rows is 0.
fn center(k: &mut Array2<f64>) {
    let means = k.mean_axis(Axis(0)).expect("there are rows");
    let all = means.mean().unwrap_or(0.0);
    k.indexed_iter_mut().for_each(|((i, j), k)| *k += all - means[i] - means[j]);
}

/// Of K + λI.
fn factor(team: &Team, k: &Array2<f64>, lambda: f64) -> Cholesky {
    let mut shifted = k.clone();
    shifted.diag_mut().mapv_inplace(|k| k + lambda);
    Cholesky::new(team, shifted)
}

/// e `[n, outputs]` for centered K and y.
fn left_out(team: &Team, k: &Array2<f64>, lambda: f64, y: &Array2<f64>) -> Array2<f64> {
    let factor = factor(team, k, lambda);
    let mut errors = factor.solve(y);
    for (mut errors, inverse) in errors.outer_iter_mut().zip(factor.inverse_diagonal(team)) {
        // above 0 but for rounding, as K has a row space without the vector of ones
        let rest = (inverse - 1.0 / (lambda * k.nrows() as f64)).max(1e-12 / lambda);
        errors.mapv_inplace(|error| error / rest);
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(n: usize, features: usize) -> (Array2<f32>, Array2<f64>) {
        let x =
            Array2::from_shape_fn((n, features), |(i, j)| ((i * 37 + j * 101 + i * j) as f32 * 0.37).sin() + j as f32);
        let y = Array2::from_shape_fn((n, 2), |(i, j)| f64::from(x[[i, j]]) + ((i * 7 + j) as f64 * 1.3).cos());
        (x, y)
    }

    /// Cheaper than leaving out, and the same: fits to all rows but one, with the scale of the features of all.
    #[test]
    fn left_out_errors_are_those_of_fits_without_the_row() {
        let (n, lambda) = (9, 0.3);
        let (mut z, y) = data(n, 30);
        let team = Team::alone();
        standardize(&team, &mut z, &[10, 20]);
        let center = |y: &Array2<f64>| y - &y.mean_axis(Axis(0)).unwrap();
        let errors = left_out(&team, &gram(&team, &z, 0..30), lambda, &center(&y));
        for i in 0..n {
            let others: Vec<usize> = (0..n).filter(|&other| other != i).collect();
            let (some_z, some_y) = (z.select(Axis(0), &others).mapv(f64::from), y.select(Axis(0), &others));
            let z_mean = some_z.mean_axis(Axis(0)).unwrap();
            let some_z = &some_z - &z_mean;
            let k = some_z.dot(&some_z.t());
            let alpha = factor(&team, &k, lambda).solve(&center(&some_y));
            let z = z.row(i).mapv(f64::from) - z_mean;
            let predicted = alpha.t().dot(&some_z.dot(&z)) + some_y.mean_axis(Axis(0)).unwrap();
            for output in 0..2 {
                let want = y[[i, output]] - predicted[output];
                assert!((errors[[i, output]] - want).abs() < 1e-4, "{i} {output}: {} {want}", errors[[i, output]]);
            }
        }
    }

    /// K of some rows, centered again, is that of these rows alone; so the errors at some of many rows are those of fits to the others
    /// of them.
    #[test]
    fn some_of_many_rows_are_centered_by_themselves() {
        let (mut z, y) = data(600, 6);
        let team = Team::alone();
        standardize(&team, &mut z, &[6]);
        let rows = evenly(600, MOST_LEFT_OUT);
        let all = gram(&team, &z, 0..6);
        let mut some = Array2::from_shape_fn((rows.len(), rows.len()), |(i, j)| all[[rows[i], rows[j]]]);
        center(&mut some);
        let alone = gram(&team, &z.select(Axis(0), &rows), 0..6);
        assert!((&some - &alone).iter().all(|difference| difference.abs() < 1e-5));
        // six features, a linear part and a wave of size 1: errors are no larger than that
        let (_, left_out) = Ridge::fit(data(600, 6).0, &y, [2, 2, 2]);
        let errors = &left_out.predicted - &y.select(Axis(0), &left_out.rows);
        assert_eq!(left_out.rows.len(), MOST_LEFT_OUT);
        assert!((errors.mapv(|error| error * error).mean().unwrap()) < 1.0);
    }

    #[test]
    fn a_linear_map_is_found() {
        let (x, _) = data(60, 8);
        let y = Array2::from_shape_fn((60, 1), |(i, _)| f64::from(3.0 * x[[i, 2]] - 0.5 * x[[i, 7]] + 2.0));
        let (ridge, left_out) = Ridge::fit(x.clone(), &y, [3, 5, 0]);
        for (predicted, y) in ridge.predict(x.view()).iter().zip(&y) {
            assert!((f64::from(*predicted) - y).abs() < 1e-3, "{predicted} {y}");
        }
        assert_eq!(left_out.rows.len(), 60);
        assert!(left_out.predicted.iter().zip(&y).all(|(predicted, y)| (predicted - y).abs() < 1e-2));
    }

    #[test]
    fn rows_that_are_all_alike_get_the_mean() {
        let y = Array2::from_shape_fn((6, 1), |(i, _)| (i % 2) as f64);
        let (ridge, _) = Ridge::fit(Array2::ones((6, 5)), &y, [2, 2, 1]);
        assert_eq!(ridge.predict(Array2::ones((1, 5)).view())[[0, 0]], 0.5);
    }
}
