//! Depthwise causal convolution over time.

use super::math::{self, Silu};
use super::matmul::Rows;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Taps of the convolution.
pub(crate) const TAPS: usize = 4;

/// out `[l, d]`: out_t = silu(bias + Σᵢ weight_i ⊙ x_{t−3+i}) for i = 0 … 3. `weight` is `[4, d]`; `before` `[3, d]` holds
/// the rows of x in front of the first, oldest first.
pub(crate) fn conv_silu(x: Rows, before: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    dispatch(Conv { x, before, weight, bias, out });
    math::map::<Silu>(out);
}

struct Conv<'a> {
    x: Rows<'a>,
    before: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Conv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.bias.len();
        for (t, out) in self.out.chunks_exact_mut(d).enumerate() {
            // the row of x at t − 3 + tap
            let rows: [&[f32]; TAPS] = std::array::from_fn(|tap| match (t + tap).checked_sub(TAPS - 1) {
                Some(t) => &self.x.data[t * self.x.stride..][..d],
                None => &self.before[(t + tap) * d..][..d],
            });
            let taps: [&[f32]; TAPS] = std::array::from_fn(|tap| &self.weight[tap * d..][..d]);
            for (first, out) in (0..d).step_by(LANES).zip(out.chunks_mut(LANES)) {
                let lanes = first..first + out.len();
                let mut sum = s.load_some(&self.bias[lanes.clone()]);
                for (tap, row) in taps.iter().zip(rows) {
                    sum = s.mul_add(s.load_some(&tap[lanes.clone()]), s.load_some(&row[lanes.clone()]), sum);
                }
                s.store_some(sum, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, dispatch_at};
    use super::*;

    #[test]
    fn every_level_equals_the_plain_convolution() {
        let wave = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 10.0;
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            for d in 1..70 {
                let (l, stride) = (6, d + 3);
                let x: Vec<f32> = (0..l * stride).map(wave).collect();
                let before: Vec<f32> = (0..3 * d).map(|i| wave(i + 5)).collect();
                let weight: Vec<f32> = (0..4 * d).map(|i| wave(i + 11)).collect();
                let bias: Vec<f32> = (0..d).map(|i| wave(i + 17)).collect();
                let mut out = vec![0.0; l * d];
                let rows = Rows { data: &x, stride };
                let conv = Conv { x: rows, before: &before, weight: &weight, bias: &bias, out: &mut out };
                dispatch_at(level, conv);
                for t in 0..l {
                    for c in 0..d {
                        let mut want = bias[c];
                        for tap in 0..TAPS {
                            let x = if t + tap < 3 { before[(t + tap) * d + c] } else { x[(t + tap - 3) * stride + c] };
                            want += weight[tap * d + c] * x;
                        }
                        assert!((out[t * d + c] - want).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
