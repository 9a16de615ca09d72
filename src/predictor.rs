//! From sequences to classes and numbers: an encoder with a linear head.

use std::fmt;

use ndarray::{Array, Array2, Array3, ArrayRef3, ArrayViewD, ArrayViewMutD, Axis, Dimension, s};
use rand::{RngExt, SeedableRng};

use crate::encoder::{Keeps, of_numbers, sequences};
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{Linear, Rng, StridedConv};
use crate::lora::Adapted;
use crate::parameters::{Parameter, ParameterMut};
use crate::train::Parameters;
use crate::{Error, Hymba, HymbaOptions, Inspection, Pooling, Result};

mod adapters;
mod ensemble;
mod enter;
mod features;
mod file;
mod front;
mod kernel_predictor;
mod logits;
mod normalization;
mod options;
mod reader;
mod ridge;
mod series;
mod streaming;
mod task;
mod training;

use adapters::trains_beside_adapters;
use front::reversed;
use reader::{Reader, full};

pub use ensemble::Ensemble;
pub use features::KernelFeatures;
pub use front::Differences;
pub use kernel_predictor::KernelPredictor;
pub use logits::{argmax, softmax};
pub use normalization::Normalization;
pub use options::PredictorOptions;
pub use streaming::PredictorState;
pub use task::Task;
pub use training::PredictorCache;

/// A [`Hymba`] encoder with a linear head, for one [`Task`]: classes or numbers, of whole sequences or of every frame.
///
/// ```text
/// x      = (frames − input_mean) / input_scale            [b, l, embed_dim]   where it has an input normalization
/// hidden = encoder(x)                                      [b, l, h]
/// pooled = pooling(hidden)                                 [b, p]   the last frame, or what the options say
/// z      = pooled · W_headᵀ + b_head                       [b, c] or [b, l, c]   for a classification: logits
/// y      = z · output_scale + output_mean                  where it has an output normalization
/// ```
///
/// [`PredictorOptions`] say what else is around the encoder: the form of the input, a convolutional stem, a second encoder that reads
/// from the end, pooling. Every call works for every task: a classifier of sequences also predicts at every frame (unless an option
/// other than `pooling` is set). The task says how many outputs there are, what they are called, and what
/// [`Trainer`](crate::train::Trainer) trains.
///
/// ```
/// use hymba::ndarray::Array3;
/// use hymba::{HymbaOptions, Predictor, Task, argmax};
///
/// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
/// let predictor = Predictor::build(options, Task::classify(["walking", "standing", "sitting"]))?;
/// let logits = predictor.predict(&Array3::ones((2, 50, 6)), Some(&[50, 31]))?;
/// assert_eq!(logits.dim(), (2, 3));
/// for class in argmax(&logits) {
///     println!("{}", predictor.task().labels()[class]);
/// }
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct Predictor {
    task: Task,
    options: PredictorOptions,
    stem: Option<StridedConv>,
    reader: Reader,
    /// Of frames from the last to the first.
    reverse: Option<Reader>,
    head: Linear,
    input: Option<Normalization>,
    output: Option<Normalization>,
}

impl Predictor {
    /// Builds a predictor with new random weights, as [`Hymba::build`] does, from [`PredictorOptions`], or from [`HymbaOptions`] for
    /// their defaults.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option or the task is not usable; see [`PredictorOptions`] and [`Task::validate`].
    pub fn build(options: impl Into<PredictorOptions>, task: Task) -> Result<Self> {
        let options = options.into();
        options.validate(&task)?;
        let encoder = Hymba::build(options.reader())?;
        let mut predictor = Self::around(encoder, options, task);
        if let Some(reverse) = &mut predictor.reverse {
            let options = reverse.encoder.options().clone();
            let other = Rng::seed_from_u64(options.seed ^ REVERSE).random();
            reverse.encoder = Hymba::build(HymbaOptions { seed: other, ..options })?;
        }
        Ok(predictor)
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
        let options = PredictorOptions::new(encoder.options().clone());
        options.validate(&task)?;
        Ok(Self::around(encoder, options, task))
    }

    /// New random weights around an encoder, by options that go with both.
    fn around(encoder: Hymba, options: PredictorOptions, task: Task) -> Self {
        let seed = options.encoder.seed;
        let stream = |stream: u64| {
            let mut rng = Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            rng
        };
        let mut predictor = Predictor::zeros(options, None, task);
        predictor.reader.encoder = encoder;
        predictor.head.init(&mut stream(1));
        predictor.reader.pool.init(&mut stream(2));
        predictor.stem.iter_mut().for_each(|stem| stem.init(&mut stream(3)));
        predictor.reverse.iter_mut().for_each(|reverse| reverse.pool.init(&mut stream(4)));
        predictor
    }

    /// A predictor of validated options and task whose parameters are all zero.
    fn zeros(options: PredictorOptions, storage: Option<Storage>, task: Task) -> Self {
        let head = Linear::zeros(options.head_inputs(), task.outputs(), true);
        let reader = || Reader::zeros(options.reader(), storage, options.pooling);
        Predictor {
            stem: options.stem.as_ref().map(|stem| StridedConv::zeros(stem, options.features())),
            reader: reader(),
            reverse: options.bidirectional.then(reader),
            head,
            input: None,
            output: None,
            task,
            options,
        }
    }

    /// Predicts from the whole of each sequence: x `[b, l, embed_dim]` → `[b, outputs]`; logits in a classification.
    /// With lengths, row i is a sequence of `lengths[i]` frames, and what follows them is ignored.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_ragged`].
    pub fn predict(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>) -> Result<Array2<f32>> {
        Ok(self.rescaled(self.run(x, lengths, false)?).index_axis_move(Axis(1), 0))
    }

    /// Predicts at every frame from the frames up to it, as [`predict`](Self::predict) does from all: x `[b, l, embed_dim]` →
    /// `[b, l, outputs]`.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_sequence`]; [`Error::Option`] if an option other than `encoder` and `pooling` is set, see
    /// [`PredictorOptions`].
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

    /// z `[b, l, outputs]` of every frame, or `[b, 1, outputs]` of whole sequences.
    pub(crate) fn run(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>, frame_wise: bool) -> Result<Array3<f32>> {
        let batch = x.dim().0;
        let keeps = if frame_wise || self.options.pooling != Pooling::Last { Keeps::Outputs } else { Keeps::Last };
        if frame_wise {
            self.options.check_causal()?;
        }
        let (x, lengths, _) = self.enter(x, lengths.filter(|_| !frame_wise), keeps)?;
        let pooled = match frame_wise {
            true => self.reader.read_frames(&x),
            false => {
                let pooled = self.reader.read(&x, lengths.as_deref())?;
                match &self.reverse {
                    Some(reverse) => {
                        let lengths = full(&x, lengths.as_deref());
                        let other = reverse.read(&reversed(&x, &lengths), Some(&lengths))?;
                        beside(&pooled, &other)
                    }
                    None => pooled,
                }
            }
        };
        Ok(sequences(self.head.forward(&Team::alone(), pooled.view()).into_array(), batch))
    }

    /// z in the units of the targets.
    fn rescaled<D: Dimension>(&self, mut z: Array<f32, D>) -> Array<f32, D> {
        if let Some(output) = &self.output {
            output.undo(&mut z);
        }
        z
    }

    /// [`Hymba::inspect`] of the encoder for x `[b, l, embed_dim]`, which reads the frames normalized and, with a stem, as tokens. Of a
    /// bidirectional predictor it is the encoder that reads from the beginning.
    ///
    /// # Errors
    ///
    /// As [`Hymba::inspect`].
    pub fn inspect(&self, x: &ArrayRef3<f32>) -> Result<Inspection> {
        let (x, ..) = self.enter(x, None, Keeps::Inspection)?;
        self.reader.encoder.inspect(&x)
    }

    /// The task.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The encoder; of a bidirectional predictor, the one that reads from the beginning.
    pub fn encoder(&self) -> &Hymba {
        &self.reader.encoder
    }

    /// The encoder without the head.
    pub fn into_encoder(self) -> Hymba {
        self.reader.encoder
    }

    /// The options of the encoder.
    pub fn options(&self) -> &HymbaOptions {
        &self.options.encoder
    }

    /// All options: of the encoder, and of what is around it.
    pub fn predictor_options(&self) -> &PredictorOptions {
        &self.options
    }

    /// The normalization of every frame before the encoder, if there is one.
    pub fn input_normalization(&self) -> Option<&Normalization> {
        self.input.as_ref()
    }

    /// The mean and scale of the targets of a regression, if they are set.
    pub fn output_normalization(&self) -> Option<&Normalization> {
        self.output.as_ref()
    }

    /// Sets the normalization of every frame before the encoder. It is saved with the model, but is no parameter: training
    /// leaves it as it is. States made before can no longer be used.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless it has [`PredictorOptions::features`] features: `embed_dim`, or twice that with
    /// [`Differences::Beside`].
    pub fn set_input_normalization(&mut self, normalization: Option<Normalization>) -> Result<()> {
        check_width(normalization.as_ref(), "embed_dim", self.options.features())?;
        self.input = normalization;
        self.salt_encoder();
        Ok(())
    }

    /// Ties states to what happens to frames before the encoder.
    fn salt_encoder(&mut self) {
        let salt = self.input.as_ref().map_or(0, |input| of_numbers(input.mean().iter().chain(input.scale())));
        self.reader.encoder.set_salt(salt);
        self.reverse.iter_mut().for_each(|reverse| reverse.encoder.set_salt(salt));
    }

    /// Sets the mean and scale of the targets of a regression, so that the head predicts numbers of mean 0 and scale 1.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless it is for as many numbers as the task has outputs; [`Error::Option`] in a classification.
    pub fn set_output_normalization(&mut self, normalization: Option<Normalization>) -> Result<()> {
        check_width(normalization.as_ref(), "outputs", self.task.outputs())?;
        if !self.task.is_regression() && normalization.is_some() {
            return Err(Error::Option {
                option: "output_normalization",
                given: "one for a classification".into(),
                allowed: "it is for regressions; logits have no unit".into(),
            });
        }
        self.output = normalization;
        Ok(())
    }

    /// The number of parameters, without those of adapters.
    pub fn num_parameters(&self) -> usize {
        self.options.parameters(&self.task).expect("options and task of a predictor are valid")
    }

    /// Bytes of memory that the parameters take: see [`Hymba::num_bytes`].
    pub fn num_bytes(&self) -> usize {
        let mut bytes = 0;
        self.visit_others("", &mut |_, parameter| bytes += parameter.num_bytes());
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
        self.readers_mut().try_for_each(|reader| reader.encoder.store_as(storage))
    }

    /// Makes it a predictor that can be trained: see [`Hymba::make_trainable`].
    ///
    /// # Errors
    ///
    /// As [`Hymba::make_trainable`].
    pub fn make_trainable(&mut self) -> Result<()> {
        self.readers_mut().try_for_each(|reader| reader.encoder.make_trainable())
    }

    fn readers_mut(&mut self) -> impl Iterator<Item = &mut Reader> {
        std::iter::once(&mut self.reader).chain(&mut self.reverse)
    }

    /// The encoder's table, with the stem, the second encoder and the head below it.
    pub fn summary(&self) -> String {
        let (h, outputs) = (self.options.head_inputs(), self.task.outputs());
        let what = match &self.task {
            task if task.is_regression() => "numbers",
            task if task.is_multi_label() => "labels",
            _ => "classes",
        };
        let when = match self.options.pooling {
            _ if self.task.is_frame_wise() => "every frame".into(),
            Pooling::Last => "the last frame".into(),
            Pooling::Mean => "the mean of all frames".into(),
            Pooling::Max => "the largest of each feature".into(),
            Pooling::Attention { queries } => format!("attention of {queries} queries to all frames"),
        };
        let stem = self.options.stem.as_ref().map(|stem| {
            format!(
                "stem: a token of {} features from every {} frames, widths {:?}\n",
                stem.width(),
                stem.stride,
                stem.widths
            )
        });
        let reverse = self.reverse.as_ref().map(|_| "a second encoder of this kind reads from the end\n");
        let around = format!("{}{}", stem.unwrap_or_default(), reverse.unwrap_or_default());
        format!(
            "{}{around}head: {outputs} {what} from {when}, weight [{outputs}, {h}] and bias [{outputs}]; {} parameters in all\n",
            self.reader.encoder.summary(),
            self.num_parameters()
        )
    }

    /// Calls `f` with the name and the values of every parameter: those of the encoder, `pooling.queries` where it has them,
    /// the same of the second encoder behind `reverse.`, those of the stem's convolutions as `stem.0.weight` and so on, then
    /// `head.weight` and `head.bias`. With [adapters](Self::add_lora) only the active one is visited of the encoders, as in
    /// [`Hymba::visit`].
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        let all = !self.has_lora();
        self.visit_parameters(&mut |name, parameter| match parameter {
            Parameter::Array(array) if all || trains_beside_adapters(name) => f(name, array),
            _ => {}
        });
    }

    /// As [`visit`](Self::visit), with all parameters, each in the form in which it is stored: see [`Hymba::visit_parameters`].
    pub fn visit_parameters<'a>(&'a self, f: &mut dyn FnMut(&str, Parameter<'a>)) {
        self.reader.visit("", f);
        self.reverse.iter().for_each(|reverse| reverse.visit("reverse", f));
        self.stem.iter().for_each(|stem| stem.visit("stem", f));
        self.head.visit("head", f);
    }

    /// As [`visit`](Self::visit), for changing the parameters. States made before can no longer be used.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        let all = !self.has_lora();
        self.visit_parameters_mut(&mut |name, parameter| match parameter {
            ParameterMut::Array(array) if all || trains_beside_adapters(name) => f(name, array),
            _ => {}
        });
    }

    fn visit_parameters_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ParameterMut<'a>)) {
        self.reader.visit_mut("", f);
        self.reverse.iter_mut().for_each(|reverse| reverse.visit_mut("reverse", f));
        self.stem.iter_mut().for_each(|stem| stem.visit_mut("stem", f));
        self.head.visit_mut("head", f);
    }

    /// A predictor of the same task and options whose parameters are all zero, for [`backward`](Self::backward) to add gradients to.
    pub fn zeros_like(&self) -> Predictor {
        Predictor {
            task: self.task.clone(),
            options: self.options.clone(),
            stem: self.options.stem.as_ref().map(|stem| StridedConv::zeros(stem, self.options.features())),
            reader: self.reader.zeros_like(),
            reverse: self.reverse.as_ref().map(Reader::zeros_like),
            head: self.head.zeros_like(),
            input: None,
            output: None,
        }
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
        self.reader.encoder.check_trainable()
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

/// Sets the seed of the reverse encoder apart from the other's.
const REVERSE: u64 = 0x7265_7665_7273_6564;

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

/// `[b, p]` and `[b, q]` → `[b, p + q]`
fn beside(a: &Array2<f32>, b: &Array2<f32>) -> Array2<f32> {
    let mut both = Array2::zeros((a.nrows(), a.ncols() + b.ncols()));
    both.slice_mut(s![.., ..a.ncols()]).assign(a);
    both.slice_mut(s![.., a.ncols()..]).assign(b);
    both
}

/// `[b, l, h]` → `[b·l, h]`
fn rows(x: Array3<f32>) -> Array2<f32> {
    let (batch, l, h) = x.dim();
    let x = if x.is_standard_layout() { x } else { x.as_standard_layout().into_owned() };
    x.into_shape_with_order((batch * l, h)).expect("the same numbers")
}
