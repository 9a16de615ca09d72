//! One epoch of a training: its steps, taken by all ranks together.

use std::ops::ControlFlow;

use super::measure::Totals;
use super::report::Clock;
use super::{Metrics, Progress, State, TrainerOptions};
use crate::train::{Parameters, Ranks};
use crate::{Error, Predictor, Result};

/// Where the steps of an epoch come from: data sets, or batches from anywhere. A step is one of all ranks, to which each adds batches of
/// its own, or none.
pub(super) trait Loader {
    /// What is the same in all epochs.
    fn plan(&self) -> Plan;

    /// Fits the normalizations that the predictor lacks.
    fn normalize(&self, predictor: &mut Predictor, ranks: &mut Ranks) -> Result<()>;

    /// Begins an epoch, counted from 0.
    fn begin(&mut self, epoch: usize, ranks: &mut Ranks) -> Result<()>;

    /// Goes on to the next step, or says that there is none on any rank.
    fn next_step(&mut self) -> bool;

    /// Learns from the next batch of the step, if this rank has one: adds to `totals` and `gradient`. Returns whether another follows in
    /// the step.
    fn learn(&mut self, state: &State, totals: &mut Totals, gradient: &mut Predictor) -> Result<bool>;

    /// Ends the step. Returns numbers to be added up over the ranks.
    fn end_step(&mut self) -> [f64; 2];

    /// The divisor of the step's gradient, given these sums; `None` if nothing counts on any rank.
    fn divisor(&mut self, sums: [f64; 2]) -> Option<f64>;

    /// Batches of this rank in the epoch so far.
    fn batch(&self) -> usize;

    /// Measures a predictor on what all ranks have to validate on, if they have anything.
    fn measure(&mut self, predictor: &Predictor, ranks: &mut Ranks) -> Result<Option<Metrics>>;
}

pub(super) struct Plan {
    /// The fingerprint of the data, by which a resumed training knows them.
    pub fingerprint: u64,
    /// Of the optimiser in an epoch, if that is known.
    pub steps: Option<usize>,
    /// Of this rank in an epoch, if that is known.
    pub batches: Option<usize>,
}

impl State {
    /// Learns from everything once. Returns where it stands, or `None` if the callback said stop.
    pub(super) fn epoch(
        &mut self,
        loader: &mut impl Loader,
        options: &TrainerOptions,
        clock: &Clock,
        ranks: &mut Ranks,
        gradient: &mut Predictor,
        callback: &mut impl FnMut(&Progress, &Predictor) -> ControlFlow<()>,
    ) -> Result<Option<Progress>> {
        let epoch = self.history.len();
        loader.begin(epoch, ranks)?;
        let batches = loader.plan().batches;
        let mut totals = Totals::default();
        let mut progress = Progress::begin(epoch, options.epochs, totals.metrics(&self.predictor));
        let skipped_before = self.history.iter().map(|epoch| epoch.skipped).sum::<usize>();
        let (mut norms, mut taken) = (0.0, 0);
        while loader.next_step() {
            let before = totals;
            if !ranks.is_first() {
                // rank 0 brings what was before into the sum
                totals = Totals::default();
            }
            let may_skip = skipped_before + progress.skipped < options.skip_not_finite;
            let mut learned = Ok(true);
            while !ranks.stop() && matches!(learned, Ok(true)) {
                learned = loader.learn(self, &mut totals, gradient);
                if let Ok(true) = learned {
                    progress = clock.at(self.told(progress, loader.batch(), batches, &totals));
                    ranks.tell(|| callback(&progress, self.current()));
                }
            }
            let ([a, b, c, d, e], [f, g]) = (totals.numbers(), loader.end_step());
            let mut sums = [a, b, c, d, e, f, g];
            let stepped = match ranks.agree(learned.map(drop), &mut sums) {
                Ok(true) => return Ok(None),
                Ok(false) => {
                    let [a, b, c, d, e, f, g] = sums;
                    totals = Totals::of_numbers([a, b, c, d, e]);
                    match loader.divisor([f, g]) {
                        Some(divisor) => {
                            ranks.sum(gradient)?;
                            self.optimizer.step_accumulated(&mut self.predictor, gradient, divisor).map(Some)
                        }
                        None => Ok(None),
                    }
                }
                Err(error) => Err(error),
            };
            match stepped {
                Ok(Some(info)) => {
                    self.update_average(options.average);
                    norms += info.gradient_norm;
                    taken += 1;
                    progress.learning_rate = info.learning_rate;
                    progress.gradient_norm = info.gradient_norm as f32;
                }
                Ok(None) => {}
                Err(Error::NotFinite { .. }) if may_skip => {
                    gradient.fill_zero();
                    progress.skipped += 1;
                    totals = before;
                }
                Err(error) => return Err(error),
            }
            progress = clock.at(self.told(progress, loader.batch(), batches, &totals));
            ranks.tell(|| callback(&progress, self.current()));
        }
        if ranks.agree(Ok(()), &mut [])? {
            return Ok(None);
        }
        if taken == 0 && progress.skipped > 0 {
            return Err(self.not_finite("no step of an epoch could be taken"));
        } else if taken == 0 {
            return Err(Error::Data("an epoch has no batches, or none in which anything counts".into()));
        }
        progress.gradient_norm = (norms / f64::from(taken)) as f32;
        Ok(Some(progress))
    }

    fn told(&self, progress: Progress, batch: usize, batches: Option<usize>, totals: &Totals) -> Progress {
        Progress { batch, batches: batches.unwrap_or(batch), train: totals.metrics(&self.predictor), ..progress }
    }
}
