//! Training a [`Predictor`] on a [`Dataset`]: epochs, validation, checkpoints.

use std::ops::ControlFlow;
use std::path::Path;

use super::{AdamW, Alone, Collective, Dataset, Parameters, Ranks, TrainingData, hash_of_every, hash_of_text};
use crate::{Error, Parameter, Predictor, Result};

mod batches;
mod checkpoint;
mod epoch;
mod measure;
mod options;
mod report;
mod sets;
mod source;
mod split;
mod state;

pub use batches::{BatchSource, DatasetBatches, SeriesBatch};
use checkpoint::Checkpoint;
use epoch::{Loader, Plan};
use measure::Part;
pub use measure::evaluate;
pub use options::{Decay, TrainerOptions};
use report::{Clock, best_epoch};
pub use report::{EpochMetrics, Metrics, Progress, Stopped, Trained};
use sets::Sets;
use state::State;

/// Trains a [`Predictor`] on a [`Dataset`]: all of it, or of one with adapters ([`Predictor::add_lora`]) the active one and what is
/// around the encoder.
///
/// In each epoch every series is seen once, in an order drawn from the seed, with series of similar length in one batch. The
/// predictor with the lowest loss of all epochs is the result: loss on the validation part, or without one on the training
/// data. The same options and data give the same weights, bit for bit, for any number of threads.
///
/// With [`TrainerOptions::checkpoint`], everything is written to a folder after every epoch, so that a process that is killed
/// loses the epoch it was in and no more. [`resume`](Self::resume) goes on as if nothing had happened: the end is the same,
/// bit for bit. [`prolong`](Self::prolong) goes on with a training that has ended.
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
    Resumed {
        state: Box<State>,
        /// Fingerprint of the data.
        data: u64,
        /// Whether the schedule begins anew.
        prolonged: bool,
    },
}

impl Trainer {
    /// A training of `predictor` that begins when [`fit`](Self::fit) is called.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range, see [`TrainerOptions`], or the encoder is stored for inference only
    /// ([`Hymba::store_as`](crate::Hymba::store_as)) and has no adapters; [`Error::State`] if it holds adapters of which none is
    /// active.
    pub fn new(predictor: Predictor, options: TrainerOptions) -> Result<Self> {
        options.validate()?;
        predictor.check_trainable()?;
        Ok(Trainer { options, start: Start::New(Box::new(predictor)) })
    }

    /// Goes on with a training that was killed or stopped, from the last epoch that its checkpoint folder holds. The data must
    /// be the same. Further checkpoints go into the same folder.
    ///
    /// A training that has ended has nothing left to do: [`fit`](Self::fit) returns its result at once. To train it further, see
    /// [`prolong`](Self::prolong).
    ///
    /// The files need not be trusted, as in [`Hymba::load`](crate::Hymba::load).
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if there is no training in the folder; [`Error::Io`], [`Error::Format`] and [`Error::Tensors`] when a
    /// file cannot be read or is not what it should be.
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
        let start = Start::Resumed { state: Box::new(state), data, prolonged: false };
        Ok(Trainer { options: options.checkpoint(checkpoint.as_ref()), start })
    }

    /// Goes on with other options: more epochs, another learning rate, another batch size. For a training that was
    /// [resumed](Self::resume), whether it had ended or not.
    ///
    /// Weights, the optimiser's moments, the history and the best epoch stay. The learning rate begins a schedule of its own over the
    /// epochs that are left: it warms up and falls as the options say, and `patience` counts from here. Options equal to those the
    /// training has change nothing, so a program that asks for so many epochs in all can be killed and run again. Checkpoints go
    /// into the same folder. A training that has not begun takes the options as they are.
    ///
    /// ```
    /// # use std::ops::ControlFlow;
    /// # use hymba::ndarray::Array2;
    /// # use hymba::train::{Dataset, Targets};
    /// use hymba::train::{Trainer, TrainerOptions};
    /// # use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let folder = folder.path().join("run");
    /// # let task = Task::classify(["a", "b"]);
    /// # let data = Dataset::new(&task, vec![Array2::ones((9, 1)); 4], Targets::Classes(vec![0, 1, 0, 1]))?;
    /// # let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task)?;
    /// # let go_on = |_: &_| ControlFlow::Continue(());
    /// Trainer::new(predictor, TrainerOptions::default().epochs(2).checkpoint(&folder))?.fit(&data, go_on)?;
    ///
    /// let trainer = Trainer::resume(&folder)?;
    /// let longer = trainer.options().clone().epochs(5).learning_rate(1e-4).warm_up(0.0);
    /// let trained = trainer.prolong(longer)?.fit(&data, go_on)?;
    /// assert_eq!(trained.history.len(), 5);
    /// assert_eq!(trained.history[2].learning_rate, 1e-4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range; if there are no more `epochs` than are done; or if one of those differs
    /// that decide which series are validated on and what is measured: `seed`, `validation_fraction`, `label_smoothing`,
    /// `class_weights`, `regression_loss` and whether there is an `average`. Epochs could not be compared then.
    pub fn prolong(mut self, options: TrainerOptions) -> Result<Self> {
        options.validate()?;
        let Start::Resumed { state, prolonged, .. } = &mut self.start else {
            return Ok(Trainer { options, ..self });
        };
        let options = TrainerOptions { checkpoint: self.options.checkpoint.clone(), ..options };
        if options == self.options {
            return Ok(self);
        }
        let refused = |option, given, allowed| Err(Error::Option { option, given, allowed });
        if let Some((option, given)) = options.incomparable(&self.options) {
            return refused(option, given, "it cannot change, as epochs could not be compared then".into());
        }
        let done = state.history.len();
        if options.epochs <= done {
            let allowed = format!("{done} epochs are done, and it counts these, too: it must be more");
            return refused("epochs", options.epochs.to_string(), allowed);
        }
        (state.before_schedule, *prolonged) = (done, true);
        Ok(Trainer { options, ..self })
    }

    /// The options, those in the checkpoint of a resumed training.
    pub fn options(&self) -> &TrainerOptions {
        &self.options
    }

    /// Trains, and calls `callback` after every batch and at the end of every epoch.
    ///
    /// # Errors
    ///
    /// Before anything is trained: [`Error::Data`] if the data are for another task or width, not those of the resumed
    /// training, too few to split off a validation part, or without a target in one of the parts; [`Error::Option`] if an option does
    /// not fit them; [`Error::Checkpoint`] if the checkpoint folder has a training in it already, or if its options are not those
    /// its optimiser goes by.
    ///
    /// After that: [`Error::NotFinite`] names the step and the first parameter at fault when a loss or a gradient is not finite,
    /// and [`Error::Io`] says why a checkpoint could not be written. The last checkpoint is intact then.
    pub fn fit(self, data: &Dataset, mut callback: impl FnMut(&Progress) -> ControlFlow<()>) -> Result<Trained> {
        self.fit_with(data, None, |progress, _| callback(progress))
    }

    /// As [`fit`](Self::fit), or with `validation` as [`fit_with_validation`](Self::fit_with_validation), with a callback that also
    /// gets the current predictor, or that of the averaged weights if there is an [average](TrainerOptions::average): for a metric of
    /// your own, for instance.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
    /// use hymba::{HymbaOptions, Predictor, Task, argmax};
    ///
    /// let task = Task::classify(["a", "b"]);
    /// let data = Dataset::new(&task, vec![Array2::ones((9, 1)); 4], Targets::Classes(vec![0, 1, 0, 1]))?;
    /// let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task)?;
    /// let mut rates_of_b = Vec::new();
    /// Trainer::new(predictor, TrainerOptions::default().epochs(2))?.fit_with(&data, None, |progress, predictor| {
    ///     if progress.finished.is_some()
    ///         && let Ok((x, lengths)) = data.pad(&[1, 3])
    ///         && let Ok(logits) = predictor.predict(&x, Some(&lengths))
    ///     {
    ///         rates_of_b.push(argmax(&logits).iter().filter(|class| **class == 1).count() as f32 / 2.0);
    ///     }
    ///     ControlFlow::Continue(())
    /// })?;
    /// assert_eq!(rates_of_b.len(), 2);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`fit`](Self::fit).
    pub fn fit_with(
        self,
        data: &Dataset,
        validation: Option<&Dataset>,
        callback: impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Trained> {
        self.fit_on(TrainingData::new(data).validation(validation), &mut Alone, callback)
    }

    /// As [`fit`](Self::fit), with separate data to validate on; `validation_fraction` is ignored.
    ///
    /// # Errors
    ///
    /// Those of [`fit`](Self::fit).
    pub fn fit_with_validation(
        self,
        train: &Dataset,
        validation: &Dataset,
        mut callback: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Trained> {
        self.fit_with(train, Some(validation), |progress, _| callback(progress))
    }

    /// As [`fit_with`](Self::fit_with), together with other processes, the ranks of `collective`: each learns from its share of every
    /// batch, and all take the same step. All must call this, with the same options (the checkpoint folder may differ) and, but for
    /// [`TrainingData::sharded`], the same data. They begin with the weights of rank 0, or with the same checkpoint.
    ///
    /// `batch_size` and `accumulation` say how many series of all ranks are in a step. So a training is the same on any number of
    /// ranks but for rounding, if nothing in it is drawn at random: dropout and augmentations are drawn on each rank for itself.
    /// For a given number of ranks the weights are the same, bit for bit, each time. A checkpoint may be resumed by another number, and
    /// data that are [sharded](TrainingData::sharded) may be divided anew: which series `validation_fraction` takes follows from what is
    /// in each.
    ///
    /// Rank 0 alone writes checkpoints and calls back, before the next step of all: a callback that stops, or an error on any rank,
    /// ends the training on all. The result is the same on each.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use std::thread;
    ///
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets, Threads, Trainer, TrainerOptions};
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let task = Task::classify(["a", "b"]);
    /// let data = Dataset::new(&task, vec![Array2::ones((9, 1)); 8], Targets::Classes(vec![0, 1, 0, 1, 0, 1, 1, 1]))?;
    /// let train = |rank: &mut Threads| {
    ///     let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task.clone())?;
    ///     let trainer = Trainer::new(predictor, TrainerOptions::default().epochs(2).batch_size(4))?;
    ///     trainer.fit_on(&data, rank, |progress, _| {
    ///         println!("{progress:?}");
    ///         ControlFlow::Continue(())
    ///     })
    /// };
    /// let trained = thread::scope(|scope| {
    ///     let ranks = Threads::new(2).into_iter().map(|mut rank| scope.spawn(move || train(&mut rank)));
    ///     let ranks: Vec<_> = ranks.collect();
    ///     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<hymba::Result<Vec<_>>>()
    /// })?;
    /// assert_eq!(trained[0].history, trained[1].history);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`fit`](Self::fit), each on the rank it happened on, and [`Error::Collective`] on the others; this also if a rank is
    /// gone, if ranks do not have the same options, data or weights at the start, or if their weights, which are compared after
    /// each epoch, have come to differ.
    pub fn fit_on<'a>(
        self,
        data: impl Into<TrainingData<'a, Dataset>>,
        collective: &mut dyn Collective,
        callback: impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let TrainingData { train: data, validation, sharded } = data.into();
        let mut ranks = Ranks::new(collective, sharded)?;
        let Trainer { options, start } = &self;
        let fraction = options.validation_fraction;
        let mut both = std::iter::once(data).chain(validation).map(Part::whole);
        ranks.together(both.try_for_each(|part| part.check(start.predictor(), options)))?;
        start.compare(options, validation.is_some(), &mut ranks)?;
        let (train, validation) = if validation.is_some() || fraction == 0.0 {
            (Part::whole(data), validation.map(Part::whole))
        } else {
            let split = match sharded {
                true => split::split(data, fraction, options.seed, &mut ranks)?,
                false => ranks.together(data.split_indices(fraction, options.seed))?,
            };
            let (train, validation) = split;
            (Part { data, indices: train }, Some(Part { data, indices: validation }))
        };
        let sets = Sets::new(train, validation, options, &mut ranks)?;
        self.run(sets, ranks, callback)
    }

    fn run(
        self,
        mut loader: impl Loader,
        mut ranks: Ranks,
        mut callback: impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let Trainer { options, start } = self;
        let Plan { fingerprint, steps, batches } = loader.plan();
        let checkpoint = options.checkpoint.as_deref().filter(|_| ranks.is_first()).map(Checkpoint::new);
        let optimizer = |epochs: usize| options.optimizer((steps.unwrap_or(1) as u64).saturating_mul(epochs as u64));
        let mut state = match start {
            Start::Resumed { data, .. } if data != fingerprint => {
                return Err(Error::Data("these are not the data that the resumed training began with".into()));
            }
            Start::Resumed { mut state, prolonged, .. } => {
                let optimizer = optimizer(options.epochs - state.before_schedule);
                if prolonged {
                    state.optimizer.restart(optimizer)?;
                } else if *state.optimizer.options() != optimizer {
                    let steps = steps.map_or("of unknown number".into(), |steps| format!("{steps} in an epoch"));
                    return Err(Error::Checkpoint {
                        path: options.checkpoint.unwrap_or_default(),
                        reason: format!(
                            "its options or its steps ({steps}) differ from those its optimiser was made for: were the \
                             options edited, or did the batches or the ranks change? To change options, or to train \
                             longer, resume and call Trainer::prolong"
                        ),
                    });
                }
                *state
            }
            Start::New(mut predictor) => {
                ranks.broadcast(&mut *predictor)?;
                loader.normalize(&mut predictor, &mut ranks)?;
                let optimizer = AdamW::new(&*predictor, optimizer(options.epochs))?;
                let (best, average) = (*predictor.clone(), options.average.map(|_| *predictor.clone()));
                let (history, predictor) = (Vec::new(), *predictor);
                let state = State { predictor, average, best, optimizer, history, before_schedule: 0 };
                let begun = checkpoint.as_ref().map_or(Ok(()), |checkpoint| {
                    checkpoint.create()?;
                    checkpoint.write(&options, &state, fingerprint)
                });
                ranks.together(begun)?;
                state
            }
        };
        ranks.compare("the weights to begin with", || {
            let every = |f: &mut dyn FnMut(&str, Parameter)| {
                state.predictor.visit_parameters(&mut |name, parameter| f(name, parameter));
            };
            hash_of_text(&[state.hash(), hash_of_every(every)])
        })?;

        let clock = Clock::start(batches.unwrap_or(1), state.history.len(), options.epochs);
        let mut gradient = state.predictor.zeros_like();
        let stopped = loop {
            let epoch = state.history.len();
            let patience = options.patience.unwrap_or(usize::MAX);
            if epoch >= options.epochs {
                break Stopped::Finished;
            } else if epoch - best_epoch(&state.history).max(state.before_schedule) >= patience {
                break Stopped::NoImprovement;
            }
            let learned = state.epoch(&mut loader, &options, &clock, &mut ranks, &mut gradient, &mut callback)?;
            let Some(progress) = learned else { break Stopped::Callback };
            let metrics = loader.measure(state.current(), &mut ranks)?;
            // first, so that all ranks find the same fault in them
            ranks.compare("the weights after an epoch", || state.hash())?;
            let progress = state.finish(progress, metrics)?;
            let written = checkpoint.as_ref().map_or(Ok(()), |to| to.write(&options, &state, fingerprint));
            if written.is_ok() {
                let progress = clock.at(progress);
                ranks.tell(|| callback(&progress, state.current()));
            }
            if ranks.agree(written, &mut [])? {
                break Stopped::Callback;
            }
        };
        let best_epoch = best_epoch(&state.history);
        let predictor = if best_epoch == 0 { state.average.unwrap_or(state.predictor) } else { state.best };
        Ok(Trained { predictor, best_epoch, history: state.history, stopped })
    }
}

impl Start {
    fn predictor(&self) -> &Predictor {
        match self {
            Start::New(predictor) => predictor,
            Start::Resumed { state, .. } => &state.predictor,
        }
    }

    /// Refuses what must be the same on all ranks and is not, but for the weights.
    fn compare(&self, options: &TrainerOptions, validates: bool, ranks: &mut Ranks) -> Result<()> {
        let options = TrainerOptions { checkpoint: None, ..options.clone() };
        let predictor = self.predictor();
        let normalized = [predictor.input_normalization(), predictor.output_normalization()].map(|of| of.is_some());
        let of = (predictor.task(), predictor.predictor_options(), predictor.lora_options(), normalized);
        let done = match self {
            Start::New(_) => None,
            Start::Resumed { state, data, prolonged } => Some((&state.history, data, prolonged)),
        };
        let given = (options, validates, ranks.sharded(), of, done);
        ranks.compare("the options, or the epochs done,", || hash_of_text(&given))
    }
}
