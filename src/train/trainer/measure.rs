//! How well a predictor does on data.

use ndarray::{Array3, s};
use rand::seq::SliceRandom;

use super::{Metrics, TrainerOptions};
use crate::layers::Rng;
use crate::train::data::{Batch, BatchTargets, Mixed};
use crate::train::loss::Sums;
use crate::train::{Alone, Dataset, Ranks, Targets, cut};
use crate::{Error, Predictor, Result, argmax};

/// How well `predictor` does on `data`, by the losses of `options`. The batch size has no influence but on memory and time.
///
/// # Errors
///
/// [`Error::Data`] if the data are for another task or width; [`Error::Option`] if an option is outside its range or does not fit
/// the data, or if the class weights leave no target any weight.
///
/// ```
/// use hymba::ndarray::{Array2, array};
/// use hymba::train::{Dataset, Targets, TrainerOptions, evaluate};
/// use hymba::{HymbaOptions, Predictor, Task};
///
/// let task = Task::Regress { outputs: 1 };
/// let data = Dataset::new(&task, vec![Array2::ones((9, 2)); 2], Targets::Values(array![[1.0], [3.0]]))?;
/// let predictor = Predictor::build(HymbaOptions::new(2).hidden_size(8).num_layers(1), task)?;
/// assert!(evaluate(&predictor, &data, &TrainerOptions::default())?.loss >= 1.0); // both get the same prediction
/// # Ok::<(), hymba::Error>(())
/// ```
pub fn evaluate(predictor: &Predictor, data: &Dataset, options: &TrainerOptions) -> Result<Metrics> {
    options.validate()?;
    let (part, mut alone) = (Part::whole(data), Alone);
    let mut ranks = Ranks::new(&mut alone, false)?;
    part.check(predictor, options)?;
    part.mean_weight(options, &mut ranks)?;
    Ok(part.measure(predictor, options, &ranks)?.metrics(predictor))
}

/// Some series of a set.
pub(super) struct Part<'a> {
    pub data: &'a Dataset,
    pub indices: Vec<usize>,
}

impl<'a> Part<'a> {
    pub fn whole(data: &'a Dataset) -> Self {
        Part { data, indices: (0..data.num_series()).collect() }
    }

    /// Whether these are data for the predictor, and the options of the loss fit them.
    pub fn check(&self, predictor: &Predictor, options: &TrainerOptions) -> Result<()> {
        if self.data.task() != predictor.task() {
            let (task, other) = (predictor.task(), self.data.task());
            return Err(Error::Data(format!("they are for the task {other:?}, and the predictor is for {task:?}")));
        }
        let (width, embed_dim) = (self.data.width(), predictor.options().embed_dim);
        if width != embed_dim {
            return Err(Error::Data(format!(
                "its frames have width {width}, and the predictor has embed_dim {embed_dim}"
            )));
        }
        options.augmentations.iter().try_for_each(|augmentation| augmentation.check(self.data.task()))?;
        let batch = self.data.batch(&self.indices[..1]);
        let z = Array3::zeros((1, batch.counts[0], predictor.task().outputs()));
        score(predictor, z, batch.targets, &batch.counts, options, None).map(drop)
    }

    /// Some series as they are learned from.
    pub fn augmented(&self, indices: &[usize], options: &TrainerOptions, rng: &mut Rng) -> (Batch, Option<Mixed>) {
        self.data.augmented_batch(indices, &options.augmentations, rng)
    }

    /// A number by which to notice that the data of all ranks are others. All must have the same where each has all.
    pub fn fingerprint(&self, ranks: &mut Ranks) -> Result<u64> {
        let parts = || self.data.fingerprint_of_parts(&self.indices);
        ranks.fingerprint("the data", || self.data.fingerprint(), parts)
    }

    /// Refuses a part that has no targets on any rank.
    pub fn check_targets(&self, called: &str, ranks: &mut Ranks) -> Result<()> {
        let mut count = [self.data.num_targets(&self.indices)];
        ranks.sum_of_data(&mut count)?;
        match count[0] > 0.0 {
            true => Ok(()),
            false => {
                Err(Error::Data(format!("no frame of the {called} part has a target: all are Targets::IGNORED or NaN")))
            }
        }
    }

    /// The series of this rank in each of the `count` steps of an epoch, in an order drawn from the seed, and what this rank draws
    /// further from.
    pub fn steps(&self, count: usize, seed: u64, epoch: usize, ranks: &Ranks) -> (Vec<Vec<usize>>, Rng) {
        let [mut of_all, mut own] = ranks.generators(seed, epoch);
        let mut steps =
            self.data.sorted_batches(&self.indices, count, if ranks.sharded() { &mut own } else { &mut of_all });
        // the same order on all ranks, so that they have series of similar length at a time
        steps.shuffle(&mut of_all);
        let steps = steps.into_iter().map(|step| ranks.share(&step)).collect();
        (steps, if ranks.is_first() { of_all } else { own })
    }

    /// The mean class weight of the targets of all ranks; 1 without class weights.
    pub fn mean_weight(&self, options: &TrainerOptions, ranks: &mut Ranks) -> Result<f64> {
        let Some(weights) = &options.class_weights else { return Ok(1.0) };
        let of_all = self.data.classes(&self.indices).map(|class| f64::from(weights[class]));
        let (sum, count) = of_all.fold((0.0, 0.0), |(sum, count), weight| (sum + weight, count + 1.0));
        let mut sums = [sum, count];
        ranks.sum_of_data(&mut sums)?;
        let [sum, count] = sums;
        if count == 0.0 {
            return Ok(1.0);
        } else if sum == 0.0 {
            return Err(Error::Option {
                option: "class_weights",
                given: format!("{weights:?}"),
                allowed: "at least one class of the data must have a weight above 0".into(),
            });
        }
        Ok(sum / count)
    }

    /// This rank's share of what all measure.
    pub fn measure(&self, predictor: &Predictor, options: &TrainerOptions, ranks: &Ranks) -> Result<Totals> {
        let mut indices = self.indices.clone();
        indices.sort_by_key(|&i| self.data.series()[i].nrows());
        let (indices, mut totals) = (ranks.share(&indices), Totals::default());
        for batch in cut(indices.len(), options.batch_size) {
            let batch = self.data.batch(&indices[batch]);
            let z = predictor.run(&batch.x, Some(&batch.lengths), self.data.task().is_frame_wise())?;
            totals.add(&score(predictor, z, batch.targets, &batch.counts, options, None)?.0);
        }
        Ok(totals)
    }
}

/// Sums over series, or frames, from which the metrics of all of them follow.
#[derive(Clone, Copy, Default)]
pub(super) struct Totals {
    pub loss: f64,
    /// The divisor of `loss` in the mean.
    pub weight: f64,
    plain_loss: f64,
    right: usize,
    count: usize,
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        self.loss += other.loss;
        self.weight += other.weight;
        self.plain_loss += other.plain_loss;
        self.right += other.right;
        self.count += other.count;
    }

    /// All of them, to be added up over ranks.
    pub fn numbers(&self) -> [f64; 5] {
        [self.loss, self.weight, self.plain_loss, self.right as f64, self.count as f64]
    }

    pub fn of_numbers([loss, weight, plain_loss, right, count]: [f64; 5]) -> Self {
        Totals { loss, weight, plain_loss, right: right as usize, count: count as usize }
    }

    /// Those of all ranks.
    pub fn of_all(own: Result<Totals>, ranks: &mut Ranks) -> Result<Totals> {
        let mut numbers = own.as_ref().map_or([0.0; 5], Totals::numbers);
        ranks.agree(own.map(drop), &mut numbers)?;
        Ok(Totals::of_numbers(numbers))
    }

    /// Of mixed targets: a share of these totals, and of `other` the rest.
    pub fn mixed(self, other: &Totals, share: f32) -> Totals {
        let share = f64::from(share);
        let mix = |own: f64, other: f64| own * share + other * (1.0 - share);
        Totals {
            loss: mix(self.loss, other.loss),
            weight: mix(self.weight, other.weight),
            plain_loss: mix(self.plain_loss, other.plain_loss),
            ..self
        }
    }

    pub fn metrics(&self, predictor: &Predictor) -> Metrics {
        // of nothing 0, but not where NaN was seen
        let mean = |sum: f64, of: f64| (if of > 0.0 { sum / of } else { 0.0 * sum }) as f32;
        let counted = self.count > 0 && !predictor.task().is_regression();
        let of_all = |sum| counted.then(|| mean(sum, self.count as f64));
        Metrics {
            loss: mean(self.loss, self.weight),
            plain_loss: of_all(self.plain_loss),
            accuracy: of_all(self.right as f64),
        }
    }
}

/// z `[b, l, outputs]` before the output normalization → what it adds to the totals, and the gradient of the sum of its losses
/// divided by `divisor`, or of their mean.
pub(super) fn score(
    predictor: &Predictor,
    z: Array3<f32>,
    targets: BatchTargets,
    counts: &[usize],
    options: &TrainerOptions,
    divisor: Option<f64>,
) -> Result<(Totals, Array3<f32>)> {
    let (mut right, mut count) = (0, counts.iter().sum());
    let sums = match targets {
        BatchTargets::Classes(classes) => {
            let predicted = argmax(&z);
            count = 0;
            for (row, &frames) in counts.iter().enumerate() {
                let [given, wanted] = [&predicted, &classes].map(|of| of.slice(s![row, ..frames]));
                count += wanted.iter().filter(|wanted| **wanted != Targets::IGNORED).count();
                right += given.iter().zip(wanted).filter(|(given, wanted)| given == wanted).count();
            }
            options.cross_entropy().evaluate_sums(&z, &classes, Some(counts), divisor)?
        }
        BatchTargets::Values(mut values) => {
            if let Some(normalization) = predictor.output_normalization() {
                normalization.apply(&mut values);
            }
            options.regression_loss.evaluate_sums(&z, &values, Some(counts), divisor)?
        }
        BatchTargets::Labels(labels) => {
            right = z.iter().zip(&labels).filter(|(z, label)| (**z > 0.0) == (**label > 0.5)).count();
            let sums = options.binary_cross_entropy().evaluate_sums(&z, &labels, Some(counts), divisor)?;
            // right and wrong is counted by the label
            count = labels.len();
            let plain = sums.plain * labels.dim().2 as f64;
            Sums { plain, ..sums }
        }
    };
    Ok((Totals { loss: sums.loss, weight: sums.weight, plain_loss: sums.plain, right, count }, sums.gradient))
}
