//! What can go wrong, and what to do about it.

use std::path::{Path, PathBuf};

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Each message names the value given, what is allowed, and what to change.
///
/// ```
/// use hymba::{Hymba, HymbaOptions};
///
/// let error = Hymba::build(HymbaOptions::new(8).num_heads(3)).unwrap_err();
/// assert!(error.to_string().contains("hidden_size"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option is outside its range, or two options do not fit together.
    #[error("option {option} = {given} is not usable: {allowed}")]
    Option {
        /// The option's name, as its setter has it.
        option: &'static str,
        /// The value given.
        given: String,
        /// The allowed range, and what to change.
        allowed: String,
    },

    /// An array argument has the wrong shape.
    #[error("{argument} has shape {given:?}, expected {expected}")]
    Shape {
        /// The argument's name.
        argument: &'static str,
        /// The expected shape, with its letters, and what to change.
        expected: String,
        /// The shape given.
        given: Vec<usize>,
    },

    /// The lengths of a ragged batch do not fit its frames.
    #[error("lengths do not fit the input: {0}")]
    Lengths(String),

    /// A streaming state does not belong to this model or to this frame.
    #[error("the state cannot be used here: {0}")]
    State(String),

    /// Token ids cannot be used.
    #[error("the tokens cannot be used: {0}")]
    Tokens(String),

    /// No token can be chosen from logits: there are none, one is NaN or +∞, or all are −∞.
    #[error("the next token cannot be chosen from the logits: {0}")]
    Logits(String),

    /// Training data are invalid.
    #[error("invalid training data: {0}")]
    Data(String),

    /// The targets of a loss are invalid.
    #[error("invalid targets: {0}")]
    Targets(String),

    /// The optimiser does not fit the model it is to train.
    #[error("the optimiser cannot be used here: {0}")]
    Optimizer(String),

    /// A number in training is not finite, or too large.
    #[error(
        "at step {step}, {what}: lower the learning rate, warm it up, clip the gradient's norm, or look for extreme \
         values in the data; to go on without the batch, clear its gradient (Parameters::fill_zero), or with a Trainer set \
         TrainerOptions::skip_not_finite"
    )]
    NotFinite {
        /// The step that was to be taken, from 1.
        step: u64,
        /// What is not finite, or too large to be squared, and its value.
        what: String,
    },

    /// The ranks of a training cannot go on together: one is gone, one has an error of its own, or their data or weights differ.
    #[error("the training over several ranks has ended: {0}")]
    Collective(String),

    /// Text, token ids or a chat cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Text {
        /// What was given, for example a chat template or token ids.
        what: &'static str,
        /// What is wrong with it, and what to change.
        reason: String,
    },

    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// The folder of a training cannot be used.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },

    /// A file is not what it should be: damaged, cut short, of another format, or hostile.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file is well-formed, but its tensors are not those of the model. Every difference is listed.
    #[error("{}: the tensors do not fit the model{}", path.display(), list(problems))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// One line for each missing, unexpected or misshapen tensor.
        problems: Vec<String>,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), source }
    }

    #[cfg(feature = "tokenizer")]
    pub(crate) fn text(what: &'static str, reason: impl Into<String>) -> Self {
        Error::Text { what, reason: reason.into() }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Error::Format { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// The problems, one per line, and not all of a file that has thousands.
fn list(problems: &[String]) -> String {
    const SHOWN: usize = 40;
    let mut text = String::new();
    for problem in problems.iter().take(SHOWN) {
        text.push_str("\n  ");
        text.push_str(problem);
    }
    if problems.len() > SHOWN {
        text.push_str(&format!("\n  and {} more", problems.len() - SHOWN));
    }
    text
}
