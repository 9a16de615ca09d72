//! Features of whole series from convolution kernels that are not trained.

use ndarray::{Array2, ArrayView2};
use rand::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use super::Normalization;
use crate::encoder::check_fits;
use crate::kernels::features::{COMPETITORS, Competition, Lanes, Pooled, REACH, STATISTICS, TAPS};
use crate::kernels::simd::LANES;
use crate::kernels::team::{threads, with_team, work};
use crate::layers::Rng;
use crate::{Error, Result};

mod levels;
mod plan;

pub(super) use plan::Plan;
use plan::{BIASES, BLOCKS, Bank, CONTEST, Contest, KERNELS, MAX_DILATION, below};

/// Thousands of features per series, by which a linear model can tell series apart: convolutions with fixed kernels of nine taps at
/// many dilations, pooled over time.
///
/// Two sets of kernels look at each series and at its first difference:
///
/// * **pooled**: the 84 kernels of MiniRocket with six weights of −1 and three of 2. Of the frames whose output is above a bias
///   (a quantile of the outputs of a training series): their share, how far above they are, where they lie and the longest stretch
///   of them, the four statistics of MultiRocket.
/// * **competing**: 64 groups of eight random kernels, Hydra. At each frame the kernel with the largest output of its group gets that
///   output, the one with the smallest a point; the features are the square roots of the sums.
///
/// A third set, **levels**, has no kernels: quantiles of intervals of the series and its differences, as in Quant.
///
/// Where frames have several channels, each kernel reads the sum of a few. Series may be of any lengths. Papers: Dempster, Schmidt and Webb 2021
/// (MiniRocket), 2023 (Hydra) and 2024 (Quant); Tan, Dempster, Bergmeir and Webb 2022 (MultiRocket).
#[derive(Debug, Clone)]
pub struct KernelFeatures {
    pub(super) plan: Plan,
    pub(super) input: Normalization,
    banks: Vec<Bank>,
    /// `[biases, lanes]`, in the order of the banks.
    pub(super) biases: Array2<f32>,
    contests: Vec<Contest>,
    /// `[contests · competitors · taps, lanes]`
    pub(super) weights: Array2<f32>,
}

/// The weights of a block of pooled kernels; the last block has zeros in the lanes that are left.
fn pooled_weights(block: usize) -> [Lanes; TAPS] {
    let mut weights = [[0.0; LANES]; TAPS];
    let kernels = (0..TAPS).flat_map(|a| (a + 1..TAPS).flat_map(move |b| (b + 1..TAPS).map(move |c| [a, b, c])));
    for (lane, kernel) in kernels.skip(block * LANES).take(LANES).enumerate() {
        for (tap, weights) in weights.iter_mut().enumerate() {
            weights[lane] = if kernel.contains(&tap) { 2.0 } else { -1.0 };
        }
    }
    weights
}

/// Kernels in a block.
fn lanes(block: usize) -> usize {
    LANES.min(KERNELS - block * LANES)
}

impl KernelFeatures {
    /// Fits the scale of the channels and the biases to training series `[length, channels]`. Kernels are drawn from `seed`.
    ///
    /// ```
    /// use hymba::KernelFeatures;
    /// use hymba::ndarray::Array2;
    ///
    /// let series: Vec<Array2<f32>> = (10..30).map(|l| Array2::from_shape_fn((l, 3), |(t, i)| (t * l + i) as f32)).collect();
    /// let features = KernelFeatures::fit(&series, 0)?;
    /// assert_eq!(features.transform(&series[..2])?.dim(), (2, features.num_features()));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if there are no series; [`Error::Shape`] if one has no frames, no channels, or another number of channels than
    /// the first.
    pub fn fit(series: &[Array2<f32>], seed: u64) -> Result<Self> {
        Self::fit_within(series, seed, usize::MAX)
    }

    /// With at most about `most` features.
    pub(super) fn fit_within(series: &[Array2<f32>], seed: u64, most: usize) -> Result<Self> {
        check(series, None)?;
        let channels = series[0].ncols();
        let longest = series.iter().map(|series| series.nrows()).max().unwrap_or(1).min(MAX_DILATION * (TAPS - 1));
        let plan = Plan::within(seed, channels, longest, most);
        let input = Normalization::fit(channels, series.iter().map(|series| series.view()));
        let mut features = Self::with_plan(plan, input);
        features.draw_weights();
        features.fit_biases(series);
        Ok(features)
    }

    /// Biases and competing weights are zero.
    pub(super) fn with_plan(plan: Plan, input: Normalization) -> Self {
        let (banks, contests) = plan.parts();
        let biases = Array2::zeros((2 * BLOCKS * plan.biases(), LANES));
        let weights = Array2::zeros((plan.num_contests() * COMPETITORS * TAPS, LANES));
        KernelFeatures { plan, input, banks, biases, contests, weights }
    }

    /// Competing kernels: normal numbers of mean 0 whose sizes sum to 1.
    fn draw_weights(&mut self) {
        let mut rng = Rng::seed_from_u64(self.plan.seed);
        rng.set_stream(1);
        for weights in in_lanes_mut(&mut self.weights).as_chunks_mut::<TAPS>().0 {
            for lane in 0..LANES {
                let drawn: [f32; TAPS] = std::array::from_fn(|_| StandardNormal.sample(&mut rng));
                let mean = drawn.iter().sum::<f32>() / TAPS as f32;
                let size = drawn.iter().map(|weight| (weight - mean).abs()).sum::<f32>();
                for (weights, drawn) in weights.iter_mut().zip(drawn) {
                    weights[lane] = (drawn - mean) / size;
                }
            }
        }
    }

    /// Biases: quantiles of the outputs of one training series for each kernel.
    fn fit_biases(&mut self, series: &[Array2<f32>]) {
        const GOLDEN: f64 = 0.618_033_988_749_894_9;
        let mut rng = Rng::seed_from_u64(self.plan.seed);
        rng.set_stream(2);
        let mut jobs = Vec::new();
        let mut biases = in_lanes_mut(&mut self.biases);
        for bank in &self.banks {
            let (those, rest) = biases.split_at_mut(bank.biases.len());
            biases = rest;
            let drawn: [usize; LANES] = std::array::from_fn(|_| below(&mut rng, series.len()));
            jobs.push((bank, drawn, those));
        }
        let longest = series.iter().map(|series| series.nrows()).max().unwrap_or(1);
        let (input, weights) = (&self.input, (0..BLOCKS).map(pooled_weights).collect::<Vec<_>>());
        with_team(work([jobs.len(), LANES, TAPS, longest]), |team| {
            team.for_each(jobs, |(bank, drawn, biases)| {
                let mut x = Vec::new();
                for lane in 0..lanes(bank.block) {
                    let channels = prepared(input, series[drawn[lane]].view(), bank.difference);
                    let l = channels.ncols();
                    let padding = REACH * bank.dilation;
                    summed(&channels, &bank.channels, padding, &mut x);
                    let pooled = bank.pooled(l);
                    let mut outputs = vec![0.0f32; pooled.len()];
                    for tap in 0..TAPS {
                        let weight = weights[bank.block][tap][lane];
                        let x = &x[pooled.start + tap * bank.dilation..][..outputs.len()];
                        outputs.iter_mut().zip(x).for_each(|(output, x)| *output += weight * x);
                    }
                    outputs.sort_unstable_by(f32::total_cmp);
                    for (i, bias) in biases.iter_mut().enumerate() {
                        let place = bank.block * LANES + lane + KERNELS * (bank.biases.start + i) + 1;
                        let quantile = (place as f64 * GOLDEN).fract() * (outputs.len() - 1) as f64;
                        let (low, share) = (quantile as usize, quantile.fract() as f32);
                        let high = outputs[(low + 1).min(outputs.len() - 1)];
                        bias[lane] = outputs[low] + share * (high - outputs[low]);
                    }
                }
            });
        });
    }

    /// Channels of a series.
    pub fn channels(&self) -> usize {
        self.plan.channels
    }

    /// Features of a series.
    pub fn num_features(&self) -> usize {
        self.plan.views().iter().sum()
    }

    /// How many features come from the pooled kernels, the competing kernels and the levels; they stand in this order.
    pub fn views(&self) -> [usize; 3] {
        self.plan.views()
    }

    /// The features of series `[length, channels]`: `[series, num_features]`, without rows if there are no series. Those of a series
    /// do not depend on the others.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a series has no frames or another number of channels, or the features do not fit into memory.
    pub fn transform(&self, series: &[Array2<f32>]) -> Result<Array2<f32>> {
        if series.is_empty() {
            return Ok(Array2::zeros((0, self.num_features())));
        }
        check(series, Some(self.plan.channels))?;
        let frames = series.iter().map(|series| series.nrows()).sum::<usize>();
        self.check_memory(series)?;
        let mut features = Array2::zeros((series.len(), self.num_features()));
        with_team(work([frames, self.num_features()]), |team| {
            let rows = features.outer_iter_mut().map(|row| row.into_slice().expect("numbers side by side"));
            team.for_each(series.iter().zip(rows.collect::<Vec<_>>()), |(series, row)| self.of(series.view(), row));
        });
        Ok(features)
    }

    /// Checks, before memory is taken, that there is enough: on each thread a series with its padding, sixteen kernels side by side.
    fn check_memory(&self, series: &[Array2<f32>]) -> Result<()> {
        let longest = series.iter().map(|series| series.nrows()).max().unwrap_or(0);
        let padding = 2 * REACH * self.plan.dilations.last().map_or(1, |last| last.0);
        let rows = work([series.len(), self.num_features()]);
        let passing = work([threads(), longest.saturating_add(padding), 2 * LANES]);
        check_fits("series", &[series.len(), longest], work([rows.saturating_add(passing), size_of::<f32>()]))
    }

    /// The features of one series.
    fn of(&self, series: ArrayView2<f32>, mut features: &mut [f32]) {
        let views = [false, true].map(|difference| prepared(&self.input, series, difference));
        let weights: Vec<_> = (0..BLOCKS).map(pooled_weights).collect();
        let (mut x, mut outputs) = (Vec::new(), Vec::new());
        for bank in &self.banks {
            let channels = &views[usize::from(bank.difference)];
            let padding = REACH * bank.dilation;
            summed(channels, &bank.channels, padding, &mut x);
            let mut out = [[[0.0; LANES]; STATISTICS]; BIASES];
            let pooled = Pooled {
                x: &x,
                padding,
                dilation: bank.dilation,
                pooled: bank.pooled(channels.ncols()),
                weights: &weights[bank.block],
                biases: &in_lanes(&self.biases)[bank.biases.clone()],
                outputs: &mut outputs,
                out: &mut out,
            };
            pooled.run();
            for lane in out[..bank.biases.len()].as_flattened() {
                let (those, rest) = features.split_at_mut(lanes(bank.block));
                those.copy_from_slice(&lane[..those.len()]);
                features = rest;
            }
        }
        let mut x = Vec::new();
        let (weights, _) = in_lanes(&self.weights).as_chunks::<TAPS>().0.as_chunks::<COMPETITORS>();
        for (contest, weights) in self.contests.iter().zip(weights) {
            let channels = &views[usize::from(contest.difference)];
            let padding = REACH * contest.dilation;
            let frames = channels.ncols();
            x.clear();
            x.resize(frames + 2 * padding, [0.0; LANES]);
            for (lane, chosen) in contest.channels.iter().enumerate() {
                for &channel in chosen {
                    let channel = channels.row(channel);
                    x[padding..].iter_mut().zip(channel).for_each(|(x, value)| x[lane] += value);
                }
            }
            let mut out = [[[0.0; LANES]; COMPETITORS]; 2];
            let dilation = contest.dilation;
            Competition { x: &x, padding, dilation, frames, weights, out: &mut out }.run();
            let (those, rest) = features.split_at_mut(CONTEST);
            for (to, &from) in those.iter_mut().zip(out.as_flattened().as_flattened()) {
                *to = from.max(0.0).sqrt();
            }
            features = rest;
        }
        levels::levels(self.plan.length, &views[0], features);
    }
}

/// `[rows, lanes]`
fn in_lanes(array: &Array2<f32>) -> &[Lanes] {
    array.as_slice().expect("rows one after the other").as_chunks().0
}

fn in_lanes_mut(array: &mut Array2<f32>) -> &mut [Lanes] {
    array.as_slice_mut().expect("rows one after the other").as_chunks_mut().0
}

/// The normalized channels `[channels, length]` of a series, or their first difference; never without a frame.
fn prepared(input: &Normalization, series: ArrayView2<f32>, difference: bool) -> Array2<f32> {
    let mut channels = Array2::from_shape_fn((series.ncols(), series.nrows()), |(channel, t)| series[[t, channel]]);
    for ((mut row, &mean), &scale) in channels.outer_iter_mut().zip(input.mean()).zip(input.scale()) {
        row.mapv_inplace(|x| (x - mean) / scale);
    }
    if !difference {
        return channels;
    }
    let l = channels.ncols();
    Array2::from_shape_fn((channels.nrows(), l.saturating_sub(1).max(1)), |(channel, t)| match t + 1 < l {
        true => channels[[channel, t + 1]] - channels[[channel, t]],
        false => 0.0,
    })
}

/// The sum of some channels, with zeros on either side.
fn summed(channels: &Array2<f32>, chosen: &[usize], padding: usize, sum: &mut Vec<f32>) {
    sum.clear();
    sum.resize(channels.ncols() + 2 * padding, 0.0);
    for &channel in chosen {
        sum[padding..].iter_mut().zip(channels.row(channel)).for_each(|(sum, x)| *sum += x);
    }
}

/// Checks that there are series, none of them empty, of so many channels.
fn check(series: &[Array2<f32>], channels: Option<usize>) -> Result<()> {
    let Some(first) = series.first() else { return Err(Error::Data("there are no series".into())) };
    let channels = channels.unwrap_or(first.ncols());
    match series.iter().position(|series| series.nrows() == 0 || series.ncols() != channels || channels == 0) {
        Some(i) => {
            let expected = format!("[length, {channels}] with 1 frame at least, for series {i}");
            Err(Error::Shape { argument: "series", expected, given: series[i].shape().to_vec() })
        }
        None => Ok(()),
    }
}
