//! Which data a rank has.

/// The data that a rank trains on, and validates on if it does: each a [`Dataset`](crate::train::Dataset) or rows of tokens.
///
/// By default every rank has all data, and they divide each batch among them. Where the data are too many for that, each rank
/// reads a part, and says that it has [only a part](Self::sharded).
///
/// ```
/// use std::ops::ControlFlow;
/// use std::thread;
///
/// use hymba::ndarray::Array2;
/// use hymba::train::{Collective, Dataset, Targets, Threads, Trainer, TrainerOptions, TrainingData};
/// use hymba::{HymbaOptions, Predictor, Task};
///
/// let ranks: Vec<_> = Threads::new(2).into_iter().map(|mut rank| thread::spawn(move || {
///     let task = Task::Regress { outputs: 1 };
///     // what this rank has read: other series on each, and not as many
///     let count = 5 + rank.rank();
///     let wave = |i: usize| Array2::from_shape_fn((9, 1), |(t, _)| ((i * t + rank.rank()) as f32).sin());
///     let targets = Targets::Values(Array2::from_shape_fn((count, 1), |(i, _)| i as f32));
///     let mine = Dataset::new(&task, (0..count).map(wave).collect(), targets)?;
///
///     let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task)?;
///     let trainer = Trainer::new(predictor, TrainerOptions::default().epochs(2).batch_size(4))?;
///     trainer.fit_on(TrainingData::new(&mine).sharded(), &mut rank, |_, _| ControlFlow::Continue(()))
/// })).collect();
/// let trained = ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<hymba::Result<Vec<_>>>()?;
/// assert_eq!(trained[0].history, trained[1].history);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug)]
pub struct TrainingData<'a, D> {
    pub(in crate::train) train: &'a D,
    pub(in crate::train) validation: Option<&'a D>,
    pub(in crate::train) sharded: bool,
}

impl<'a, D> TrainingData<'a, D> {
    /// Trains on these data, which all ranks have.
    pub fn new(train: &'a D) -> Self {
        TrainingData { train, validation: None, sharded: false }
    }

    /// Sets the data to validate on.
    pub fn validation(mut self, validation: impl Into<Option<&'a D>>) -> Self {
        self.validation = validation.into();
        self
    }

    /// Says that every rank has other data: a part of the training set, and if there is one, a part of the validation set. All parts
    /// together are what is trained and validated on. In every step each rank learns from its own series, in proportion to how
    /// many it has; parts of similar sizes and lengths are the fastest.
    pub fn sharded(mut self) -> Self {
        self.sharded = true;
        self
    }
}

impl<'a, D> From<&'a D> for TrainingData<'a, D> {
    fn from(train: &'a D) -> Self {
        TrainingData::new(train)
    }
}

impl<D> Clone for TrainingData<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for TrainingData<'_, D> {}
