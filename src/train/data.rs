//! Series and their targets: checked, split and shuffled.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;

use ndarray::{Array2, Array3, Axis, s};
use rand::SeedableRng;
use rand::seq::SliceRandom;

use super::{Hash, Ranks};
use crate::layers::Rng;
use crate::{Error, Normalization, Predictor, Result, Task};

mod batch;

use batch::padded;
pub(super) use batch::{Batch, BatchTargets, Mixed};

/// Series of any lengths with their targets.
///
/// Everything is checked when it is made: a `Dataset` can be trained on. Missing values must be filled before.
///
/// ```
/// use hymba::Task;
/// use hymba::ndarray::Array2;
/// use hymba::train::{Dataset, Targets};
///
/// let task = Task::classify(["walking", "standing"]);
/// let series = vec![Array2::ones((50, 6)), Array2::zeros((31, 6))]; // each [length, width]
/// let data = Dataset::new(&task, series.clone(), Targets::Classes(vec![0, 1]))?;
/// assert_eq!((data.num_series(), data.width(), data.longest()), (2, 6, 50));
///
/// let error = Dataset::new(&task, series, Targets::Classes(vec![0, 2])).unwrap_err();
/// assert!(error.to_string().contains("class 2"));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    task: Task,
    series: Vec<Array2<f32>>,
    targets: Targets,
}

/// The targets of all series, in their order. Which kind they are follows from the [`Task`].
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// For [`Task::Classify`]: the class of each series, as its index among the labels.
    Classes(Vec<usize>),
    /// For [`Task::Regress`]: `[series, outputs]`
    Values(Array2<f32>),
    /// For [`Task::ClassifyFrames`]: the class of each frame of each series, or [`Targets::IGNORED`].
    FrameClasses(Vec<Vec<usize>>),
    /// For [`Task::RegressFrames`]: `[length, outputs]` for each series; NaN where a number is missing.
    FrameValues(Vec<Array2<f32>>),
    /// For [`Task::MultiLabel`]: `[series, labels]`, which labels each has.
    Labels(Array2<bool>),
}

impl Targets {
    /// Marks a frame without a class: it counts neither in losses and their gradients nor in metrics. (Numbers of a frame are marked by
    /// NaN, each output by itself.)
    ///
    /// ```
    /// use hymba::Task;
    /// use hymba::ndarray::{Array2, array};
    /// use hymba::train::{Dataset, Targets};
    ///
    /// let task = Task::classify_frames(["still", "moving"]);
    /// let classes = vec![vec![Targets::IGNORED, 0, 1]];
    /// assert!(Dataset::new(&task, vec![Array2::ones((3, 6))], Targets::FrameClasses(classes)).is_ok());
    ///
    /// let task = Task::RegressFrames { outputs: 1 };
    /// let numbers = Targets::FrameValues(vec![array![[f32::NAN], [2.0], [2.5]]]);
    /// assert!(Dataset::new(&task, vec![Array2::ones((3, 6))], numbers).is_ok());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub const IGNORED: usize = usize::MAX;

    pub(super) fn select(&self, indices: &[usize]) -> Targets {
        match self {
            Targets::Classes(all) => Targets::Classes(indices.iter().map(|&i| all[i]).collect()),
            Targets::Values(all) => Targets::Values(all.select(Axis(0), indices)),
            Targets::FrameClasses(all) => Targets::FrameClasses(indices.iter().map(|&i| all[i].clone()).collect()),
            Targets::FrameValues(all) => Targets::FrameValues(indices.iter().map(|&i| all[i].clone()).collect()),
            Targets::Labels(all) => Targets::Labels(all.select(Axis(0), indices)),
        }
    }
}

impl Dataset {
    /// The series `[length, width]` with their targets for a task.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] names the first fault, with its series and frame (counted from 0): no series at all, one without frames
    /// or of another width, a number that is not finite, targets of another kind or number than the task and the series need,
    /// a class that has no label, no frame with a target. [`Error::Option`] if the task is not usable.
    pub fn new(task: &Task, series: Vec<Array2<f32>>, targets: Targets) -> Result<Self> {
        task.validate()?;
        let data = Dataset { task: task.clone(), series, targets };
        data.check_series()?;
        data.check_targets()?;
        Ok(data)
    }

    fn check_series(&self) -> Result<()> {
        let Some(first) = self.series.first() else { return bad("there are no series") };
        let width = first.ncols();
        if width == 0 {
            return bad("series 0 has frames of width 0");
        }
        for (i, series) in self.series.iter().enumerate() {
            if series.nrows() == 0 {
                return bad(format!("series {i} has no frames; leave it out"));
            }
            if series.ncols() != width {
                return bad(format!("series {i} has frames of width {}, and series 0 of {width}", series.ncols()));
            }
            if let Some(((frame, feature), x)) = find(series, |x| !x.is_finite()) {
                return bad(format!(
                    "series {i}: feature {feature} of frame {frame} is {x}; fill gaps first, for instance with the \
                     value before them"
                ));
            }
        }
        Ok(())
    }

    fn check_targets(&self) -> Result<()> {
        let (count, outputs) = (self.series.len(), self.task.outputs());
        let counted = |targets: usize| match targets == count {
            true => Ok(()),
            false => bad(format!("{targets} targets for {count} series; give one for each")),
        };
        let class = |place: &dyn Display, class: usize| match class < outputs {
            true => Ok(()),
            false => bad(format!("{place} has class {class}, but there are {outputs}: 0 to {}", outputs - 1)),
        };
        let values = |place: &dyn Display, values: &Array2<f32>, rows: usize, unusable: fn(f32) -> bool| {
            if values.dim() != (rows, outputs) {
                let (given, expected) = (values.shape(), [rows, outputs]);
                return bad(format!("the targets of {place} have shape {given:?}, expected {expected:?}"));
            }
            match find(values, unusable) {
                Some(((row, output), y)) => bad(format!("the targets of {place} have {y} at [{row}, {output}]")),
                None => Ok(()),
            }
        };
        match (&self.task, &self.targets) {
            (Task::Classify { .. }, Targets::Classes(classes)) => {
                counted(classes.len())?;
                classes.iter().enumerate().try_for_each(|(i, &given)| class(&format_args!("series {i}"), given))
            }
            (Task::Regress { .. }, Targets::Values(targets)) => {
                values(&"all series", targets, count, |y| !y.is_finite())
            }
            (Task::ClassifyFrames { .. }, Targets::FrameClasses(all)) => {
                counted(all.len())?;
                for (i, (classes, series)) in all.iter().zip(&self.series).enumerate() {
                    if classes.len() != series.nrows() {
                        return bad(format!(
                            "{} classes for the {} frames of series {i}",
                            classes.len(),
                            series.nrows()
                        ));
                    }
                    for (frame, &given) in classes.iter().enumerate().filter(|(_, class)| **class != Targets::IGNORED) {
                        class(&format_args!("frame {frame} of series {i}"), given)?;
                    }
                }
                match all.iter().flatten().all(|class| *class == Targets::IGNORED) {
                    true => bad("no frame has a class: all are Targets::IGNORED"),
                    false => Ok(()),
                }
            }
            (Task::RegressFrames { .. }, Targets::FrameValues(all)) => {
                counted(all.len())?;
                for (i, (targets, series)) in all.iter().zip(&self.series).enumerate() {
                    values(&format_args!("series {i}"), targets, series.nrows(), f32::is_infinite)?;
                }
                match all.iter().flatten().all(|y| y.is_nan()) {
                    true => bad("no frame has a target: all are NaN"),
                    false => Ok(()),
                }
            }
            (Task::MultiLabel { .. }, Targets::Labels(labels)) => match labels.dim() == (count, outputs) {
                true => Ok(()),
                false => bad(format!("the labels have shape {:?}, expected {:?}", labels.shape(), [count, outputs])),
            },
            (Task::MultiLabel { .. }, _) => bad("for labels of series, give Targets::Labels"),
            (Task::Classify { .. }, _) => bad("to classify series, give Targets::Classes"),
            (Task::Regress { .. }, _) => bad("for numbers of series, give Targets::Values"),
            (Task::ClassifyFrames { .. }, _) => bad("to classify frames, give Targets::FrameClasses"),
            (Task::RegressFrames { .. }, _) => bad("for numbers of frames, give Targets::FrameValues"),
        }
    }

    /// The task.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The series, each `[length, width]`.
    pub fn series(&self) -> &[Array2<f32>] {
        &self.series
    }

    /// The targets of the series.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// How many series there are; at least 1.
    pub fn num_series(&self) -> usize {
        self.series.len()
    }

    /// The width of every frame.
    pub fn width(&self) -> usize {
        self.series[0].ncols()
    }

    /// The frames of the longest series: a good `window_size`.
    pub fn longest(&self) -> usize {
        self.series.iter().map(Array2::nrows).max().unwrap_or(0)
    }

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

    /// The batches of an epoch, for a training loop of your own: all series, as few batches of at most `size` as hold them, equal in
    /// size but for one series, in an order drawn from `seed`, with series of similar length together. Each batch is a list of
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

    /// Cuts the series `indices` into batches of at most `size`, equal but for one series, in an order drawn from `rng`.
    pub(super) fn batches_of(&self, indices: &[usize], size: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
        let mut batches = self.sorted_batches(indices, indices.len().div_ceil(size), rng);
        batches.shuffle(rng);
        batches
    }

    /// Cuts the series `indices` into `count` batches of equal size (but for one series), in an order drawn from `rng`: series of similar
    /// length in one batch, and all lengths in every few batches. Some batches are empty if there are too few series.
    pub(super) fn sorted_batches(&self, indices: &[usize], count: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
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

    /// Stacks series into a batch: x `[b, l, width]` with zeros past the end of each, and their lengths.
    ///
    /// ```
    /// use hymba::Task;
    /// use hymba::ndarray::{Array2, array};
    /// use hymba::train::{Dataset, Targets};
    ///
    /// let series = vec![Array2::ones((3, 1)), Array2::ones((2, 1))];
    /// let data = Dataset::new(&Task::classify(["a", "b"]), series, Targets::Classes(vec![0, 1]))?;
    /// let (x, lengths) = data.pad(&[1, 0])?;
    /// assert_eq!((x, lengths), (array![[[1.0], [1.0], [0.0]], [[1.0], [1.0], [1.0]]], vec![2, 3]));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if there is no such series.
    pub fn pad(&self, indices: &[usize]) -> Result<(Array3<f32>, Vec<usize>)> {
        if let Some(i) = indices.iter().find(|&&i| i >= self.num_series()) {
            return bad(format!("there is no series {i}: there are {}", self.num_series()));
        }
        Ok((padded(&self.series, indices), self.lengths(indices)))
    }

    fn lengths(&self, indices: &[usize]) -> Vec<usize> {
        indices.iter().map(|&i| self.series[i].nrows()).collect()
    }

    /// How many targets some series have: one per series, or one per frame with a target. Of the c numbers of a frame each counts 1/c.
    pub(super) fn num_targets(&self, indices: &[usize]) -> f64 {
        match &self.targets {
            Targets::FrameClasses(_) => self.classes(indices).count() as f64,
            Targets::FrameValues(all) => {
                let numbers = indices.iter().flat_map(|&i| &all[i]).filter(|y| !y.is_nan()).count();
                numbers as f64 / self.task.outputs() as f64
            }
            Targets::Classes(_) | Targets::Values(_) | Targets::Labels(_) => indices.len() as f64,
        }
    }

    /// The classes of some series or of their frames; none in a regression.
    pub(super) fn classes<'a>(&'a self, indices: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        indices
            .iter()
            .flat_map(|&i| match &self.targets {
                Targets::Classes(all) => &all[i..=i],
                Targets::FrameClasses(all) => &all[i],
                Targets::Values(_) | Targets::FrameValues(_) | Targets::Labels(_) => &[],
            })
            .copied()
            .filter(|class| *class != Targets::IGNORED)
    }

    /// Fitted to the frames of some series, and of those of other ranks, in the form in which `predictor` sees them.
    pub(super) fn input_normalization(
        &self,
        indices: &[usize],
        predictor: &Predictor,
        ranks: &mut Ranks,
    ) -> Result<Normalization> {
        let formed: Vec<_> = indices.iter().map(|&i| predictor.formed(&self.series[i])).collect();
        ranks.fit(predictor.predictor_options().features(), formed.iter().map(|series| series.view()))
    }

    /// Fitted to the targets of some series, and of those of other ranks; `None` for a classification.
    pub(super) fn output_normalization(&self, indices: &[usize], ranks: &mut Ranks) -> Result<Option<Normalization>> {
        let outputs = self.task.outputs();
        match &self.targets {
            Targets::Classes(_) | Targets::FrameClasses(_) | Targets::Labels(_) => Ok(None),
            Targets::Values(all) => ranks.fit(outputs, indices.iter().map(|&i| all.slice(s![i..=i, ..]))).map(Some),
            Targets::FrameValues(all) => ranks.fit(outputs, indices.iter().map(|&i| all[i].view())).map(Some),
        }
    }

    /// A number by which to notice that the series `indices` of two sets differ, whichever rank has which of them.
    pub(super) fn fingerprint_of_parts(&self, indices: &[usize]) -> u64 {
        indices.iter().map(|&i| self.fingerprint_of(&[i])).fold(0, u64::wrapping_add)
    }

    /// A number by which to notice that two sets differ.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint_of(&(0..self.num_series()).collect::<Vec<_>>())
    }

    fn fingerprint_of(&self, indices: &[usize]) -> u64 {
        let mut hash = Hash::new();
        let mut add = |word: u64| hash.add(word);
        let mut add_values = |values: &Array2<f32>| {
            add(values.nrows() as u64);
            // there are many NaNs
            values.iter().for_each(|x| add(u64::from(if x.is_nan() { f32::NAN } else { *x }.to_bits())));
        };
        indices.iter().for_each(|&i| add_values(&self.series[i]));
        match &self.targets {
            Targets::Values(all) => add_values(&all.select(Axis(0), indices)),
            Targets::FrameValues(all) => indices.iter().for_each(|&i| add_values(&all[i])),
            Targets::Classes(all) => indices.iter().for_each(|&i| add(all[i] as u64)),
            // no class is a number that depends on the size of a word
            Targets::FrameClasses(all) => indices.iter().flat_map(|&i| &all[i]).for_each(|&class| match class {
                Targets::IGNORED => add(u64::MAX),
                class => add(class as u64),
            }),
            Targets::Labels(all) => all.select(Axis(0), indices).iter().for_each(|&label| add(u64::from(label))),
        }
        hash.finish()
    }
}

/// How many of each of several groups are in a part that is this fraction of them all. Of each group one at least is not.
pub(super) fn shares(sizes: &[usize], fraction: f32) -> Vec<usize> {
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

/// Cuts 0..`count` into ranges of equal size (but for 1), at most `most` each.
pub(super) fn cut(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    cut_into(count, count.div_ceil(most))
}

/// Cuts 0..`count` into so many ranges of equal size (but for 1).
pub(super) fn cut_into(count: usize, pieces: usize) -> impl Iterator<Item = Range<usize>> {
    // in u64: the product may be past a usize of 32 bits
    let start = move |piece: usize| (piece as u64 * count as u64 / pieces as u64) as usize;
    (0..pieces).map(move |piece| start(piece)..start(piece + 1))
}

fn find(array: &Array2<f32>, what: impl Fn(f32) -> bool) -> Option<((usize, usize), f32)> {
    array.indexed_iter().find(|(_, x)| what(**x)).map(|(place, &x)| (place, x))
}

fn bad<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Data(reason.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
