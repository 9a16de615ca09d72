//! Some series of a set on top of each other, changed at random or not, with their targets.

use ndarray::{Array2, Array3, Axis, s};
use rand::seq::SliceRandom;

use super::{Dataset, Targets};
use crate::layers::Rng;
use crate::train::augment::{Augmentation, augmented, mix, share};

/// Some series, padded.
pub(in crate::train) struct Batch {
    /// `[b, l, width]`, zeros past the end of each series.
    pub x: Array3<f32>,
    pub lengths: Vec<usize>,
    pub targets: BatchTargets,
    /// How many targets of each row count.
    pub counts: Vec<usize>,
}

/// Targets of which a batch has a part, too: those of the series that its own are mixed with.
pub(in crate::train) struct Mixed {
    /// The share of the own targets.
    pub share: f32,
    pub targets: BatchTargets,
}

/// Targets of every frame, or of one.
pub(in crate::train) enum BatchTargets {
    /// `[b, l]` or `[b, 1]`
    Classes(Array2<usize>),
    /// `[b, l, outputs]` or `[b, 1, outputs]`
    Values(Array3<f32>),
    /// `[b, 1, outputs]`, 1 where a label is right and 0 elsewhere
    Labels(Array3<f32>),
}

impl Dataset {
    pub(in crate::train) fn batch(&self, indices: &[usize]) -> Batch {
        self.padded_batch(&self.series, indices, indices)
    }

    /// The targets of some series, with frames `frames` of any `series`.
    fn padded_batch(&self, series: &[Array2<f32>], frames: &[usize], indices: &[usize]) -> Batch {
        let lengths = frames.iter().map(|&i| series[i].nrows()).collect();
        let counts = if self.task.is_frame_wise() { self.lengths(indices) } else { vec![1; indices.len()] };
        Batch { x: padded(series, frames), lengths, targets: self.batch_targets(indices), counts }
    }

    fn batch_targets(&self, indices: &[usize]) -> BatchTargets {
        match &self.targets {
            Targets::Classes(all) => {
                BatchTargets::Classes(Array2::from_shape_fn((indices.len(), 1), |(row, _)| all[indices[row]]))
            }
            Targets::Values(all) => BatchTargets::Values(all.select(Axis(0), indices).insert_axis(Axis(1))),
            Targets::FrameClasses(all) => {
                let longest = self.lengths(indices).into_iter().max().unwrap_or(0);
                BatchTargets::Classes(Array2::from_shape_fn((indices.len(), longest), |(row, frame)| {
                    all[indices[row]].get(frame).copied().unwrap_or(0)
                }))
            }
            Targets::FrameValues(all) => BatchTargets::Values(padded(all, indices)),
            Targets::Labels(all) => {
                let labels = all.select(Axis(0), indices).mapv(|label| if label { 1.0 } else { 0.0 });
                BatchTargets::Labels(labels.insert_axis(Axis(1)))
            }
        }
    }

    /// As [`batch`](Self::batch), with series that are changed at random, and the targets of those they are mixed with.
    pub(in crate::train) fn augmented_batch(
        &self,
        indices: &[usize],
        augmentations: &[Augmentation],
        rng: &mut Rng,
    ) -> (Batch, Option<Mixed>) {
        if augmentations.is_empty() {
            return (self.batch(indices), None);
        }
        let mut series: Vec<_> = indices.iter().map(|&i| augmented(&self.series[i], augmentations, rng)).collect();
        let mixed = share(augmentations, rng).map(|share| {
            let mut others: Vec<_> = (0..indices.len()).collect();
            others.shuffle(rng);
            series = mix(&series, &others, share);
            let others: Vec<_> = others.into_iter().map(|other| indices[other]).collect();
            Mixed { share, targets: self.batch_targets(&others) }
        });
        let all: Vec<_> = (0..series.len()).collect();
        (self.padded_batch(&series, &all, indices), mixed)
    }
}

/// `[length, width]` each → `[b, longest, width]`
pub(super) fn padded(all: &[Array2<f32>], indices: &[usize]) -> Array3<f32> {
    let longest = indices.iter().map(|&i| all[i].nrows()).max().unwrap_or(0);
    let mut padded = Array3::zeros((indices.len(), longest, all[0].ncols()));
    for (row, &i) in indices.iter().enumerate() {
        padded.slice_mut(s![row, ..all[i].nrows(), ..]).assign(&all[i]);
    }
    padded
}
