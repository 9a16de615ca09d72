//! Quantiles of intervals: where a series is, and when.

use ndarray::{Array2, ArrayView1};

/// Channels used, the first ones.
const MOST_CHANNELS: usize = 16;
/// Halvings of the series.
const DEPTHS: usize = 6;
/// Quantiles of an interval: one for each four frames of it, and at most so many.
const MOST_QUANTILES: usize = 16;
const FRAMES_PER_QUANTILE: usize = 4;
/// The series, its first difference and its second.
const DIFFERENCES: usize = 3;

/// For the halvings that a series of this length allows: intervals, among them those that lie across two, and quantiles of each.
fn intervals(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..DEPTHS)
        .map(|depth| 1 << depth)
        .take_while(move |&parts| parts == 1 || length / parts >= FRAMES_PER_QUANTILE)
        .map(move |parts| (parts, (1 + (length / parts).saturating_sub(1) / FRAMES_PER_QUANTILE).min(MOST_QUANTILES)))
}

/// Features of series with so many channels, the longest of which have this length.
pub(super) fn count(length: usize, channels: usize) -> usize {
    let quantiles: usize = intervals(length).map(|(parts, quantiles)| (2 * parts - 1) * quantiles).sum();
    DIFFERENCES * channels.min(MOST_CHANNELS) * quantiles
}

/// Writes the features of a series `[channels, l]`. Intervals are parts of it, whatever its length. Every second quantile is
/// taken from the mean of its interval: a shape without a level.
pub(super) fn levels(length: usize, series: &Array2<f32>, mut out: &mut [f32]) {
    let mut sorted = Vec::new();
    for channel in series.outer_iter().take(MOST_CHANNELS) {
        let mut x = channel.to_vec();
        for _ in 0..DIFFERENCES {
            let l = x.len() as f64;
            for (parts, quantiles) in intervals(length) {
                for half in 0..2 * parts - 1 {
                    // in units of half an interval
                    let place = |half: usize| (half as f64 * l / (2 * parts) as f64) as usize;
                    let start = place(half).min(x.len() - 1);
                    let interval = &x[start..place(half + 2).max(start + 1)];
                    sorted.clear();
                    sorted.extend_from_slice(interval);
                    sorted.sort_unstable_by(f32::total_cmp);
                    let mean = ArrayView1::from(interval).mean().unwrap_or(0.0);
                    let (those, rest) = out.split_at_mut(quantiles);
                    for (i, to) in those.iter_mut().enumerate() {
                        let last = (sorted.len() - 1) as f64;
                        let share = if quantiles == 1 { 0.5 } else { i as f64 / (quantiles - 1) as f64 };
                        *to = sorted[(share * last).round() as usize] - if i % 2 == 1 { mean } else { 0.0 };
                    }
                    out = rest;
                }
            }
            x = if x.len() > 1 { x.windows(2).map(|pair| pair[1] - pair[0]).collect() } else { vec![0.0] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_written_for_any_length() {
        for (length, channels) in [(1, 1), (3, 2), (8, 1), (40, 20), (500, 3)] {
            for l in [1, 2, 5, length, 3 * length] {
                let mut out = vec![f32::NAN; count(length, channels)];
                levels(length, &Array2::from_shape_fn((channels, l), |(c, t)| (c + t) as f32), &mut out);
                assert!(out.iter().all(|x| x.is_finite()), "{length} {channels} {l}");
            }
        }
        // lowest, the middle less the mean, and highest of the whole; then of its first half, its middle and its second half
        let mut out = vec![0.0; count(9, 1)];
        levels(9, &Array2::from_shape_vec((1, 9), vec![5., 1., 9., 4., 4., 4., 4., 4., 1.]).unwrap(), &mut out);
        assert_eq!(out[..3], [1.0, 0.0, 9.0]);
        assert_eq!(out[3..6], [5.0, 4.0, 4.0]); // the upper one of two in the middle
    }
}
