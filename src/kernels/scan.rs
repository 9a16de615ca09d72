//! The selective scan: the recurrence at the heart of Mamba.

use ndarray::{ArrayViewMut1, ArrayViewMut2, Axis};

use super::math;
use super::matmul::Rows;
use super::parallel;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Channels that pass through time together: their states stay in the first cache, and two vectors of them hide each
/// other's latency.
const CHANNELS: usize = 2 * LANES;

/// The arguments of a scan over l frames of d channels with n states each.
#[derive(Clone, Copy)]
pub(crate) struct ScanInput<'a> {
    /// Δ `[l, d]`, the time steps.
    pub delta: Rows<'a>,
    /// v `[l, d]`, the input.
    pub v: Rows<'a>,
    /// B `[l, n]`, what the input writes.
    pub b: Rows<'a>,
    /// C `[l, n]`, what the output reads.
    pub c: Rows<'a>,
    /// z `[l, d]`, the gate before its silu.
    pub z: Rows<'a>,
    /// A `[n, d]`, the decay rates, all negative.
    pub a: &'a [f32],
    /// D `[d]`, the skip, if there is one.
    pub skip: Option<&'a [f32]>,
    /// One time step a frame `[l]` to be used with B in place of Δ.
    pub input_step: Option<&'a [f32]>,
}

/// For t = 0 … l−1, with the state S `[n, d]` (transposed against the paper, so that channels lie side by side):
///
/// S = exp(Δ_t A) ⊙ S + B_t (Δ_t ⊙ v_t)ᵀ,  out_t = (S·C_t + D ⊙ v_t) ⊙ silu(z_t).
pub(crate) fn selective_scan(input: ScanInput, state: ArrayViewMut2<f32>, out: ArrayViewMut2<f32>) {
    scan_channels(input, 0, state, out);
}

/// The channels from `first` on, as many as `out` has columns, on several threads if that pays.
fn scan_channels(input: ScanInput, first: usize, state: ArrayViewMut2<f32>, out: ArrayViewMut2<f32>) {
    /// Multiplications that take as long as one exp and what surrounds it.
    const STATE_WORK: usize = 50;
    let half = (out.ncols() / 2).next_multiple_of(CHANNELS);
    let work = half * out.nrows() * state.nrows() * STATE_WORK;
    if half < out.ncols() && work >= parallel::MIN_WORK {
        let (left, right) = out.split_at(Axis(1), half);
        let (left_state, right_state) = state.split_at(Axis(1), half);
        parallel::join(
            || scan_channels(input, first, left_state, left),
            || scan_channels(input, first + half, right_state, right),
        );
    } else {
        dispatch(Scan { input, first, state, out });
    }
}

struct Scan<'a> {
    input: ScanInput<'a>,
    first: usize,
    state: ArrayViewMut2<'a, f32>,
    out: ArrayViewMut2<'a, f32>,
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let ScanInput { delta, v, b, c, z, a, skip, input_step } = self.input;
        let (n, columns) = self.state.dim();
        let d = a.len() / n;
        let zero = [s.splat(0.0); 2];
        let mut decays = vec![zero; n]; // A of the channels at hand
        let mut states = vec![zero; n]; // S of the channels at hand
        for begin in (0..columns).step_by(CHANNELS) {
            let end = columns.min(begin + CHANNELS);
            let here = self.first + begin..self.first + end;
            for (row, decay) in a.chunks_exact(d).zip(&mut decays) {
                *decay = load_pair(s, &row[here.clone()]);
            }
            for (row, state) in self.state.rows_mut().into_iter().zip(&mut states) {
                *state = load_pair(s, &cells(row)[begin..end]);
            }
            let skip = match skip {
                Some(skip) => load_pair(s, &skip[here.clone()]),
                None => zero,
            };

            for (t, out) in self.out.rows_mut().into_iter().enumerate() {
                let delta = load_pair(s, &delta.data[t * delta.stride..][here.clone()]);
                let v = load_pair(s, &v.data[t * v.stride..][here.clone()]);
                let z = load_pair(s, &z.data[t * z.stride..][here.clone()]);
                let step = match input_step {
                    Some(step) => [s.splat(step[t]); 2],
                    None => delta,
                };
                let input = [s.mul(step[0], v[0]), s.mul(step[1], v[1])];
                let b = &b.data[t * b.stride..][..n];
                let c = &c.data[t * c.stride..][..n];
                let mut y = [s.mul(skip[0], v[0]), s.mul(skip[1], v[1])];
                for ((decay, state), (&b, &c)) in decays.iter().zip(&mut states).zip(b.iter().zip(c)) {
                    let (b, c) = (s.splat(b), s.splat(c));
                    for i in 0..2 {
                        let kept = s.mul(math::exp(s, s.mul(delta[i], decay[i])), state[i]);
                        state[i] = s.mul_add(input[i], b, kept);
                        y[i] = s.mul_add(state[i], c, y[i]);
                    }
                }
                let gated = [s.mul(y[0], math::silu(s, z[0])), s.mul(y[1], math::silu(s, z[1]))];
                store_pair(s, gated, &mut cells(out)[begin..end]);
            }

            for (row, state) in self.state.rows_mut().into_iter().zip(&states) {
                store_pair(s, *state, &mut cells(row)[begin..end]);
            }
        }
    }
}

/// A row of a matrix or of some of its columns: contiguous, as only whole columns are ever split off.
#[inline(always)]
fn cells<'a>(row: ArrayViewMut1<'a, f32>) -> &'a mut [f32] {
    row.into_slice().expect("the numbers of a row lie side by side")
}

/// Up to [`CHANNELS`] numbers in two vectors.
#[inline(always)]
fn load_pair<S: Simd>(s: S, x: &[f32]) -> [S::V; 2] {
    let (low, high) = x.split_at(x.len().min(LANES));
    [s.load_some(low), s.load_some(high)]
}

#[inline(always)]
fn store_pair<S: Simd>(s: S, v: [S::V; 2], x: &mut [f32]) {
    let (low, high) = x.split_at_mut(x.len().min(LANES));
    s.store_some(v[0], low);
    s.store_some(v[1], high);
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, dispatch_at};
    use super::*;
    use ndarray::Array2;

    fn wave(count: usize, step: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|i| ((i * step % 37) as f32 / 18.0 - 1.0) * scale).collect()
    }

    /// The recurrence as the paper writes it, in f64, one number at a time: the oracle.
    fn reference(input: &ScanInput, state: &mut Array2<f32>, l: usize, d: usize) -> Vec<f64> {
        let n = state.nrows();
        let at = |rows: Rows, t: usize, i: usize| rows.data[t * rows.stride + i] as f64;
        let mut out = vec![0.0; l * d];
        for ch in 0..d {
            let mut hidden: Vec<f64> = state.column(ch).iter().map(|s| *s as f64).collect();
            for t in 0..l {
                let (delta, v, z) = (at(input.delta, t, ch), at(input.v, t, ch), at(input.z, t, ch));
                let step = input.input_step.map_or(delta, |step| step[t] as f64);
                let mut y = input.skip.map_or(0.0, |skip| skip[ch] as f64) * v;
                for (i, hidden) in hidden.iter_mut().enumerate() {
                    let decay = (delta * input.a[i * d + ch] as f64).exp();
                    *hidden = decay * *hidden + step * at(input.b, t, i) * v;
                    y += *hidden * at(input.c, t, i);
                }
                out[t * d + ch] = y * z / (1.0 + (-z).exp());
            }
            for i in 0..n {
                state[[i, ch]] = hidden[i] as f32;
            }
        }
        out
    }

    #[test]
    fn every_level_equals_the_plain_recurrence() {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            for d in (1..130).step_by(3).chain([16, 32, 64, 512]) {
                for (l, n, edifice) in [(1, 16, false), (9, 5, true), (9, 1, false)] {
                    let delta: Vec<f32> = wave(l * d, 5, 0.04).iter().map(|x| x + 0.05).collect();
                    let (v, z) = (wave(l * d, 7, 1.0), wave(l * 2 * d, 11, 2.0));
                    let bc = wave(l * 2 * n, 13, 1.0);
                    let a: Vec<f32> = (0..n * d).map(|i| -((i / d + 1) as f32) - (i % 3) as f32 / 7.0).collect();
                    let (skip, step) = (wave(d, 3, 1.0), wave(l, 3, 0.1));
                    let input = ScanInput {
                        delta: Rows { data: &delta, stride: d },
                        v: Rows { data: &v, stride: d },
                        b: Rows { data: &bc, stride: 2 * n },
                        c: Rows { data: &bc[n..], stride: 2 * n },
                        z: Rows { data: &z[d..], stride: 2 * d },
                        a: &a,
                        skip: (!edifice).then_some(&skip),
                        input_step: edifice.then_some(&step),
                    };
                    let mut want_state = Array2::from_elem((n, d), 0.5);
                    let mut state = want_state.clone();
                    let want = reference(&input, &mut want_state, l, d);
                    let mut out = Array2::zeros((l, d));
                    dispatch_at(level, Scan { input, first: 0, state: state.view_mut(), out: out.view_mut() });
                    for (got, want) in out.iter().zip(&want) {
                        assert!((*got as f64 - want).abs() < 1e-5, "{level:?} d {d} {got} {want}");
                    }
                    for (got, want) in state.iter().zip(&want_state) {
                        assert!((got - want).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn channels_do_not_depend_on_how_they_are_shared_out() {
        let (l, d, n) = (200, 300, 16);
        let delta: Vec<f32> = wave(l * d, 5, 0.04).iter().map(|x| x + 0.05).collect();
        let (v, bc) = (wave(l * d, 7, 1.0), wave(l * 2 * n, 13, 1.0));
        let a: Vec<f32> = (0..n * d).map(|i| -((i / d + 1) as f32)).collect();
        let input = ScanInput {
            delta: Rows { data: &delta, stride: d },
            v: Rows { data: &v, stride: d },
            b: Rows { data: &bc, stride: 2 * n },
            c: Rows { data: &bc[n..], stride: 2 * n },
            z: Rows { data: &v, stride: d },
            a: &a,
            skip: None,
            input_step: None,
        };
        let (mut shared, mut alone) = (Array2::zeros((l, d)), Array2::zeros((l, d)));
        let (mut shared_state, mut state) = (Array2::zeros((n, d)), Array2::zeros((n, d)));
        selective_scan(input, shared_state.view_mut(), shared.view_mut());
        dispatch(Scan { input, first: 0, state: state.view_mut(), out: alone.view_mut() });
        assert_eq!(shared, alone);
        assert_eq!(shared_state, state);
    }
}
