//! Training on batches from anywhere, by a loss of one's own.

use std::ops::ControlFlow;

use ndarray::{Array3, Ix3};
use rand::{RngExt, SeedableRng};

use super::checkpoint::Checkpoint;
use super::report::{Clock, best_epoch};
use super::{Decay, Metrics, Progress, Start, State, Stopped, Trained, Trainer, TrainerOptions};
use crate::layers::Rng;
use crate::train::{AdamW, Dataset, Loss, Parameters, Targets};
use crate::{Error, Predictor, Result};

/// Series that are learned from together.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesBatch<T> {
    /// `[b, l, width]`; what follows the end of a series is ignored.
    pub x: Array3<f32>,
    /// The lengths of the series, b of them.
    pub lengths: Vec<usize>,
    /// What is to be learned of them: whatever the loss takes.
    pub targets: T,
}

/// Where batches come from: a data set that does not fit into memory, or a generator.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use hymba::ndarray::{Array2, Array3};
/// use hymba::train::{BatchSource, BinaryCrossEntropy, SeriesBatch, Trainer, TrainerOptions};
/// use hymba::{HymbaOptions, Predictor, Result, Task};
///
/// /// Waves whose two labels say whether they are fast, and whether they are high.
/// struct Waves {
///     place: usize,
///     seed: u64,
/// }
///
/// impl BatchSource for Waves {
///     type Targets = Array2<f32>;
///
///     fn begin(&mut self, seed: u64) -> Result<()> {
///         (self.place, self.seed) = (0, seed); // files would be shuffled here
///         Ok(())
///     }
///
///     fn next_batch(&mut self) -> Result<Option<SeriesBatch<Array2<f32>>>> {
///         self.place += 1;
///         let targets = Array2::from_shape_fn((8, 2), |(i, label)| ((i >> label) % 2) as f32);
///         let phase = (self.seed % 100) as f32 + self.place as f32;
///         let x = Array3::from_shape_fn((8, 20, 1), |(i, t, _)| {
///             (1.0 + targets[[i, 1]]) * (phase + t as f32 * (0.5 + targets[[i, 0]])).sin()
///         });
///         Ok((self.place <= 5).then_some(SeriesBatch { x, lengths: vec![20; 8], targets }))
///     }
///
///     fn batches(&self) -> Option<usize> {
///         Some(5)
///     }
/// }
///
/// let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(16).num_layers(1), Task::multi_label(["fast", "high"]))?;
/// let options = TrainerOptions::default().epochs(4).learning_rate(1e-2);
/// let trained = Trainer::new(predictor, options)?.fit_batches(
///     &mut Waves { place: 0, seed: 0 },
///     |z, batch| {
///         let targets = batch.targets.to_shape((8, 1, 2)).expect("the same numbers").into_owned();
///         BinaryCrossEntropy::new().evaluate_sequences(z, &targets, None)
///     },
///     |_| Ok(None),
///     |progress| {
///         println!("epoch {}: loss {:.3}", progress.epoch, progress.train.loss);
///         ControlFlow::Continue(())
///     },
/// )?;
/// assert!(trained.history[3].train.loss < trained.history[0].train.loss);
/// # Ok::<(), hymba::Error>(())
/// ```
pub trait BatchSource {
    /// What the loss takes.
    type Targets;

    /// Begins an epoch, whose order is drawn from `seed`: another in each epoch, and the same whenever the training is repeated or
    /// resumed.
    ///
    /// # Errors
    ///
    /// Those of the source: they end the training.
    fn begin(&mut self, seed: u64) -> Result<()>;

    /// The next batch of the epoch, or `None` at its end.
    ///
    /// # Errors
    ///
    /// Those of the source: they end the training.
    fn next_batch(&mut self) -> Result<Option<SeriesBatch<Self::Targets>>>;

    /// How many batches an epoch has, if that is known. A schedule that falls needs it.
    fn batches(&self) -> Option<usize>;
}

/// A data set as a source of batches, for a loss of one's own.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use hymba::ndarray::{Array2, array};
/// use hymba::train::{Dataset, DatasetBatches, Loss, Targets, Trainer, TrainerOptions};
/// use hymba::{HymbaOptions, Predictor, Task};
///
/// let task = Task::Regress { outputs: 1 };
/// let values = Targets::Values(array![[1.0], [2.0], [3.0]]);
/// let data = Dataset::new(&task, (1..4).map(|i| Array2::from_elem((5, 1), i as f32)).collect(), values)?;
/// let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task)?;
/// let trained = Trainer::new(predictor, TrainerOptions::default().epochs(2))?.fit_batches(
///     &mut DatasetBatches::new(&data, 2)?,
///     |z, batch| {
///         // the mean absolute error
///         let Targets::Values(values) = &batch.targets else { unreachable!("a regression") };
///         let errors = z - &values.view().insert_axis(hymba::ndarray::Axis(1));
///         let count = errors.len() as f32;
///         let value = errors.mapv(f32::abs).sum() / count;
///         Ok(Loss { value, gradient: errors.mapv(|error| error.signum() / count), weight: f64::from(count) })
///     },
///     |predictor| Ok(Some((predictor.predict_series(data.series())?.sum() - 6.0).abs())), // picks the best epoch
///     |_| ControlFlow::Continue(()),
/// )?;
/// assert_eq!(trained.history.len(), 2);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug)]
pub struct DatasetBatches<'a> {
    data: &'a Dataset,
    size: usize,
    /// From the last to the first.
    left: Vec<Vec<usize>>,
}

impl<'a> DatasetBatches<'a> {
    /// Batches of `size` series or one less.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `size` is 0.
    pub fn new(data: &'a Dataset, size: usize) -> Result<Self> {
        data.batches(size, 0)?;
        Ok(DatasetBatches { data, size, left: Vec::new() })
    }
}

impl BatchSource for DatasetBatches<'_> {
    type Targets = Targets;

    fn begin(&mut self, seed: u64) -> Result<()> {
        self.left = self.data.batches(self.size, seed)?;
        self.left.reverse();
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<SeriesBatch<Targets>>> {
        let Some(indices) = self.left.pop() else { return Ok(None) };
        let (x, lengths) = self.data.pad(&indices)?;
        Ok(Some(SeriesBatch { x, lengths, targets: self.data.targets().select(&indices) }))
    }

    fn batches(&self) -> Option<usize> {
        Some(self.data.num_series().div_ceil(self.size))
    }
}

impl Trainer {
    /// Trains on batches from anywhere, by a loss of one's own.
    ///
    /// `loss` gets what the predictor says, before its output normalization, `[b, 1, outputs]`, or `[b, l, outputs]` where the task is of
    /// frames, and the batch; it returns the mean loss, its gradient by that array, and the weight of the mean ([`Loss::weight`]).
    /// `accumulation` batches make a step, as if they were one batch. `metric` is called at the end of each epoch: what it returns is
    /// in [`EpochMetrics::validation`](super::EpochMetrics::validation) as the loss, and the epoch with the least is kept; with `None`,
    /// that with the least training loss. A metric that is better when it is higher is returned with a minus.
    ///
    /// Of the options, those of the optimiser, `epochs`, `accumulation`, `average`, `patience`, `seed` and `checkpoint` count; the
    /// others are of [`fit`](Self::fit). In particular nothing is normalized or augmented: give the predictor an input
    /// normalization ([`Predictor::set_input_normalization`]) and the source its augmentations. A training can be
    /// [resumed](Self::resume) and [prolonged](Self::prolong) with the same source; nothing checks that it is the same.
    ///
    /// # Errors
    ///
    /// Those of the source, of `loss` and of `metric`; [`Error::Option`] if the number of batches is not known and the learning rate falls
    /// or warms up; [`Error::Data`] if an epoch has no batches or not those that were announced; otherwise as
    /// [`fit`](Self::fit). [`BatchSource`] and [`DatasetBatches`] have examples.
    pub fn fit_batches<S: BatchSource>(
        self,
        source: &mut S,
        mut loss: impl FnMut(&Array3<f32>, &SeriesBatch<S::Targets>) -> Result<Loss<Ix3>>,
        mut metric: impl FnMut(&Predictor) -> Result<Option<f32>>,
        mut callback: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let Trainer { options, start } = self;
        let known = source.batches();
        if known.is_none() && (options.decay != Decay::Constant || options.warm_up > 0.0) {
            return Err(Error::Option {
                option: "decay",
                given: format!("{:?}, with a warm-up of {}", options.decay, options.warm_up),
                allowed: "the source does not say how many batches it has: Decay::Constant without warm-up".into(),
            });
        }
        let steps_of = |epochs: usize| {
            let steps = known.map_or(1, |batches| batches.div_ceil(options.accumulation));
            (steps as u64).saturating_mul(epochs as u64)
        };
        let checkpoint = options.checkpoint.as_deref().map(Checkpoint::new);
        let mut state = match start {
            Start::Resumed { data, .. } if data != SOURCE => {
                return Err(Error::Data("the resumed training is one of Trainer::fit, on a data set".into()));
            }
            Start::Resumed { mut state, prolonged, .. } => {
                let optimizer = options.optimizer(steps_of(options.epochs - state.before_schedule));
                if prolonged {
                    state.optimizer.restart(optimizer)?;
                } else if *state.optimizer.options() != optimizer {
                    let advice = "the source has another number of batches than the resumed training began with";
                    return Err(Error::Data(advice.into()));
                }
                *state
            }
            Start::New(predictor) => {
                let state = State::of_batches(*predictor, &options, steps_of(options.epochs))?;
                if let Some(checkpoint) = &checkpoint {
                    checkpoint.create()?;
                    checkpoint.write(&options, &state, SOURCE)?;
                }
                state
            }
        };
        let clock = Clock::start(known.unwrap_or(1), state.history.len(), options.epochs);
        let mut gradient = state.predictor.zeros_like();
        let stopped = loop {
            let epoch = state.history.len();
            if epoch >= options.epochs {
                break Stopped::Finished;
            } else if epoch - best_epoch(&state.history).max(state.before_schedule)
                >= options.patience.unwrap_or(usize::MAX)
            {
                break Stopped::NoImprovement;
            }
            let learned = state.epoch_of_batches(source, &options, &clock, &mut gradient, &mut loss, &mut callback)?;
            let Some(progress) = learned else { break Stopped::Callback };
            let validation = metric(state.current())?.map(|loss| Metrics { loss, plain_loss: None, accuracy: None });
            let progress = state.finish(progress, validation)?;
            if let Some(checkpoint) = &checkpoint {
                checkpoint.write(&options, &state, SOURCE)?;
            }
            if callback(&clock.at(progress)).is_break() {
                break Stopped::Callback;
            }
        };
        let best_epoch = best_epoch(&state.history);
        let predictor = if best_epoch == 0 { state.average.unwrap_or(state.predictor) } else { state.best };
        Ok(Trained { predictor, best_epoch, history: state.history, stopped })
    }
}

/// What checkpoints have in the place of the fingerprint of the data.
const SOURCE: u64 = 0x736f_7572_6365;

impl State {
    fn of_batches(predictor: Predictor, options: &TrainerOptions, steps: u64) -> Result<Self> {
        let optimizer = AdamW::new(&predictor, options.optimizer(steps))?;
        let average = options.average.map(|_| predictor.clone());
        Ok(State { best: predictor.clone(), predictor, average, optimizer, history: Vec::new(), before_schedule: 0 })
    }

    /// Learns from every batch once. Returns where it stands, or `None` if the callback said stop.
    fn epoch_of_batches<S: BatchSource>(
        &mut self,
        source: &mut S,
        options: &TrainerOptions,
        clock: &Clock,
        gradient: &mut Predictor,
        loss: &mut impl FnMut(&Array3<f32>, &SeriesBatch<S::Targets>) -> Result<Loss<Ix3>>,
        callback: &mut impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Option<Progress>> {
        let epoch = self.history.len();
        let mut rng = Rng::seed_from_u64(options.seed);
        rng.set_stream(epoch as u64 + 1);
        source.begin(rng.random())?;
        let known = source.batches();
        let frame_wise = self.predictor.task().is_frame_wise();
        let nothing = Metrics { loss: 0.0, plain_loss: None, accuracy: None };
        let mut progress = Progress::begin(epoch, options.epochs, known.unwrap_or(1), nothing);
        let (mut sum, mut weight, mut norms, mut steps) = (0.0, 0.0, 0.0, 0u32);
        let (mut pieces, mut of_step) = (0, 0.0);
        let mut next = source.next_batch()?;
        while let Some(batch) = next {
            // one ahead: whether it is the last
            next = source.next_batch()?;
            progress.batch += 1;
            if known.is_some_and(|known| progress.batch > known) {
                return Err(self.other_number(known));
            }
            let (z, cache) = self.predictor.run_train(&batch.x, Some(&batch.lengths), rng.random(), frame_wise)?;
            let found = loss(&z, &batch)?;
            if !found.value.is_finite() {
                return Err(self.not_finite(&format!("the loss is {}", found.value)));
            }
            if found.gradient.dim() != z.dim() {
                let expected = format!("{:?}, as what was predicted has", z.shape());
                return Err(Error::Shape { argument: "gradient", expected, given: found.gradient.shape().to_vec() });
            }
            self.predictor.run_backward(&cache, found.sum_gradient(), gradient)?;
            sum += f64::from(found.value) * found.weight;
            weight += found.weight;
            of_step += found.weight;
            pieces += 1;
            if pieces == options.accumulation || next.is_none() {
                // batches in which nothing counts are no step
                if of_step != 0.0 {
                    let step = self.optimizer.step_accumulated(&mut self.predictor, gradient, of_step)?;
                    self.update_average(options.average);
                    norms += step.gradient_norm;
                    steps += 1;
                    (progress.learning_rate, progress.gradient_norm) = (step.learning_rate, step.gradient_norm as f32);
                }
                (pieces, of_step) = (0, 0.0);
            }
            progress.batches = known.unwrap_or(progress.batch);
            progress.train.loss = if weight > 0.0 { (sum / weight) as f32 } else { 0.0 };
            progress = clock.at(progress);
            if callback(&progress).is_break() {
                gradient.fill_zero();
                return Ok(None);
            }
        }
        if steps == 0 {
            return Err(Error::Data("an epoch of the source has no batches, or none in which anything counts".into()));
        }
        if known.is_some_and(|known| known != progress.batch) {
            return Err(self.other_number(known));
        }
        progress.gradient_norm = (norms / f64::from(steps)) as f32;
        Ok(Some(progress))
    }

    fn other_number(&self, known: Option<usize>) -> Error {
        let (epoch, known) = (self.history.len() + 1, known.unwrap_or(0));
        Error::Data(format!("the source announced {known} batches, and in epoch {epoch} it has another number"))
    }
}
