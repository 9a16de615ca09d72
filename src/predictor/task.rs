//! The task of a predictor.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The kind of outputs of a [`Predictor`](crate::Predictor), and whether it is trained to predict per sequence or per frame. The
/// prediction for a sequence comes from its last frame, or as [`Pooling`](crate::Pooling) says.
///
/// ```
/// use hymba::Task;
///
/// let task = Task::classify(["walking", "standing"]);
/// assert_eq!((task.outputs(), task.labels()[1].as_str()), (2, "standing"));
/// assert!(Task::Regress { outputs: 0 }.validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Task {
    /// One class per sequence.
    Classify {
        /// The names of the classes.
        #[serde(deserialize_with = "few_labels")]
        labels: Vec<String>,
    },
    /// Numbers per sequence.
    Regress {
        /// How many numbers.
        outputs: usize,
    },
    /// One class per frame.
    ClassifyFrames {
        /// The names of the classes.
        #[serde(deserialize_with = "few_labels")]
        labels: Vec<String>,
    },
    /// Numbers per frame.
    RegressFrames {
        /// How many numbers.
        outputs: usize,
    },
    /// Any number of labels per sequence, from none to all. Each label has a logit, and sigmoid(logit) is its probability.
    MultiLabel {
        /// The names of the labels.
        #[serde(deserialize_with = "few_labels")]
        labels: Vec<String>,
    },
}

impl Task {
    /// Most classes or labels.
    pub const MAX_LABELS: usize = 1 << 14;
    /// Most bytes of all their names together, which stand in the header of a file.
    pub const MAX_LABEL_BYTES: usize = 1 << 18;

    /// One class for each sequence.
    pub fn classify(labels: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Task::Classify { labels: labels.into_iter().map(Into::into).collect() }
    }

    /// One class for each frame.
    pub fn classify_frames(labels: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Task::ClassifyFrames { labels: labels.into_iter().map(Into::into).collect() }
    }

    /// Any number of labels for each sequence.
    ///
    /// ```
    /// use hymba::Task;
    ///
    /// let task = Task::multi_label(["rain", "wind"]);
    /// assert!(task.outputs() == 2 && task.is_multi_label() && !task.is_classification());
    /// ```
    pub fn multi_label(labels: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Task::MultiLabel { labels: labels.into_iter().map(Into::into).collect() }
    }

    /// The names of the classes or labels; none for a regression.
    pub fn labels(&self) -> &[String] {
        match self {
            Task::Classify { labels } | Task::ClassifyFrames { labels } | Task::MultiLabel { labels } => labels,
            Task::Regress { .. } | Task::RegressFrames { .. } => &[],
        }
    }

    /// How many numbers are predicted: one for each class or label.
    pub fn outputs(&self) -> usize {
        match self {
            Task::Classify { labels } | Task::ClassifyFrames { labels } | Task::MultiLabel { labels } => labels.len(),
            Task::Regress { outputs } | Task::RegressFrames { outputs } => *outputs,
        }
    }

    /// Whether classes are predicted, one of them at a time.
    pub fn is_classification(&self) -> bool {
        matches!(self, Task::Classify { .. } | Task::ClassifyFrames { .. })
    }

    /// Whether numbers are predicted.
    pub(crate) fn is_regression(&self) -> bool {
        matches!(self, Task::Regress { .. } | Task::RegressFrames { .. })
    }

    /// Whether several labels can be right at once.
    pub fn is_multi_label(&self) -> bool {
        matches!(self, Task::MultiLabel { .. })
    }

    /// Whether every frame has a target, and not only every sequence.
    pub fn is_frame_wise(&self) -> bool {
        matches!(self, Task::ClassifyFrames { .. } | Task::RegressFrames { .. })
    }

    /// Checks the labels or the number of outputs.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if a regression has no output, a classification fewer than two classes, or [`MultiLabel`](Self::MultiLabel)
    /// no label; if two names are equal; if there are more than [`MAX_LABELS`](Self::MAX_LABELS) names, or they have more than
    /// [`MAX_LABEL_BYTES`](Self::MAX_LABEL_BYTES) bytes together.
    pub fn validate(&self) -> Result<()> {
        if self.is_regression() {
            return match self.outputs() {
                0 => bad("outputs", "0".into(), "a regression predicts at least 1 number".into()),
                _ => Ok(()),
            };
        }
        let labels = self.labels();
        let bytes: usize = labels.iter().map(String::len).sum();
        if labels.len() > Self::MAX_LABELS || bytes > Self::MAX_LABEL_BYTES {
            return bad(
                "labels",
                format!("{} labels of {bytes} bytes", labels.len()),
                format!("at most {} labels of {} bytes are allowed", Self::MAX_LABELS, Self::MAX_LABEL_BYTES),
            );
        }
        if labels.len() < 2 && self.is_classification() || labels.is_empty() {
            let allowed = "a classification has at least 2 classes, and at least 1 where any number may be right";
            return bad("labels", format!("{labels:?}"), allowed.into());
        }
        let mut seen = BTreeSet::new();
        match labels.iter().find(|&label| !seen.insert(label)) {
            Some(label) => bad("labels", format!("{label:?} twice"), "give every class a name of its own".into()),
            None => Ok(()),
        }
    }
}

fn bad(option: &'static str, given: String, allowed: String) -> Result<()> {
    Err(Error::Option { option, given, allowed })
}

/// Reads labels from a file, which may have a list of millions: in memory an empty text is eight times what it is in the
/// file.
fn few_labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Labels;

    impl<'de> Visitor<'de> for Labels {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {} labels", Task::MAX_LABELS)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<String>, A::Error> {
            let mut labels = Vec::new();
            while let Some(label) = sequence.next_element()? {
                if labels.len() == Task::MAX_LABELS {
                    return Err(A::Error::invalid_length(Task::MAX_LABELS + 1, &self));
                }
                labels.push(label);
            }
            Ok(labels)
        }
    }

    deserializer.deserialize_seq(Labels)
}
