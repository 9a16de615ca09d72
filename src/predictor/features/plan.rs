//! Which kernels there are: their dilations, and the channels that each of them sees.

use rand::{Rng as _, SeedableRng};
use serde::{Deserialize, Serialize};

use super::levels;
use crate::kernels::features::{COMPETITORS, REACH, STATISTICS, TAPS};
use crate::kernels::simd::LANES;
use crate::layers::Rng;

/// Everything but the numbers: it follows from the options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::predictor) struct Plan {
    /// Of the choice of channels.
    pub seed: u64,
    pub channels: usize,
    /// Of the longest training series.
    pub length: usize,
    /// Dilations and the biases at each, of all pooled kernels.
    pub dilations: Vec<(usize, usize)>,
}

/// Sixteen of the pooled kernels at one dilation, with up to four biases each.
#[derive(Debug, Clone)]
pub(super) struct Bank {
    pub difference: bool,
    pub dilation: usize,
    pub block: usize,
    /// Whether frames are pooled whose kernel reaches beyond the ends of the series.
    pub padded: bool,
    pub channels: Vec<usize>,
    /// Where its biases begin, and how many there are.
    pub biases: std::ops::Range<usize>,
}

/// Sixteen groups of competing kernels at one dilation.
#[derive(Debug, Clone)]
pub(super) struct Contest {
    pub difference: bool,
    pub dilation: usize,
    /// Of each group.
    pub channels: Vec<Vec<usize>>,
}

/// Biases that see the same channels.
pub(super) const BIASES: usize = 4;
/// Kernels with three of nine weights 2 and the others −1.
pub(super) const KERNELS: usize = 84;
pub(super) const BLOCKS: usize = KERNELS.div_ceil(LANES);
/// Of each kernel, for the series and for its difference. With 84 kernels and four statistics 49 728 features, as in MultiRocket.
const BIASES_PER_KERNEL: usize = 74;
const MAX_DILATIONS: usize = 32;
/// Groups of competing kernels, for the series and for its difference.
const GROUPS: usize = 32;
/// No series is so long that a kernel with this dilation fits.
pub(super) const MAX_DILATION: usize = 1 << 20;
/// Numbers a contest of sixteen groups gives.
pub(super) const CONTEST: usize = 2 * COMPETITORS * LANES;

impl Plan {
    /// For series of this length.
    pub(in crate::predictor) fn new(seed: u64, channels: usize, length: usize, biases: usize) -> Self {
        let count = biases.min(MAX_DILATIONS);
        let largest = (length.saturating_sub(1) as f64 / (TAPS - 1) as f64).max(1.0).log2();
        let mut dilations: Vec<(usize, usize)> = Vec::new();
        for i in 0..count {
            let dilation = (largest * i as f64 / (count - 1).max(1) as f64).exp2() as usize;
            // the first ones get what does not divide
            let biases = (biases / count) + usize::from(i < biases % count);
            match dilations.last_mut().filter(|last| last.0 == dilation) {
                Some(last) => last.1 += biases,
                None => dilations.push((dilation, biases)),
            }
        }
        Plan { seed, channels, length, dilations }
    }

    /// With as many biases as go with so many features, and at least one.
    pub(super) fn within(seed: u64, channels: usize, length: usize, most: usize) -> Self {
        let plans = (1..=BIASES_PER_KERNEL).rev().map(|biases| Self::new(seed, channels, length, biases));
        let fits = |plan: &Self| plan.views().iter().sum::<usize>() <= most;
        plans.into_iter().find(fits).unwrap_or_else(|| Self::new(seed, channels, length, 1))
    }

    /// Checks what a stranger wrote; the error is what is wrong.
    pub(in crate::predictor) fn check(&self) -> Result<(), String> {
        let ascending = self.dilations.is_sorted_by(|a, b| a.0 < b.0);
        let within = |&(dilation, biases): &(usize, usize)| {
            (1..=MAX_DILATION).contains(&dilation) && (1..=BIASES_PER_KERNEL).contains(&biases)
        };
        match () {
            () if self.channels == 0 || self.length == 0 => Err("there are no channels or no frames".into()),
            () if self.dilations.is_empty() || self.dilations.len() > MAX_DILATIONS => {
                Err(format!("there are {} dilations, from 1 to {MAX_DILATIONS} are allowed", self.dilations.len()))
            }
            () if !ascending || !self.dilations.iter().all(within) || self.biases() > BIASES_PER_KERNEL => {
                Err(format!(
                    "its dilations are not in order, above {MAX_DILATION}, or without 1 to {BIASES_PER_KERNEL} biases"
                ))
            }
            () => Ok(()),
        }
    }

    /// Of each pooled kernel.
    pub(super) fn biases(&self) -> usize {
        self.dilations.iter().map(|dilation| dilation.1).sum()
    }

    /// Powers of two, up to the largest dilation.
    fn contest_dilations(&self) -> impl Iterator<Item = usize> {
        let largest = self.dilations.last().map_or(1, |last| last.0);
        (0..=largest.ilog2()).map(|i| 1 << i)
    }

    pub(super) fn num_contests(&self) -> usize {
        2 * GROUPS / LANES * self.contest_dilations().count()
    }

    /// How many features there are of the pooled and of the competing kernels, and of levels.
    pub(in crate::predictor) fn views(&self) -> [usize; 3] {
        let levels = levels::count(self.length, self.channels);
        [2 * KERNELS * STATISTICS * self.biases(), self.num_contests() * CONTEST, levels]
    }

    /// The tensors in a file of a predictor with so many outputs.
    pub(in crate::predictor) fn shapes(&self, outputs: usize) -> [(&'static str, Vec<usize>); 6] {
        let features = self.views().iter().sum();
        [
            ("kernels.input_mean", vec![self.channels]),
            ("kernels.input_scale", vec![self.channels]),
            ("kernels.biases", vec![2 * BLOCKS * self.biases(), LANES]),
            ("kernels.weights", vec![self.num_contests() * COMPETITORS * TAPS, LANES]),
            ("head.weight", vec![outputs, features]),
            ("head.bias", vec![outputs]),
        ]
    }

    /// Banks and contests; channels are drawn.
    pub(super) fn parts(&self) -> (Vec<Bank>, Vec<Contest>) {
        let mut rng = Rng::seed_from_u64(self.seed);
        let (mut banks, mut contests, mut first) = (Vec::new(), Vec::new(), 0);
        for difference in [false, true] {
            for (i, &(dilation, biases)) in self.dilations.iter().enumerate() {
                for block in 0..BLOCKS {
                    for start in (0..biases).step_by(BIASES) {
                        let count = BIASES.min(biases - start);
                        let channels = self.draw_channels(&mut rng);
                        let padded = (i + block + start / BIASES).is_multiple_of(2);
                        let biases = first..first + count;
                        banks.push(Bank { difference, dilation, block, padded, channels, biases });
                        first += count;
                    }
                }
            }
            for dilation in self.contest_dilations() {
                for _ in 0..GROUPS / LANES {
                    let channels = (0..LANES).map(|_| self.draw_channels(&mut rng)).collect();
                    contests.push(Contest { difference, dilation, channels });
                }
            }
        }
        (banks, contests)
    }

    /// 1, 2, 4 or 8 different channels, as far as there are so many.
    fn draw_channels(&self, rng: &mut Rng) -> Vec<usize> {
        if self.channels == 1 {
            return vec![0];
        }
        let count = 1 << below(rng, self.channels.min(8).ilog2() as usize + 1);
        let mut chosen: Vec<usize> = Vec::with_capacity(count);
        while chosen.len() < count {
            let channel = below(rng, self.channels);
            if !chosen.contains(&channel) {
                chosen.push(channel);
            }
        }
        chosen
    }
}

impl Bank {
    /// The frames that are pooled, of a series of this length: a series that the kernels do not fit into is padded.
    pub fn pooled(&self, length: usize) -> std::ops::Range<usize> {
        let margin = REACH * self.dilation;
        if self.padded || length <= 2 * margin { 0..length } else { margin..length - margin }
    }
}

/// A whole number below `count`, each as likely.
pub(super) fn below(rng: &mut Rng, count: usize) -> usize {
    ((u128::from(rng.next_u64()) * count as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_features_are_within_the_budget() {
        for (channels, length) in [(1, 20), (1, 427), (12, 5000), (60, 200_000)] {
            for most in [1 << 15, 1 << 28 >> 12, 55_000] {
                let plan = Plan::within(0, channels, length, most);
                let total = |plan: &Plan| plan.views().iter().sum::<usize>();
                let more = Plan::new(0, channels, length, plan.biases() + 1);
                assert!(total(&plan) <= most || plan.biases() == 1, "{channels} {length} {most}: {}", total(&plan));
                assert!(total(&more) > most || plan.biases() == BIASES_PER_KERNEL, "{channels} {length} {most}");
            }
            assert_eq!(Plan::within(0, channels, length, usize::MAX).biases(), BIASES_PER_KERNEL);
        }
    }
}
