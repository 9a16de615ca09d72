//! One epoch of a training on a data set: its steps, taken by all ranks together.

use std::ops::ControlFlow;

use rand::RngExt;

use super::measure::{Part, Totals, score};
use super::report::Clock;
use super::{Progress, State, TrainerOptions};
use crate::train::data::{Batch, Mixed};
use crate::train::{Parameters, Ranks, cut};
use crate::{Error, Predictor, Result};

/// What is the same in all epochs.
pub(super) struct Plan {
    /// Of the optimiser, in an epoch.
    pub steps: usize,
    /// Of this rank, in an epoch.
    pub batches: usize,
    /// Of the class weights.
    pub mean_weight: f64,
    pub clock: Clock,
}

impl State {
    /// Learns from every series once. Returns where it stands, or `None` if the callback said stop.
    pub(super) fn epoch(
        &mut self,
        train: &Part,
        options: &TrainerOptions,
        plan: &Plan,
        ranks: &mut Ranks,
        gradient: &mut Predictor,
        callback: &mut impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Option<Progress>> {
        let epoch = self.history.len();
        let (steps, mut rng) = train.steps(plan.steps, options.seed, epoch, ranks);
        // of all ranks
        let mut targets: Vec<_> = steps.iter().map(|step| train.data.num_targets(step) as f64).collect();
        ranks.agree(Ok(()), &mut targets)?;
        let mut totals = Totals::default();
        let mut progress = Progress::begin(epoch, options.epochs, plan.batches, totals.metrics(&self.predictor));
        let skipped_before = self.history.iter().map(|epoch| epoch.skipped).sum::<usize>();
        let (mut norms, mut taken) = (0.0, 0);
        for (step, targets) in steps.into_iter().zip(targets) {
            if targets == 0.0 {
                // nothing to learn on any rank: no step, or the optimiser would go on by its momentum
                progress.batch += cut(step.len(), options.batch_size).count().max(1);
                continue;
            }
            // of the whole step, so that a batch in pieces is the same as in one
            let divisor = plan.mean_weight * targets;
            let before = totals;
            if !ranks.is_first() {
                // rank 0 brings what was before into the sum
                totals = Totals::default();
            }
            let mut learned = Ok(());
            let may_skip = skipped_before + progress.skipped < options.skip_not_finite;
            for piece in cut(step.len(), options.batch_size) {
                if ranks.stop() {
                    break;
                }
                let (seed, last) = (rng.random(), piece.end == step.len());
                if learned.is_ok() {
                    let batch = train.augmented(&step[piece], options, &mut rng);
                    learned = self.learn(batch, divisor, seed, options, &mut totals, gradient);
                }
                if learned.as_ref().is_err_and(|error| !(may_skip && matches!(error, Error::NotFinite { .. }))) {
                    break;
                }
                if !last {
                    progress.batch += 1;
                    progress.train = totals.metrics(&self.predictor);
                    progress = plan.clock.at(progress);
                    ranks.tell(|| callback(&progress, self.current()));
                }
            }
            let mut sums = totals.numbers();
            let stepped = match ranks.agree(learned, &mut sums) {
                Ok(true) => return Ok(None),
                Ok(false) => {
                    totals = Totals::of_numbers(sums);
                    ranks.sum(gradient)?;
                    self.optimizer.step(&mut self.predictor, gradient)
                }
                Err(error) => Err(error),
            };
            match stepped {
                Ok(info) => {
                    self.update_average(options.average);
                    norms += info.gradient_norm;
                    taken += 1;
                    progress.learning_rate = info.learning_rate;
                    progress.gradient_norm = info.gradient_norm as f32;
                }
                Err(Error::NotFinite { .. }) if may_skip => {
                    gradient.fill_zero();
                    progress.skipped += 1;
                    totals = before;
                }
                Err(error) => return Err(error),
            }
            progress.batch += 1;
            progress.train = totals.metrics(&self.predictor);
            progress = plan.clock.at(progress);
            ranks.tell(|| callback(&progress, self.current()));
        }
        if ranks.agree(Ok(()), &mut [])? {
            return Ok(None);
        }
        if taken == 0 {
            return Err(self.not_finite("no step of an epoch could be taken"));
        }
        progress.gradient_norm = (norms / f64::from(taken)) as f32;
        Ok(Some(progress))
    }

    /// Adds the losses of a batch to `totals`, and the gradient of their sum divided by `divisor` to `gradient`.
    fn learn(
        &self,
        (batch, mixed): (Batch, Option<Mixed>),
        divisor: f64,
        seed: u64,
        options: &TrainerOptions,
        totals: &mut Totals,
        gradient: &mut Predictor,
    ) -> Result<()> {
        let frame_wise = self.predictor.task().is_frame_wise();
        let (z, cache) = self.predictor.run_train(&batch.x, Some(&batch.lengths), seed, frame_wise)?;
        let other = mixed.map(|Mixed { share, targets }| {
            let scored = score(&self.predictor, z.clone(), targets, &batch.counts, options, Some(divisor));
            scored.map(|scored| (share, scored))
        });
        let (mut of_batch, mut dz) = score(&self.predictor, z, batch.targets, &batch.counts, options, Some(divisor))?;
        if let Some((share, (of_other, dz_of_other))) = other.transpose()? {
            of_batch = of_batch.mixed(&of_other, share);
            dz.zip_mut_with(&dz_of_other, |dz, other| *dz = *dz * share + other * (1.0 - share));
        }
        let loss = of_batch.metrics(&self.predictor).loss;
        if !loss.is_finite() {
            return Err(self.not_finite(&format!("the loss is {loss}")));
        }
        totals.add(&of_batch);
        self.predictor.run_backward(&cache, dz, gradient).map(drop)
    }
}
