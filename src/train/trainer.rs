//! Training a [`Predictor`] on a [`Dataset`]: epochs, validation, checkpoints.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};

use super::{AdamW, Dataset, views};
use crate::layers::Rng;
use crate::{Error, Predictor, Result};

mod checkpoint;
mod measure;
mod options;
mod report;

use checkpoint::Checkpoint;
pub use measure::evaluate;
use measure::{Meter, Part};
pub use options::{Decay, TrainerOptions};
use report::{Clock, best_epoch};
pub use report::{EpochMetrics, Metrics, Progress, Stopped, Trained};

/// Trains a [`Predictor`] on a [`Dataset`].
///
/// In each epoch every series is seen once, in an order drawn from the seed, with series of like length in one batch. The
/// predictor with the lowest loss of all epochs is the result: loss on the validation part, or without one on the training
/// data. The same options and data give the same weights, bit for bit, for any number of threads.
///
/// With [`TrainerOptions::checkpoint`], everything is written to a folder after every epoch, so that a process that is killed
/// loses the epoch it was in and no more. [`resume`](Self::resume) goes on as if nothing had happened: the end is the same,
/// bit for bit.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use hymba::ndarray::Array2;
/// use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
/// use hymba::{HymbaOptions, Predictor, Task};
///
/// // slow and fast waves of any phase
/// let task = Task::classify(["slow", "fast"]);
/// let wave = |i: usize| Array2::from_shape_fn((20, 1), |(t, _)| ((0.3 + 0.5 * (i % 2) as f32) * t as f32 + i as f32).sin());
/// let data = Dataset::new(&task, (0..40).map(wave).collect(), Targets::Classes((0..40).map(|i| i % 2).collect()))?;
///
/// let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(16).num_layers(1), task)?;
/// let trained = Trainer::new(predictor, TrainerOptions::default().epochs(8).learning_rate(1e-2))?.fit(&data, |progress| {
///     if let Some(epoch) = &progress.finished {
///         println!("epoch {}: loss {:.3}, {:?} left", progress.epoch, epoch.train.loss, progress.remaining);
///     }
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(trained.history.len(), 8);
/// assert!(trained.history[7].train.loss < trained.history[0].train.loss);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug)]
pub struct Trainer {
    options: TrainerOptions,
    start: Start,
}

/// Where a training begins.
#[derive(Debug)]
enum Start {
    New(Box<Predictor>),
    /// With the fingerprint of the data.
    Resumed(Box<State>, u64),
}

/// Everything that changes from epoch to epoch.
#[derive(Debug)]
struct State {
    predictor: Predictor,
    /// The predictor after the best epoch; the one at the start before there is any.
    best: Predictor,
    optimizer: AdamW<Predictor>,
    history: Vec<EpochMetrics>,
}

impl Trainer {
    /// A training of `predictor` that begins when [`fit`](Self::fit) is called.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range; see [`TrainerOptions`].
    pub fn new(predictor: Predictor, options: TrainerOptions) -> Result<Self> {
        options.validate()?;
        Ok(Trainer { options, start: Start::New(Box::new(predictor)) })
    }

    /// Goes on with a training that was killed or stopped, from the last epoch that its checkpoint folder holds. The data must
    /// be the same. Further checkpoints go into the same folder.
    ///
    /// The files need not be trusted, as in [`Hymba::load`](crate::Hymba::load).
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Format`] and [`Error::Tensors`] when a file cannot be read or is not what it should be.
    ///
    /// ```no_run
    /// use std::path::Path;
    ///
    /// use hymba::train::{Trainer, TrainerOptions};
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let folder = Path::new("run");
    /// let trainer = if folder.join("training.json").exists() {
    ///     Trainer::resume(folder)?
    /// } else {
    ///     let predictor = Predictor::build(HymbaOptions::recommended(6), Task::classify(["walking", "standing"]))?;
    ///     Trainer::new(predictor, TrainerOptions::default().checkpoint(folder))?
    /// };
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn resume(checkpoint: impl AsRef<Path>) -> Result<Self> {
        let (options, state, data) = Checkpoint::new(checkpoint.as_ref()).read()?;
        Ok(Trainer { options: options.checkpoint(checkpoint.as_ref()), start: Start::Resumed(Box::new(state), data) })
    }

    /// The options, those in the checkpoint of a resumed training.
    pub fn options(&self) -> &TrainerOptions {
        &self.options
    }

    /// Trains, and calls `callback` after every batch and at the end of every epoch.
    ///
    /// # Errors
    ///
    /// Before anything is trained: [`Error::Data`] if the data are for another task or width, or not those of the resumed
    /// training; [`Error::Option`] if an option does not fit them; [`Error::Checkpoint`] if the checkpoint folder has a training
    /// in it already.
    ///
    /// After that: [`Error::NotFinite`] names the step and the first parameter at fault when a loss or a gradient is not finite,
    /// and [`Error::Io`] says why a checkpoint could not be written. The last checkpoint is intact then.
    pub fn fit(self, data: &Dataset, callback: impl FnMut(&Progress) -> ControlFlow<()>) -> Result<Trained> {
        let fraction = self.options.validation_fraction;
        if fraction == 0.0 {
            return self.run(Part::whole(data), None, callback);
        }
        let (train, validation) = data.split_indices(fraction, self.options.seed)?;
        self.run(Part { data, indices: train }, Some(Part { data, indices: validation }), callback)
    }

    /// As [`fit`](Self::fit), with a set of its own to validate on; `validation_fraction` is not looked at.
    ///
    /// # Errors
    ///
    /// Those of [`fit`](Self::fit).
    pub fn fit_with_validation(
        self,
        train: &Dataset,
        validation: &Dataset,
        callback: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Trained> {
        self.run(Part::whole(train), Some(Part::whole(validation)), callback)
    }

    fn run(
        self,
        train: Part,
        validation: Option<Part>,
        mut callback: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let Trainer { options, start } = self;
        let predictor = match &start {
            Start::New(predictor) => predictor,
            Start::Resumed(state, _) => &state.predictor,
        };
        let mut fingerprint = 0u64;
        for part in std::iter::once(&train).chain(&validation) {
            part.check(predictor, &options)?;
            fingerprint = fingerprint.rotate_left(1) ^ part.data.fingerprint();
        }
        let batches = train.indices.len().div_ceil(options.batch_size);
        let steps = (batches.div_ceil(options.accumulation) * options.epochs) as u64;
        let checkpoint = options.checkpoint.as_deref().map(Checkpoint::new);
        let mut state = match start {
            Start::Resumed(_, data) if data != fingerprint => {
                return Err(Error::Data("they are not the data that the resumed training began with".into()));
            }
            Start::Resumed(state, _) => *state,
            Start::New(predictor) => {
                let state = State::new(*predictor, &train, &options, steps)?;
                if let Some(checkpoint) = &checkpoint {
                    checkpoint.create()?;
                    checkpoint.write(&options, &state, fingerprint)?;
                }
                state
            }
        };

        let clock =
            Clock { began: Instant::now(), before: state.history.len() * batches, all: options.epochs * batches };
        let mut gradient = state.predictor.zeros_like();
        let stopped = loop {
            let epoch = state.history.len();
            let patience = options.patience.unwrap_or(usize::MAX);
            if epoch >= options.epochs {
                break Stopped::Finished;
            } else if epoch - best_epoch(&state.history) >= patience {
                break Stopped::NoImprovement;
            }
            let Some(progress) = state.epoch(&train, &options, &clock, &mut gradient, &mut callback)? else {
                break Stopped::Callback;
            };
            let validation = validation.as_ref().map(|part| part.measure(&state.predictor, &options)).transpose()?;
            let progress = state.finish(progress, validation)?;
            if let Some(checkpoint) = &checkpoint {
                checkpoint.write(&options, &state, fingerprint)?;
            }
            if callback(&clock.at(progress)).is_break() {
                break Stopped::Callback;
            }
        };
        let best_epoch = best_epoch(&state.history);
        let predictor = if best_epoch == 0 { state.predictor } else { state.best };
        Ok(Trained { predictor, best_epoch, history: state.history, stopped })
    }
}

impl State {
    fn new(mut predictor: Predictor, train: &Part, options: &TrainerOptions, steps: u64) -> Result<Self> {
        if options.normalize && predictor.input_normalization().is_none() {
            predictor.set_input_normalization(Some(train.data.input_normalization(&train.indices)))?;
        }
        if options.normalize && predictor.output_normalization().is_none() {
            predictor.set_output_normalization(train.data.output_normalization(&train.indices))?;
        }
        let optimizer = AdamW::new(&predictor, options.optimizer(steps))?;
        Ok(State { best: predictor.clone(), predictor, optimizer, history: Vec::new() })
    }

    /// Learns from every series once. Returns where it stands, or `None` if the callback said stop.
    fn epoch(
        &mut self,
        train: &Part,
        options: &TrainerOptions,
        clock: &Clock,
        gradient: &mut Predictor,
        callback: &mut impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Option<Progress>> {
        let epoch = self.history.len();
        let mut rng = Rng::seed_from_u64(options.seed);
        rng.set_stream(epoch as u64 + 1);
        let batches = train.data.batches(&train.indices, options.batch_size, &mut rng);
        let mut meter = Meter::new(train.data);
        let mut progress = Progress {
            epoch: epoch + 1,
            epochs: options.epochs,
            batch: 0,
            batches: batches.len(),
            train: meter.metrics(),
            learning_rate: 0.0,
            gradient_norm: 0.0,
            finished: None,
            elapsed: Duration::ZERO,
            remaining: Duration::ZERO,
        };
        let (mut norms, mut steps) = (0.0, 0);
        for batches in batches.chunks(options.accumulation) {
            for (i, indices) in batches.iter().enumerate() {
                let batch = train.data.batch(indices);
                let frame_wise = train.data.task().is_frame_wise();
                let (z, cache) = self.predictor.run_train(&batch.x, Some(&batch.lengths), rng.random(), frame_wise)?;
                let loss = meter.add(&self.predictor, z, batch, options)?;
                if !loss.value.is_finite() {
                    return Err(self.not_finite(&format!("the loss is {}", loss.value)));
                }
                self.predictor.run_backward(&cache, loss.gradient, gradient)?;
                if i + 1 == batches.len() {
                    let info = self.optimizer.step_accumulated(&mut self.predictor, gradient, batches.len())?;
                    norms += info.gradient_norm;
                    steps += 1;
                    progress.learning_rate = info.learning_rate;
                    progress.gradient_norm = info.gradient_norm as f32;
                }
                progress.batch += 1;
                progress.train = meter.metrics();
                progress = clock.at(progress);
                if callback(&progress).is_break() {
                    return Ok(None);
                }
            }
        }
        progress.gradient_norm = (norms / f64::from(steps)) as f32;
        Ok(Some(progress))
    }

    /// Writes an epoch down, and keeps the predictor if it is the best so far.
    fn finish(&mut self, progress: Progress, validation: Option<Metrics>) -> Result<Progress> {
        let Progress { train, learning_rate, gradient_norm, .. } = progress;
        let epoch = EpochMetrics { train, validation, learning_rate, gradient_norm };
        // the last step of the epoch can have led out of the numbers, and nothing has looked at them since
        if views(&self.predictor).iter().any(|(_, array)| array.iter().any(|number| !number.is_finite())) {
            return Err(self.not_finite("the steps of an epoch are done"));
        }
        if !epoch.decisive_loss().is_finite() {
            return Err(self.not_finite(&format!("the validation loss is {}", epoch.decisive_loss())));
        }
        self.history.push(epoch.clone());
        if best_epoch(&self.history) == self.history.len() {
            self.best = self.predictor.clone();
        }
        Ok(Progress { finished: Some(epoch), ..progress })
    }

    /// The error of the step that is due, and the parameter that is most to blame.
    fn not_finite(&self, what: &str) -> Error {
        let all = views(&self.predictor);
        let numbers = all.iter().flat_map(|(name, array)| array.iter().map(move |number| (name, number)));
        let what = match numbers.clone().find(|(_, number)| !number.is_finite()) {
            Some((name, number)) => format!("{what}, and {name:?} has become {number}"),
            None => match numbers.max_by(|(_, a), (_, b)| a.abs().total_cmp(&b.abs())) {
                Some((name, number)) => format!("{what}; the largest parameter is {number:e} in {name:?}"),
                None => what.to_string(),
            },
        };
        Error::NotFinite { step: self.optimizer.steps() + 1, what }
    }
}
