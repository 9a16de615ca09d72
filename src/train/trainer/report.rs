//! The reports and the result of a training.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Predictor;

/// How well a predictor does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Mean loss of the series, or of the frames if each has a target, by the options of the training: with label smoothing, and
    /// with class weights as Σ weight·loss / Σ weight, over all of them together. In a regression with an output normalization
    /// its unit is that of the normalized targets.
    pub loss: f32,
    /// Mean of −ln p of the right class, in a classification: the cross-entropy without label smoothing and class weights. Where several
    /// labels can be right, the mean over all of them.
    #[serde(default)]
    pub plain_loss: Option<f32>,
    /// Share of the series or frames whose class is right, in a classification; of the labels, where several can be right.
    pub accuracy: Option<f32>,
}

/// The result of an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EpochMetrics {
    /// On the training data during training: with dropout, and each batch before its step.
    pub train: Metrics,
    /// On the validation part, at the end of the epoch.
    pub validation: Option<Metrics>,
    /// The learning rate of the last step.
    pub learning_rate: f32,
    /// The mean norm of the gradients, before clipping.
    pub gradient_norm: f32,
    /// Steps that were left out, see [`TrainerOptions::skip_not_finite`](super::TrainerOptions::skip_not_finite). Their batches are not
    /// in `train`.
    #[serde(default)]
    pub skipped: usize,
}

impl EpochMetrics {
    /// The loss by which epochs are compared.
    pub(super) fn decisive_loss(&self) -> f32 {
        self.validation.unwrap_or(self.train).loss
    }
}

/// Where a training stands. Given to the callback of [`Trainer::fit`](super::Trainer::fit) after every batch and at the end of every epoch.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Progress {
    /// The epoch, from 1.
    pub epoch: usize,
    /// Epochs in all.
    pub epochs: usize,
    /// The batch within the epoch, from 1.
    pub batch: usize,
    /// Batches in an epoch.
    pub batches: usize,
    /// The mean of the epoch's batches so far.
    pub train: Metrics,
    /// The learning rate of the last step.
    pub learning_rate: f32,
    /// The norm of the last step's gradient, before clipping; at the end of an epoch, the mean over its steps.
    pub gradient_norm: f32,
    /// Steps of the epoch that were left out so far.
    pub skipped: usize,
    /// At the end of an epoch, after validation and checkpoint: its results.
    pub finished: Option<EpochMetrics>,
    /// Time since [`Trainer::fit`](super::Trainer::fit) was called; zero where there is no clock, on `wasm32-unknown-unknown`.
    pub elapsed: Duration,
    /// Time until all epochs are done, at the pace so far; zero where there is no clock.
    pub remaining: Duration,
}

impl Progress {
    /// Before the first batch of an epoch, counted from 0.
    pub(super) fn begin(epoch: usize, epochs: usize, train: Metrics) -> Self {
        Progress {
            epoch: epoch + 1,
            epochs,
            batch: 0,
            batches: 0,
            train,
            learning_rate: 0.0,
            gradient_norm: 0.0,
            skipped: 0,
            finished: None,
            elapsed: Duration::ZERO,
            remaining: Duration::ZERO,
        }
    }
}

/// Why a training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stopped {
    /// All epochs are done.
    Finished,
    /// No better loss for as many epochs as [`TrainerOptions::patience`](super::TrainerOptions::patience).
    NoImprovement,
    /// The callback stopped it.
    Callback,
}

/// The result of a training.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Trained {
    /// The predictor of the best epoch, or its current state if training stopped within the first.
    pub predictor: Predictor,
    /// The best epoch, from 1; 0 before the end of the first one.
    pub best_epoch: usize,
    /// All epochs, those before a resumption, too.
    pub history: Vec<EpochMetrics>,
    /// Why it ended.
    pub stopped: Stopped,
}

/// The epoch with the lowest loss, from 1; the first of equals. 0 before there is any.
pub(super) fn best_epoch(history: &[EpochMetrics]) -> usize {
    let losses = history.iter().map(EpochMetrics::decisive_loss);
    losses.enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(i, _)| i + 1)
}

/// Tells the time that is left.
pub(super) struct Clock {
    /// `None` where there is no clock.
    began: Option<Instant>,
    /// Batches that an earlier process has done.
    before: u64,
    /// Batches of all epochs.
    all: u64,
}

impl Clock {
    /// For `epochs` epochs of so many batches, `done` of which are behind.
    pub fn start(batches: usize, done: usize, epochs: usize) -> Self {
        // there, asking for the time is a panic
        let absent = cfg!(all(target_family = "wasm", target_os = "unknown"));
        let count = |epochs: usize| epochs as u64 * batches as u64;
        Clock { began: (!absent).then(Instant::now), before: count(done), all: count(epochs) }
    }

    pub fn at(&self, progress: Progress) -> Progress {
        let elapsed = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let done = (progress.epoch as u64 - 1) * progress.batches as u64 + progress.batch as u64;
        let pace = elapsed.as_secs_f64() / done.saturating_sub(self.before).max(1) as f64;
        let remaining =
            Duration::try_from_secs_f64(pace * self.all.saturating_sub(done) as f64).unwrap_or(Duration::MAX);
        Progress { elapsed, remaining, ..progress }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stopped::Finished => "all epochs are done",
            Stopped::NoImprovement => "the loss got no better",
            Stopped::Callback => "stopped by the callback",
        })
    }
}
