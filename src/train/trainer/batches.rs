//! Training on batches from any source, with a loss of your own.

use std::ops::ControlFlow;

use ndarray::{Array3, Ix3};

use super::source::{Batches, SOURCE};
use super::{Decay, Progress, Start, Trained, Trainer};
use crate::train::{Alone, Collective, Dataset, Loss, Ranks, Targets};
use crate::{Error, Predictor, Result};

/// A batch of series with their targets.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesBatch<T> {
    /// `[b, l, width]`, right-padded; padding is ignored.
    pub x: Array3<f32>,
    /// The lengths of the series, b of them.
    pub lengths: Vec<usize>,
    /// Their targets: whatever the loss takes.
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
    /// The targets of a batch, as the loss takes them.
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

/// A data set as a source of batches, for a loss of your own.
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
    /// Batches of at most `size` series: see [`Dataset::batches`].
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
    /// Trains on batches from any source, with a loss of your own.
    ///
    /// `loss` gets the predictions before the output normalization, `[b, 1, outputs]`, or `[b, l, outputs]` where the task is of frames,
    /// and the batch; it returns the mean loss, its gradient with respect to the predictions, and the weight of the mean
    /// ([`Loss::weight`]).
    /// `accumulation` batches make a step, as if they were one batch. `metric` is called at the end of each epoch: what it returns is
    /// in [`EpochMetrics::validation`](super::EpochMetrics::validation) as the loss, and the epoch with the least is kept; with `None`,
    /// that with the least training loss. A metric that is better when it is higher is returned with a minus.
    ///
    /// Of the options, those of the optimiser, `epochs`, `accumulation`, `average`, `skip_not_finite`, `patience`, `seed` and `checkpoint`
    /// count; the others are of [`fit`](Self::fit). In particular nothing is normalized or augmented: give the predictor an input
    /// normalization ([`Predictor::set_input_normalization`]) and the source its augmentations. A training can be
    /// [resumed](Self::resume) and [prolonged](Self::prolong) with the same source; nothing checks that it is the same.
    ///
    /// # Errors
    ///
    /// Those of the source, of `loss` and of `metric`; [`Error::Option`] if the number of batches is not known and the learning rate falls
    /// or warms up; [`Error::Data`] if an epoch has no batches or not those that were announced, or the resumed training is one of
    /// [`fit`](Self::fit); [`Error::Shape`] if a gradient does not have the shape of the predictions; otherwise as
    /// [`fit`](Self::fit). [`BatchSource`] and [`DatasetBatches`] have examples.
    pub fn fit_batches<S: BatchSource>(
        self,
        source: &mut S,
        loss: impl FnMut(&Array3<f32>, &SeriesBatch<S::Targets>) -> Result<Loss<Ix3>>,
        metric: impl FnMut(&Predictor) -> Result<Option<f32>>,
        mut callback: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let callback = |progress: &Progress, _: &Predictor| callback(progress);
        self.fit_batches_on(source, loss, metric, &mut Alone, callback)
    }

    /// As [`fit_batches`](Self::fit_batches), together with other processes, the ranks of `collective`: each has a source of its own. All
    /// that is said of [`fit_on`](Self::fit_on) holds, and:
    ///
    /// * `accumulation` batches of each rank make a step, weighted by what they count. Where some ranks have no more batches, the others go
    ///   on; the epoch is over when none has any. The number of batches is known if it is on all ranks.
    /// * [`BatchSource::begin`] gets the same seed on all ranks: sources that draw an order can divide the same one among them.
    /// * A checkpoint may be resumed by another number of ranks if an epoch has as many steps then, or the learning rate is constant.
    /// * `metric` is called on every rank, and the mean of those that return something is what counts.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use std::thread;
    ///
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Collective, CrossEntropy, Dataset, DatasetBatches, Targets, Threads, Trainer, TrainerOptions};
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let ranks: Vec<_> = Threads::new(2).into_iter().map(|mut rank| thread::spawn(move || {
    ///     let task = Task::classify(["a", "b"]);
    ///     // other series on each rank, and not as many
    ///     let count = 6 + 2 * rank.rank();
    ///     let targets = Targets::Classes((0..count).map(|i| i % 2).collect());
    ///     let mine = Dataset::new(&task, vec![Array2::ones((9, 1)); count], targets)?;
    ///     let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task)?;
    ///     Trainer::new(predictor, TrainerOptions::default().epochs(2))?.fit_batches_on(
    ///         &mut DatasetBatches::new(&mine, 2)?,
    ///         |z, batch| {
    ///             let Targets::Classes(classes) = &batch.targets else { unreachable!("a classification") };
    ///             let labels = Array2::from_shape_fn((classes.len(), 1), |(i, _)| classes[i]);
    ///             CrossEntropy::new().evaluate_sequences(z, &labels, None)
    ///         },
    ///         |_| Ok(None),
    ///         &mut rank,
    ///         |_, _| ControlFlow::Continue(()),
    ///     )
    /// })).collect();
    /// let trained = ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<hymba::Result<Vec<_>>>()?;
    /// assert_eq!(trained[0].history, trained[1].history);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`fit_batches`](Self::fit_batches), each on the rank it happened on, and [`Error::Collective`] on the others, as
    /// [`fit_on`](Self::fit_on).
    pub fn fit_batches_on<S: BatchSource>(
        self,
        source: &mut S,
        loss: impl FnMut(&Array3<f32>, &SeriesBatch<S::Targets>) -> Result<Loss<Ix3>>,
        metric: impl FnMut(&Predictor) -> Result<Option<f32>>,
        collective: &mut dyn Collective,
        callback: impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Trained> {
        let mut ranks = Ranks::new(collective, true)?;
        let Trainer { options, start } = &self;
        start.compare(options, false, &mut ranks)?;
        if let Start::Resumed { data, .. } = start
            && *data != SOURCE
        {
            return Err(Error::Data("the resumed training is one of Trainer::fit, on a data set".into()));
        }
        let batches = source.batches();
        let own = batches.map_or(f64::NAN, |batches| batches.div_ceil(options.accumulation) as f64);
        let all = ranks.gather([own])?;
        let known = all.iter().all(|[steps]| !steps.is_nan());
        let steps = known.then(|| all.iter().fold(0, |most, [steps]| most.max(*steps as usize)));
        if steps == Some(0) {
            return Err(Error::Data("the source has no batches".into()));
        } else if !known && (options.decay != Decay::Constant || options.warm_up > 0.0) {
            return Err(Error::Option {
                option: "decay",
                given: format!("{:?}, with a warm-up of {}", options.decay, options.warm_up),
                allowed: "the source does not say how many batches it has: use Decay::Constant without warm-up".into(),
            });
        }
        let batches = Batches::new(source, loss, metric, options, steps);
        self.run(batches, ranks, callback)
    }
}
