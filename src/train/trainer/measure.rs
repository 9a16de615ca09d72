//! How well a predictor does on data.

use ndarray::{Array3, Ix3, s};

use super::{Metrics, TrainerOptions};
use crate::train::data::{Batch, BatchTargets};
use crate::train::{Dataset, Loss};
use crate::{Error, Predictor, Result, argmax};

/// How well `predictor` does on `data`, by the losses of `options`.
///
/// # Errors
///
/// [`Error::Data`] if the data are for another task or width; [`Error::Option`] if the loss is not usable.
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
    let part = Part::whole(data);
    part.check(predictor, options)?;
    part.measure(predictor, options)
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
        let batch = self.data.batch(&self.indices[..1]);
        let z = Array3::zeros((1, batch.counts[0], predictor.task().outputs()));
        Meter::new(self.data).add(predictor, z, batch, options).map(drop)
    }

    pub fn measure(&self, predictor: &Predictor, options: &TrainerOptions) -> Result<Metrics> {
        let mut indices = self.indices.clone();
        indices.sort_by_key(|&i| self.data.series()[i].nrows());
        let mut meter = Meter::new(self.data);
        for indices in indices.chunks(options.batch_size) {
            let batch = self.data.batch(indices);
            let z = predictor.run(&batch.x, Some(&batch.lengths), self.data.task().is_frame_wise())?;
            meter.add(predictor, z, batch, options)?;
        }
        Ok(meter.metrics())
    }
}

/// Adds up losses and right answers.
pub(super) struct Meter {
    loss: f64,
    count: usize,
    right: usize,
    classes: bool,
}

impl Meter {
    pub fn new(data: &Dataset) -> Self {
        Meter { loss: 0.0, count: 0, right: 0, classes: data.task().is_classification() }
    }

    /// z `[b, l, outputs]` before the output normalization → its loss.
    pub fn add(
        &mut self,
        predictor: &Predictor,
        z: Array3<f32>,
        batch: Batch,
        options: &TrainerOptions,
    ) -> Result<Loss<Ix3>> {
        let counts = &batch.counts;
        let loss = match batch.targets {
            BatchTargets::Classes(classes) => {
                let predicted = argmax(&z);
                for (row, &count) in counts.iter().enumerate() {
                    let [given, wanted] = [&predicted, &classes].map(|of| of.slice(s![row, ..count]));
                    self.right += given.iter().zip(wanted).filter(|(given, wanted)| given == wanted).count();
                }
                options.cross_entropy().evaluate_sequences(&z, &classes, Some(counts))?
            }
            BatchTargets::Values(mut values) => {
                if let Some(normalization) = predictor.output_normalization() {
                    normalization.apply(&mut values);
                }
                options.regression_loss.evaluate_sequences(&z, &values, Some(counts))?
            }
        };
        let count: usize = counts.iter().sum();
        self.loss += f64::from(loss.value) * count as f64;
        self.count += count;
        Ok(loss)
    }

    pub fn metrics(&self) -> Metrics {
        let count = self.count.max(1) as f64;
        let accuracy = self.classes.then_some((self.right as f64 / count) as f32);
        Metrics { loss: (self.loss / count) as f32, accuracy }
    }
}
