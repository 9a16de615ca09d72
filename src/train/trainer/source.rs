//! Steps of batches from anywhere.

use ndarray::{Array3, Ix3};
use rand::{RngExt, SeedableRng};

use super::epoch::{Loader, Plan};
use super::measure::Totals;
use super::{BatchSource, Metrics, SeriesBatch, State, TrainerOptions};
use crate::layers::Rng;
use crate::train::{Loss, Ranks};
use crate::{Error, Predictor, Result};

/// What checkpoints have in the place of the fingerprint of the data.
pub(super) const SOURCE: u64 = 0x736f_7572_6365;

/// Steps of a source.
pub(super) struct Batches<'a, S: BatchSource, L, M> {
    source: &'a mut S,
    loss: L,
    metric: M,
    seed: u64,
    accumulation: usize,
    /// Of this rank in an epoch, and steps of all ranks, if they are known.
    batches: Option<usize>,
    steps: Option<usize>,
    rng: Rng,
    epoch: usize,
    /// One ahead: whether there is another.
    next: Option<SeriesBatch<S::Targets>>,
    /// Batches of the epoch that the source has given.
    given: usize,
    /// Batches of the step, and their weight.
    of_step: (usize, f64),
    /// Whether a rank has another batch.
    more: bool,
}

impl<'a, S: BatchSource, L, M> Batches<'a, S, L, M> {
    pub fn new(source: &'a mut S, loss: L, metric: M, options: &TrainerOptions, steps: Option<usize>) -> Self {
        Batches {
            batches: source.batches(),
            source,
            loss,
            metric,
            seed: options.seed,
            accumulation: options.accumulation,
            steps,
            rng: Rng::seed_from_u64(options.seed),
            epoch: 0,
            next: None,
            given: 0,
            of_step: (0, 0.0),
            more: false,
        }
    }

    fn fetch(&mut self) -> Result<()> {
        self.next = self.source.next_batch()?;
        self.given += usize::from(self.next.is_some());
        match self.batches {
            Some(known) if self.given > known || self.next.is_none() && self.given < known => {
                let epoch = self.epoch + 1;
                let reason = format!("the source announced {known} batches, but epoch {epoch} has another number");
                Err(Error::Data(reason))
            }
            _ => Ok(()),
        }
    }
}

impl<S, L, M> Loader for Batches<'_, S, L, M>
where
    S: BatchSource,
    L: FnMut(&Array3<f32>, &SeriesBatch<S::Targets>) -> Result<Loss<Ix3>>,
    M: FnMut(&Predictor) -> Result<Option<f32>>,
{
    fn plan(&self) -> Plan {
        Plan { fingerprint: SOURCE, steps: self.steps, batches: self.batches }
    }

    fn normalize(&self, _: &mut Predictor, _: &mut Ranks) -> Result<()> {
        Ok(())
    }

    fn begin(&mut self, epoch: usize, ranks: &mut Ranks) -> Result<()> {
        let [mut of_all, own] = ranks.generators(self.seed, epoch);
        let seed = of_all.random();
        self.rng = if ranks.is_first() { of_all } else { own };
        (self.epoch, self.given) = (epoch, 0);
        let begun = self.source.begin(seed).and_then(|()| self.fetch());
        let mut more = [f64::from(u8::from(self.next.is_some()))];
        ranks.agree(begun, &mut more)?;
        self.more = more[0] > 0.0;
        Ok(())
    }

    fn next_step(&mut self) -> bool {
        self.of_step = (0, 0.0);
        self.more
    }

    fn learn(&mut self, state: &State, totals: &mut Totals, gradient: &mut Predictor) -> Result<bool> {
        let Some(batch) = self.next.take() else { return Ok(false) };
        self.fetch()?;
        let (predictor, seed) = (&state.predictor, self.rng.random());
        let (z, cache) = predictor.run_train(&batch.x, Some(&batch.lengths), seed, predictor.task().is_frame_wise())?;
        let found = (self.loss)(&z, &batch)?;
        state.check_loss(found.value)?;
        if found.gradient.dim() != z.dim() {
            let expected = format!("{:?}, the shape of the predictions", z.shape());
            return Err(Error::Shape { argument: "gradient", expected, given: found.gradient.shape().to_vec() });
        }
        predictor.run_backward(&cache, found.sum_gradient(), gradient)?;
        totals.loss += f64::from(found.value) * found.weight;
        totals.weight += found.weight;
        self.of_step = (self.of_step.0 + 1, self.of_step.1 + found.weight);
        Ok(self.of_step.0 < self.accumulation && self.next.is_some())
    }

    fn end_step(&mut self) -> [f64; 2] {
        [self.of_step.1, f64::from(u8::from(self.next.is_some()))]
    }

    fn divisor(&mut self, [weight, more]: [f64; 2]) -> Option<f64> {
        self.more = more > 0.0;
        // batches in which nothing counts are no step
        (weight != 0.0).then_some(weight)
    }

    fn batch(&self) -> usize {
        self.given - usize::from(self.next.is_some())
    }

    fn measure(&mut self, predictor: &Predictor, ranks: &mut Ranks) -> Result<Option<Metrics>> {
        let measured = (self.metric)(predictor);
        let mut sums = [0.0; 2];
        if let Ok(Some(loss)) = measured {
            sums = [f64::from(loss), 1.0];
        }
        ranks.agree(measured.map(drop), &mut sums)?;
        let loss = (sums[0] / sums[1]) as f32;
        Ok((sums[1] > 0.0).then_some(Metrics { loss, plain_loss: None, accuracy: None }))
    }
}
