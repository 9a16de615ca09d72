//! Normalisation of rows to mean 0 and variance 1.

use std::borrow::Cow;

use super::{SHRINK, SmallVariance, load_or, shrink};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::rows::Out;
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// out = weight ⊙ (x − mean) / deviation + bias, for each row of `weight.len()` numbers.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, rule: SmallVariance, out: &mut [f32]) {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || {
        dispatch(LayerNorm { x, weight, bias, epsilon, rule, out })
    });
}

pub(super) struct LayerNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub epsilon: f32,
    pub rule: SmallVariance,
    pub out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let h = self.weight.len();
        for (x, out) in self.x.chunks_exact(h).zip(self.out.chunks_exact_mut(h)) {
            let row = Row::new(s, x, self.epsilon, self.rule);
            let scale = s.splat(row.scale);
            let parameters = self.weight.chunks(LANES).zip(self.bias.chunks(LANES));
            for ((x, out), (weight, bias)) in row.x.chunks(LANES).zip(out.chunks_mut(LANES)).zip(parameters) {
                let y = s.mul_add(s.mul(s.load_some(weight), scale), row.centred(s, x), s.load_some(bias));
                s.store_some(y, out);
            }
        }
    }
}

/// The mean of a row, the mean of what is left when that is subtracted, and the variance.
///
/// Sums are taken of differences: from the first number, then from the mean. Where the numbers lie close together, those
/// are exact, however large the numbers.
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32]) -> [f32; 3] {
    let count = x.len() as f32;
    let first = x.first().copied().unwrap_or_default();
    let from_first = s.splat(first);
    let mut sum = s.splat(0.0);
    for x in x.chunks(LANES) {
        sum = s.add(sum, s.sub(load_or(s, x, first), from_first));
    }
    let mean = first + s.sum(sum) / count;

    let from_mean = s.splat(mean);
    let (mut sum, mut squares) = (s.splat(0.0), s.splat(0.0));
    for x in x.chunks(LANES) {
        let x = s.sub(load_or(s, x, mean), from_mean);
        sum = s.add(sum, x);
        squares = s.mul_add(x, x, squares);
    }
    let rest = s.sum(sum) / count;
    [mean, rest, s.sum(squares) / count - rest * rest]
}

/// The gradient of [`layer_norm`]: dx is overwritten, the gradients of weight and bias are added to. With x̂ the normalised
/// row and ĝ = weight ⊙ dy,
///
/// dx = (ĝ − mean(ĝ) − x̂·mean(ĝ ⊙ x̂)) / deviation
///
/// without the last term where the deviation is clipped, and so constant.
#[allow(clippy::too_many_arguments)]
pub(crate) fn layer_norm_backward(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    rule: SmallVariance,
    dy: &[f32],
    dx: &mut [f32],
    mode: Out,
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    timed(Stage::Elementwise, Cost::numbers(3 * x.len()), || {
        dispatch(LayerNormBackward { x, weight, epsilon, rule, dy, dx, mode, dweight, dbias })
    });
}

pub(super) struct LayerNormBackward<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub epsilon: f32,
    pub rule: SmallVariance,
    pub dy: &'a [f32],
    pub dx: &'a mut [f32],
    pub mode: Out,
    pub dweight: &'a mut [f32],
    pub dbias: &'a mut [f32],
}

impl Kernel for LayerNormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let h = self.weight.len();
        for ((x, dy), dx) in self.x.chunks_exact(h).zip(self.dy.chunks_exact(h)).zip(self.dx.chunks_exact_mut(h)) {
            let row = Row::new(s, x, self.epsilon, self.rule);
            let (x, scale) = (&*row.x, s.splat(row.scale));
            let (mut sum, mut projection) = (s.splat(0.0), s.splat(0.0));
            let gradients = self.dweight.chunks_mut(LANES).zip(self.dbias.chunks_mut(LANES));
            let rows = x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.weight.chunks(LANES));
            for (((x, dy), weight), (dweight, dbias)) in rows.zip(gradients) {
                let dy = s.load_some(dy);
                let hat = s.mul(row.centred(s, x), scale);
                let g = s.mul(s.load_some(weight), dy); // zero in the lanes past the end
                sum = s.add(sum, g);
                projection = s.mul_add(g, hat, projection);
                s.store_some(s.mul_add(dy, hat, s.load_some(dweight)), dweight);
                s.store_some(s.add(dy, s.load_some(dbias)), dbias);
            }
            let sum = s.splat(s.sum(sum) / h as f32);
            let projection = match row.is_clipped {
                true => s.splat(0.0),
                false => s.splat(-s.sum(projection) / h as f32),
            };
            let given_scale = s.splat(row.given_scale);
            let rows = x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.weight.chunks(LANES));
            for (((x, dy), weight), dx) in rows.zip(dx.chunks_mut(LANES)) {
                let hat = s.mul(row.centred(s, x), scale);
                let g = s.sub(s.mul(s.load_some(weight), s.load_some(dy)), sum);
                let d = s.mul(given_scale, s.mul_add(projection, hat, g));
                let d = if self.mode == Out::Add { s.add(s.load_some(dx), d) } else { d };
                s.store_some(d, dx);
            }
        }
    }
}

/// A row on its way to x̂ = (x − mean − rest) · scale.
pub(super) struct Row<'a> {
    pub x: Cow<'a, [f32]>,
    /// The mean, rounded, and what rounding left out: between numbers of 1e5 that lie close together, it is all there is.
    pub mean: f32,
    pub rest: f32,
    /// 1 / deviation of x.
    pub scale: f32,
    /// 1 / deviation of the row that was given, which may be larger than x.
    pub given_scale: f32,
    pub is_clipped: bool,
}

impl<'a> Row<'a> {
    #[inline(always)]
    fn new<S: Simd>(s: S, x: &'a [f32], epsilon: f32, rule: SmallVariance) -> Self {
        let [mean, rest, variance] = moments(s, x);
        if !variance.is_finite() {
            return Row::shrunk(s, x);
        }
        let scale = rule.reciprocal_deviation(variance, epsilon);
        let is_clipped = rule.is_clipped(variance, epsilon);
        Row { x: Cow::Borrowed(x), mean, rest, scale, given_scale: scale, is_clipped }
    }

    /// Of a row whose variance overflows: beside it, ε is nothing.
    #[inline(always)]
    fn shrunk<S: Simd>(s: S, x: &[f32]) -> Self {
        let x = shrink(x);
        let [mean, rest, variance] = moments(s, &x);
        let scale = variance.sqrt().recip();
        Row { x: Cow::Owned(x), mean, rest, scale, given_scale: scale * SHRINK, is_clipped: false }
    }

    /// x − mean for the first lanes of a part of x.
    #[inline(always)]
    fn centred<S: Simd>(&self, s: S, x: &[f32]) -> S::V {
        s.sub(s.sub(s.load_some(x), s.splat(self.mean)), s.splat(self.rest))
    }
}
