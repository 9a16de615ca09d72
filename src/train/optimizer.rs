//! AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;

use ndarray::ArrayViewD;
use serde::{Deserialize, Serialize};

use super::{Parameters, views, views_mut};
use crate::files::tensors::Source;
use crate::files::{Target, header, saved as files};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::team::with_team;
use crate::parameters::Parameter;
use crate::{Error, Result};

mod options;

pub use options::AdamWOptions;

/// Numbers that are worth a thread: about 50 µs of the update.
const GROUP: usize = 1 << 16;
/// Gradients, without their sign, that are taken: the square of the largest is still a finite f32.
const USABLE: RangeInclusive<f64> = 0.0..=1e19;
/// In front of the parameters' names, in files.
const PREFIXES: [&str; 2] = ["first_moment.", "second_moment."];

/// The optimiser: gives every parameter a step size of its own, from running means of its gradient g and of g².
///
/// As PyTorch's `torch.optim.AdamW`. For step t = 1, 2, … with the rate η of the [`Schedule`](super::Schedule), after the
/// gradient was clipped,
///
/// ```text
/// m = β₁·m + (1 − β₁)·g
/// v = β₂·v + (1 − β₂)·g²
/// p = p·(1 − η·decay) − η · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)
/// ```
///
/// Updates are reproducible bit for bit, for any number of threads, and after [`save`](Self::save) and [`load`](Self::load).
///
/// ```
/// use hymba::train::{AdamW, AdamWOptions};
/// use hymba::{Hymba, HymbaOptions};
///
/// let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
/// let mut optimizer = AdamW::new(&model, AdamWOptions::default().learning_rate(3e-4).clip_norm(1.0))?;
///
/// let mut gradient = model.zeros_like(); // Hymba::backward adds into it
/// gradient.visit_mut(&mut |_, mut array| array.fill(1.0));
/// let info = optimizer.step(&mut model, &mut gradient)?;
/// assert_eq!((info.step, info.learning_rate), (1, 3e-4));
/// assert!((info.gradient_norm - (model.num_parameters() as f64).sqrt()).abs() < 1e-6);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct AdamW<P> {
    options: AdamWOptions,
    steps: u64,
    /// Steps that were taken before the schedule began.
    before_schedule: u64,
    /// m and v.
    moments: [P; 2],
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepInfo {
    /// Which step it was, from 1.
    pub step: u64,
    /// The learning rate it used.
    pub learning_rate: f32,
    /// The Euclidean norm of the whole gradient, but for what is [frozen](AdamWOptions::rate_for), before it was clipped.
    pub gradient_norm: f64,
}

/// The metadata entry of a saved optimiser.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    steps: u64,
    #[serde(default)]
    before_schedule: u64,
    adamw: AdamWOptions,
}

impl<P: Parameters> AdamW<P> {
    /// An optimiser for `model` that has not taken a step yet. It holds two further models.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range, or the model is stored for inference only
    /// ([`Hymba::store_as`](crate::Hymba::store_as)) and has no adapters; [`Error::State`] if it holds adapters of which none is
    /// active; [`Error::Optimizer`] if two parameters have one name, the numbers of one are not in row-major order without gaps
    /// (those of a [`Hymba`](crate::Hymba) are), or [`zeros_like`](Parameters::zeros_like) makes other parameters.
    pub fn new(model: &P, options: AdamWOptions) -> Result<Self> {
        options.validate()?;
        model.check_trainable()?;
        let mut names = BTreeSet::new();
        for (name, array) in views(model) {
            if !array.is_standard_layout() {
                return Err(Error::Optimizer(format!("{name:?} is not contiguous in row-major order")));
            }
            if let Some(name) = names.replace(name) {
                return Err(Error::Optimizer(format!("two parameters have the name {name:?}")));
            }
        }
        let optimizer =
            AdamW { options, steps: 0, before_schedule: 0, moments: [model.zeros_like(), model.zeros_like()] };
        for moment in &optimizer.moments {
            check_same("what zeros_like makes", moment, model)?;
        }
        Ok(optimizer)
    }

    /// Changes `model` by one step against `gradient`, and sets `gradient` to zero for the next.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] names the first parameter whose gradient is not finite, or so large that its square is not. To go on
    /// without the batch at fault, clear the gradient by [`Parameters::fill_zero`]: what is added to NaN stays NaN.
    /// [`Error::Optimizer`] if the parameters of `model` or of `gradient` are not those of the model the optimiser was made
    /// for. Nothing is changed then.
    pub fn step(&mut self, model: &mut P, gradient: &mut P) -> Result<StepInfo> {
        self.step_accumulated(model, gradient, 1.0)
    }

    /// As [`step`](Self::step), for a `gradient` into which the gradients of several sums were added: it is divided by `weight`, and
    /// the norm is that of the result.
    ///
    /// For a large batch that does not fit into memory, in pieces of any sizes. Each piece adds the gradient of its sum, and its
    /// weight; a mean of the pieces' means would be another loss where they have different numbers of frames, or labels of
    /// different class weights.
    ///
    /// ```
    /// use hymba::ndarray::{Array2, Array3};
    /// use hymba::train::{AdamW, AdamWOptions, CrossEntropy};
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// let mut optimizer = AdamW::new(&model, AdamWOptions::default())?;
    /// let mut gradient = model.zeros_like();
    ///
    /// let mut weight = 0.0;
    /// for length in [20, 3] {
    ///     let (x, labels) = (Array3::ones((1, length, 3)), Array2::from_elem((1, length), 5));
    ///     let (y, cache) = model.forward_sequence_train(&x, None, 0)?;
    ///     let loss = CrossEntropy::new().evaluate_sequences(&y, &labels, None)?;
    ///     model.backward_sequence(&cache, &loss.sum_gradient(), &mut gradient)?;
    ///     weight += loss.weight;
    /// }
    /// assert_eq!(weight, 23.0);
    /// optimizer.step_accumulated(&mut model, &mut gradient, weight)?;
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`step`](Self::step), and [`Error::Optimizer`] unless `weight` is finite and above 0.
    pub fn step_accumulated(&mut self, model: &mut P, gradient: &mut P, weight: f64) -> Result<StepInfo> {
        if !(weight > 0.0 && weight.is_finite()) {
            return Err(Error::Optimizer(format!(
                "the gradient's weight is {weight}; it must be finite and above 0: the sum of the losses' weights"
            )));
        }
        check_same("the model", model, &self.moments[0])?;
        check_same("the gradient", gradient, &self.moments[0])?;

        let step = self.steps.saturating_add(1);
        let gradient_norm = norm(&self.trained(gradient)) / weight;
        let clip = match self.options.clip_norm.map(f64::from) {
            Some(most) if gradient_norm > most => most / gradient_norm,
            _ => 1.0,
        };
        let scale = clip / weight;
        // no number is larger than the norm, and in f64 the norm of finite numbers is finite
        if !USABLE.contains(&(gradient_norm * clip)) {
            check_each(&self.trained(gradient), scale, step)?;
        }

        let learning_rate = self.options.schedule.rate(self.steps - self.before_schedule);
        let update = Update::new(&self.options, learning_rate, scale as f32, step);
        let [first, second] = &mut self.moments;
        let tensors =
            views_mut(model).into_iter().zip(views_mut(gradient)).zip(views_mut(first)).zip(views_mut(second));
        let chunks =
            tensors.flat_map(|((((name, parameter), (_, mut gradient)), (_, first)), (_, second))| {
                let decay = self.options.decay_of(&name, parameter.shape());
                let factor = self.options.factor_of(&name);
                if factor == 0.0 {
                    gradient.fill(0.0);
                }
                let keep = (1.0 - f64::from(learning_rate * factor) * f64::from(decay)) as f32;
                let rate = update.rate * factor;
                let [parameter, gradient, first, second] = [parameter, gradient, first, second]
                    .map(|array| array.into_slice().expect("checked above").chunks_mut(GROUP));
                // of what is frozen nothing
                let parameter = parameter.take(if factor == 0.0 { 0 } else { usize::MAX });
                parameter.zip(gradient).zip(first).zip(second).map(move |(((parameter, gradient), first), second)| {
                    Chunk { keep, rate, parameter, gradient, first, second }
                })
            });
        let groups = groups(chunks, |chunk| chunk.parameter.len());
        with_team(usize::MAX, |team| {
            team.for_each(groups, |group| {
                for chunk in group {
                    // four numbers read and four written
                    let work = Cost { memory_bytes: 32 * chunk.parameter.len() as u64, ..Cost::default() };
                    timed(Stage::Optimizer, work, || update.apply(chunk));
                }
            });
        });
        self.steps = step;
        Ok(StepInfo { step, learning_rate, gradient_norm })
    }

    /// The part of a gradient that a step reads: all that is not frozen.
    fn trained<'g>(&self, gradient: &'g P) -> Vec<(String, ArrayViewD<'g, f32>)> {
        views(gradient).into_iter().filter(|(name, _)| self.options.factor_of(name) > 0.0).collect()
    }

    /// Goes on with other options: the schedule counts from the next step, and the moments and the number of steps stay.
    ///
    /// ```
    /// use hymba::train::{AdamW, AdamWOptions, Schedule};
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// let mut optimizer = AdamW::new(&model, AdamWOptions::default().schedule(Schedule::linear(1e-3, 1)))?;
    /// let mut gradient = model.zeros_like();
    /// let mut rate = |optimizer: &mut AdamW<Hymba>| optimizer.step(&mut model, &mut gradient).map(|info| info.learning_rate);
    /// assert_eq!((rate(&mut optimizer)?, rate(&mut optimizer)?), (1e-3, 0.0)); // the schedule is at its end
    /// optimizer.restart(AdamWOptions::default().schedule(Schedule::linear(1e-4, 10)))?;
    /// assert_eq!((rate(&mut optimizer)?, optimizer.steps()), (1e-4, 3));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range; nothing is changed then.
    pub fn restart(&mut self, options: AdamWOptions) -> Result<()> {
        options.validate()?;
        (self.options, self.before_schedule) = (options, self.steps);
        Ok(())
    }

    /// The options it steps by.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// m and v.
    pub(super) fn moments(&self) -> &[P; 2] {
        &self.moments
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Writes everything that later steps depend on, the model apart, to a safetensors file: m and v as f32 under
    /// `first_moment.` and `second_moment.` and the name of the parameter, the options and the number of steps in the
    /// metadata. As [`Hymba::save`](crate::Hymba::save), the file is replaced in a single step.
    ///
    /// ```
    /// use hymba::train::{AdamW, AdamWOptions};
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("optimizer.safetensors");
    /// let model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// AdamW::new(&model, AdamWOptions::default())?.save(&path)?;
    /// assert_eq!(AdamW::load(&path, &model)?.steps(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Hymba::save`](crate::Hymba::save).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let (steps, before_schedule) = (self.steps, self.before_schedule);
        let saved = Saved { version: files::VERSION, steps, before_schedule, adamw: self.options.clone() };
        let mut tensors = Vec::new();
        for (prefix, moment) in PREFIXES.into_iter().zip(&self.moments) {
            tensors.extend(
                views(moment).into_iter().map(|(name, array)| (format!("{prefix}{name}"), Parameter::Array(array))),
            );
        }
        files::write(Target::File(path.as_ref()), &saved, tensors)
    }

    /// Reads an optimiser of `model` that [`save`](Self::save) wrote. Of `model` only the names and shapes matter.
    ///
    /// The file need not be trusted, as in [`Hymba::load`](crate::Hymba::load).
    ///
    /// # Errors
    ///
    /// Those of [`Hymba::load`](crate::Hymba::load) and of [`new`](Self::new), and [`Error::Format`] when the numbers are not
    /// what steps leave behind.
    pub fn load(path: impl AsRef<Path>, model: &P) -> Result<Self> {
        let (mut tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Some(saved) = saved else {
            return Err(tensors.error("its metadata has no options: AdamW::save did not write it"));
        };
        let Saved { steps, before_schedule, adamw: options, .. } = files::parse(&saved, &tensors)?;
        if before_schedule > steps {
            return Err(tensors.error(format!("its schedule began after {before_schedule} of {steps} steps")));
        }
        options.validate().map_err(|error| tensors.error(error.to_string()))?;
        let mut expected = Vec::new();
        for prefix in PREFIXES {
            model.visit(&mut |name, array| expected.push((format!("{prefix}{name}"), array.shape().to_vec())));
        }
        // before memory is taken
        tensors.check(&expected.into_iter().collect(), Vec::new())?;

        let mut optimizer = AdamW { steps, before_schedule, ..AdamW::new(model, options)? };
        let usable: [fn(f32) -> bool; 2] = [f32::is_finite, |v| v.is_finite() && v >= 0.0];
        for ((prefix, moment), usable) in PREFIXES.into_iter().zip(&mut optimizer.moments).zip(usable) {
            for (name, mut array) in views_mut(moment) {
                let name = format!("{prefix}{name}");
                tensors.read_into(&name, array.view_mut())?;
                if let Some(number) = array.iter().find(|&&number| !usable(number)) {
                    return Err(tensors.error(format!("{name:?} holds {number}, which cannot be a moment")));
                }
            }
        }
        Ok(optimizer)
    }
}

impl<P: Parameters> fmt::Debug for AdamW<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdamW").field("options", &self.options).field("steps", &self.steps).finish_non_exhaustive()
    }
}

/// Checks that the parameters of `given` are those of `expected`, and their numbers in row-major order.
fn check_same<P: Parameters>(what: &str, given: &P, expected: &P) -> Result<()> {
    let [given, expected] = [views(given), views(expected)];
    for i in 0..given.len().max(expected.len()) {
        match (given.get(i), expected.get(i)) {
            (Some((name, array)), Some((expected, shape)))
                if name == expected && array.shape() == shape.shape() && array.is_standard_layout() => {}
            (given, expected) => {
                let [given, expected] = [given, expected].map(|parameter| match parameter {
                    Some((name, array)) => format!("{name:?} of shape {:?}", array.shape()),
                    None => "nothing".into(),
                });
                return Err(Error::Optimizer(format!(
                    "{what} has {given} where the optimiser has {expected}; use what the optimiser was made for"
                )));
            }
        }
    }
    Ok(())
}

/// The Euclidean norm of all numbers. Added up in an order that depends on sizes only.
fn norm(tensors: &[(String, ArrayViewD<f32>)]) -> f64 {
    let chunks = tensors.iter().flat_map(|(_, array)| array.as_slice().expect("checked before").chunks(GROUP));
    let groups = groups(chunks, |chunk| chunk.len());
    let sums =
        with_team(usize::MAX, |team| team.map(groups, |group| group.into_iter().map(sum_of_squares).sum::<f64>()));
    sums.iter().sum::<f64>().sqrt()
}

fn sum_of_squares(numbers: &[f32]) -> f64 {
    // several sums side by side, which the compiler makes vectors of
    timed(Stage::Optimizer, Cost { memory_bytes: 4 * numbers.len() as u64, ..Cost::default() }, || {
        let mut sums = [0f64; 16];
        let (blocks, rest) = numbers.as_chunks::<16>();
        for block in blocks {
            for (sum, &number) in sums.iter_mut().zip(block) {
                *sum += f64::from(number) * f64::from(number);
            }
        }
        sums.iter().sum::<f64>() + rest.iter().map(|&number| f64::from(number) * f64::from(number)).sum::<f64>()
    })
}

/// Finds the first gradient, times `scale`, that a step cannot take.
fn check_each(tensors: &[(String, ArrayViewD<f32>)], scale: f64, step: u64) -> Result<()> {
    for (name, array) in tensors {
        if let Some(number) = array.iter().find(|number| !USABLE.contains(&(f64::from(number.abs()) * scale))) {
            let state = if number.is_finite() { "too large" } else { "not finite" };
            return Err(Error::NotFinite { step, what: format!("the gradient of {name:?} is {state} ({number:e})") });
        }
    }
    Ok(())
}

/// Puts neighbours together until they are worth a thread.
fn groups<T>(chunks: impl Iterator<Item = T>, len: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut groups = Vec::new();
    let mut held = GROUP;
    for chunk in chunks {
        if held >= GROUP {
            groups.push(Vec::new());
            held = 0;
        }
        held += len(&chunk);
        groups.last_mut().expect("one was just pushed").push(chunk);
    }
    groups
}

/// Numbers of one parameter and all that belongs to them.
struct Chunk<'a> {
    /// The factor that decay leaves of the parameter.
    keep: f32,
    /// η / (1 − β₁ᵗ), times the parameter's own factor.
    rate: f32,
    parameter: &'a mut [f32],
    gradient: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

/// The numbers of a step that are the same for all parameters.
struct Update {
    scale: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    /// η / (1 − β₁ᵗ)
    rate: f32,
    /// 1 / √(1 − β₂ᵗ)
    root: f32,
}

impl Update {
    fn new(options: &AdamWOptions, learning_rate: f32, scale: f32, step: u64) -> Self {
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        let (beta1, beta2) = options.betas;
        Update {
            scale,
            beta1,
            beta2,
            epsilon: options.epsilon,
            rate: (f64::from(learning_rate) / correction(beta1)) as f32,
            root: correction(beta2).sqrt().recip() as f32,
        }
    }

    /// Everything in one pass: it is memory that takes the time.
    fn apply(&self, chunk: Chunk) {
        let &Update { scale, beta1, beta2, epsilon, root, .. } = self;
        let moments = chunk.first.iter_mut().zip(chunk.second);
        for ((p, gradient), (m, v)) in chunk.parameter.iter_mut().zip(chunk.gradient).zip(moments) {
            let g = *gradient * scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * (g * g);
            *p = *p * chunk.keep - chunk.rate * *m / (v.sqrt() * root + epsilon);
            *gradient = 0.0;
        }
    }
}
