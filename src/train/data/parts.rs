//! Series drawn into parts, and into batches of like lengths.

use std::collections::BTreeMap;
use std::ops::Range;

use rand::SeedableRng;
use rand::seq::SliceRandom;

use super::{Dataset, Targets, bad};
use crate::layers::Rng;
use crate::{Error, Result};

impl Dataset {
    /// Splits off a part for validation, drawn from `seed`: returns the rest and the part. It takes a share of each class of series,
    /// and leaves at least one of each.
    ///
    /// ```
    /// use hymba::Task;
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets};
    ///
    /// let task = Task::Regress { outputs: 1 };
    /// let data = Dataset::new(&task, vec![Array2::ones((9, 2)); 50], Targets::Values(Array2::zeros((50, 1))))?;
    /// let (train, validation) = data.split(0.2, 0)?;
    /// assert_eq!((train.num_series(), validation.num_series()), (40, 10));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`] unless 0 < fraction < 1; [`Error::Data`] if no series is left for one of the parts.
    pub fn split(&self, fraction: f32, seed: u64) -> Result<(Dataset, Dataset)> {
        let (train, validation) = self.split_indices(fraction, seed)?;
        Ok((self.subset(&train), self.subset(&validation)))
    }

    pub(crate) fn split_indices(&self, fraction: f32, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(Error::Option {
                option: "validation_fraction",
                given: fraction.to_string(),
                allowed: "it must be above 0 and below 1; 0.2 is usual".into(),
            });
        }
        let mut groups = BTreeMap::<_, Vec<usize>>::new();
        for i in 0..self.num_series() {
            let class = if let Targets::Classes(classes) = &self.targets { classes[i] } else { 0 };
            groups.entry(class).or_default().push(i);
        }
        let mut rng = Rng::seed_from_u64(seed);
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        let shares = shares(&groups.values().map(Vec::len).collect::<Vec<_>>(), fraction);
        for (mut group, share) in groups.into_values().zip(shares) {
            group.shuffle(&mut rng);
            let (taken, left) = group.split_at(share);
            validation.extend_from_slice(taken);
            train.extend_from_slice(left);
        }
        if validation.is_empty() {
            return bad(format!("no series is left for a validation part of {fraction} of {}", self.num_series()));
        }
        train.sort_unstable();
        validation.sort_unstable();
        Ok((train, validation))
    }

    pub(crate) fn subset(&self, indices: &[usize]) -> Dataset {
        Dataset {
            task: self.task.clone(),
            series: indices.iter().map(|&i| self.series[i].clone()).collect(),
            targets: self.targets.select(indices),
        }
    }

    /// The batches of an epoch, for a training loop of your own: all series, in as few batches of at most `size` as hold them, whose
    /// sizes differ by one at most, in an order drawn from `seed`, with series of similar length together. Each batch is a list of
    /// indices for [`pad`](Self::pad).
    ///
    /// ```
    /// use hymba::Task;
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets};
    ///
    /// let task = Task::Regress { outputs: 1 };
    /// let data = Dataset::new(&task, vec![Array2::ones((9, 2)); 50], Targets::Values(Array2::zeros((50, 1))))?;
    /// let batches = data.batches(16, 0)?;
    /// assert_eq!((batches.len(), batches.concat().len()), (4, 50));
    /// for batch in batches {
    ///     let (x, lengths) = data.pad(&batch)?;
    ///     assert_eq!(x.dim().0, lengths.len());
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `size` is 0.
    pub fn batches(&self, size: usize, seed: u64) -> Result<Vec<Vec<usize>>> {
        if size == 0 {
            let (given, allowed) = ("0".into(), "it must be at least 1".into());
            return Err(Error::Option { option: "batch_size", given, allowed });
        }
        let all: Vec<_> = (0..self.num_series()).collect();
        Ok(self.batches_of(&all, size, &mut Rng::seed_from_u64(seed)))
    }

    /// Cuts the series `indices` into batches of at most `size`, whose sizes differ by one at most, in an order drawn from `rng`.
    pub(in crate::train) fn batches_of(&self, indices: &[usize], size: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
        let mut batches = self.sorted_batches(indices, indices.len().div_ceil(size), rng);
        batches.shuffle(rng);
        batches
    }

    /// Cuts the series `indices` into `count` batches, whose sizes differ by one at most, in an order drawn from `rng`: series of similar
    /// length in one batch, and all lengths in every few batches. Some batches are empty if there are too few series.
    pub(in crate::train) fn sorted_batches(&self, indices: &[usize], count: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
        /// Batches among which series are sorted.
        const POOL: usize = 8;
        let mut order = indices.to_vec();
        order.shuffle(rng);
        let ranges: Vec<_> = cut_into(order.len(), count).collect();
        // similar lengths go together, so that little padding is computed
        for pool in ranges.chunks(POOL) {
            order[pool[0].start..pool[pool.len() - 1].end].sort_by_key(|&i| self.series[i].nrows());
        }
        ranges.into_iter().map(|range| order[range].to_vec()).collect()
    }
}

/// How many of each of several groups are in a part that is this fraction of them all. Of each group one at least is not.
pub(in crate::train) fn shares(sizes: &[usize], fraction: f32) -> Vec<usize> {
    let (fraction, mut seen, mut taken) = (f64::from(fraction), 0, 0);
    let share = |&size: &usize| {
        seen += size;
        // what rounding left over in one group is made up for in the next
        let wanted = ((fraction * seen as f64).round() as usize).saturating_sub(taken);
        let share = wanted.min((fraction * size as f64).ceil() as usize).min(size.saturating_sub(1));
        taken += share;
        share
    };
    sizes.iter().map(share).collect()
}

/// Cuts 0..`count` into ranges of at most `most` each, whose sizes differ by one at most.
pub(in crate::train) fn cut(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    cut_into(count, count.div_ceil(most))
}

/// Cuts 0..`count` into `pieces` ranges, whose sizes differ by one at most.
pub(in crate::train) fn cut_into(count: usize, pieces: usize) -> impl Iterator<Item = Range<usize>> {
    // in u64: the product may be past a usize of 32 bits
    let start = move |piece: usize| (piece as u64 * count as u64 / pieces as u64) as usize;
    (0..pieces).map(move |piece| start(piece)..start(piece + 1))
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::Task;

    /// Series i has i % 30 + 1 frames and the class `class(i)`.
    fn data(count: usize, class: impl Fn(usize) -> usize) -> Dataset {
        let series = (0..count).map(|i| Array2::from_elem((i % 30 + 1, 1), i as f32)).collect();
        Dataset::new(&Task::classify(["a", "b", "c"]), series, Targets::Classes((0..count).map(class).collect()))
            .unwrap()
    }

    fn classes(data: &Dataset) -> [usize; 3] {
        let Targets::Classes(classes) = data.targets() else { panic!("a classification") };
        [0, 1, 2].map(|class| classes.iter().filter(|&&given| given == class).count())
    }

    #[test]
    fn a_split_takes_its_share_of_every_class() {
        let whole = data(75, |i| if i < 50 { 0 } else { 1 + usize::from(i == 74) });
        let (train, validation) = whole.split(0.2, 7).unwrap();
        assert_eq!((classes(&train), classes(&validation)), ([40, 19, 1], [10, 5, 0]));
        assert_eq!(whole.split(0.2, 7).unwrap().1, validation);
        assert_ne!(whole.split(0.2, 8).unwrap().1, validation);
        let [train, validation] =
            [train, validation].map(|part| part.series.iter().map(|x| x[[0, 0]]).collect::<Vec<_>>());
        let mut all = [train, validation].concat();
        all.sort_by(f32::total_cmp);
        assert!(all.into_iter().eq((0..75).map(|i| i as f32)));

        for fraction in [0.0, 1.0, -0.5, f32::NAN] {
            assert!(matches!(whole.split(fraction, 0), Err(Error::Option { .. })), "{fraction}");
        }
        assert!(matches!(data(3, |i| i).split(0.5, 0), Err(Error::Data(_))), "one series a class");
    }

    #[test]
    fn batches_hold_everything_once_and_like_lengths_together() {
        let (data, indices) = (data(301, |_| 0), Vec::from_iter((0..301).filter(|i| i % 3 > 0)));
        let batches = |seed| data.batches_of(&indices, 16, &mut Rng::seed_from_u64(seed));
        let found = batches(1);
        assert_eq!(found.len(), 13);
        assert!(found.iter().all(|batch| (15..=16).contains(&batch.len())));
        let mut all = found.concat();
        all.sort_unstable();
        assert_eq!(all, indices);
        let frames: usize =
            found.iter().map(|batch| batch.len() * data.lengths(batch).into_iter().max().unwrap()).sum();
        let needed: usize = data.lengths(&indices).iter().sum();
        assert!(frames < needed * 6 / 5, "{frames} frames with padding, {needed} without");
        assert_eq!(batches(1), found);
        assert_ne!(batches(2), found);
        assert_eq!(data.batches_of(&indices, 1000, &mut Rng::seed_from_u64(1)).len(), 1);
    }
}
