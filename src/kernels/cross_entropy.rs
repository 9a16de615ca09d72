//! Cross-entropy of one row of logits.

use super::math;
use super::profiler::{Cost, Stage, timed};
use super::simd::{Kernel, LANES, Simd, dispatch};

/// ln Σ exp(x); NaN if a logit is NaN.
pub(crate) fn log_sum_exp(x: &[f32]) -> f32 {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || dispatch(LogSumExp(x)))
}

/// x = scale · exp(x − log_sum): the softmax, where `log_sum` is ln Σ exp(x).
pub(crate) fn softmax(x: &mut [f32], log_sum: f32, scale: f32) {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || dispatch(Softmax { x, log_sum, scale }));
}

struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.0.as_chunks();
        let mut largest = s.splat(f32::NEG_INFINITY);
        for x in whole {
            largest = s.max(s.load(x), largest);
        }
        let largest = rest.iter().fold(s.largest(largest), |largest, x| largest.max(*x));
        let shift = s.splat(largest);
        let mut sum = s.splat(0.0);
        for x in whole {
            sum = s.add(sum, math::exp(s, s.sub(s.load(x), shift)));
        }
        let mut lanes = [0.0; LANES];
        s.store(math::exp(s, s.sub(s.load_some(rest), shift)), &mut lanes);
        largest + (s.sum(sum) + lanes[..rest.len()].iter().sum::<f32>()).ln()
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    log_sum: f32,
    scale: f32,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (shift, scale) = (s.splat(self.log_sum), s.splat(self.scale));
        for x in self.x.chunks_mut(LANES) {
            s.store_some(s.mul(scale, math::exp(s, s.sub(s.load_some(x), shift))), x);
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
            for v in 1..130 {
                let mut x: Vec<f32> = (0..v).map(|i| ((i * 29 % 31) as f32 - 15.0) * 2.0 + 50.0).collect();
                let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                let log_sum = dispatch_at(level, LogSumExp(&x));
                assert!((f64::from(log_sum) - sum.ln()).abs() < 1e-5, "{level:?} {v}: {log_sum} {}", sum.ln());
                let want: Vec<f64> = x.iter().map(|x| 0.5 * f64::from(*x).exp() / sum).collect();
                dispatch_at(level, Softmax { x: &mut x, log_sum, scale: 0.5 });
                assert!(x.iter().zip(want).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5), "{level:?} {v}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_is_seen() {
        for place in [0, 17] {
            let mut x = [1.0; 18];
            x[place] = f32::NAN;
            assert!(log_sum_exp(&x).is_nan());
        }
    }
}
