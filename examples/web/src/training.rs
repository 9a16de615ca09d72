//! Training in slices, between which a page can draw.

use hymba::ndarray::{Array2, Axis, concatenate};
use hymba::train::{AdamW, AdamWOptions, CrossEntropy, Dataset, Schedule, Targets};
use hymba::{Normalization, Predictor, Task, argmax};
use wasm_bindgen::JsError;
use wasm_bindgen::prelude::wasm_bindgen;

use crate::frames;
use crate::model::{Model, ModelOptions};

/// Series, and the class of each.
#[wasm_bindgen]
pub struct Examples {
    task: Task,
    width: usize,
    series: Vec<Array2<f32>>,
    classes: Vec<usize>,
}

#[wasm_bindgen]
impl Examples {
    /// For these classes, and frames of `width` numbers.
    #[wasm_bindgen(constructor)]
    pub fn new(classes: Vec<String>, width: usize) -> Examples {
        Examples { task: Task::classify(classes), width, series: Vec::new(), classes: Vec::new() }
    }

    /// A series, frame after frame, and the place of its class.
    pub fn add(&mut self, class: usize, series: &[f32]) -> Result<(), JsError> {
        let series = frames(series, self.width)?;
        // what cannot be learned from is refused here, not when all of them are there
        Dataset::new(&self.task, vec![series.clone()], Targets::Classes(vec![class]))?;
        self.series.push(series);
        self.classes.push(class);
        Ok(())
    }

    /// How many there are.
    #[wasm_bindgen(getter)]
    pub fn length(&self) -> usize {
        self.series.len()
    }

    /// The share of them that `model` puts into the right class.
    pub fn accuracy(&self, model: &Model) -> Result<f32, JsError> {
        let mut right = 0;
        for (series, &class) in self.series.iter().zip(&self.classes) {
            let given = model.predict(series.as_slice().unwrap_or_default())?;
            right += usize::from(argmax(&hymba::ndarray::arr1(&given)).into_scalar() == class);
        }
        Ok(right as f32 / self.series.len().max(1) as f32)
    }
}

/// How to train. It starts with what suits gestures.
#[wasm_bindgen]
#[derive(Clone)]
pub struct TrainingOptions {
    /// Steps of the optimiser.
    pub steps: u32,
    /// Series in a step.
    #[wasm_bindgen(js_name = batchSize)]
    pub batch_size: usize,
    /// The largest learning rate: it rises over the first tenth of the steps, and falls to 0 with the last.
    #[wasm_bindgen(js_name = learningRate)]
    pub learning_rate: f32,
    /// Probability that is taken from the right class and given to all.
    #[wasm_bindgen(js_name = labelSmoothing)]
    pub label_smoothing: f32,
}

#[wasm_bindgen]
impl TrainingOptions {
    /// For gestures.
    #[wasm_bindgen(constructor)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> TrainingOptions {
        TrainingOptions { steps: 320, batch_size: 16, learning_rate: 5e-3, label_smoothing: 0.1 }
    }
}

/// A training that goes on by `advance`, some steps at a time.
#[wasm_bindgen]
pub struct Training {
    options: TrainingOptions,
    data: Dataset,
    classes: Vec<usize>,
    predictor: Predictor,
    gradient: Predictor,
    optimizer: AdamW<Predictor>,
    loss: CrossEntropy,
    /// Batches of the epoch that are left, the next one last.
    batches: Vec<Vec<usize>>,
    epoch: u64,
    step: u32,
    /// Of each step.
    losses: Vec<f32>,
}

#[wasm_bindgen]
impl Training {
    /// A training of a new model, which has not begun.
    #[wasm_bindgen(constructor)]
    pub fn new(examples: &Examples, model: &ModelOptions, options: &TrainingOptions) -> Result<Training, JsError> {
        let (classes, options) = (examples.classes.clone(), options.clone());
        let data = Dataset::new(&examples.task, examples.series.clone(), Targets::Classes(classes.clone()))?;
        let mut predictor = Predictor::build(model.of(examples.width), examples.task.clone())?;
        predictor.set_input_normalization(Some(normalization(&data)?))?;
        let steps = u64::from(options.steps);
        let schedule = Schedule::cosine(options.learning_rate, steps).warm_up(steps / 10);
        let optimizer = AdamW::new(&predictor, AdamWOptions::default().schedule(schedule).clip_norm(1.0))?;
        let loss = CrossEntropy::new().label_smoothing(options.label_smoothing);
        let gradient = predictor.zeros_like();
        let (batches, losses) = (Vec::new(), Vec::new());
        Ok(Training {
            options,
            data,
            classes,
            predictor,
            gradient,
            optimizer,
            loss,
            batches,
            epoch: 0,
            step: 0,
            losses,
        })
    }

    /// Takes so many steps, or those that are left → the mean loss of their batches; NaN if none is left.
    pub fn advance(&mut self, steps: u32) -> Result<f32, JsError> {
        let first = self.losses.len();
        for _ in 0..steps.min(self.options.steps - self.step) {
            self.advance_once()?;
        }
        let losses = &self.losses[first..];
        Ok(losses.iter().sum::<f32>() / losses.len() as f32)
    }

    fn advance_once(&mut self) -> hymba::Result<()> {
        if self.batches.is_empty() {
            self.batches = self.data.batches(self.options.batch_size, self.epoch)?;
            self.epoch += 1;
        }
        let Some(batch) = self.batches.pop() else { return Ok(()) };
        let (x, lengths) = self.data.pad(&batch)?; // [b, l, width]
        let labels: Vec<usize> = batch.iter().map(|&i| self.classes[i]).collect();
        let (logits, cache) = self.predictor.forward_train(&x, Some(&lengths), self.step.into())?; // [b, classes]
        let loss = self.loss.evaluate(&logits, &labels)?;
        self.predictor.backward(&cache, &loss.gradient, &mut self.gradient)?;
        self.optimizer.step(&mut self.predictor, &mut self.gradient)?;
        self.step += 1;
        self.losses.push(loss.value);
        Ok(())
    }

    /// Steps taken so far.
    #[wasm_bindgen(getter)]
    pub fn step(&self) -> u32 {
        self.step
    }

    /// Steps in all.
    #[wasm_bindgen(getter)]
    pub fn steps(&self) -> u32 {
        self.options.steps
    }

    /// Whether all steps are taken.
    #[wasm_bindgen(getter)]
    pub fn done(&self) -> bool {
        self.step >= self.options.steps
    }

    /// The loss of each step so far.
    #[wasm_bindgen(getter)]
    pub fn losses(&self) -> Vec<f32> {
        self.losses.clone()
    }

    /// The model as it is now.
    pub fn model(&self) -> Model {
        self.predictor.clone().into()
    }
}

/// That brings each number of a frame to mean 0 and variance 1 over all series.
fn normalization(data: &Dataset) -> Result<Normalization, JsError> {
    let views: Vec<_> = data.series().iter().map(|series| series.view()).collect();
    let all = concatenate(Axis(0), &views)?; // [frames, width]
    let scale = all.std_axis(Axis(0), 0.0).mapv(|scale| if scale > 1e-6 { scale } else { 1.0 });
    Ok(Normalization::new(all.mean_axis(Axis(0)).unwrap_or_default(), scale)?)
}
