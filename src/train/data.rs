//! Series and their targets: checked, split and shuffled.

use std::fmt::Display;

use ndarray::{Array2, Array3, Axis, s};

use super::{Hash, Ranks};
use crate::{Error, Normalization, Predictor, Result, Task};

mod batch;
mod parts;

use batch::padded;
pub(super) use batch::{Batch, BatchTargets, Mixed};
pub(super) use parts::{cut, cut_into, shares};

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

fn find(array: &Array2<f32>, what: impl Fn(f32) -> bool) -> Option<((usize, usize), f32)> {
    array.indexed_iter().find(|(_, x)| what(**x)).map(|(place, &x)| (place, x))
}

fn bad<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Data(reason.into()))
}
