//! The selective scan: the recurrence at the heart of Mamba.

use ndarray::{ArrayView3, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3, Axis};

use super::math;
use super::profiler::{Cost, Stage, timed};
use super::rows::{Rows, RowsMut};
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
    /// The mean of Δ over the channels `[l]`, where B is scaled by it in place of Δ.
    pub mean_delta: Option<&'a [f32]>,
}

/// Frames of a chunk: the states at the start of each are kept for the backward pass, those inside computed again. Keeping all
/// would take n times as much memory as the output; with 16 frames the states and decays of a chunk (64 kB at n = 16) stay in
/// the second cache, and what is kept is one number in 16.
pub(crate) const CHUNK: usize = 16;

/// Frames through which some channels pass before the next channels do: their rows stay in the second cache. A few channels
/// read a small part of a row, and the rows of a long sequence would otherwise come from memory once for each of them.
const FRAMES: usize = 64;

/// Frames to prefetch ahead. Little is read of each frame, and the CPU's own prefetcher does not see where reading
/// continues.
const AHEAD: usize = 8;

/// Where the states `[⌈l/16⌉, n, d]` at the start of each chunk are kept.
pub(crate) type Checkpoints<'a> = Option<ArrayViewMut3<'a, f32>>;

/// For t = 0 … l−1, with the state S `[n, d]` (transposed against the paper, so that channels lie side by side):
///
/// S = exp(Δ_t A) ⊙ S + B_t (Δ_t ⊙ v_t)ᵀ,  out_t = (S·C_t + D ⊙ v_t) ⊙ silu(z_t),
///
/// for the channels from `first` on, as many as `out` and `state` have columns.
pub(crate) fn selective_scan(
    input: ScanInput,
    first: usize,
    state: ArrayViewMut2<f32>,
    out: ArrayViewMut2<f32>,
    checkpoints: Checkpoints,
) {
    // one for each state, and that of the gate
    let exps = (out.len() * (state.nrows() + 1)) as u64;
    let work = Cost { exps, ..Cost::default() };
    timed(Stage::Scan, work, || dispatch(Scan { input, first, state, out, checkpoints }));
}

struct Scan<'a> {
    input: ScanInput<'a>,
    first: usize,
    state: ArrayViewMut2<'a, f32>,
    out: ArrayViewMut2<'a, f32>,
    checkpoints: Checkpoints<'a>,
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let ScanInput { delta, v, b, c, z, a, skip, mean_delta } = self.input;
        let (n, columns) = self.state.dim();
        let (l, d) = (self.out.nrows(), a.len() / n);
        let zero = [s.splat(0.0); 2];
        let log2_e = s.splat(std::f32::consts::LOG2_E);
        let mut decays = vec![zero; n]; // A/ln 2 of these channels
        let mut states = vec![zero; n]; // S of these channels
        for start in (0..l).step_by(FRAMES) {
            let stop = l.min(start + FRAMES);
            for begin in (0..columns).step_by(CHANNELS) {
                let end = columns.min(begin + CHANNELS);
                let here = self.first + begin..self.first + end;
                for (row, decay) in a.chunks_exact(d).zip(&mut decays) {
                    *decay = load_pair(s, &row[here.clone()]).map(|rate| s.mul(rate, log2_e));
                }
                for (row, state) in self.state.rows_mut().into_iter().zip(&mut states) {
                    *state = load_pair(s, &cells(row)[begin..end]);
                }
                let skip = match skip {
                    Some(skip) => load_pair(s, &skip[here.clone()]),
                    None => zero,
                };

                for t in start..stop {
                    if let (0, Some(kept)) = (t % CHUNK, &mut self.checkpoints) {
                        let mut kept = kept.index_axis_mut(Axis(0), t / CHUNK);
                        for (row, state) in kept.rows_mut().into_iter().zip(&states) {
                            store_pair(s, *state, &mut cells(row)[begin..end]);
                        }
                    }
                    // or the first of these frames of the next channels, or the next frames of the first ones
                    let (next, column) = match t + AHEAD {
                        next if next < stop => (next, here.start),
                        next if end < columns => (next - stop + start, here.end),
                        next => (next, self.first),
                    };
                    for rows in [delta, v, z] {
                        fetch(s, rows, next, column);
                    }
                    let delta = load_pair(s, &delta.data[t * delta.stride..][here.clone()]);
                    let v = load_pair(s, &v.data[t * v.stride..][here.clone()]);
                    let z = load_pair(s, &z.data[t * z.stride..][here.clone()]);
                    let input_delta = input_delta(s, mean_delta, t, delta);
                    let input = [s.mul(input_delta[0], v[0]), s.mul(input_delta[1], v[1])];
                    let b = &b.data[t * b.stride..][..n];
                    let c = &c.data[t * c.stride..][..n];
                    let mut y = [s.mul(skip[0], v[0]), s.mul(skip[1], v[1])];
                    for ((decay, state), (&b, &c)) in decays.iter().zip(&mut states).zip(b.iter().zip(c)) {
                        let (b, c) = (s.splat(b), s.splat(c));
                        for i in 0..2 {
                            let kept = s.mul(math::exp2_negative(s, s.mul(delta[i], decay[i])), state[i]);
                            state[i] = s.mul_add(input[i], b, kept);
                            y[i] = s.mul_add(state[i], c, y[i]);
                        }
                    }
                    let gated = [s.mul(y[0], math::silu(s, z[0])), s.mul(y[1], math::silu(s, z[1]))];
                    store_pair(s, gated, &mut cells(self.out.row_mut(t))[begin..end]);
                }

                for (row, state) in self.state.rows_mut().into_iter().zip(&states) {
                    store_pair(s, *state, &mut cells(row)[begin..end]);
                }
            }
        }
    }
}

/// What [`selective_scan_backward`] writes. Rows of `bc` and `xz` are longer than what belongs to the scan.
pub(crate) struct ScanGradient<'a> {
    /// dΔ `[l, d]`, overwritten.
    pub delta: &'a mut [f32],
    /// dv `[l, d]`, overwritten.
    pub v: &'a mut [f32],
    /// dB | dC in the last 2n columns of `[l, ·]`, overwritten.
    pub bc: RowsMut<'a>,
    /// dz in the last d columns of `[l, ·]`, overwritten.
    pub z: RowsMut<'a>,
    /// dA `[n, d]`, added to.
    pub a: &'a mut [f32],
    /// dD `[d]`, added to, if there is a skip.
    pub skip: Option<&'a mut [f32]>,
    /// The gradient `[n, d]` of the state after the last frame; becomes that of the state before the first.
    pub state: &'a mut [f32],
    /// The gradient `[l]` of the mean of Δ, where B is scaled by it; overwritten.
    pub mean_delta: Option<&'a mut [f32]>,
}

/// The gradient of [`selective_scan`] for dout `[l, d]`, as the reverse recurrence. With dy = dout ⊙ silu(z), Δ′ = Δ or its mean in
/// the frame, and from the last frame to the first
///
/// ```text
/// dS   = dS + dy Cᵀ                      of the state after the frame
/// dC   = Σ_channels dy S_t               dB = Σ_channels dS · Δ′ · v
/// dv   = Δ′ · (dS · B) + D dy            dΔ′ = v · (dS · B)
/// dE   = dS ⊙ exp(Δ A) ⊙ S_{t−1}         of the exponent Δ A:  dΔ += dE · A,  dA += dE · Δ
/// dS   = dS ⊙ exp(Δ A)                   of the state before the frame
/// ```
pub(crate) fn selective_scan_backward(
    input: ScanInput,
    checkpoints: ArrayView3<f32>,
    dout: &[f32],
    gradient: ScanGradient,
) {
    // one for each state, that of the gate and that of its slope
    let exps = (dout.len() * (checkpoints.dim().1 + 2)) as u64;
    let work = Cost { exps, ..Cost::default() };
    timed(Stage::Scan, work, || dispatch(ScanBackward { input, checkpoints, dout, gradient }));
}

struct ScanBackward<'a> {
    input: ScanInput<'a>,
    checkpoints: ArrayView3<'a, f32>,
    dout: &'a [f32],
    gradient: ScanGradient<'a>,
}

impl Kernel for ScanBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ScanInput { delta, v, b, c, z, a, skip, mean_delta } = self.input;
        let mut gradient = self.gradient;
        let (_, n, d) = self.checkpoints.dim();
        let l = self.dout.len() / d;
        let zero = [s.splat(0.0); 2];
        let mut rates = vec![zero; n]; // A of these channels
        let mut powers = vec![zero; n]; // A/ln 2
        let log2_e = s.splat(std::f32::consts::LOG2_E);
        let mut drates = vec![zero; n];
        let mut dstates = vec![zero; n]; // dS
        let mut decays = vec![zero; CHUNK * n]; // exp(Δ A) of the chunk
        let mut states = vec![zero; CHUNK * n]; // S before each frame of the chunk
        let mut state = vec![zero; n]; // S at the current frame
        // sums over channels, still in lanes
        let mut db = vec![s.splat(0.0); CHUNK * n];
        let mut dc = vec![s.splat(0.0); CHUNK * n];
        let mut dmean_delta = [s.splat(0.0); CHUNK];

        for (chunk, kept) in self.checkpoints.outer_iter().enumerate().rev() {
            let frames = chunk * CHUNK..l.min((chunk + 1) * CHUNK);
            let first = frames.start;
            db.fill(s.splat(0.0));
            dc.fill(s.splat(0.0));
            dmean_delta.fill(s.splat(0.0));
            for begin in (0..d).step_by(CHANNELS) {
                let here = begin..d.min(begin + CHANNELS);
                let row = |i: usize| i * d + here.start..i * d + here.end;
                for i in 0..n {
                    rates[i] = load_pair(s, &a[row(i)]);
                    powers[i] = rates[i].map(|rate| s.mul(rate, log2_e));
                    dstates[i] = load_pair(s, &gradient.state[row(i)]);
                    drates[i] = load_pair(s, &gradient.a[row(i)]);
                    let kept = kept.row(i).to_slice().expect("checkpoints are in standard layout");
                    state[i] = load_pair(s, &kept[here.clone()]);
                }

                for t in frames.clone() {
                    // the same frame of the next channels, or of the first ones in the chunk before
                    let (next, column) = if here.end < d { (t, here.end) } else { (t.wrapping_sub(CHUNK), 0) };
                    for rows in [delta, v, z, Rows { data: self.dout, stride: d }] {
                        fetch(s, rows, next, column);
                    }
                    let delta = load_pair(s, &delta.data[t * delta.stride..][here.clone()]);
                    let v = load_pair(s, &v.data[t * v.stride..][here.clone()]);
                    let input_delta = input_delta(s, mean_delta, t, delta);
                    let input = [s.mul(input_delta[0], v[0]), s.mul(input_delta[1], v[1])];
                    let b = &b.data[t * b.stride..][..n];
                    let place = (t - first) * n..(t - first + 1) * n;
                    let chunk = decays[place.clone()].iter_mut().zip(&mut states[place]);
                    for (((decay, before), state), (power, &b)) in chunk.zip(&mut state).zip(powers.iter().zip(b)) {
                        let b = s.splat(b);
                        *before = *state;
                        for i in 0..2 {
                            decay[i] = math::exp2_negative(s, s.mul(delta[i], power[i]));
                            state[i] = s.mul_add(input[i], b, s.mul(decay[i], state[i]));
                        }
                    }
                }

                let skips = match skip {
                    Some(skip) => load_pair(s, &skip[here.clone()]),
                    None => zero,
                };
                let mut dskip = zero;
                for t in frames.clone().rev() {
                    let delta = load_pair(s, &delta.data[t * delta.stride..][here.clone()]);
                    let v = load_pair(s, &v.data[t * v.stride..][here.clone()]);
                    let z = load_pair(s, &z.data[t * z.stride..][here.clone()]);
                    let dout = load_pair(s, &self.dout[row(t)]);
                    let dy = [s.mul(dout[0], math::silu(s, z[0])), s.mul(dout[1], math::silu(s, z[1]))];
                    let input_delta = input_delta(s, mean_delta, t, delta);
                    let input = [s.mul(input_delta[0], v[0]), s.mul(input_delta[1], v[1])];
                    let b = &b.data[t * b.stride..][..n];
                    let c = &c.data[t * c.stride..][..n];
                    let mut y = [s.mul(skips[0], v[0]), s.mul(skips[1], v[1])];
                    let mut dinput = zero; // dS · B
                    let mut ddelta = zero;
                    let place = (t - first) * n..(t - first + 1) * n;
                    for i in 0..n {
                        let (bs, cs) = (s.splat(b[i]), s.splat(c[i]));
                        let (decay, before) = (decays[place.start + i], states[place.start + i]);
                        let (mut dbs, mut dcs) = (db[place.start + i], dc[place.start + i]);
                        for half in 0..2 {
                            let kept = s.mul(decay[half], before[half]);
                            let state = s.mul_add(input[half], bs, kept);
                            y[half] = s.mul_add(state, cs, y[half]);
                            dcs = s.mul_add(dy[half], state, dcs);
                            let dstate = s.mul_add(dy[half], cs, dstates[i][half]);
                            dbs = s.mul_add(dstate, input[half], dbs);
                            dinput[half] = s.mul_add(dstate, bs, dinput[half]);
                            let dexponent = s.mul(dstate, kept);
                            ddelta[half] = s.mul_add(dexponent, rates[i][half], ddelta[half]);
                            drates[i][half] = s.mul_add(dexponent, delta[half], drates[i][half]);
                            dstates[i][half] = s.mul(dstate, decay[half]);
                        }
                        db[place.start + i] = dbs;
                        dc[place.start + i] = dcs;
                    }
                    let mut dv = zero;
                    let mut dz = zero;
                    for half in 0..2 {
                        let dinput_delta = s.mul(v[half], dinput[half]);
                        match mean_delta {
                            Some(_) => dmean_delta[t - first] = s.add(dmean_delta[t - first], dinput_delta),
                            None => ddelta[half] = s.add(ddelta[half], dinput_delta),
                        }
                        dv[half] = s.mul_add(input_delta[half], dinput[half], s.mul(skips[half], dy[half]));
                        dskip[half] = s.mul_add(dy[half], v[half], dskip[half]);
                        dz[half] = s.mul(s.mul(dout[half], y[half]), math::silu_derivative(s, z[half]));
                    }
                    store_pair(s, ddelta, &mut gradient.delta[row(t)]);
                    store_pair(s, dv, &mut gradient.v[row(t)]);
                    let last = gradient.z.stride - d;
                    store_pair(s, dz, &mut gradient.z.data[t * gradient.z.stride + last..][here.clone()]);
                }

                for i in 0..n {
                    store_pair(s, dstates[i], &mut gradient.state[row(i)]);
                    store_pair(s, drates[i], &mut gradient.a[row(i)]);
                }
                if let Some(skip) = &mut gradient.skip {
                    let skip = &mut skip[here.clone()];
                    let so_far = load_pair(s, skip);
                    store_pair(s, [s.add(so_far[0], dskip[0]), s.add(so_far[1], dskip[1])], skip);
                }
            }
            for t in frames {
                let RowsMut { data, stride } = &mut gradient.bc;
                let row = &mut data[t * *stride..][*stride - 2 * n..*stride];
                for i in 0..n {
                    row[i] = s.sum(db[(t - first) * n + i]);
                    row[n + i] = s.sum(dc[(t - first) * n + i]);
                }
                if let Some(mean_delta) = &mut gradient.mean_delta {
                    mean_delta[t] = s.sum(dmean_delta[t - first]);
                }
            }
        }
    }
}

/// What B is scaled by: Δ, or its mean over the channels.
#[inline(always)]
fn input_delta<S: Simd>(s: S, mean_delta: Option<&[f32]>, t: usize, delta: [S::V; 2]) -> [S::V; 2] {
    match mean_delta {
        Some(mean) => [s.splat(mean[t]); 2],
        None => delta,
    }
}

/// A row of a matrix or of some of its columns: contiguous, as only whole columns are ever split off.
#[inline(always)]
fn cells<'a>(row: ArrayViewMut1<'a, f32>) -> &'a mut [f32] {
    row.into_slice().expect("the numbers of a row lie side by side")
}

/// Prefetches the [`CHANNELS`] numbers of a row that are read at a time.
#[inline(always)]
fn fetch<S: Simd>(s: S, rows: Rows, row: usize, column: usize) {
    let first = rows.data.as_ptr().wrapping_add(row.wrapping_mul(rows.stride).wrapping_add(column));
    s.prefetch(first);
    s.prefetch(first.wrapping_add(LANES));
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
mod tests;
