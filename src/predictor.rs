//! From sequences to classes and numbers: an encoder with a linear head.

use std::fmt;

use ndarray::{
    Array, Array2, Array3, ArrayRef, ArrayRef3, ArrayViewD, ArrayViewMutD, Axis, CowArray, Dimension, Ix2, Ix3, s,
};
use rand::{RngExt, SeedableRng};

use crate::encoder::{Keeps, check_lengths, fits, frames, of_numbers, padded, sequences};
use crate::kernels::team::{Team, with_team, work};
use crate::layers::{Linear, Rng, Spans, StemCache, StridedConv};
use crate::parameters::{Parameter, ParameterMut};
use crate::train::Parameters;
use crate::{Error, Hymba, HymbaOptions, Inspection, Pooling, Result};

mod ensemble;
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

use front::{FormCache, reversed};
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
/// from the end, pooling. Every call is there for every task: a classifier of sequences also has an opinion at every frame. The task says how many
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
        let mut predictor = Predictor::zeros(options, task);
        predictor.reader.encoder = encoder;
        predictor.head.init(&mut stream(1));
        predictor.reader.pool.init(&mut stream(2));
        predictor.stem.iter_mut().for_each(|stem| stem.init(&mut stream(3)));
        predictor.reverse.iter_mut().for_each(|reverse| reverse.pool.init(&mut stream(4)));
        predictor
    }

    /// A predictor of validated options and task whose parameters are all zero.
    fn zeros(options: PredictorOptions, task: Task) -> Self {
        let head = Linear::zeros(options.head_inputs(), task.outputs(), true);
        let reader = || Reader::zeros(options.reader(), options.pooling);
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

    /// Checks x `[b, l, embed_dim]` and its lengths, and turns frames into what the encoder reads, with the lengths of that.
    fn enter<'a>(&self, x: &'a ArrayRef3<f32>, lengths: Option<&[usize]>, keeps: Keeps) -> Result<Entered<'a>> {
        let (_, l, embed_dim) = x.dim();
        let outputs = 2 * self.task.outputs();
        let form = self.options.form();
        if self.stem.is_none() && form.is_plain() {
            // of a row or a frame: the normalised frames, and what the head makes of it
            let normalized = if keeps == Keeps::Last { embed_dim.saturating_mul(l) } else { embed_dim };
            let more = normalized.saturating_add(outputs).saturating_add(self.options.head_inputs());
            self.reader.encoder.check_batch(x, lengths, keeps, more)?;
            let lengths = lengths.map(<[usize]>::to_vec);
            return Ok((self.normalized(x), lengths, FrontCache::default()));
        }
        check_frames(x, lengths, self.options.encoder.embed_dim, &self.options)?;
        let lengths = full(x, lengths);
        let (x, form) = match form.is_plain() {
            true => (x.to_owned(), None),
            false => {
                let (x, cache) = form.apply(x, &lengths);
                (x, Some(cache))
            }
        };
        let mut x = CowArray::from(x);
        if let Some(input) = &self.input {
            input.apply(&mut x);
        }
        let (mut tokens, mut of_stem) = (lengths.clone(), None);
        if let Some(stem) = &self.stem {
            let (spans, rows) = (Spans::new(lengths.iter().copied()), frames(&x, &lengths));
            let after = stem.token_spans(&spans);
            let (y, cache) = with_team(work([after.rows(), self.options.token_numbers(), 32]), |team| match keeps {
                Keeps::Cache => {
                    let (y, cache) = stem.forward_train(team, &spans, rows);
                    (y, Some(cache))
                }
                _ => (stem.forward(team, &spans, rows.view()), None),
            });
            tokens = after.iter().map(|span| span.len()).collect();
            let longest = tokens.iter().copied().max().unwrap_or(0);
            x = CowArray::from(padded(&y, &after, longest));
            of_stem = cache;
        }
        self.reader.encoder.check_batch(
            &x,
            Some(&tokens),
            keeps,
            outputs.saturating_add(self.options.head_inputs()),
        )?;
        let cache = FrontCache { form, stem: of_stem, frames: Some((lengths, l)) };
        Ok((x, Some(tokens), cache))
    }

    /// The gradient of [`enter`](Self::enter): dx of what the encoder reads → that of the frames.
    fn enter_backward(
        &self,
        cache: &FrontCache,
        mut dx: Array3<f32>,
        tokens: Option<&[usize]>,
        grads: &mut Predictor,
    ) -> Array3<f32> {
        if let (Some(stem), Some(of_stem), Some(grad), Some((lengths, l)), Some(tokens)) =
            (&self.stem, &cache.stem, &mut grads.stem, &cache.frames, tokens)
        {
            let (spans, dy) = (Spans::new(lengths.iter().copied()), frames(&dx, tokens));
            let work = work([dy.nrows(), self.options.token_numbers(), 64]);
            let dframes = with_team(work, |team| stem.backward(team, &spans, of_stem, dy, grad));
            dx = padded(&dframes, &spans, *l);
        }
        if let Some(input) = &self.input {
            input.apply_backward(&mut dx);
        }
        match (&cache.form, &cache.frames) {
            (Some(form), Some((lengths, _))) => {
                self.options.form().backward(form, dx, lengths, self.options.encoder.embed_dim)
            }
            _ => dx,
        }
    }

    /// A series in the form that an input normalization is fitted to: `[l, embed_dim]` → `[l, features]`.
    pub(crate) fn formed<'a>(&self, x: &'a Array2<f32>) -> CowArray<'a, f32, Ix2> {
        let form = self.options.form();
        if form.is_plain() {
            return x.view().into();
        }
        form.apply(&x.view().insert_axis(Axis(0)), &[x.nrows()]).0.index_axis_move(Axis(0), 0).into()
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

    /// What every block of the encoder does to x `[b, l, embed_dim]`: [`Hymba::inspect`] of what it reads of these frames, normalized and,
    /// behind a stem, as tokens. Of both directions, that from the beginning.
    ///
    /// # Errors
    ///
    /// As [`Hymba::inspect`].
    pub fn inspect(&self, x: &ArrayRef3<f32>) -> Result<Inspection> {
        let (x, ..) = self.enter(x, None, Keeps::Inspection)?;
        self.reader.encoder.inspect(&x)
    }

    /// What to predict.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The encoder, of a bidirectional predictor that which reads from the beginning.
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
    /// [`Error::Shape`] unless it is for as many features as frames have in their form: `embed_dim`, unless
    /// [`PredictorOptions::features`] are more.
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
        let mut count = 0;
        self.visit(&mut |_, parameter| count += parameter.len());
        count
    }

    /// The encoder's table, and what the head adds to it.
    pub fn summary(&self) -> String {
        let (h, outputs) = (self.options.head_inputs(), self.task.outputs());
        let what = if self.task.is_classification() { "classes" } else { "numbers" };
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
    /// `head.weight` and `head.bias`.
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        let mut arrays = |name: &str, parameter| {
            if let Parameter::Array(array) = parameter {
                f(name, array);
            }
        };
        self.reader.visit("", &mut arrays);
        self.reverse.iter().for_each(|reverse| reverse.visit("reverse", &mut arrays));
        self.stem.iter().for_each(|stem| stem.visit("stem", &mut arrays));
        self.head.visit("head", &mut arrays);
    }

    /// As [`visit`](Self::visit), for changing the parameters. States made before can no longer be used.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        let mut arrays = |name: &str, parameter| {
            if let ParameterMut::Array(array) = parameter {
                f(name, array);
            }
        };
        self.reader.visit_mut("", &mut arrays);
        self.reverse.iter_mut().for_each(|reverse| reverse.visit_mut("reverse", &mut arrays));
        self.stem.iter_mut().for_each(|stem| stem.visit_mut("stem", &mut arrays));
        self.head.visit_mut("head", &mut arrays);
    }

    /// A predictor of the same task and options whose parameters are all zero: where gradients are gathered.
    pub fn zeros_like(&self) -> Predictor {
        Predictor::zeros(self.options.clone(), self.task.clone())
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

/// What the reverse encoder's seed is told apart by.
const REVERSE: u64 = 0x7265_7665_7273_6564;

/// What the encoder reads `[b, l, …]`, the lengths of its rows, and what the backward pass reads.
type Entered<'a> = (CowArray<'a, f32, Ix3>, Option<Vec<usize>>, FrontCache);

/// What [`Predictor::enter_backward`] reads; nothing where the encoder reads frames as they are.
#[derive(Debug, Default)]
struct FrontCache {
    form: Option<FormCache>,
    stem: Option<StemCache>,
    /// The lengths of the sequences, and of padded rows.
    frames: Option<(Vec<usize>, usize)>,
}

/// Checks frames and their lengths in front of a stem or a change of form, and that they fit into memory there.
fn check_frames(
    x: &ArrayRef3<f32>,
    lengths: Option<&[usize]>,
    embed_dim: usize,
    options: &PredictorOptions,
) -> Result<()> {
    let (batch, l, width) = x.dim();
    let wrong = |expected: String| Err(Error::Shape { argument: "x", expected, given: x.shape().to_vec() });
    if batch == 0 || l == 0 || width != embed_dim {
        return wrong(format!("[b, l, embed_dim] with b ≥ 1, l ≥ 1 and embed_dim = {embed_dim}"));
    }
    if let Some(lengths) = lengths {
        check_lengths(lengths, batch, l)?;
    }
    let tokens = options.stem.as_ref().map_or(0, |stem| work([batch, stem.tokens(l)]));
    let form = work([batch, l, options.features().saturating_mul(4)]);
    let bytes = form.saturating_add(work([tokens, options.token_numbers()])).saturating_mul(size_of::<f32>());
    match fits(bytes) {
        true => Ok(()),
        false => wrong(format!("a smaller batch or shorter sequences: this takes about {} MB of memory", bytes >> 20)),
    }
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
