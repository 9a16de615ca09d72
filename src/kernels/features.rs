//! Dilated convolutions that are pooled over time at once: the features of MiniRocket, MultiRocket and Hydra.
//!
//! Sixteen kernels of nine taps lie side by side in the lanes, so that pooling, which goes from frame to frame, is done for all
//! of them together. A series has [`REACH`]`·dilation` zeros on either side.

use super::simd::{Kernel, LANES, Simd, dispatch};

/// Taps of a kernel.
pub(crate) const TAPS: usize = 9;
/// Taps on either side of the one in the middle.
pub(crate) const REACH: usize = TAPS / 2;
/// Statistics of a kernel and a bias.
pub(crate) const STATISTICS: usize = 4;
/// Kernels that compete with each other.
pub(crate) const COMPETITORS: usize = 8;

/// One number for each of sixteen kernels.
pub(crate) type Lanes = [f32; LANES];

/// out `[biases, 4]` of the outputs c_t = Σ_j weight_j · x_{t + (j − 4)·dilation} at the frames `pooled`, n of them:
///
/// ```text
/// share      #{c > b} / n
/// mean       mean of c − b where c > b
/// place      mean of (t − first frame) / n where c > b
/// stretch    most frames in a row where c > b, / n
/// ```
///
/// Where no output is above the bias b, place is −1 and the others are 0.
pub(crate) struct Pooled<'a> {
    /// The series between its zeros: frame t is at `padding + t`.
    pub x: &'a [f32],
    pub padding: usize,
    pub dilation: usize,
    pub pooled: std::ops::Range<usize>,
    pub weights: &'a [Lanes; TAPS],
    pub biases: &'a [Lanes],
    /// Room for the outputs, kept from call to call.
    pub outputs: &'a mut Vec<Lanes>,
    /// `[biases, 4]`
    pub out: &'a mut [[Lanes; STATISTICS]],
}

impl Pooled<'_> {
    pub(crate) fn run(self) {
        dispatch(self);
    }
}

impl Kernel for Pooled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.pooled.len();
        let taps: [&[f32]; TAPS] = std::array::from_fn(|tap| {
            let first = self.padding + self.pooled.start + tap * self.dilation - REACH * self.dilation;
            &self.x[first..][..n]
        });
        let mut weights = [s.splat(0.0); TAPS];
        for (weight, lanes) in weights.iter_mut().zip(self.weights) {
            *weight = s.load(lanes);
        }
        self.outputs.resize(n, [0.0; LANES]);
        for (t, output) in self.outputs.iter_mut().enumerate() {
            let mut sum = s.mul(weights[0], s.splat(taps[0][t]));
            for tap in 1..TAPS {
                sum = s.mul_add(weights[tap], s.splat(taps[tap][t]), sum);
            }
            s.store(sum, output);
        }
        let (zero, one, per_frame) = (s.splat(0.0), s.splat(1.0), s.splat(1.0 / n as f32));
        for (bias, out) in self.biases.iter().zip(self.out) {
            let bias = s.load(bias);
            let (mut count, mut sum, mut places, mut run, mut longest, mut t) = (zero, zero, zero, zero, zero, zero);
            for output in self.outputs.iter() {
                let above = s.sub(s.load(output), bias);
                let is_above = indicator(s, above);
                count = s.add(count, is_above);
                sum = s.add(sum, s.max(above, zero));
                places = s.mul_add(is_above, t, places);
                run = s.mul_add(run, is_above, is_above);
                longest = s.max(longest, run);
                t = s.add(t, one);
            }
            let some = s.min(count, one);
            let at_least_one = s.max(count, one);
            let place = s.mul(s.div(places, at_least_one), per_frame);
            let statistics = [
                s.mul(count, per_frame),
                s.div(sum, at_least_one),
                s.add(place, s.sub(some, one)),
                s.mul(longest, per_frame),
            ];
            for (statistic, out) in statistics.into_iter().zip(out) {
                s.store(statistic, out);
            }
        }
    }
}

/// 1 where x > 0 and 0 elsewhere, for x not below 2⁻¹⁰⁰ in size.
#[inline(always)]
fn indicator<S: Simd>(s: S, x: S::V) -> S::V {
    /// 2¹⁰⁰
    const LARGE: f32 = f32::from_bits((127 + 100) << 23);
    s.min(s.max(s.mul(x, s.splat(LARGE)), s.splat(0.0)), s.splat(1.0))
}

/// Sixteen groups of eight kernels. At each frame the kernels of a group compete: the one of the largest output c gets that output,
/// the one of the smallest a point. out `[2, 8]`: the sums of what each got, per frame.
pub(crate) struct Competition<'a> {
    /// As in [`Pooled`], with a series of its own for each group.
    pub x: &'a [Lanes],
    pub padding: usize,
    pub dilation: usize,
    pub frames: usize,
    pub weights: &'a [[Lanes; TAPS]; COMPETITORS],
    pub out: &'a mut [[Lanes; COMPETITORS]; 2],
}

impl Competition<'_> {
    pub(crate) fn run(self) {
        dispatch(self);
    }
}

impl Kernel for Competition<'_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // over the frames of all taps at once
    fn run<S: Simd>(self, s: S) {
        let taps: [&[Lanes]; TAPS] = std::array::from_fn(|tap| {
            let first = self.padding + tap * self.dilation - REACH * self.dilation;
            &self.x[first..][..self.frames]
        });
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        let [most, least] = self.out;
        let mut sums = [[zero; COMPETITORS]; 2];
        for t in 0..self.frames {
            let mut outputs = [zero; COMPETITORS];
            for tap in 0..TAPS {
                let x = s.load(&taps[tap][t]);
                for (output, weights) in outputs.iter_mut().zip(self.weights) {
                    *output = s.mul_add(s.load(&weights[tap]), x, *output);
                }
            }
            let (mut largest, mut smallest) = (outputs[0], outputs[0]);
            for &output in &outputs[1..] {
                largest = s.max(largest, output);
                smallest = s.min(smallest, output);
            }
            for (k, &output) in outputs.iter().enumerate() {
                let wins = s.sub(one, indicator(s, s.sub(largest, output)));
                let loses = s.sub(one, indicator(s, s.sub(output, smallest)));
                sums[0][k] = s.mul_add(wins, largest, sums[0][k]);
                sums[1][k] = s.add(sums[1][k], loses);
            }
        }
        let per_frame = s.splat(1.0 / self.frames as f32);
        for (out, sums) in [most, least].into_iter().zip(sums) {
            for (out, sum) in out.iter_mut().zip(sums) {
                s.store(s.mul(sum, per_frame), out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, dispatch_at};
    use super::*;

    fn wave(i: usize) -> f32 {
        ((i * 29 % 31) as f32 - 15.0) / 10.0
    }

    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The outputs of one kernel, the plainest way.
    fn outputs(
        x: &[f32],
        padding: usize,
        dilation: usize,
        frames: std::ops::Range<usize>,
        weights: &[f32],
    ) -> Vec<f64> {
        let at = |t: usize, tap: usize| f64::from(x[padding + t + tap * dilation - REACH * dilation]);
        frames.map(|t| (0..TAPS).map(|tap| at(t, tap) * f64::from(weights[tap])).sum()).collect()
    }

    #[test]
    fn pooled_statistics_are_those_of_the_outputs() {
        for (level, (l, dilation)) in
            levels().flat_map(|level| [(1, 1), (7, 2), (40, 3), (130, 16)].map(|l| (level, l)))
        {
            let padding = REACH * dilation + 3;
            let x: Vec<f32> =
                (0..l + 2 * padding).map(|i| if i < padding || i >= padding + l { 0.0 } else { wave(i) }).collect();
            // multiples of a quarter and of a tenth: never within rounding of each other
            let weights: [Lanes; TAPS] =
                std::array::from_fn(|tap| std::array::from_fn(|lane| wave(tap * 7 + lane) * 2.5));
            let biases: [Lanes; 3] = std::array::from_fn(|i| std::array::from_fn(|lane| wave(i * 11 + lane) + 0.0371));
            let pooled = if l > 2 * REACH * dilation { REACH * dilation..l - REACH * dilation } else { 0..l };
            let mut out = [[[7.0; LANES]; STATISTICS]; 3];
            dispatch_at(
                level,
                Pooled {
                    x: &x,
                    padding,
                    dilation,
                    pooled: pooled.clone(),
                    weights: &weights,
                    biases: &biases,
                    outputs: &mut Vec::new(),
                    out: &mut out,
                },
            );
            for lane in 0..LANES {
                let kernel: Vec<f32> = weights.iter().map(|weights| weights[lane]).collect();
                let outputs = outputs(&x, padding, dilation, pooled.clone(), &kernel);
                let n = outputs.len() as f64;
                for (bias, out) in biases.iter().zip(&out) {
                    let above: Vec<f64> = outputs.iter().map(|output| output - f64::from(bias[lane])).collect();
                    let places: Vec<usize> = (0..above.len()).filter(|&t| above[t] > 0.0).collect();
                    let count = places.len() as f64;
                    let (mut run, mut longest) = (0, 0);
                    for above in &above {
                        run = if *above > 0.0 { run + 1 } else { 0 };
                        longest = longest.max(run);
                    }
                    let want = match places.len() {
                        0 => [0.0, 0.0, -1.0, 0.0],
                        _ => [
                            count / n,
                            places.iter().map(|&t| above[t]).sum::<f64>() / count,
                            places.iter().sum::<usize>() as f64 / count / n,
                            longest as f64 / n,
                        ],
                    };
                    for (got, want) in out.iter().zip(want) {
                        assert!((f64::from(got[lane]) - want).abs() < 1e-5, "{level:?} {l} {dilation}: {got:?} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn of_competing_kernels_one_wins_and_one_loses() {
        for (level, (l, dilation)) in levels().flat_map(|level| [(1, 1), (7, 2), (40, 8)].map(|l| (level, l))) {
            let padding = REACH * dilation;
            let x: Vec<Lanes> = (0..l + 2 * padding).map(|i| std::array::from_fn(|lane| wave(i * 3 + lane))).collect();
            let weights: [[Lanes; TAPS]; COMPETITORS] = std::array::from_fn(|k| {
                std::array::from_fn(|tap| std::array::from_fn(|lane| ((k * 131 + tap * 17 + lane) as f32).sin()))
            });
            let mut out = [[[7.0; LANES]; COMPETITORS]; 2];
            let competition = Competition { x: &x, padding, dilation, frames: l, weights: &weights, out: &mut out };
            dispatch_at(level, competition);
            for lane in 0..LANES {
                let own: Vec<f32> = x.iter().map(|x| x[lane]).collect();
                let all: Vec<Vec<f64>> = weights
                    .iter()
                    .map(|kernel| {
                        let kernel: Vec<f32> = kernel.iter().map(|weights| weights[lane]).collect();
                        outputs(&own, padding, dilation, 0..l, &kernel)
                    })
                    .collect();
                let mut want = [[0.0; COMPETITORS]; 2];
                for t in 0..l {
                    let at: Vec<f64> = all.iter().map(|outputs| outputs[t]).collect();
                    let order = |a: &usize, b: &usize| at[*a].total_cmp(&at[*b]);
                    let (most, least) = ((0..8).max_by(order).unwrap(), (0..8).min_by(order).unwrap());
                    want[0][most] += at[most] / l as f64;
                    want[1][least] += 1.0 / l as f64;
                }
                for (got, want) in out.iter().flatten().zip(want.iter().flatten()) {
                    assert!(
                        (f64::from(got[lane]) - want).abs() < 1e-5,
                        "{level:?} {l} {dilation}: {} {want}",
                        got[lane]
                    );
                }
            }
        }
    }
}
