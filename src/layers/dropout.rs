//! Dropout, in training.

use std::sync::Arc;

use ndarray::Array2;

use super::batch::{Spans, copied, for_rows};
use super::{Buffer, flat_mut};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::team::Team;

/// Sets each number to 0 at a rate and divides the others by 1 − rate, so that the mean stays.
///
/// Which numbers are dropped depends on the key, the sequence, the frame and the feature alone. So the same call on a
/// gradient is the backward pass, nothing is kept, and neither other sequences nor the number of threads matter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    /// The rate in units of 2⁻¹⁶: four random numbers come from one word.
    threshold: u16,
    key: u64,
}

impl Dropout {
    pub(crate) const NONE: Dropout = Dropout { threshold: 0, key: 0 };

    /// At a rate from 0 to below 1.
    pub(crate) fn new(rate: f32, seed: u64) -> Self {
        // a rate that rounds to 1 would leave nothing
        Dropout { threshold: (rate * 65536.0).round().min(65535.0) as u16, key: mixed(seed.wrapping_add(GOLDEN)) }
    }

    /// The same rate with a mask of its own for this place in the model.
    pub(crate) fn at(self, place: u64) -> Self {
        Dropout { key: mixed((self.key ^ place).wrapping_add(GOLDEN)), ..self }
    }

    pub(crate) fn is_none(self) -> bool {
        self.threshold == 0
    }

    /// x `[rows, h]` after dropout, where anything is dropped.
    pub(crate) fn applied(self, team: &Team, spans: &Spans, x: &Array2<f32>) -> Option<Buffer> {
        (!self.is_none()).then(|| {
            let mut dropped = copied(team, x);
            self.apply(team, spans, &mut dropped);
            dropped
        })
    }

    /// x `[rows, h]`
    pub(crate) fn apply(self, team: &Team, spans: &Spans, x: &mut Array2<f32>) {
        if self.is_none() || x.is_empty() {
            return;
        }
        /// Frames that one thread takes at a time.
        const FRAMES: usize = 64;
        let h = x.ncols();
        let mut blocks = Vec::new();
        for ((sequence, x), first) in spans.split(flat_mut(x), h).enumerate().zip(spans.first_frames()) {
            let of_sequence = self.at(sequence as u64);
            blocks.extend(x.chunks_mut(FRAMES * h).enumerate().map(|(i, x)| (of_sequence, first + i * FRAMES, x)));
        }
        team.for_each(blocks, |(dropout, first, x)| {
            timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || {
                for (i, row) in x.chunks_exact_mut(h).enumerate() {
                    dropout.at((first + i) as u64).apply_to_row(row);
                }
            });
        });
    }

    /// x `[rows, h]`, of which each row has a seed of its own: see [`row_seeds`].
    pub(crate) fn apply_by_row(self, team: &Team, seeds: &[u64], x: &mut Array2<f32>) {
        let h = x.ncols();
        debug_assert_eq!(seeds.len(), x.nrows());
        for_rows(team, flat_mut(x), h, |first, x| {
            timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || {
                x.chunks_exact_mut(h).zip(&seeds[first..]).for_each(|(row, seed)| self.at(*seed).apply_to_row(row));
            });
        });
    }

    fn apply_to_row(self, row: &mut [f32]) {
        let scale = 65536.0 / (65536.0 - f32::from(self.threshold));
        let mut counter = self.key;
        for row in row.chunks_mut(64) {
            let mut random = [0u16; 64];
            for four in random.as_chunks_mut::<4>().0 {
                counter = counter.wrapping_add(GOLDEN);
                let word = mixed(counter);
                *four = [word as u16, (word >> 16) as u16, (word >> 32) as u16, (word >> 48) as u16];
            }
            for (x, random) in row.iter_mut().zip(random) {
                // not a product with 0: infinity would leave NaN
                *x = if random < self.threshold { 0.0 } else { *x * scale };
            }
        }
    }
}

/// A seed for each row of some sequences, which follows from that of its sequence and from the frame.
pub(crate) fn row_seeds(spans: &Spans, of_sequences: impl IntoIterator<Item = u64>) -> Arc<[u64]> {
    let rows = spans.iter().zip(of_sequences).flat_map(|(span, seed)| (0..span.len()).map(move |i| seed_at(seed, i)));
    rows.collect()
}

/// The seed of one of several things.
pub(crate) fn seed_at(seed: u64, i: usize) -> u64 {
    mixed((mixed(seed.wrapping_add(GOLDEN)) ^ i as u64).wrapping_add(GOLDEN))
}

/// 2⁶⁴ over the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The mixer of SplitMix64 (Steele, Lea and Flood 2014). The generator behind the other seeds would take longer than
/// everything else a layer does to a number.
fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(dropout: Dropout, lengths: &[usize], h: usize) -> Array2<f32> {
        let spans = Spans::new(lengths.iter().copied());
        let mut x = Array2::ones((spans.rows(), h));
        dropout.apply(&Team::alone(), &spans, &mut x);
        x
    }

    #[test]
    fn keeps_the_share_and_the_mean_and_repeats_itself() {
        for rate in [0.02, 0.3, 0.9] {
            let x = mask(Dropout::new(rate, 5), &[100; 20], 100);
            let dropped = |x: &mut dyn Iterator<Item = &f32>| x.filter(|x| **x == 0.0).count() as f32;
            assert!((dropped(&mut x.iter()) / 2e5 - rate).abs() < 0.005, "{rate}");
            assert!((x.mean().unwrap() - 1.0).abs() < 0.02, "{rate}");
            // no row and no column is favoured: 5 standard deviations
            for (lines, n) in [(x.rows().into_iter(), 100.0f32), (x.columns().into_iter(), 2000.0)] {
                let bound = 5.5 * (rate * (1.0 - rate) / n).sqrt();
                for line in lines {
                    assert!((dropped(&mut line.iter()) / n - rate).abs() < bound, "{rate}");
                }
            }
        }
        let all = Dropout::new(0.3, 5);
        assert_eq!(mask(all.at(1), &[3, 3], 70), mask(all.at(1), &[3, 3], 70));
        for other in [all, all.at(2), Dropout::new(0.3, 6).at(1), Dropout::new(0.3, 1).at(5)] {
            assert_ne!(mask(all.at(1), &[3, 3], 70), mask(other, &[3, 3], 70));
        }
    }

    #[test]
    fn what_a_frame_loses_does_not_depend_on_other_sequences() {
        let (short, long) = (mask(Dropout::new(0.5, 1), &[5, 5], 130), mask(Dropout::new(0.5, 1), &[9, 100, 9], 130));
        for frame in 0..5 {
            assert_eq!(short.row(frame), long.row(frame));
            assert_eq!(short.row(5 + frame), long.row(9 + frame));
            assert_ne!(short.row(frame), short.row(5 + frame));
        }
        let ends = Spans::new([9, 100, 9]).ends();
        let mut last = Array2::ones((3, 130));
        Dropout::new(0.5, 1).apply(&Team::alone(), &ends.spans, &mut last);
        for (last, row) in last.rows().into_iter().zip(ends.rows) {
            assert_eq!(last, long.row(row));
        }
    }

    #[test]
    fn rows_with_seeds_of_their_own() {
        let (dropout, spans) = (Dropout::new(0.3, 5), Spans::new([40, 60]));
        let mask = |seeds: &[u64]| {
            let mut x = Array2::ones((seeds.len(), 100));
            dropout.apply_by_row(&Team::alone(), seeds, &mut x);
            x
        };
        let seeds = row_seeds(&spans, [7, 8]);
        let all = mask(&seeds);
        assert!((all.iter().filter(|x| **x == 0.0).count() as f32 / 1e4 - 0.3).abs() < 0.02);
        // whatever else passes
        assert_eq!(mask(&row_seeds(&Spans::new([60]), [8])), all.slice(ndarray::s![40.., ..]));
        assert_ne!(all.row(0), all.row(1));
        assert_ne!(all.row(0), all.row(40));
    }

    #[test]
    fn rates_at_the_ends() {
        assert!(Dropout::new(0.0, 1).is_none());
        let almost_all = mask(Dropout::new(1.0 - f32::EPSILON, 1), &[10], 100);
        assert!(almost_all.iter().all(|x| x.is_finite()));
        let mut x = Array2::from_elem((4, 100), f32::INFINITY);
        Dropout::new(0.5, 1).apply(&Team::alone(), &Spans::new([4]), &mut x);
        assert!(x.iter().all(|x| !x.is_nan()) && x.iter().any(|x| *x == 0.0));
    }
}
