//! Training of language models on rows of tokens.

use std::ops::ControlFlow;
use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{
    AdamW, Alone, Collective, Parameters, Ranks, Stopped, TrainingData, cut_into, hash_of, hash_of_every, hash_of_text,
    views,
};
use crate::layers::{Rng, seed_at};
use crate::lm::LmLoss;
use crate::{Error, HymbaLm, Result};

mod checkpoint;
mod data;
mod options;

pub use data::TokenRows;
pub use options::LmTrainerOptions;

/// Trains a language model on rows of tokens: every parameter that can be trained, which are all of a model of [`HymbaLm::build`], or
/// where the model has low-rank adapters ([`HymbaLm::add_lora`]) only those of the active one.
///
/// A step adds up the gradients of its rows, in as many passes as [`pass_size`](LmTrainerOptions::pass_size) makes of them, and
/// divides by the number of predicted tokens. Which numbers the [dropout](crate::LoraOptions::dropout) of adapters drops follows
/// from the seed, the epoch and the row, and from the rank where each has [rows of its own](TrainingData::sharded). The same seed
/// and rows give the same weights, bit for bit, for any number of threads, also if the training was killed and resumed.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use hymba::HymbaLm;
/// use hymba::lm::HymbaLmConfig;
/// use hymba::train::{LmTrainer, LmTrainerOptions, TokenRows};
///
/// # let mut config = HymbaLmConfig::hymba_1_5b();
/// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
/// # (config.num_hidden_layers, config.global_attn_idx, config.kv_reuse_group) = (1, Some(vec![0]), None);
/// # config.num_memory_tokens = 2;
/// let text: Vec<u32> = (0..400).map(|i| i % 7).collect();
/// let rows = TokenRows::packed(&text, 50)?;
/// let options = LmTrainerOptions::default().epochs(3).batch_size(2).learning_rate(3e-3);
/// let trained = LmTrainer::new(HymbaLm::build(config, 0)?, options)?
///     .fit(&rows, Some(&rows), |_| ControlFlow::Continue(()))?;
/// let [first, .., last] = &trained.history[..] else { panic!() };
/// assert!(last.validation.unwrap().mean() < first.validation.unwrap().mean());
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug)]
pub struct LmTrainer {
    options: LmTrainerOptions,
    start: Start,
}

#[derive(Debug)]
enum Start {
    New(Box<HymbaLm>),
    /// And the fingerprint of the data.
    Resumed(Box<State>, u64),
}

/// Everything that changes from epoch to epoch.
struct State {
    lm: HymbaLm,
    optimizer: AdamW<HymbaLm>,
    history: Vec<LmEpoch>,
    /// The weights of the best epoch.
    best: Vec<Vec<f32>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("lm", &self.lm).field("history", &self.history).finish()
    }
}

/// The result of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LmEpoch {
    /// The loss of the batches, each before its step.
    pub train: LmLoss,
    /// The loss of the validation rows after the epoch.
    pub validation: Option<LmLoss>,
    /// Bits per byte of the validation rows, if these say how many [`bytes`](TokenRows::bytes) they are.
    pub bits_per_byte: Option<f64>,
}

/// Where a training stands.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct LmProgress<'a> {
    /// The model in its current state, to sample from, for instance.
    pub lm: &'a HymbaLm,
    /// Epochs that are done.
    pub epoch: usize,
    /// Steps that are done, in all epochs.
    pub step: u64,
    /// All steps.
    pub steps: u64,
    /// Tokens predicted in the last step, and their loss.
    pub loss: LmLoss,
    /// The learning rate of the last step.
    pub learning_rate: f32,
    /// At the end of an epoch, its result.
    pub finished: Option<LmEpoch>,
}

/// The result of a training.
#[derive(Debug)]
#[non_exhaustive]
pub struct LmTrained {
    /// The model of the best epoch by validation loss, or of the last where nothing was validated; in its current state if training
    /// stopped within the first.
    pub lm: HymbaLm,
    /// The best epoch, from 1; 0 if none was finished.
    pub best_epoch: usize,
    /// The results of all epochs.
    pub history: Vec<LmEpoch>,
    /// Why it ended.
    pub stopped: Stopped,
}

impl LmTrainer {
    /// A training of `lm` that begins when [`fit`](Self::fit) is called.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range.
    pub fn new(lm: HymbaLm, options: LmTrainerOptions) -> Result<Self> {
        options.validate()?;
        Ok(LmTrainer { options, start: Start::New(Box::new(lm)) })
    }

    /// Goes on with a training that was killed or stopped, from the last epoch that its checkpoint folder holds. `lm` is a model of
    /// the same configuration; the weights that are trained are those of the folder. The rows must be the same.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Format`] and [`Error::Tensors`] when a file cannot be read, is not what it should be, or is of a
    /// model with other weights; [`Error::Option`] names the option in which the adapter of `lm` differs from that of the training;
    /// [`Error::State`] if an adapter was trained and none of `lm` is active.
    pub fn resume(lm: HymbaLm, folder: impl AsRef<Path>) -> Result<Self> {
        let (options, state, data) = checkpoint::read(folder.as_ref(), lm)?;
        let options = options.checkpoint(folder.as_ref());
        Ok(LmTrainer { options, start: Start::Resumed(Box::new(state), data) })
    }

    /// The options, those in the checkpoint of a resumed training.
    pub fn options(&self) -> &LmTrainerOptions {
        &self.options
    }

    /// Trains, and calls `callback` after every step and at the end of every epoch.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if rows do not go with the model: an id is not in the vocabulary, or they are too long, which is checked
    /// before the first step, or too many for the memory; [`Error::Data`] if they are not those that a resumed training began with;
    /// [`Error::State`] if the model holds adapters of which none is active; [`Error::Checkpoint`] if the folder has a training in it
    /// already; [`Error::NotFinite`] when a gradient is not finite, or, at the end of an epoch, a trained parameter or the validation
    /// loss is not; and [`Error::Io`] says why a checkpoint could not be written. The last checkpoint is intact then.
    pub fn fit(
        self,
        train: &TokenRows,
        validation: Option<&TokenRows>,
        callback: impl FnMut(&LmProgress) -> ControlFlow<()>,
    ) -> Result<LmTrained> {
        self.fit_on(TrainingData::new(train).validation(validation), &mut Alone, callback)
    }

    /// As [`fit`](Self::fit), together with other processes, the ranks of `collective`: each learns from its share of the rows of every
    /// step, and all take the same step. Everything that is said of [`Trainer::fit_on`](super::Trainer::fit_on) holds; `batch_size`
    /// is that of all ranks together.
    ///
    /// # Errors
    ///
    /// Those of [`fit`](Self::fit), each on the rank it happened on, and [`Error::Collective`] on the others; this also if a rank is
    /// gone, if ranks do not have the same options, rows or weights at the start, or if their weights, which are compared after
    /// each epoch, have come to differ.
    pub fn fit_on<'a>(
        self,
        data: impl Into<TrainingData<'a, TokenRows>>,
        collective: &mut dyn Collective,
        mut callback: impl FnMut(&LmProgress) -> ControlFlow<()>,
    ) -> Result<LmTrained> {
        let LmTrainer { options, start } = self;
        let TrainingData { train, validation, sharded } = data.into();
        let mut ranks = Ranks::new(collective, sharded)?;
        let lm = match &start {
            Start::New(lm) => lm,
            Start::Resumed(state, _) => &state.lm,
        };
        let checked = [Some(train), validation].into_iter().flatten().try_for_each(|rows| lm.check_tokens(&rows.rows));
        ranks.together(checked)?;
        ranks.compare("the options, or the epochs done,", || start.hash(&options, validation.is_some(), sharded))?;
        let of_train = train.fingerprint_of_all(&mut ranks)?;
        let of_validation = validation.map_or(Ok(0), |rows| rows.fingerprint_of_all(&mut ranks))?;
        let fingerprint = of_train ^ of_validation.rotate_left(1);
        let mut rows = [train.len() as f64];
        ranks.sum_of_data(&mut rows)?;
        let in_epoch = (rows[0] as usize).div_ceil(options.batch_size);
        let steps = (in_epoch as u64).saturating_mul(options.epochs as u64);
        let folder = options.checkpoint.as_deref().filter(|_| ranks.is_first());
        let mut state = match start {
            Start::Resumed(_, data) if data != fingerprint => {
                return Err(Error::Data("these are not the rows that the resumed training began with".into()));
            }
            Start::Resumed(state, _) => *state,
            Start::New(mut lm) => {
                ranks.broadcast(&mut *lm)?;
                let optimizer = AdamW::new(&*lm, options.optimizer(steps))?;
                let state = State { best: copy_of(&lm), lm: *lm, optimizer, history: Vec::new() };
                let begun = folder.map_or(Ok(()), |folder| {
                    checkpoint::create(folder)?;
                    checkpoint::write(folder, &options, &state, fingerprint)
                });
                ranks.together(begun)?;
                state
            }
        };
        ranks.compare("the weights to begin with", || {
            hash_of_text(&[state.hash(), hash_of_every(|f| state.lm.visit(&mut |name, parameter| f(name, parameter)))])
        })?;
        let plan = Plan { in_epoch, steps };
        let mut gradient = state.lm.zeros_like();
        let stopped = loop {
            let epoch = state.history.len();
            if epoch >= options.epochs {
                break Stopped::Finished;
            } else if options.patience.is_some_and(|patience| epoch - best_epoch(&state.history) >= patience) {
                break Stopped::NoImprovement;
            }
            let Some(last) = state.epoch(train, &options, &plan, &mut ranks, &mut gradient, &mut callback)? else {
                break Stopped::Callback;
            };
            let measured =
                validation.map(|rows| measure(&state.lm, rows, options.pass_size, &mut ranks)).transpose()?;
            let finished = LmEpoch {
                train: last.1,
                validation: measured.map(|(loss, _)| loss),
                bits_per_byte: measured.and_then(|(loss, bytes)| Some(loss.bits_per_byte(bytes?))),
            };
            // first, so that all ranks find the same fault in them
            ranks.compare("the weights after an epoch", || state.hash())?;
            state.check_finite(&finished)?;
            state.history.push(finished);
            if best_epoch(&state.history) == state.history.len() {
                state.best = copy_of(&state.lm);
            }
            let written = folder.map_or(Ok(()), |folder| checkpoint::write(folder, &options, &state, fingerprint));
            let (loss, learning_rate) = (last.0.0, last.0.1);
            let (epoch, step) = (state.history.len(), state.optimizer.steps());
            if written.is_ok() {
                let finished = Some(finished);
                let progress = LmProgress { lm: &state.lm, epoch, step, steps, loss, learning_rate, finished };
                ranks.tell(|| callback(&progress));
            }
            if ranks.agree(written, &mut [])? {
                break Stopped::Callback;
            }
        };
        let State { mut lm, history, best, .. } = state;
        lm.end_training();
        let best_epoch = best_epoch(&history);
        if best_epoch > 0 {
            let mut best = best.into_iter();
            Parameters::visit_mut(&mut lm, &mut |_, mut array| {
                array.iter_mut().zip(best.next().unwrap_or_default()).for_each(|(x, best)| *x = best);
            });
        }
        Ok(LmTrained { lm, best_epoch, history, stopped })
    }
}

impl Start {
    /// Of what must be the same on all ranks, but for the weights.
    fn hash(&self, options: &LmTrainerOptions, validates: bool, sharded: bool) -> u64 {
        let options = LmTrainerOptions { checkpoint: None, ..options.clone() };
        let of = |lm: &HymbaLm| {
            let trained: Vec<_> = views(lm).into_iter().map(|(name, array)| (name, array.shape().to_vec())).collect();
            hash_of_text(&(lm.config(), trained, lm.lora_options()))
        };
        let given = (options, validates, sharded);
        match self {
            Start::New(lm) => hash_of_text(&(given, of(lm))),
            Start::Resumed(state, data) => hash_of_text(&(given, of(&state.lm), &state.history, data)),
        }
    }
}

/// Steps of the optimiser, of all ranks.
struct Plan {
    in_epoch: usize,
    /// In all epochs.
    steps: u64,
}

impl State {
    /// Learns from every row once. Returns the loss and the rate of the last step, and the loss of all, or `None` if the callback
    /// said stop.
    fn epoch(
        &mut self,
        train: &TokenRows,
        options: &LmTrainerOptions,
        plan: &Plan,
        ranks: &mut Ranks,
        gradient: &mut HymbaLm,
        callback: &mut impl FnMut(&LmProgress) -> ControlFlow<()>,
    ) -> Result<Option<((LmLoss, f32), LmLoss)>> {
        let epoch = self.history.len();
        let mut rng = Rng::seed_from_u64(options.seed);
        rng.set_stream(epoch as u64 + 1);
        let mut order: Vec<usize> = (0..train.len()).collect();
        order.shuffle(&mut rng);
        let (mut of_epoch, mut last) = (LmLoss::default(), (LmLoss::default(), 0.0));
        for step in cut_into(order.len(), plan.in_epoch) {
            let share = if ranks.stop() { Vec::new() } else { ranks.share(&order[step]) };
            let seed = seed_at(options.seed, epoch + 1);
            // rows count from 0 on each
            let seed = if ranks.sharded() && ranks.rank() > 0 { seed_at(!seed, ranks.rank()) } else { seed };
            let loss = sum_of_losses(self.learn(train, &share, options.pass_size, seed, gradient), ranks)?;
            let Some(loss) = loss else { return Ok(None) };
            if loss.tokens > 0 {
                ranks.sum(gradient)?;
                let info = self.optimizer.step_accumulated(&mut self.lm, gradient, loss.tokens as f64)?;
                last = (loss, info.learning_rate);
            }
            of_epoch += loss;
            let (loss, learning_rate) = last;
            let (step, steps) = (self.optimizer.steps(), plan.steps);
            let progress = LmProgress { lm: &self.lm, epoch, step, steps, loss, learning_rate, finished: None };
            ranks.tell(|| callback(&progress));
        }
        let stop = ranks.agree(Ok(()), &mut [])?;
        Ok((!stop).then_some((last, of_epoch)))
    }

    /// Adds the gradient of some rows to `gradient`. What dropout hits follows from the seed and the row alone.
    fn learn(
        &self,
        train: &TokenRows,
        rows: &[usize],
        at_a_time: usize,
        seed: u64,
        gradient: &mut HymbaLm,
    ) -> Result<LmLoss> {
        let mut loss = LmLoss::default();
        for pass in rows.chunks(at_a_time) {
            let seeds: Vec<_> = pass.iter().map(|row| seed_at(seed, *row)).collect();
            let (rows, masks) = train.select(pass);
            loss += self.lm.accumulate_by(&rows, masks.as_deref(), Some(&seeds), gradient)?;
        }
        Ok(loss)
    }

    /// Of all that must be the same on all ranks.
    fn hash(&self) -> u64 {
        let [first, second] = self.optimizer.moments();
        hash_of_text(&([&self.lm, first, second].map(hash_of), self.optimizer.steps()))
    }

    /// Refuses an epoch after which a parameter or the validation loss is not finite: nothing else checks its last step.
    fn check_finite(&self, epoch: &LmEpoch) -> Result<()> {
        let error = |what| Err(Error::NotFinite { step: self.optimizer.steps() + 1, what });
        for (name, array) in views(&self.lm) {
            if let Some(number) = array.iter().find(|number| !number.is_finite()) {
                return error(format!("the steps of an epoch are done, and {name:?} has become {number}"));
            }
        }
        match epoch.validation.map(|loss| loss.mean()) {
            Some(loss) if !loss.is_finite() => error(format!("the validation loss is {loss}")),
            _ => Ok(()),
        }
    }
}

/// The loss of the rows of all ranks, some at a time, and how many bytes they are if all ranks know.
fn measure(lm: &HymbaLm, rows: &TokenRows, at_a_time: usize, ranks: &mut Ranks) -> Result<(LmLoss, Option<usize>)> {
    let share = ranks.share(&(0..rows.len()).collect::<Vec<_>>());
    let measured = share.chunks(at_a_time).try_fold(LmLoss::default(), |mut loss, some| {
        let (rows, masks) = rows.select(some);
        loss += lm.forward_train(&rows, masks.as_deref())?.0;
        Ok(loss)
    });
    let loss = sum_of_losses(measured, ranks)?.unwrap_or_default();
    let mut bytes = [rows.bytes.map_or(f64::NAN, |bytes| bytes as f64)];
    ranks.sum_of_data(&mut bytes)?;
    Ok((loss, bytes[0].is_finite().then_some(bytes[0] as usize)))
}

/// The loss of all ranks, or `None` if one wants to stop.
fn sum_of_losses(own: Result<LmLoss>, ranks: &mut Ranks) -> Result<Option<LmLoss>> {
    let mut sums = own.as_ref().map_or([0.0; 2], |loss| [loss.sum, loss.tokens as f64]);
    let stop = ranks.agree(own.map(drop), &mut sums)?;
    Ok((!stop).then(|| LmLoss::new(sums[0], sums[1] as usize)))
}

/// The weights that are trained.
fn copy_of(lm: &HymbaLm) -> Vec<Vec<f32>> {
    views(lm).into_iter().map(|(_, array)| array.iter().copied().collect()).collect()
}

/// From 1: the one of the lowest validation loss, the first of equals and never one of NaN; without validation the last. 0 if there is
/// none.
fn best_epoch(history: &[LmEpoch]) -> usize {
    let mut best: Option<(usize, f64)> = None;
    for (i, epoch) in history.iter().enumerate() {
        let Some(loss) = epoch.validation.map(|loss| loss.mean()) else { return history.len() };
        if !loss.is_nan() && best.is_none_or(|(_, lowest)| loss < lowest) {
            best = Some((i + 1, loss));
        }
    }
    best.map_or(0, |(epoch, _)| epoch)
}
