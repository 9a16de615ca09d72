//! Normalisation of rows to mean 0 and variance 1.

use super::simd::{Kernel, LANES, Simd, dispatch};

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
        match self {
            SmallVariance::ClipBelowEpsilon if variance < epsilon => epsilon.sqrt().recip(),
            _ => (variance + epsilon).sqrt().recip(),
        }
    }
}

/// out = weight ⊙ (x − mean) / deviation + bias, for each row of `weight.len()` numbers.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, rule: SmallVariance, out: &mut [f32]) {
    dispatch(LayerNorm { x, weight, bias, epsilon, rule, out });
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
            let mut sum = s.splat(0.0);
            for x in x.chunks(LANES) {
                sum = s.add(sum, s.load_some(x));
            }
            let mean = s.sum(sum) / h as f32;

            let centre = s.splat(mean);
            let mut squares = s.splat(0.0);
            let (whole, rest) = x.as_chunks();
            for x in whole {
                let x = s.sub(s.load(x), centre);
                squares = s.mul_add(x, x, squares);
            }
            let rest: f32 = rest.iter().map(|x| (x - mean) * (x - mean)).sum();
            let variance = (s.sum(squares) + rest) / h as f32;

            let scale = s.splat(self.rule.reciprocal_deviation(variance, self.epsilon));
            let parameters = self.weight.chunks(LANES).zip(self.bias.chunks(LANES));
            for ((x, out), (weight, bias)) in x.chunks(LANES).zip(out.chunks_mut(LANES)).zip(parameters) {
                let x = s.sub(s.load_some(x), centre);
                let y = s.mul_add(s.mul(s.load_some(weight), scale), x, s.load_some(bias));
                s.store_some(y, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, dispatch_at};
    use super::*;

    #[test]
    fn every_level_equals_the_plain_norm() {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
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
    fn the_two_rules_part_below_epsilon() {
        let (add, clip) = (SmallVariance::AddEpsilon, SmallVariance::ClipBelowEpsilon);
        assert_eq!(add.reciprocal_deviation(2e-5, 1e-5), clip.reciprocal_deviation(2e-5, 1e-5));
        approx::assert_relative_eq!(clip.reciprocal_deviation(9e-6, 1e-5), 316.22778, max_relative = 1e-6);
        assert!(add.reciprocal_deviation(9e-6, 1e-5) < 230.0);
    }
}
