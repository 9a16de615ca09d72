//! From sequences to classes and numbers: an encoder with a linear head.

use std::fmt;

use ndarray::{
    Array, Array2, Array3, ArrayRef, ArrayRef2, ArrayRef3, ArrayViewD, ArrayViewMutD, Axis, CowArray, Dimension,
};
use rand::SeedableRng;

use crate::encoder::sequences;
use crate::encoder::{Keeps, of_numbers};
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{Linear, Rng};
use crate::parameters::{Parameter, ParameterMut};
use crate::train::Parameters;
use crate::{Error, Hymba, HymbaOptions, HymbaState, Result};

mod file;
mod logits;
mod normalization;
mod task;
mod training;

pub use logits::{argmax, softmax};
pub use normalization::Normalization;
pub use task::Task;
pub use training::PredictorCache;

/// A [`Hymba`] encoder with a linear head, for one [`Task`]: classes or numbers, of whole sequences or of every frame.
///
/// ```text
/// x      = (frames − input_mean) / input_scale            [b, l, embed_dim]   where it has an input normalization
/// hidden = encoder(x)                                      [b, h] or [b, l, h]
/// z      = hidden · W_headᵀ + b_head                       [b, c] or [b, l, c]   for a classification: logits
/// y      = z · output_scale + output_mean                  where it has an output normalization
/// ```
///
/// Every call is there for every task: a classifier of sequences also has an opinion at every frame. The task says how many
/// outputs there are, what they are called, and what [`Trainer`](crate::train::Trainer) trains.
///
/// ```
/// use hymba::ndarray::Array3;
/// use hymba::{HymbaOptions, Predictor, Task, argmax};
///
/// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
/// let predictor = Predictor::build(options, Task::classify(["walking", "standing", "sitting"]))?;
/// let logits = predictor.predict(&Array3::ones((2, 50, 6)), Some(&[50, 31]))?;
/// assert_eq!(logits.dim(), (2, 3));
/// for class in argmax(&logits)? {
///     println!("{}", predictor.task().labels()[class]);
/// }
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct Predictor {
    task: Task,
    encoder: Hymba,
    head: Linear,
    input: Option<Normalization>,
    output: Option<Normalization>,
}

impl Predictor {
    /// Builds a predictor with new random weights, as [`Hymba::build`] does.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option or the task is not usable; see [`HymbaOptions`] and [`Task::validate`].
    pub fn build(options: HymbaOptions, task: Task) -> Result<Self> {
        options.validate()?;
        check(&options, &task)?;
        Self::with_encoder(Hymba::build(options)?, task)
    }

    /// Puts a new head on a trained encoder. The seed of the encoder's options is that of the head, too.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if the task is not usable.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions, Predictor, Task};
    ///
    /// let encoder = Hymba::build(HymbaOptions::new(6).hidden_size(16).num_layers(1))?; // or Hymba::load
    /// let predictor = Predictor::with_encoder(encoder, Task::Regress { outputs: 2 })?;
    /// assert_eq!(predictor.task().outputs(), 2);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn with_encoder(encoder: Hymba, task: Task) -> Result<Self> {
        check(encoder.options(), &task)?;
        let mut rng = Rng::seed_from_u64(encoder.options().seed);
        rng.set_stream(1);
        let mut head = Linear::zeros(encoder.options().hidden_size, task.outputs(), true);
        head.init(&mut rng);
        Ok(Predictor { task, encoder, head, input: None, output: None })
    }

    /// A predictor of validated options and task whose parameters are all zero.
    fn zeros(options: HymbaOptions, storage: Option<Storage>, task: Task) -> Self {
        let head = Linear::zeros(options.hidden_size, task.outputs(), true);
        Predictor { task, encoder: Hymba::zeros(options, storage), head, input: None, output: None }
    }

    /// Predicts from the last frame of each sequence: x `[b, l, embed_dim]` → `[b, outputs]`; logits in a classification.
    /// With lengths, row i is a sequence of `lengths[i]` frames, and what follows them is ignored.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_ragged`].
    pub fn predict(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>) -> Result<Array2<f32>> {
        Ok(self.rescaled(self.run(x, lengths, false)?).index_axis_move(Axis(1), 0))
    }

    /// Predicts at every frame from the frames up to it: x `[b, l, embed_dim]` → `[b, l, outputs]`.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_sequence`].
    ///
    /// ```
    /// use hymba::ndarray::Array3;
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
    /// let predictor = Predictor::build(options, Task::RegressFrames { outputs: 2 })?;
    /// assert_eq!(predictor.predict_frames(&Array3::ones((3, 50, 6)))?.dim(), (3, 50, 2));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn predict_frames(&self, x: &ArrayRef3<f32>) -> Result<Array3<f32>> {
        Ok(self.rescaled(self.run(x, None, true)?))
    }

    /// A state for `batch` streams that have seen no frame yet.
    pub fn new_state(&self, batch: usize) -> HymbaState {
        self.encoder.new_state(batch)
    }

    /// The next frame of each stream: frame `[b, embed_dim]` → `[b, outputs]`, which equals [`predict`](Self::predict) on all
    /// frames given so far.
    ///
    /// # Errors
    ///
    /// As [`Hymba::step`].
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::{HymbaOptions, Predictor, Task, softmax};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
    /// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// let mut state = predictor.new_state(1);
    /// for _ in 0..20 {
    ///     let probabilities = softmax(&predictor.step(&Array2::ones((1, 6)), &mut state)?)?;
    ///     assert!((probabilities.sum() - 1.0).abs() < 1e-6);
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn step(&self, frame: &ArrayRef2<f32>, state: &mut HymbaState) -> Result<Array2<f32>> {
        self.encoder.check_frame(frame, state, self.options().embed_dim + 2 * self.task.outputs())?;
        let hidden = self.encoder.step(&self.normalized(frame), state)?;
        Ok(self.rescaled(self.head.forward(&Team::alone(), hidden.view()).into_array()))
    }

    /// z `[b, l, outputs]` of every frame, or `[b, 1, outputs]` of the last ones.
    pub(crate) fn run(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>, frame_wise: bool) -> Result<Array3<f32>> {
        let keeps = if frame_wise { Keeps::Outputs } else { Keeps::Last };
        // of a row or a frame: the normalised frames, and what the head makes of it
        let (_, l, embed_dim) = x.dim();
        let normalized = if frame_wise { embed_dim } else { embed_dim.saturating_mul(l) };
        let more = normalized.saturating_add(2 * self.task.outputs());
        self.encoder.check_batch(x, if frame_wise { None } else { lengths }, keeps, more)?;
        let x = self.normalized(x);
        let hidden = match (frame_wise, lengths) {
            (true, _) => self.encoder.forward_sequence(&x)?,
            (_, Some(lengths)) => self.encoder.forward_ragged(&x, lengths)?.insert_axis(Axis(1)),
            (_, None) => self.encoder.forward(&x)?.insert_axis(Axis(1)),
        };
        Ok(self.apply_head(hidden).0)
    }

    /// hidden `[b, l, h]` → z `[b, l, outputs]`, and the rows that the head has read.
    fn apply_head(&self, hidden: Array3<f32>) -> (Array3<f32>, Array2<f32>) {
        let batch = hidden.dim().0;
        let hidden = rows(hidden);
        (sequences(self.head.forward(&Team::alone(), hidden.view()).into_array(), batch), hidden)
    }

    /// What the encoder sees of x. A width that is not the encoder's is left for the encoder to refuse.
    fn normalized<'a, D: Dimension>(&self, x: &'a ArrayRef<f32, D>) -> CowArray<'a, f32, D> {
        let Some(input) = &self.input else { return x.view().into() };
        let mut x = x.to_owned();
        input.apply(&mut x);
        x.into()
    }

    /// z in the units of the targets.
    fn rescaled<D: Dimension>(&self, mut z: Array<f32, D>) -> Array<f32, D> {
        if let Some(output) = &self.output {
            output.undo(&mut z);
        }
        z
    }

    /// What to predict.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The encoder.
    pub fn encoder(&self) -> &Hymba {
        &self.encoder
    }

    /// The encoder without the head.
    pub fn into_encoder(self) -> Hymba {
        self.encoder
    }

    /// The options of the encoder.
    pub fn options(&self) -> &HymbaOptions {
        self.encoder.options()
    }

    /// How the features of a frame are normalized, if they are.
    pub fn input_normalization(&self) -> Option<&Normalization> {
        self.input.as_ref()
    }

    /// How numbers are predicted in the units of their targets, if they are.
    pub fn output_normalization(&self) -> Option<&Normalization> {
        self.output.as_ref()
    }

    /// Sets the normalization of every frame before the encoder. It is saved with the model, but is no parameter: training
    /// leaves it as it is. States made before can no longer be used.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless it is for `embed_dim` features.
    pub fn set_input_normalization(&mut self, normalization: Option<Normalization>) -> Result<()> {
        check_width(normalization.as_ref(), "embed_dim", self.options().embed_dim)?;
        self.input = normalization;
        self.salt_encoder();
        Ok(())
    }

    /// Ties states to what happens to frames before the encoder.
    fn salt_encoder(&mut self) {
        let salt = self.input.as_ref().map_or(0, |input| of_numbers(input.mean().iter().chain(input.scale())));
        self.encoder.set_salt(salt);
    }

    /// Sets the mean and scale of the targets of a regression, so that the head predicts numbers of mean 0 and scale 1.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless it is for as many numbers as the task has outputs; [`Error::Option`] in a classification.
    pub fn set_output_normalization(&mut self, normalization: Option<Normalization>) -> Result<()> {
        check_width(normalization.as_ref(), "outputs", self.task.outputs())?;
        if self.task.is_classification() && normalization.is_some() {
            return Err(Error::Option {
                option: "output_normalization",
                given: "one for a classification".into(),
                allowed: "it is for regressions; logits have no unit".into(),
            });
        }
        self.output = normalization;
        Ok(())
    }

    /// The number of parameters.
    pub fn num_parameters(&self) -> usize {
        parameters(self.options(), &self.task).expect("options and task of a predictor are valid")
    }

    /// Bytes of memory that the parameters take: see [`Hymba::num_bytes`].
    pub fn num_bytes(&self) -> usize {
        let mut bytes = 0;
        self.visit_parameters(&mut |_, parameter| bytes += parameter.num_bytes());
        bytes
    }

    /// Stores the large matrices of the encoder in this type, for inference: see [`Hymba::store_as`]. The head stays f32.
    ///
    /// # Errors
    ///
    /// As [`Hymba::store_as`].
    ///
    /// ```
    /// use hymba::{HymbaOptions, Predictor, Storage, Task};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(64).num_layers(1);
    /// let mut predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// predictor.store_as(Storage::Q8)?;
    /// assert_eq!(Predictor::from_bytes(&predictor.to_bytes()?)?.encoder().storage(), Some(Storage::Q8));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn store_as(&mut self, storage: Storage) -> Result<()> {
        self.encoder.store_as(storage)
    }

    /// Makes it a predictor that can be trained: see [`Hymba::make_trainable`].
    ///
    /// # Errors
    ///
    /// As [`Hymba::make_trainable`].
    pub fn make_trainable(&mut self) -> Result<()> {
        self.encoder.make_trainable()
    }

    /// The encoder's table, and what the head adds to it.
    pub fn summary(&self) -> String {
        let (h, outputs) = (self.options().hidden_size, self.task.outputs());
        let what = if self.task.is_classification() { "classes" } else { "numbers" };
        let when = if self.task.is_frame_wise() { "every frame" } else { "the last frame" };
        format!(
            "{}head: {outputs} {what} from {when}, weight [{outputs}, {h}] and bias [{outputs}]; {} parameters in all\n",
            self.encoder.summary(),
            self.num_parameters()
        )
    }

    /// Calls `f` with the name and the values of every parameter: those of the encoder, then `head.weight` and `head.bias`.
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.encoder.visit(f);
        self.head.visit("head", &mut |name, parameter| {
            if let Parameter::Array(array) = parameter {
                f(name, array);
            }
        });
    }

    /// As [`visit`](Self::visit), with every parameter as what it is stored in: see [`Hymba::visit_parameters`].
    pub fn visit_parameters<'a>(&'a self, f: &mut dyn FnMut(&str, Parameter<'a>)) {
        self.encoder.visit_parameters(f);
        self.head.visit("head", f);
    }

    /// As [`visit`](Self::visit), for changing the parameters. States made before can no longer be used.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.encoder.visit_mut(f);
        self.head.visit_mut("head", &mut |name, parameter| {
            if let ParameterMut::Array(array) = parameter {
                f(name, array);
            }
        });
    }

    /// A predictor of the same task and options whose parameters are all zero: where gradients are gathered.
    pub fn zeros_like(&self) -> Predictor {
        let (encoder, head) = (self.encoder.zeros_like(), self.head.zeros_like());
        Predictor { task: self.task.clone(), encoder, head, input: None, output: None }
    }
}

impl Parameters for Predictor {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.visit(f);
    }

    fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.visit_mut(f);
    }

    fn zeros_like(&self) -> Self {
        self.zeros_like()
    }

    fn check_trainable(&self) -> Result<()> {
        self.encoder.check_trainable()
    }
}

impl fmt::Debug for Predictor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Predictor");
        f.field("task", &self.task)
            .field("options", self.options())
            .field("parameters", &self.num_parameters())
            .finish()
    }
}

/// Checks the task, and that encoder and head together are not too large.
fn check(options: &HymbaOptions, task: &Task) -> Result<()> {
    task.validate()?;
    match parameters(options, task) {
        Some(count) if count <= HymbaOptions::MAX_PARAMETERS => Ok(()),
        _ => Err(Error::Option {
            option: "outputs",
            given: task.outputs().to_string(),
            allowed: format!(
                "with hidden_size {} the model has more than {} parameters; make one of them smaller",
                options.hidden_size,
                HymbaOptions::MAX_PARAMETERS
            ),
        }),
    }
}

/// The number of parameters, or `None` where it cannot be counted.
fn parameters(options: &HymbaOptions, task: &Task) -> Option<usize> {
    options.parameters()?.checked_add(options.hidden_size.checked_add(1)?.checked_mul(task.outputs())?)
}

fn check_width(normalization: Option<&Normalization>, name: &str, width: usize) -> Result<()> {
    match normalization {
        Some(normalization) if normalization.mean().len() != width => Err(Error::Shape {
            argument: "normalization",
            expected: format!("[{name}] with {name} = {width}"),
            given: normalization.mean().shape().to_vec(),
        }),
        _ => Ok(()),
    }
}

/// `[b, l, h]` → `[b·l, h]`
fn rows(x: Array3<f32>) -> Array2<f32> {
    let (batch, l, h) = x.dim();
    let x = if x.is_standard_layout() { x } else { x.as_standard_layout().into_owned() };
    x.into_shape_with_order((batch * l, h)).expect("the same numbers")
}
