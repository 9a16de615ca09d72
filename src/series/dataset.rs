//! From the series of a file to a data set.

use std::path::Path;

use ndarray::{Array1, Axis};

use super::{SeriesSet, TEXT, Target, labels};
use crate::train::{Dataset, Targets};
use crate::{Error, Result, Task};

impl SeriesSet {
    /// The task of these series: to classify them, into the classes that occur, in the order of the labels, or to predict a number
    /// for each.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] if no series has a target, or if all are of one class.
    pub fn task(&self) -> Result<Task> {
        if self.cases.iter().any(|case| matches!(case.target, Target::Value(_))) {
            return Ok(Task::Regress { outputs: 1 });
        }
        let labels = self.labels_with(&[]);
        match labels.len() {
            0 => Err(self.error("its series have no targets: no classes and no numbers to predict")),
            1 => Err(self.error("all series are of one class; at least two are needed")),
            _ => Ok(Task::classify(labels)),
        }
    }

    /// The series with their targets, to learn from or to measure on. Classes are found among the labels of the task by name.
    ///
    /// A label that the task lacks is added to those of the data set: a model of `task` never predicts it, so these series count as
    /// errors. [`compare_labels`](Self::compare_labels) names them.
    ///
    /// ```
    /// use hymba::series::{ReadOptions, SeriesSet};
    /// use hymba::train::Targets;
    ///
    /// let set = |lines: &str| SeriesSet::from_ts(format!("@classLabel true\n@data\n{lines}"), &ReadOptions::default());
    /// let train = set("1,2:a\n2,1:b\n")?;
    /// let (task, test) = (train.task()?, set("3:c\n4:B\n")?);
    /// assert_eq!(test.compare_labels(&task).len(), 2); // `B` is read as `b`; c is not known
    /// assert_eq!(*test.into_dataset(&task)?.targets(), Targets::Classes(vec![2, 1]));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Format`] if a series has no target or one of another kind than the task; [`Error::Data`] as [`Dataset::new`], for missing
    /// values, for instance.
    pub fn into_dataset(self, task: &Task) -> Result<Dataset> {
        let (task, targets) = match task {
            Task::Classify { labels } => {
                let (labels, places) = self.places(labels);
                let classes = (0..self.cases.len()).map(|i| match self.cases[i].target {
                    Target::Class(class) if class < places.len() => Ok(places[class]),
                    _ => Err(self.lacks(i, "class")),
                });
                (Task::classify(labels), Targets::Classes(classes.collect::<Result<_>>()?))
            }
            Task::Regress { outputs: 1 } => {
                let values = (0..self.cases.len()).map(|i| match self.cases[i].target {
                    Target::Value(value) => Ok(value),
                    _ => Err(self.lacks(i, "number")),
                });
                let values = Array1::from(values.collect::<Result<Vec<f32>>>()?);
                (task.clone(), Targets::Values(values.insert_axis(Axis(1))))
            }
            _ => {
                return Err(
                    self.error(format!("each series has one target, which the task {task:?} does not learn from"))
                );
            }
        };
        Dataset::new(&task, self.cases.into_iter().map(|case| case.frames).collect(), targets)
    }

    /// Says how [`into_dataset`](Self::into_dataset) reads labels that the task spells in another way, one line each, and in a last line
    /// which the task lacks; nothing if all are the same.
    pub fn compare_labels(&self, task: &Task) -> Vec<String> {
        const SHOWN: usize = 200;
        let known = task.labels();
        if !task.is_classification() {
            return Vec::new();
        }
        let (all, places) = self.places(known);
        let mut counts = vec![0; self.labels.len()];
        for case in &self.cases {
            if let Target::Class(class) = case.target
                && let Some(count) = counts.get_mut(class)
            {
                *count += 1;
            }
        }
        let mut notes = Vec::new();
        for (class, label) in self.labels.iter().enumerate() {
            let place = places[class];
            if counts[class] > 0 && place < known.len() && known[place] != *label {
                notes.push(labels::read_as(label, &known[place]));
            }
        }
        let unknown: usize =
            counts.iter().zip(&places).filter(|(_, place)| **place >= known.len()).map(|(count, _)| count).sum();
        if unknown > 0 {
            let mut names = all[known.len()..].join(", ");
            if let Some((end, _)) = names.char_indices().nth(SHOWN) {
                names.truncate(end);
                names.push('…');
            }
            notes.push(format!(
                "{unknown} series are of classes that no training series has, and count as wrong: {names}"
            ));
        }
        notes
    }

    /// The labels `known` with those that occur here and are not among them, under another spelling either: the classes of several files.
    ///
    /// ```
    /// use hymba::series::{ReadOptions, SeriesSet};
    ///
    /// let set = |lines: &str| SeriesSet::from_ts(format!("@classLabel true\n@data\n{lines}"), &ReadOptions::default());
    /// let (first, second) = (set("1:b\n2:a\n")?, set("3:c\n4:B\n")?);
    /// assert_eq!(second.labels_with(&first.labels_with(&[])), ["a", "b", "c"]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn labels_with(&self, known: &[String]) -> Vec<String> {
        self.places(known).0
    }

    /// The labels of a task with those that it lacks, and the place of each class among them. Classes without a series are not added.
    fn places(&self, known: &[String]) -> (Vec<String>, Vec<usize>) {
        let (of_known, occurs) = (labels::Places::new(known), self.occurs());
        let mut all = known.to_vec();
        let places = self.labels.iter().zip(occurs).map(|(label, occurs)| match of_known.find(label) {
            _ if !occurs => 0,
            Some(place) => place,
            None => {
                all.push(label.clone());
                all.len() - 1
            }
        });
        let places = places.collect();
        (all, places)
    }

    /// Whether each class has a series.
    fn occurs(&self) -> Vec<bool> {
        let mut occurs = vec![false; self.labels.len()];
        for case in &self.cases {
            if let Target::Class(class) = case.target
                && let Some(occurs) = occurs.get_mut(class)
            {
                *occurs = true;
            }
        }
        occurs
    }

    fn lacks(&self, i: usize, what: &str) -> Error {
        let any = |of: fn(&Target) -> bool| self.cases.iter().any(|case| of(&case.target));
        let (classes, values) =
            (any(|target| matches!(target, Target::Class(_))), any(|target| matches!(target, Target::Value(_))));
        self.error(match (what, classes, values) {
            ("class", false, true) => {
                "it is a regression problem (`@targetLabel true`): it has numbers to predict, not classes".into()
            }
            ("number", true, false) => "it is a classification: it has classes to predict, not numbers".into(),
            (_, false, false) if self.labels.is_empty() => {
                "its series have no targets: no classes and no numbers to predict".into()
            }
            _ => format!("{} has no {what}; leave it out", self.called(i)),
        })
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        let path = if self.path.as_os_str().is_empty() { Path::new(TEXT) } else { &self.path };
        Error::format(path, reason)
    }
}
