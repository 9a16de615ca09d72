//! Cholesky's factorisation of a symmetric positive definite matrix: A = L·Lᵀ.

use ndarray::{Array1, Array2};

use crate::kernels::team::Team;

/// L, lower triangular; what is above its diagonal is not read.
pub(super) struct Cholesky(Array2<f64>);

/// Columns that are factored together.
const BLOCK: usize = 48;

impl Cholesky {
    /// Of A `[n, n]`, of which the lower triangle is read. A pivot that rounding has taken to 0 or below counts as tiny.
    pub(super) fn new(team: &Team, mut a: Array2<f64>) -> Self {
        let n = a.nrows();
        let tiny = f64::EPSILON * a.diag().iter().fold(f64::MIN_POSITIVE, |most, &a| most.max(a));
        let flat = a.as_slice_mut().expect("rows one after the other");
        for first in (0..n).step_by(BLOCK) {
            let end = n.min(first + BLOCK);
            let (done, rest) = flat.split_at_mut(end * n);
            // the square on the diagonal
            for i in first..end {
                for j in first..=i {
                    let (above, row) = done.split_at_mut(i * n);
                    let other = if j < i { &above[j * n + first..j * n + j] } else { &[] };
                    if j < i {
                        row[j] = (row[j] - dot(&row[first..j], other)) / above[j * n + j];
                    } else {
                        row[i] = (row[i] - dot(&row[first..i], &row[first..i])).max(tiny).sqrt();
                    }
                }
            }
            // the rows below it
            let square = &*done;
            team.for_each(rest.chunks_exact_mut(n), |row| {
                for j in first..end {
                    row[j] = (row[j] - dot(&row[first..j], &square[j * n + first..j * n + j])) / square[j * n + j];
                }
            });
            // and what those take from the rest
            let panel: Vec<f64> = rest.chunks_exact(n).flat_map(|row| row[first..end].iter().copied()).collect();
            let width = end - first;
            team.for_each(rest.chunks_exact_mut(n).enumerate(), |(i, row)| {
                let own = &panel[i * width..][..width];
                for (a, other) in row[end..=end + i].iter_mut().zip(panel.chunks_exact(width)) {
                    *a -= dot(own, other);
                }
            });
        }
        Cholesky(a)
    }

    /// A⁻¹·B for B `[n, columns]`.
    pub(super) fn solve(&self, b: &Array2<f64>) -> Array2<f64> {
        let mut x = b.to_owned();
        let n = self.0.nrows();
        for mut x in x.columns_mut() {
            let mut v = x.to_vec();
            for i in 0..n {
                let row = self.row(i);
                v[i] = (v[i] - dot(&row[..i], &v[..i])) / row[i];
            }
            for i in (0..n).rev() {
                let row = self.row(i);
                v[i] /= row[i];
                let (before, after) = v.split_at_mut(i);
                before.iter_mut().zip(row).for_each(|(v, l)| *v -= l * after[0]);
            }
            x.assign(&Array1::from_vec(v));
        }
        x
    }

    /// The diagonal of A⁻¹: the squares of L⁻¹, summed over each column.
    pub(super) fn inverse_diagonal(&self, team: &Team) -> Vec<f64> {
        let n = self.0.nrows();
        let columns: Vec<usize> = (0..n).collect();
        team.map(columns, |column| {
            let mut x = vec![0.0; n - column];
            x[0] = 1.0 / self.row(column)[column];
            for i in column + 1..n {
                let row = self.row(i);
                x[i - column] = -dot(&row[column..i], &x[..i - column]) / row[i];
            }
            dot(&x, &x)
        })
    }

    fn row(&self, i: usize) -> &[f64] {
        let n = self.0.ncols();
        &self.0.as_slice().expect("rows one after the other")[i * n..][..=i]
    }
}

/// Σ a·b, as eight sums.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solutions_and_the_inverse_are_those_of_the_matrix() {
        for n in [1, 2, 7, 47, 48, 49, 130] {
            let b = Array2::from_shape_fn((n, n), |(i, j)| ((i * 31 + j * 17) % 23) as f64 / 11.0 - 1.0);
            let a = b.dot(&b.t()) + Array2::<f64>::eye(n) * 0.5;
            let factor = Cholesky::new(&Team::alone(), a.clone());
            let inverse = factor.solve(&Array2::eye(n));
            let product = a.dot(&inverse);
            for ((i, j), x) in product.indexed_iter() {
                assert!((x - f64::from(u8::from(i == j))).abs() < 1e-7, "{n} {i} {j} {x}");
            }
            for (i, x) in factor.inverse_diagonal(&Team::alone()).into_iter().enumerate() {
                assert!((x - inverse[[i, i]]).abs() < 1e-8 * inverse[[i, i]], "{n} {i}");
            }
        }
    }
}
