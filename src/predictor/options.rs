//! The options of a predictor: everything around the encoder.

use super::Task;
use crate::{Error, HymbaOptions, Pooling, Result};

/// How to build a [`Predictor`](crate::Predictor): its encoder, and what is around that.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `encoder` | required | see [`HymbaOptions`] | the encoder; its `embed_dim` is the width of one frame |
/// | `pooling` | last | see [`Pooling`] | how a sequence becomes the one vector that it is judged by |
///
/// A task of every frame ([`Task::is_frame_wise`]) goes with `Pooling::Last` alone. [`HymbaOptions`] alone are options, too: with
/// the defaults of this table.
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
    /// How a sequence becomes the one vector that it is judged by.
    pub pooling: Pooling,
}

impl PredictorOptions {
    /// The documented defaults around this encoder.
    pub fn new(encoder: HymbaOptions) -> Self {
        PredictorOptions { encoder, pooling: Pooling::Last }
    }

    /// Sets how a sequence becomes the one vector that it is judged by.
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
        task.validate()?;
        if task.is_frame_wise() && self.pooling != Pooling::Last {
            return Err(Error::Option {
                option: "pooling",
                given: format!("{:?} for a task of every frame", self.pooling),
                allowed: "each frame is judged by itself: Pooling::Last".into(),
            });
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

    /// The width of what the head reads.
    pub(super) fn head_inputs(&self) -> usize {
        self.pooling.width(self.encoder.hidden_size)
    }

    /// The number of parameters, or `None` where it cannot be counted.
    pub(super) fn parameters(&self, task: &Task) -> Option<usize> {
        let head = self.head_inputs().checked_add(1)?.checked_mul(task.outputs())?;
        self.encoder.parameters()?.checked_add(self.pooling.count(self.encoder.hidden_size)?)?.checked_add(head)
    }
}

impl From<HymbaOptions> for PredictorOptions {
    fn from(encoder: HymbaOptions) -> Self {
        PredictorOptions::new(encoder)
    }
}
