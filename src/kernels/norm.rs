//! Normalisation of rows to mean 0 and variance 1.

use std::borrow::Cow;

use super::profiler::{Cost, Stage, timed};
use super::rows::{Out, Rows};
use super::simd::{Kernel, LANES, Simd, dispatch};

pub(crate) use rms_backward::rms_norm_backward;

mod rms_backward;

/// What a norm does where the variance is near zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SmallVariance {
    /// 1/√(v + ε), the textbook rule.
    AddEpsilon,
    /// 1/√(v + ε) from v = ε on, 1/√ε below: Axon's rule.
    ClipBelowEpsilon,
}

impl SmallVariance {
    pub(crate) fn reciprocal_deviation(self, variance: f32, epsilon: f32) -> f32 {
        match self.is_clipped(variance, epsilon) {
            true => epsilon.sqrt().recip(),
            false => (variance + epsilon).sqrt().recip(),
        }
    }

    fn is_clipped(self, variance: f32, epsilon: f32) -> bool {
        self == SmallVariance::ClipBelowEpsilon && variance < epsilon
    }
}

/// out = weight ⊙ (x − mean) / deviation + bias, for each row of `weight.len()` numbers.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, rule: SmallVariance, out: &mut [f32]) {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || {
        dispatch(LayerNorm { x, weight, bias, epsilon, rule, out })
    });
}

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

/// What a row is multiplied by whose squares overflow: then none do, and what becomes 0 is nothing beside the rest.
const SHRINK: f32 = 1.0 / (1u128 << 96) as f32;

#[cold]
fn shrink(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x * SHRINK).collect()
}

struct RmsNormInPlace<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    epsilon: f32,
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
fn mean_square<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut squares = s.splat(0.0);
    for x in x.chunks(LANES) {
        let x = s.load_some(x);
        squares = s.mul_add(x, x, squares);
    }
    s.sum(squares) / x.len() as f32
}

struct RmsNorm<'a> {
    x: Rows<'a>,
    weight: &'a [f32],
    epsilon: f32,
    scale: f32,
    out: &'a mut [f32],
    mode: Out,
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

/// A row on its way to x̂ = (x − mean − rest) · scale.
struct Row<'a> {
    x: Cow<'a, [f32]>,
    /// The mean, rounded, and what rounding left out: between numbers of 1e5 that lie close together, it is all there is.
    mean: f32,
    rest: f32,
    /// 1 / deviation of x.
    scale: f32,
    /// 1 / deviation of the row that was given, which may be larger than x.
    given_scale: f32,
    is_clipped: bool,
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
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    timed(Stage::Elementwise, Cost::numbers(3 * x.len()), || {
        dispatch(LayerNormBackward { x, weight, epsilon, rule, dy, dx, dweight, dbias })
    });
}

struct LayerNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
    rule: SmallVariance,
    dy: &'a [f32],
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
    dbias: &'a mut [f32],
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
                s.store_some(s.mul(given_scale, s.mul_add(projection, hat, g)), dx);
            }
        }
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    epsilon: f32,
    rule: SmallVariance,
    out: &'a mut [f32],
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

/// The first numbers of `x`, at most sixteen; the other lanes are `other`.
#[inline(always)]
fn load_or<S: Simd>(s: S, x: &[f32], other: f32) -> S::V {
    match x.first_chunk() {
        Some(full) => s.load(full),
        None => {
            let mut lanes = [other; LANES];
            lanes[..x.len()].copy_from_slice(x);
            s.load(&lanes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, dispatch_at};
    use super::*;

    #[test]
    fn every_level_equals_the_plain_norm() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for h in 1..130 {
                let x: Vec<f32> = (0..2 * h).map(|i| (i * 7 % 13) as f32 - 5.5).collect();
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
                let bias: Vec<f32> = (0..h).map(|i| i as f32 / 50.0).collect();
                let mut out = vec![0.0; 2 * h];
                let rule = SmallVariance::AddEpsilon;
                let norm = LayerNorm { x: &x, weight: &weight, bias: &bias, epsilon: 1e-5, rule, out: &mut out };
                dispatch_at(level, norm);
                for (x, out) in x.chunks(h).zip(out.chunks(h)) {
                    let mean = x.iter().map(|x| *x as f64).sum::<f64>() / h as f64;
                    let variance = x.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / h as f64;
                    for i in 0..h {
                        let want = (x[i] as f64 - mean) / (variance + 1e-5).sqrt() * weight[i] as f64 + bias[i] as f64;
                        assert!((out[i] as f64 - want).abs() < 1e-5, "{level:?} h {h}: {} {want}", out[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_level_equals_the_plain_rms_norm() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for h in 1..130 {
                let x: Vec<f32> = (0..2 * (h + 3)).map(|i| (i * 7 % 13) as f32 - 5.5).collect();
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
                let rows = Rows { data: &x, stride: h + 3 };
                for (mode, before) in [(Out::Set, 0.0), (Out::Add, 1.0)] {
                    let mut out = vec![1.0; 2 * h];
                    let norm = RmsNorm { x: rows, weight: &weight, epsilon: 1e-2, scale: 0.5, out: &mut out, mode };
                    dispatch_at(level, norm);
                    let mut in_place = x[..h].to_vec();
                    dispatch_at(level, RmsNormInPlace { x: &mut in_place, weight: &weight, epsilon: 1e-2 });
                    assert!((0..h).all(|i| (in_place[i] * 0.5 + before as f32 - out[i]).abs() < 1e-5));
                    for (i, out) in out.chunks(h).enumerate() {
                        let x = rows.row(i, h);
                        let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / h as f64;
                        for j in 0..h {
                            let want = before + 0.5 * x[j] as f64 / (mean + 1e-2).sqrt() * weight[j] as f64;
                            assert!((out[j] as f64 - want).abs() < 1e-5, "{level:?} h {h}: {} {want}", out[j]);
                        }
                    }
                }
            }
        }
    }

    /// Rows that f32 can hold and the textbook's sums cannot: nearly constant ones, and ones whose squares overflow.
    fn extreme_rows(h: usize) -> Vec<Vec<f32>> {
        let wave = |i: usize| (i * 7 % 13) as f32 - 5.5;
        let mut rows = Vec::new();
        for c in [1.0f32, 10.1, 1234.567, 54321.9, 98765.4, 3e7, 1e12] {
            let ulp = f32::from_bits(c.to_bits() + 1) - c;
            rows.push(vec![c; h]);
            rows.push((0..h).map(|i| c + ulp * wave(i).round()).collect());
            rows.push((0..h).map(|i| if i == 0 { -c } else { c }).collect());
            rows.push((0..h).map(|i| if i + 1 == h { c + 3.0 * ulp } else { -c }).collect());
        }
        for c in [1e18, 1e19, 1e20, 1e25, 1e30, 5e37] {
            rows.push((0..h).map(|i| c * wave(i)).collect());
            rows.push((0..h).map(|i| if i % 2 == 0 { f32::MAX } else { c }).collect());
        }
        rows.push((0..h).map(|i| if i % 2 == 0 { f32::MAX } else { f32::MIN }).collect());
        rows
    }

    #[test]
    fn rows_of_any_size_and_spread() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for (h, rule) in [2, 16, 37, 96, 128, 256, 512]
                .into_iter()
                .flat_map(|h| [(h, SmallVariance::AddEpsilon), (h, SmallVariance::ClipBelowEpsilon)])
            {
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
                let bias: Vec<f32> = (0..h).map(|i| i as f32 / 50.0).collect();
                let dy: Vec<f32> = (0..h).map(|i| (i as f32).sin()).collect();
                for x in extreme_rows(h) {
                    let mean = x.iter().map(|x| *x as f64).sum::<f64>() / h as f64;
                    let variance = x.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / h as f64;
                    let clipped = rule == SmallVariance::ClipBelowEpsilon && variance < 1e-5;
                    let deviation = if clipped { 1e-5f64.sqrt() } else { (variance + 1e-5).sqrt() };
                    let hat: Vec<f64> = x.iter().map(|x| (*x as f64 - mean) / deviation).collect();

                    let mut out = vec![9.0; h];
                    let norm = LayerNorm { x: &x, weight: &weight, bias: &bias, epsilon: 1e-5, rule, out: &mut out };
                    dispatch_at(level, norm);
                    for i in 0..h {
                        let want = hat[i] * weight[i] as f64 + bias[i] as f64;
                        let error = (out[i] as f64 - want).abs();
                        assert!(error < 2e-6 * want.abs().max(1.0), "{level:?} {h} {} {want} {:?}", out[i], &x[..2]);
                    }

                    let (mut dx, mut dweight, mut dbias) = (vec![9.0; h], vec![0.0; h], vec![0.0; h]);
                    dispatch_at(
                        level,
                        LayerNormBackward {
                            x: &x,
                            weight: &weight,
                            epsilon: 1e-5,
                            rule,
                            dy: &dy,
                            dx: &mut dx,
                            dweight: &mut dweight,
                            dbias: &mut dbias,
                        },
                    );
                    let g: Vec<f64> = (0..h).map(|i| weight[i] as f64 * dy[i] as f64).collect();
                    let mean_g = g.iter().sum::<f64>() / h as f64;
                    let projection = g.iter().zip(&hat).map(|(g, hat)| g * hat).sum::<f64>() / h as f64;
                    let projection = if clipped { 0.0 } else { projection };
                    for i in 0..h {
                        let want = g[i] - mean_g - hat[i] * projection;
                        assert!((dx[i] as f64 * deviation - want).abs() < 2e-5, "{level:?} {h} {:?}", &x[..2]);
                        let want = dy[i] as f64 * hat[i];
                        assert!((dweight[i] as f64 - want).abs() < 2e-6 * want.abs().max(1.0));
                    }
                }
            }
        }
    }

    #[test]
    fn rms_of_any_size() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for h in [1, 2, 16, 37, 256] {
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
                for x in extreme_rows(h) {
                    let deviation = (x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / h as f64 + 1e-6).sqrt();
                    let (mut out, mut in_place) = (vec![1.0; h], x.clone());
                    let (rows, out_mut, mode) = (Rows { data: &x, stride: h }, &mut out[..], Out::Add);
                    dispatch_at(
                        level,
                        RmsNorm { x: rows, weight: &weight, epsilon: 1e-6, scale: 0.5, out: out_mut, mode },
                    );
                    dispatch_at(level, RmsNormInPlace { x: &mut in_place, weight: &weight, epsilon: 1e-6 });
                    for i in 0..h {
                        let want = x[i] as f64 / deviation * weight[i] as f64;
                        let close = |got: f64, want: f64| (got - want).abs() < 2e-6 * want.abs().max(1.0);
                        assert!(close(in_place[i] as f64, want), "{level:?} {h} {} {want}", in_place[i]);
                        assert!(close(out[i] as f64, 1.0 + want / 2.0), "{level:?} {h} {} {want}", out[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 20] {
                let mut x = vec![1.0; 40];
                x[place] = bad;
                let mut out = vec![0.0; 40];
                layer_norm(&x, &[1.0; 40], &[0.0; 40], 1e-5, SmallVariance::AddEpsilon, &mut out);
                assert!(out.iter().all(|y| y.is_nan()));
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences_on_every_level() {
        for rule in [SmallVariance::AddEpsilon, SmallVariance::ClipBelowEpsilon] {
            for (h, spread) in [(1, 1.0), (5, 1.0), (16, 1.0), (37, 1.0), (37, 1e-3)] {
                let x: Vec<f32> = (0..2 * h).map(|i| ((i * 7 % 13) as f32 - 5.5) * spread).collect();
                let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 10.0).collect();
                let dy: Vec<f32> = (0..2 * h).map(|i| (i as f32).sin()).collect();
                // Σ dy ⊙ norm(x), in f64
                let value = |x: &[f64]| -> f64 {
                    let mut total = 0.0;
                    for (x, dy) in x.chunks(h).zip(dy.chunks(h)) {
                        let mean = x.iter().sum::<f64>() / h as f64;
                        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / h as f64;
                        let clipped = rule.is_clipped(variance as f32, 1e-5);
                        let deviation = if clipped { 1e-5f64.sqrt() } else { (variance + 1e-5).sqrt() };
                        let terms = x.iter().zip(dy).zip(&weight);
                        total += terms.map(|((x, dy), w)| (x - mean) / deviation * *w as f64 * *dy as f64).sum::<f64>();
                    }
                    total
                };
                for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
                    let (mut dx, mut dweight, mut dbias) = (vec![9.0; 2 * h], vec![1.0; h], vec![2.0; h]);
                    dispatch_at(
                        level,
                        LayerNormBackward {
                            x: &x,
                            weight: &weight,
                            epsilon: 1e-5,
                            rule,
                            dy: &dy,
                            dx: &mut dx,
                            dweight: &mut dweight,
                            dbias: &mut dbias,
                        },
                    );
                    let wide: Vec<f64> = x.iter().map(|x| *x as f64).collect();
                    let largest = dx.iter().fold(1.0f64, |m, dx| m.max(dx.abs() as f64));
                    for i in 0..2 * h {
                        let step = 1e-6 * spread as f64;
                        let (mut above, mut below) = (wide.clone(), wide.clone());
                        above[i] += step;
                        below[i] -= step;
                        let slope = (value(&above) - value(&below)) / (2.0 * step);
                        assert!((dx[i] as f64 - slope).abs() < 1e-4 * largest, "{level:?} {rule:?} {h}");
                    }
                    for i in 0..h {
                        assert!((dbias[i] - 2.0 - dy[i] - dy[h + i]).abs() < 1e-5);
                    }
                    let mut y = vec![0.0; 2 * h];
                    layer_norm(&x, &vec![1.0; h], &vec![0.0; h], 1e-5, rule, &mut y);
                    for i in 0..h {
                        assert!((dweight[i] - 1.0 - dy[i] * y[i] - dy[h + i] * y[h + i]).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn the_two_rules_part_below_epsilon() {
        let (add, clip) = (SmallVariance::AddEpsilon, SmallVariance::ClipBelowEpsilon);
        assert_eq!(add.reciprocal_deviation(2e-5, 1e-5), clip.reciprocal_deviation(2e-5, 1e-5));
        approx::assert_relative_eq!(clip.reciprocal_deviation(9e-6, 1e-5), 316.22778, max_relative = 1e-6);
        assert!(add.reciprocal_deviation(9e-6, 1e-5) < 230.0);
    }
}
