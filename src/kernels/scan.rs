//! The selective scan: the recurrence at the heart of Mamba.

use ndarray::{ArrayView3, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3, Axis};

use super::math;
use super::profiler::{Cost, Stage, timed};
use super::rows::{Rows, RowsMut};
use super::simd::{Kernel, LANES, Simd, dispatch};

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
/// would take n times as much memory as the output; with 16 frames what is computed again for a chunk (32 kB for each
/// vector of channels at n = 16) stays in the second cache, and what is kept is one number in 16.
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

    /// A vector of channels at a time: the chains of their n states hide each other's latency.
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let ScanInput { delta, v, b, c, z, a, skip, mean_delta } = self.input;
        let (n, columns) = self.state.dim();
        let (l, d) = (self.out.nrows(), a.len() / n);
        let log2_e = s.splat(std::f32::consts::LOG2_E);
        let mut decays = vec![s.splat(0.0); n]; // A/ln 2 of these channels
        let mut states = vec![s.splat(0.0); n]; // S of these channels
        for start in (0..l).step_by(FRAMES) {
            let stop = l.min(start + FRAMES);
            for begin in (0..columns).step_by(LANES) {
                let end = columns.min(begin + LANES);
                let here = self.first + begin..self.first + end;
                for (row, decay) in a.chunks_exact(d).zip(&mut decays) {
                    *decay = s.mul(s.load_some(&row[here.clone()]), log2_e);
                }
                for (row, state) in self.state.rows_mut().into_iter().zip(&mut states) {
                    *state = s.load_some(&cells(row)[begin..end]);
                }
                let skip = skip.map_or(s.splat(0.0), |skip| s.load_some(&skip[here.clone()]));

                for t in start..stop {
                    if let (0, Some(kept)) = (t % CHUNK, &mut self.checkpoints) {
                        let mut kept = kept.index_axis_mut(Axis(0), t / CHUNK);
                        for (row, state) in kept.rows_mut().into_iter().zip(&states) {
                            s.store_some(*state, &mut cells(row)[begin..end]);
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
                    let delta = s.load_some(&delta.data[t * delta.stride..][here.clone()]);
                    let v = s.load_some(&v.data[t * v.stride..][here.clone()]);
                    let z = s.load_some(&z.data[t * z.stride..][here.clone()]);
                    let input = s.mul(input_delta(s, mean_delta, t, delta), v);
                    let (b, c) = (&b.data[t * b.stride..][..n], &c.data[t * c.stride..][..n]);
                    let mut y = s.mul(skip, v);
                    for ((decay, state), (&b, &c)) in decays.iter().zip(&mut states).zip(b.iter().zip(c)) {
                        let kept = s.mul(math::exp2_negative(s, s.mul(delta, *decay)), *state);
                        *state = s.mul_add(input, s.splat(b), kept);
                        y = s.mul_add(*state, s.splat(c), y);
                    }
                    s.store_some(s.mul(y, math::silu(s, z)), &mut cells(self.out.row_mut(t))[begin..end]);
                }

                for (row, state) in self.state.rows_mut().into_iter().zip(&states) {
                    s.store_some(*state, &mut cells(row)[begin..end]);
                }
            }
        }
    }
}

/// What [`selective_scan_backward`] writes. Rows of `bc` and `z` are longer than what belongs to the scan.
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
        // as many channels at a time as leave registers for what each of their states adds to
        match S::TILE_LINES {
            1 => self.by_channels::<S, 1>(s),
            _ => self.by_channels::<S, 2>(s),
        }
    }
}

impl ScanBackward<'_> {
    /// P vectors of channels at a time. They pass through each chunk forwards, to make S again, and then backwards.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
    fn by_channels<S: Simd, const P: usize>(self, s: S) {
        let ScanInput { delta, v, b, c, z, a, skip, mean_delta } = self.input;
        let mut gradient = self.gradient;
        let (_, n, d) = self.checkpoints.dim();
        let l = self.dout.len() / d;
        let zero = [s.splat(0.0); P];
        let log2_e = s.splat(std::f32::consts::LOG2_E);
        let blank = Frame { delta: zero, input: zero, dy: zero, y: zero, dinput: zero, ddelta: zero };
        let mut chunk: [Frame<S, P>; CHUNK] = [blank; CHUNK];
        let mut rates = vec![zero; n]; // A of these channels
        let mut powers = vec![zero; n]; // A/ln 2
        let mut drates = vec![zero; n];
        let mut dstates = vec![zero; n]; // dS
        let mut state = vec![zero; n]; // S
        // of each state in each frame of a chunk: exp(Δ A), and what it leaves of S
        let mut decays = vec![zero; CHUNK * n];
        let mut kept = vec![zero; CHUNK * n];
        // sums over channels `[frames, n]`, still in lanes
        let mut db = vec![s.splat(0.0); n * CHUNK];
        let mut dc = vec![s.splat(0.0); n * CHUNK];

        for (i, checkpoint) in self.checkpoints.outer_iter().enumerate().rev() {
            let frames = i * CHUNK..l.min((i + 1) * CHUNK);
            db.fill(s.splat(0.0));
            dc.fill(s.splat(0.0));
            let mut dmean_delta = [s.splat(0.0); CHUNK];
            for begin in (0..d).step_by(P * LANES) {
                let here = begin..d.min(begin + P * LANES);
                let row = |i: usize| i * d + here.start..i * d + here.end;
                let skips = skip.map_or(zero, |skip| load_wide(s, &skip[here.clone()]));
                let mut dskip = zero;

                let chunk = &mut chunk[..frames.len()];
                for (t, frame) in frames.clone().zip(&mut *chunk) {
                    // the same frame of the next channels, or of the first ones in the chunk before
                    let (next, column) = if here.end < d { (t, here.end) } else { (t.wrapping_sub(CHUNK), 0) };
                    for rows in [delta, v, z, Rows { data: self.dout, stride: d }] {
                        (0..P).for_each(|p| fetch(s, rows, next, column + p * LANES));
                    }
                    let v: [S::V; P] = load_wide(s, &v.data[t * v.stride..][here.clone()]);
                    let z: [S::V; P] = load_wide(s, &z.data[t * z.stride..][here.clone()]);
                    let dout: [S::V; P] = load_wide(s, &self.dout[row(t)]);
                    frame.delta = load_wide(s, &delta.data[t * delta.stride..][here.clone()]);
                    for p in 0..P {
                        frame.input[p] = s.mul(input_delta(s, mean_delta, t, frame.delta[p]), v[p]);
                        frame.dy[p] = s.mul(dout[p], math::silu(s, z[p]));
                        frame.y[p] = s.mul(skips[p], v[p]);
                        dskip[p] = s.mul_add(frame.dy[p], v[p], dskip[p]);
                    }
                }

                for i in 0..n {
                    rates[i] = load_wide(s, &a[row(i)]);
                    powers[i] = rates[i].map(|rate| s.mul(rate, log2_e));
                    dstates[i] = load_wide(s, &gradient.state[row(i)]);
                    drates[i] = load_wide(s, &gradient.a[row(i)]);
                    let checkpoint = checkpoint.row(i).to_slice().expect("checkpoints are in standard layout");
                    state[i] = load_wide(s, &checkpoint[here.clone()]);
                }
                for (t, frame) in frames.clone().zip(&mut *chunk) {
                    let place = (t - frames.start) * n..(t - frames.start + 1) * n;
                    let (b, c) = (&b.data[t * b.stride..][..n], &c.data[t * c.stride..][..n]);
                    let of_frame = decays[place.clone()].iter_mut().zip(&mut kept[place.clone()]).zip(&mut dc[place]);
                    let states = state.iter_mut().zip(&powers).zip(b.iter().zip(c));
                    let Frame { delta, input, dy, mut y, .. } = *frame;
                    for (((decay, kept), dc), ((state, power), (&b, &c))) in of_frame.zip(states) {
                        let (b, c) = (s.splat(b), s.splat(c));
                        for p in 0..P {
                            decay[p] = math::exp2_negative(s, s.mul(delta[p], power[p]));
                            kept[p] = s.mul(decay[p], state[p]);
                            state[p] = s.mul_add(input[p], b, kept[p]);
                            y[p] = s.mul_add(state[p], c, y[p]);
                            *dc = s.mul_add(dy[p], state[p], *dc);
                        }
                    }
                    frame.y = y;
                }
                for (t, frame) in frames.clone().zip(&mut *chunk).rev() {
                    let place = (t - frames.start) * n..(t - frames.start + 1) * n;
                    let (b, c) = (&b.data[t * b.stride..][..n], &c.data[t * c.stride..][..n]);
                    let of_frame = decays[place.clone()].iter().zip(&kept[place.clone()]).zip(&mut db[place]);
                    let states = dstates.iter_mut().zip(&mut drates).zip(&rates).zip(b.iter().zip(c));
                    let (Frame { delta, input, dy, .. }, mut dinput, mut ddelta) = (*frame, zero, zero);
                    for (((decay, kept), db), (((dstate, drate), rate), (&b, &c))) in of_frame.zip(states) {
                        let (b, c) = (s.splat(b), s.splat(c));
                        for p in 0..P {
                            let after = s.mul_add(dy[p], c, dstate[p]);
                            *db = s.mul_add(after, input[p], *db);
                            dinput[p] = s.mul_add(after, b, dinput[p]);
                            let dexponent = s.mul(after, kept[p]);
                            ddelta[p] = s.mul_add(dexponent, rate[p], ddelta[p]);
                            drate[p] = s.mul_add(dexponent, delta[p], drate[p]);
                            dstate[p] = s.mul(after, decay[p]);
                        }
                    }
                    (frame.dinput, frame.ddelta) = (dinput, ddelta);
                }
                for i in 0..n {
                    store_wide(s, dstates[i], &mut gradient.state[row(i)]);
                    store_wide(s, drates[i], &mut gradient.a[row(i)]);
                }

                for ((t, frame), dmean) in frames.clone().zip(&mut *chunk).zip(&mut dmean_delta) {
                    let v: [S::V; P] = load_wide(s, &v.data[t * v.stride..][here.clone()]);
                    let z: [S::V; P] = load_wide(s, &z.data[t * z.stride..][here.clone()]);
                    let dout: [S::V; P] = load_wide(s, &self.dout[row(t)]);
                    let (mut dv, mut dz) = (zero, zero);
                    for p in 0..P {
                        let dinput_delta = s.mul(v[p], frame.dinput[p]);
                        match mean_delta {
                            Some(_) => *dmean = s.add(*dmean, dinput_delta),
                            None => frame.ddelta[p] = s.add(frame.ddelta[p], dinput_delta),
                        }
                        let input_delta = input_delta(s, mean_delta, t, frame.delta[p]);
                        dv[p] = s.mul_add(input_delta, frame.dinput[p], s.mul(skips[p], frame.dy[p]));
                        dz[p] = s.mul(s.mul(dout[p], frame.y[p]), math::silu_derivative(s, z[p]));
                    }
                    store_wide(s, frame.ddelta, &mut gradient.delta[row(t)]);
                    store_wide(s, dv, &mut gradient.v[row(t)]);
                    let last = gradient.z.stride - d;
                    store_wide(s, dz, &mut gradient.z.data[t * gradient.z.stride + last..][here.clone()]);
                }
                if let Some(skip) = &mut gradient.skip {
                    let skip = &mut skip[here.clone()];
                    let mut sums: [S::V; P] = load_wide(s, skip);
                    for p in 0..P {
                        sums[p] = s.add(sums[p], dskip[p]);
                    }
                    store_wide(s, sums, skip);
                }
            }
            for (i, t) in frames.enumerate() {
                let RowsMut { data, stride } = &mut gradient.bc;
                let row = &mut data[t * *stride..][*stride - 2 * n..*stride];
                for state in 0..n {
                    row[state] = s.sum(db[i * n + state]);
                    row[n + state] = s.sum(dc[i * n + state]);
                }
                if let Some(mean_delta) = &mut gradient.mean_delta {
                    mean_delta[t] = s.sum(dmean_delta[i]);
                }
            }
        }
    }
}

/// What some channels of a frame have in common for all their states.
#[derive(Clone, Copy)]
struct Frame<S: Simd, const P: usize> {
    /// Δ
    delta: [S::V; P],
    /// Δ′ · v
    input: [S::V; P],
    /// dout ⊙ silu(z)
    dy: [S::V; P],
    /// S·C + D ⊙ v, so far
    y: [S::V; P],
    /// dS · B, so far
    dinput: [S::V; P],
    /// Σ dE ⊙ A, so far
    ddelta: [S::V; P],
}

/// What B is scaled by: Δ, or its mean over the channels.
#[inline(always)]
fn input_delta<S: Simd>(s: S, mean_delta: Option<&[f32]>, t: usize, delta: S::V) -> S::V {
    mean_delta.map_or(delta, |mean| s.splat(mean[t]))
}

/// A row of a matrix or of some of its columns: contiguous, as only whole columns are ever split off.
#[inline(always)]
fn cells<'a>(row: ArrayViewMut1<'a, f32>) -> &'a mut [f32] {
    row.into_slice().expect("the numbers of a row lie side by side")
}

/// Prefetches a vector of a row.
#[inline(always)]
fn fetch<S: Simd>(s: S, rows: Rows, row: usize, column: usize) {
    s.prefetch(rows.data.as_ptr().wrapping_add(row.wrapping_mul(rows.stride).wrapping_add(column)));
}

/// At most P·LANES numbers in P vectors.
#[inline(always)]
fn load_wide<S: Simd, const P: usize>(s: S, x: &[f32]) -> [S::V; P] {
    let mut v = [s.splat(0.0); P];
    for (p, v) in v.iter_mut().enumerate() {
        *v = s.load_some(&x[x.len().min(p * LANES)..x.len().min((p + 1) * LANES)]);
    }
    v
}

#[inline(always)]
fn store_wide<S: Simd, const P: usize>(s: S, v: [S::V; P], x: &mut [f32]) {
    for (p, v) in v.into_iter().enumerate() {
        let part = x.len().min(p * LANES)..x.len().min((p + 1) * LANES);
        s.store_some(v, &mut x[part]);
    }
}

#[cfg(test)]
mod tests;
