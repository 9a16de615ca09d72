//! Normalisation by the root of the mean square.

use super::shrink;
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// out (+)= scale · weight ⊙ x / √(mean(x²) + ε), for each row of `weight.len()` numbers.
pub(crate) fn rms_norm(x: Rows, weight: &[f32], epsilon: f32, scale: f32, out: &mut [f32], mode: Out) {
    timed(Stage::Elementwise, Cost::numbers(2 * out.len()), || {
        dispatch(RmsNorm { x, weight, epsilon, scale, out, mode })
    });
}

/// x = weight ⊙ x / √(mean(x²) + ε), for each row of `weight.len()` numbers.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || dispatch(RmsNormInPlace { x, weight, epsilon }));
}

pub(super) struct RmsNormInPlace<'a> {
    pub x: &'a mut [f32],
    pub weight: &'a [f32],
    pub epsilon: f32,
}

impl Kernel for RmsNormInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.weight.len()) {
            let mut square = mean_square(s, x) + self.epsilon;
            if !square.is_finite() {
                x.copy_from_slice(&shrink(x));
                square = mean_square(s, x);
            }
            let factor = s.splat(1.0 / square.sqrt());
            for (x, weight) in x.chunks_mut(LANES).zip(self.weight.chunks(LANES)) {
                s.store_some(s.mul(s.mul(s.load_some(x), factor), s.load_some(weight)), x);
            }
        }
    }
}

#[inline(always)]
pub(super) fn mean_square<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut squares = s.splat(0.0);
    for x in x.chunks(LANES) {
        let x = s.load_some(x);
        squares = s.mul_add(x, x, squares);
    }
    s.sum(squares) / x.len() as f32
}

pub(super) struct RmsNorm<'a> {
    pub x: Rows<'a>,
    pub weight: &'a [f32],
    pub epsilon: f32,
    pub scale: f32,
    pub out: &'a mut [f32],
    pub mode: Out,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let h = self.weight.len();
        for (i, out) in self.out.chunks_exact_mut(h).enumerate() {
            let mut x = self.x.row(i, h);
            let shrunk;
            let mut square = mean_square(s, x) + self.epsilon;
            if !square.is_finite() {
                shrunk = shrink(x);
                x = &shrunk;
                square = mean_square(s, x);
            }
            let factor = s.splat(self.scale * (1.0 / square.sqrt()));
            let rows = x.chunks(LANES).zip(self.weight.chunks(LANES));
            for ((x, weight), out) in rows.zip(out.chunks_mut(LANES)) {
                let normal = s.mul(s.mul(s.load_some(x), factor), s.load_some(weight));
                let sum = if self.mode == Out::Add { s.add(s.load_some(out), normal) } else { normal };
                s.store_some(sum, out);
            }
        }
    }
}
