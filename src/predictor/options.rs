//! The options of a predictor: everything around the encoder.

use super::Task;
use super::front::{Differences, Form};
use crate::{Error, HymbaOptions, Pooling, Result, Stem};

/// How to build a [`Predictor`](crate::Predictor): its encoder, and what is around that.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `encoder` | required | see [`HymbaOptions`] | the encoder; its `embed_dim` is the width of one frame |
/// | `normalize_series` | no | | bring each feature of each series to mean 0 and variance 1 over its own frames |
/// | `differences` | none | see [`Differences`] | read the differences between frames, in their place or beside them |
/// | `stem` | none | see [`Stem`] | strided convolutions that make few tokens of many frames |
/// | `bidirectional` | no | | a second encoder reads each sequence from its end |
/// | `pooling` | last | see [`Pooling`] | how the frames of a sequence become the one vector that the head reads |
///
/// Every option but `encoder` is for whole sequences: a task of every frame ([`Task::is_frame_wise`]) needs the defaults of all
/// others. Streams ([`Predictor::step`](crate::Predictor::step)) and predictions at every frame
/// ([`Predictor::predict_frames`](crate::Predictor::predict_frames)) go with any `pooling`, and are refused if one of the others is
/// set. [`HymbaOptions`] alone convert to these options, with the defaults of this table.
///
/// ```
/// use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, Task};
///
/// let encoder = HymbaOptions::new(6).hidden_size(16).num_layers(1);
/// let options = PredictorOptions::new(encoder).pooling(Pooling::Attention { queries: 2 });
/// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
/// assert_eq!(predictor.predictor_options().pooling, Pooling::Attention { queries: 2 });
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PredictorOptions {
    /// The encoder. Its `embed_dim` is the width of one frame.
    pub encoder: HymbaOptions,
    /// Whether to bring each feature of each series to mean 0 and variance 1 over its own frames.
    pub normalize_series: bool,
    /// Whether to read the differences between frames.
    pub differences: Differences,
    /// Strided convolutions that make few tokens of many frames.
    pub stem: Option<Stem>,
    /// Whether a second encoder reads each sequence from its end.
    pub bidirectional: bool,
    /// How the frames of a sequence become the one vector that the head reads.
    pub pooling: Pooling,
}

impl PredictorOptions {
    /// The documented defaults around this encoder.
    pub fn new(encoder: HymbaOptions) -> Self {
        PredictorOptions {
            encoder,
            normalize_series: false,
            differences: Differences::None,
            stem: None,
            bidirectional: false,
            pooling: Pooling::Last,
        }
    }

    /// Sets whether to bring each feature of each series to mean 0 and variance 1 over its own frames.
    pub fn normalize_series(mut self, normalize_series: bool) -> Self {
        self.normalize_series = normalize_series;
        self
    }

    /// Sets whether to read the differences between frames.
    pub fn differences(mut self, differences: Differences) -> Self {
        self.differences = differences;
        self
    }

    /// Sets strided convolutions that make few tokens of many frames, or `None`.
    pub fn stem(mut self, stem: impl Into<Option<Stem>>) -> Self {
        self.stem = stem.into();
        self
    }

    /// Sets whether a second encoder, with weights of its own, reads each sequence from its end. The head reads both results.
    pub fn bidirectional(mut self, bidirectional: bool) -> Self {
        self.bidirectional = bidirectional;
        self
    }

    /// Sets how the frames of a sequence become the one vector that the head reads.
    pub fn pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = pooling;
        self
    }

    /// Checks every option, and that they go with the task.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first that is outside its range or does not go with the task.
    pub fn validate(&self, task: &Task) -> Result<()> {
        self.encoder.validate()?;
        self.pooling.validate()?;
        self.stem.as_ref().map_or(Ok(()), Stem::validate)?;
        task.validate()?;
        if task.is_frame_wise() {
            self.check_frame_wise()?;
        }
        match self.parameters(task) {
            Some(count) if count <= HymbaOptions::MAX_PARAMETERS => Ok(()),
            _ => Err(Error::Option {
                option: "outputs",
                given: task.outputs().to_string(),
                allowed: format!(
                    "with hidden_size {} the model has more than {} parameters; make one of them smaller",
                    self.encoder.hidden_size,
                    HymbaOptions::MAX_PARAMETERS
                ),
            }),
        }
    }

    /// Checks that the prediction at a frame depends on the frames up to it, by their encoding alone.
    pub(super) fn check_frame_wise(&self) -> Result<()> {
        self.check_causal()?;
        match self.pooling {
            Pooling::Last => Ok(()),
            pooling => refused("pooling", format!("{pooling:?}"), "for a task per frame it must be Pooling::Last"),
        }
    }

    /// Checks that nothing looks at frames that are still to come.
    pub(super) fn check_causal(&self) -> Result<()> {
        const WHOLE: &str = "it needs whole sequences: streams and predictions per frame cannot use it";
        if self.normalize_series {
            return refused("normalize_series", "true".into(), WHOLE);
        }
        if self.differences != Differences::None {
            return refused("differences", format!("{:?}", self.differences), WHOLE);
        }
        if let Some(stem) = &self.stem {
            return refused("stem", format!("{stem:?}"), WHOLE);
        }
        if self.bidirectional { refused("bidirectional", "true".into(), WHOLE) } else { Ok(()) }
    }

    /// The form that series get before anything else.
    pub(super) fn form(&self) -> Form {
        Form { normalize_series: self.normalize_series, differences: self.differences }
    }

    /// Features of a frame after `differences`: `embed_dim`, or twice that with [`Differences::Beside`]. An input normalization has
    /// as many.
    pub fn features(&self) -> usize {
        self.differences.width(self.encoder.embed_dim)
    }

    /// The options of the encoders, which read what the stem makes of frames.
    pub(super) fn reader(&self) -> HymbaOptions {
        let embed_dim = self.stem.as_ref().map_or(self.features(), Stem::width);
        HymbaOptions { embed_dim, ..self.encoder.clone() }
    }

    /// Numbers that a token of the stem takes on its way.
    pub(super) fn token_numbers(&self) -> usize {
        self.stem.as_ref().map_or(0, |stem| stem.token_numbers(self.features()))
    }

    /// The width of what the head reads.
    pub(super) fn head_inputs(&self) -> usize {
        let directions = 1 + usize::from(self.bidirectional);
        self.pooling.width(self.encoder.hidden_size).saturating_mul(directions)
    }

    /// The number of parameters, or `None` where it cannot be counted.
    pub(super) fn parameters(&self, task: &Task) -> Option<usize> {
        let head = self.head_inputs().checked_add(1)?.checked_mul(task.outputs())?;
        let reader = self.reader().parameters()?.checked_add(self.pooling.count(self.encoder.hidden_size)?)?;
        let readers = reader.checked_mul(1 + usize::from(self.bidirectional))?;
        let stem = self.stem.as_ref().map_or(Some(0), |stem| stem.count(self.features()))?;
        readers.checked_add(stem)?.checked_add(head)
    }
}

fn refused(option: &'static str, given: String, allowed: &str) -> Result<()> {
    Err(Error::Option { option, given, allowed: allowed.into() })
}

impl From<HymbaOptions> for PredictorOptions {
    fn from(encoder: HymbaOptions) -> Self {
        PredictorOptions::new(encoder)
    }
}
