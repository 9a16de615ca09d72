//! Depthwise causal convolution over time.

use super::math::{self, Silu};
use super::profiler::{Cost, Stage, timed};
use super::rows::Rows;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Taps of the convolution.
pub(crate) const TAPS: usize = 4;
/// Rows that are fetched before their turn.
const AHEAD: usize = 8;

/// out `[l, d]`: out_t = bias + Σᵢ weight_i ⊙ x_{t−3+i} for i = 0 … 3, the argument of silu in [`conv_silu`].
pub(crate) fn conv(x: Rows, before: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    timed(Stage::Elementwise, Cost::numbers(2 * out.len()), || dispatch(Conv { x, before, weight, bias, out }));
}

/// out `[l, d]`: out_t = silu(bias + Σᵢ weight_i ⊙ x_{t−3+i}) for i = 0 … 3. `weight` is `[4, d]`; `before` `[3, d]` holds
/// the rows of x in front of the first, oldest first.
pub(crate) fn conv_silu(x: Rows, before: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    conv(x, before, weight, bias, out);
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
            let ahead = self.x.data.as_ptr().wrapping_add((t + AHEAD) * self.x.stride);
            for (first, out) in (0..d).step_by(LANES).zip(out.chunks_mut(LANES)) {
                let lanes = first..first + out.len();
                s.prefetch(ahead.wrapping_add(first));
                let mut sum = s.load_some(&self.bias[lanes.clone()]);
                for (tap, row) in taps.iter().zip(rows) {
                    sum = s.mul_add(s.load_some(&tap[lanes.clone()]), s.load_some(&row[lanes.clone()]), sum);
                }
                s.store_some(sum, out);
            }
        }
    }
}

/// What [`conv_backward`] writes: dx `[l, d]` with rows `stride` apart is overwritten, the others are added to.
pub(crate) struct ConvGradient<'a> {
    pub dx: &'a mut [f32],
    pub stride: usize,
    /// `[3, d]`, of the rows in front of x.
    pub before: &'a mut [f32],
    /// `[4, d]`
    pub weight: &'a mut [f32],
    /// `[d]`
    pub bias: &'a mut [f32],
}

/// The gradient of [`conv`] for dy `[l, d]`: row t of x went into the outputs t … t + 3, through weight 3 … 0.
pub(crate) fn conv_backward(x: Rows, before: &[f32], weight: &[f32], dy: &[f32], gradient: ConvGradient) {
    timed(Stage::Elementwise, Cost::numbers(3 * dy.len()), || {
        dispatch(ConvBackward { x, before, weight, dy, gradient })
    });
}

struct ConvBackward<'a> {
    x: Rows<'a>,
    before: &'a [f32],
    weight: &'a [f32],
    dy: &'a [f32],
    gradient: ConvGradient<'a>,
}

impl Kernel for ConvBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ConvGradient { dx, stride, before: dbefore, weight: dweight, bias: dbias } = self.gradient;
        let d = dbias.len();
        let l = self.dy.len() / d;
        for first in (0..d).step_by(LANES) {
            let lanes = first..d.min(first + LANES);
            let mut taps = [s.splat(0.0); TAPS];
            for (tap, lane) in taps.iter_mut().enumerate() {
                *lane = s.load_some(&self.weight[tap * d..][lanes.clone()]);
            }
            let mut dtaps = [s.splat(0.0); TAPS];
            let mut dsum = s.load_some(&dbias[lanes.clone()]);
            // row j of the history and x together is seen by output j − tap through each tap
            for j in 0..l + TAPS - 1 {
                let x = match j.checked_sub(TAPS - 1) {
                    Some(t) => s.load_some(&self.x.data[t * self.x.stride..][lanes.clone()]),
                    None => s.load_some(&self.before[j * d..][lanes.clone()]),
                };
                let mut sum = s.splat(0.0);
                for (tap, (weight, dweight)) in taps.iter().zip(&mut dtaps).enumerate() {
                    if let Some(t) = j.checked_sub(tap).filter(|&t| t < l) {
                        let dy = s.load_some(&self.dy[t * d..][lanes.clone()]);
                        sum = s.mul_add(*weight, dy, sum);
                        *dweight = s.mul_add(dy, x, *dweight);
                    }
                }
                match j.checked_sub(TAPS - 1) {
                    Some(t) => {
                        dsum = s.add(dsum, s.load_some(&self.dy[t * d..][lanes.clone()]));
                        s.store_some(sum, &mut dx[t * stride..][lanes.clone()]);
                    }
                    None => {
                        let dbefore = &mut dbefore[j * d..][lanes.clone()];
                        s.store_some(s.add(s.load_some(dbefore), sum), dbefore);
                    }
                }
            }
            s.store_some(dsum, &mut dbias[lanes.clone()]);
            for (tap, lane) in dtaps.into_iter().enumerate() {
                let dweight = &mut dweight[tap * d..][lanes.clone()];
                s.store_some(s.add(s.load_some(dweight), lane), dweight);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, dispatch_at};
    use super::*;

    #[test]
    fn every_level_equals_the_plain_convolution() {
        let wave = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 10.0;
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
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

    #[test]
    fn gradients_equal_the_plain_sums_on_every_level() {
        let wave = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 10.0;
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for (d, l) in [(1, 1), (7, 2), (16, 3), (33, 9), (70, 5)] {
                let stride = d + 3;
                let x: Vec<f32> = (0..l * stride).map(wave).collect();
                let before: Vec<f32> = (0..3 * d).map(|i| wave(i + 5)).collect();
                let weight: Vec<f32> = (0..4 * d).map(|i| wave(i + 11)).collect();
                let dy: Vec<f32> = (0..l * d).map(|i| wave(i + 3)).collect();
                let (mut dx, mut dbefore) = (vec![7.0; l * stride], vec![1.0; 3 * d]);
                let (mut dweight, mut dbias) = (vec![1.0; 4 * d], vec![1.0; d]);
                dispatch_at(
                    level,
                    ConvBackward {
                        x: Rows { data: &x, stride },
                        before: &before,
                        weight: &weight,
                        dy: &dy,
                        gradient: ConvGradient {
                            dx: &mut dx,
                            stride,
                            before: &mut dbefore,
                            weight: &mut dweight,
                            bias: &mut dbias,
                        },
                    },
                );
                let (mut want_x, mut want_before) = (vec![0.0; l * d], vec![1.0; 3 * d]);
                let (mut want_weight, mut want_bias) = (vec![1.0; 4 * d], vec![1.0; d]);
                for t in 0..l {
                    for c in 0..d {
                        let dy = dy[t * d + c];
                        want_bias[c] += dy;
                        for tap in 0..TAPS {
                            let weight = weight[tap * d + c];
                            if t + tap < 3 {
                                want_before[(t + tap) * d + c] += weight * dy;
                                want_weight[tap * d + c] += before[(t + tap) * d + c] * dy;
                            } else {
                                want_x[(t + tap - 3) * d + c] += weight * dy;
                                want_weight[tap * d + c] += x[(t + tap - 3) * stride + c] * dy;
                            }
                        }
                    }
                }
                let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4);
                assert!(close(&dbefore, &want_before) && close(&dweight, &want_weight) && close(&dbias, &want_bias));
                for t in 0..l {
                    assert!(close(&dx[t * stride..][..d], &want_x[t * d..][..d]), "{level:?}");
                    assert!(dx[t * stride + d..][..3].iter().all(|dx| *dx == 7.0));
                }
            }
        }
    }
}
