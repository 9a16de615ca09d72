//! The gradient of normalisation by the root of the mean square.

use super::rms::mean_square;
use super::{SHRINK, shrink};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// The gradient of y = scale · weight ⊙ x / √(mean(x²) + ε), for each row of `weight.len()` numbers: dy becomes dx, and that of the
/// weight is added to. With x̂ = x/√(mean(x²) + ε) and ĝ = scale · weight ⊙ dy,
///
/// dx = (ĝ − x̂·mean(ĝ ⊙ x̂)) / √(mean(x²) + ε)
pub(crate) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    scale: f32,
    dy: &mut [f32],
    dweight: &mut [f32],
) {
    timed(Stage::Elementwise, Cost::numbers(3 * x.len()), || {
        dispatch(RmsNormBackward { x, weight, epsilon, scale, dy, dweight })
    });
}

struct RmsNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
    scale: f32,
    dy: &'a mut [f32],
    dweight: &'a mut [f32],
}

impl Kernel for RmsNormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let h = self.weight.len();
        let scale = s.splat(self.scale);
        for (x, dy) in self.x.chunks_exact(h).zip(self.dy.chunks_exact_mut(h)) {
            let (mut x, mut shrunk_by) = (x, 1.0);
            let shrunk;
            let mut square = mean_square(s, x) + self.epsilon;
            if !square.is_finite() {
                shrunk = shrink(x);
                (x, shrunk_by) = (&shrunk, SHRINK);
                square = mean_square(s, x);
            }
            let factor = 1.0 / square.sqrt();
            let (hat_factor, mut projection) = (s.splat(factor), s.splat(0.0));
            let rows = x.chunks(LANES).zip(dy.chunks_mut(LANES)).zip(self.weight.chunks(LANES));
            for (((x, dy), weight), dweight) in rows.zip(self.dweight.chunks_mut(LANES)) {
                let hat = s.mul(s.load_some(x), hat_factor);
                let scaled = s.mul(scale, s.load_some(dy));
                s.store_some(s.mul_add(scaled, hat, s.load_some(dweight)), dweight);
                let g = s.mul(s.load_some(weight), scaled);
                projection = s.mul_add(g, hat, projection);
                s.store_some(g, dy);
            }
            let projection = s.splat(-s.sum(projection) / h as f32);
            let given_factor = s.splat(factor * shrunk_by);
            for (x, dy) in x.chunks(LANES).zip(dy.chunks_mut(LANES)) {
                let hat = s.mul(s.load_some(x), hat_factor);
                s.store_some(s.mul(given_factor, s.mul_add(projection, hat, s.load_some(dy))), dy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::{Isa, dispatch_at};

    #[test]
    fn every_level_equals_the_definition() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for h in 1..70 {
                let wave = |i: usize| ((i * 7 + h) % 13) as f32 / 4.0 - 1.4;
                let x: Vec<f32> = (0..2 * h).map(wave).collect();
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
                let dy: Vec<f32> = (0..2 * h).map(|i| wave(i + 5)).collect();
                let (mut dx, mut dweight) = (dy.clone(), vec![1.0; h]);
                let (epsilon, scale) = (1e-2, 0.5);
                let kernel =
                    RmsNormBackward { x: &x, weight: &weight, epsilon, scale, dy: &mut dx, dweight: &mut dweight };
                dispatch_at(level, kernel);
                let mut want_dweight = vec![1.0; h];
                for row in 0..2 {
                    let at = |from: &[f32], i: usize| f64::from(from[row * h + i]);
                    let root = ((0..h).map(|i| at(&x, i).powi(2)).sum::<f64>() / h as f64 + 0.01).sqrt();
                    let g = |i: usize| 0.5 * f64::from(weight[i]) * at(&dy, i);
                    let projection = (0..h).map(|i| g(i) * at(&x, i) / root).sum::<f64>() / h as f64;
                    for (i, dweight) in want_dweight.iter_mut().enumerate() {
                        let want = (g(i) - at(&x, i) / root * projection) / root;
                        assert!((at(&dx, i) - want).abs() < 2e-5, "{level:?} h {h}: {} {want}", at(&dx, i));
                        *dweight += 0.5 * at(&dy, i) * at(&x, i) / root;
                    }
                }
                assert!(dweight.iter().zip(want_dweight).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5));
            }
        }
    }

    /// Rows whose squares overflow have a gradient as small as they are large.
    #[test]
    fn large_rows_have_small_gradients() {
        let (x, weight) = ([3e20, -1e20, 2e20], [1.0, 2.0, 0.5]);
        let (mut dx, mut dweight) = ([1.0, -1.0, 0.5], [0.0; 3]);
        rms_norm_backward(&x, &weight, 1e-6, 1.0, &mut dx, &mut dweight);
        let small = x.map(|x| x / 1e20);
        let (mut want, mut want_dweight) = ([1.0, -1.0, 0.5], [0.0; 3]);
        rms_norm_backward(&small, &weight, 0.0, 1.0, &mut want, &mut want_dweight);
        for i in 0..3 {
            assert!((dx[i] * 1e20 - want[i]).abs() < 1e-5 && (dweight[i] - want_dweight[i]).abs() < 1e-6);
        }
    }
}
