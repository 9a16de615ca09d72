//! Steps of data sets.

use std::ops::Range;
use std::vec::IntoIter;

use rand::{RngExt, SeedableRng};

use super::epoch::{Loader, Plan};
use super::measure::{Part, Totals, score};
use super::{Metrics, State, TrainerOptions};
use crate::layers::Rng;
use crate::train::data::Mixed;
use crate::train::{Ranks, cut};
use crate::{Predictor, Result};

/// A training set, and one to validate on.
pub(super) struct Sets<'a> {
    train: Part<'a>,
    validation: Option<Part<'a>>,
    options: TrainerOptions,
    fingerprint: u64,
    /// Of the class weights.
    mean_weight: f64,
    /// Of the optimiser in an epoch, and batches of this rank.
    counts: [usize; 2],
    rng: Rng,
    /// The steps of the epoch that are left: series of this rank, and targets of all.
    steps: IntoIter<(Vec<usize>, f64)>,
    /// The step that is due, and its batches.
    step: Vec<usize>,
    pieces: IntoIter<Range<usize>>,
    divisor: f64,
    /// Batches so far, and at the end of the step.
    batch: usize,
    end: usize,
}

impl<'a> Sets<'a> {
    pub fn new(
        train: Part<'a>,
        validation: Option<Part<'a>>,
        options: &TrainerOptions,
        ranks: &mut Ranks,
    ) -> Result<Self> {
        train.check_targets("training", ranks)?;
        let mut fingerprint = train.fingerprint(ranks)?;
        let mean_weight = train.mean_weight(options, ranks)?;
        if let Some(part) = &validation {
            part.check_targets("validation", ranks)?;
            fingerprint = fingerprint.rotate_left(1) ^ part.fingerprint(ranks)?;
            part.mean_weight(options, ranks)?;
        }
        let mut series = [train.indices.len() as f64];
        ranks.sum_of_data(&mut series)?;
        let steps = (series[0] as usize).div_ceil(options.step_size());
        let counts = [steps, ranks.num_batches(train.indices.len(), steps, options.batch_size)];
        Ok(Sets {
            train,
            validation,
            options: options.clone(),
            fingerprint,
            mean_weight,
            counts,
            rng: Rng::seed_from_u64(0),
            steps: Vec::new().into_iter(),
            step: Vec::new(),
            pieces: Vec::new().into_iter(),
            divisor: 0.0,
            batch: 0,
            end: 0,
        })
    }
}

impl Loader for Sets<'_> {
    fn plan(&self) -> Plan {
        let [steps, batches] = self.counts.map(Some);
        Plan { fingerprint: self.fingerprint, steps, batches }
    }

    fn normalize(&self, predictor: &mut Predictor, ranks: &mut Ranks) -> Result<()> {
        let Part { data, indices } = &self.train;
        if self.options.normalize && predictor.input_normalization().is_none() {
            let normalization = data.input_normalization(indices, predictor, ranks)?;
            predictor.set_input_normalization(Some(normalization))?;
        }
        if self.options.normalize && predictor.output_normalization().is_none() {
            predictor.set_output_normalization(data.output_normalization(indices, ranks)?)?;
        }
        Ok(())
    }

    fn begin(&mut self, epoch: usize, ranks: &mut Ranks) -> Result<()> {
        let (steps, rng) = self.train.steps(self.counts[0], self.options.seed, epoch, ranks);
        // of all ranks
        let mut targets: Vec<_> = steps.iter().map(|step| self.train.data.num_targets(step)).collect();
        ranks.agree(Ok(()), &mut targets)?;
        self.steps = steps.into_iter().zip(targets).collect::<Vec<_>>().into_iter();
        (self.rng, self.batch, self.end) = (rng, 0, 0);
        Ok(())
    }

    fn next_step(&mut self) -> bool {
        for (step, targets) in self.steps.by_ref() {
            let pieces: Vec<_> = cut(step.len(), self.options.batch_size).collect();
            self.end += pieces.len().max(1);
            // nothing to learn on any rank: no step, or the optimiser would go on by its momentum
            if targets > 0.0 {
                // of the whole step, so that a batch in pieces is the same as in one
                self.divisor = self.mean_weight * targets;
                (self.step, self.pieces) = (step, pieces.into_iter());
                return true;
            }
            self.batch = self.end;
        }
        false
    }

    fn learn(&mut self, state: &State, totals: &mut Totals, gradient: &mut Predictor) -> Result<bool> {
        let Some(piece) = self.pieces.next() else { return Ok(false) };
        let (options, divisor, seed) = (&self.options, Some(self.divisor), self.rng.random());
        let (batch, mixed) = self.train.augmented(&self.step[piece], options, &mut self.rng);
        let predictor = &state.predictor;
        let frame_wise = predictor.task().is_frame_wise();
        let (z, cache) = predictor.run_train(&batch.x, Some(&batch.lengths), seed, frame_wise)?;
        let other = mixed.map(|Mixed { share, targets }| {
            score(predictor, z.clone(), targets, &batch.counts, options, divisor).map(|scored| (share, scored))
        });
        let (mut of_batch, mut dz) = score(predictor, z, batch.targets, &batch.counts, options, divisor)?;
        if let Some((share, (of_other, dz_of_other))) = other.transpose()? {
            of_batch = of_batch.mixed(&of_other, share);
            dz.zip_mut_with(&dz_of_other, |dz, other| *dz = *dz * share + other * (1.0 - share));
        }
        state.check_loss(of_batch.metrics(predictor).loss)?;
        totals.add(&of_batch);
        predictor.run_backward(&cache, dz, gradient)?;
        self.batch += 1;
        Ok(self.pieces.len() > 0)
    }

    fn end_step(&mut self) -> [f64; 2] {
        self.batch = self.end;
        [0.0; 2]
    }

    fn divisor(&mut self, _: [f64; 2]) -> Option<f64> {
        // the losses were divided
        Some(1.0)
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn measure(&mut self, predictor: &Predictor, ranks: &mut Ranks) -> Result<Option<Metrics>> {
        let Some(part) = &self.validation else { return Ok(None) };
        let measured = part.measure(predictor, &self.options, ranks);
        Ok(Some(Totals::of_all(measured, ranks)?.metrics(predictor)))
    }
}
