//! The predictor in training: forward and backward pass.

use std::ops::Range;

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, ArrayView3, Axis, s};

use super::enter::FrontCache;
use super::front::reversed;
use super::reader::{Reader, ReaderCache, full};
use super::{Differences, Predictor, PredictorOptions, REVERSE, beside, rows};
use crate::encoder::{Keeps, sequences};
use crate::kernels::team::Team;
use crate::{Error, HymbaOptions, Result};

/// The intermediate results of a forward pass that [`Predictor::backward`] needs.
#[derive(Debug)]
pub struct PredictorCache {
    front: FrontCache,
    reader: ReaderCache,
    reverse: Option<ReaderCache>,
    /// Of what the encoder has read.
    tokens: Option<Vec<usize>>,
    /// Input of the head, `[rows, p]`.
    pooled: Array2<f32>,
    /// `[b, l, c]`, of which l is 1 where only last frames were asked for.
    outputs: (usize, usize, usize),
    /// The frames of each sequence that have an output, if not all have.
    lengths: Option<Vec<usize>>,
}

impl PredictorCache {
    /// Checks that dy has the shape of the outputs.
    fn check(&self, dy: ArrayView3<f32>) -> Result<()> {
        if dy.dim() == self.outputs {
            return Ok(());
        }
        Err(Error::Shape {
            argument: "dy",
            expected: format!("{:?}, the shape of the outputs", self.outputs),
            given: dy.shape().to_vec(),
        })
    }
}

impl Predictor {
    /// As [`predict`](Self::predict), for training: with dropout, drawn from `seed`, and with what
    /// [`backward`](Self::backward) needs.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_train`](crate::Hymba::forward_train).
    ///
    /// ```
    /// use hymba::ndarray::Array3;
    /// use hymba::train::{AdamW, AdamWOptions, CrossEntropy, Parameters};
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let options = HymbaOptions::recommended(6).hidden_size(16).num_layers(1);
    /// let mut predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// let mut grads = predictor.zeros_like();
    /// let mut optimizer = AdamW::new(&predictor, AdamWOptions::default())?;
    /// let (x, labels) = (Array3::ones((2, 50, 6)), [1, 1]);
    /// for seed in 0..3 {
    ///     let (logits, cache) = predictor.forward_train(&x, None, seed)?;
    ///     let loss = CrossEntropy::new().evaluate(&logits, &labels)?;
    ///     predictor.backward(&cache, &loss.gradient, &mut grads)?;
    ///     optimizer.step(&mut predictor, &mut grads)?;
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array2<f32>, PredictorCache)> {
        let (z, cache) = self.run_train(x, lengths, seed, false)?;
        Ok((self.rescaled(z).index_axis_move(Axis(1), 0), cache))
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, outputs]` → that with respect to the inputs,
    /// `[b, l, embed_dim]`. **Adds** the gradients of the parameters to `grads`, which [`zeros_like`](Self::zeros_like) makes.
    ///
    /// # Errors
    ///
    /// As [`Hymba::backward`](crate::Hymba::backward).
    pub fn backward(&self, cache: &PredictorCache, dy: &ArrayRef2<f32>, grads: &mut Predictor) -> Result<Array3<f32>> {
        self.run_backward(cache, self.rescaled_backward(cache, dy.view().insert_axis(Axis(1)))?, grads)
    }

    /// As [`predict_frames`](Self::predict_frames), for training. Positions past a sequence's length are
    /// unspecified.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_sequence_train`](crate::Hymba::forward_sequence_train); [`Error::Option`] if an option other than
    /// `encoder` is set, see [`PredictorOptions`].
    pub fn forward_frames_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array3<f32>, PredictorCache)> {
        let (z, cache) = self.run_train(x, lengths, seed, true)?;
        Ok((self.rescaled(z), cache))
    }

    /// The gradient of [`forward_frames_train`](Self::forward_frames_train): dy `[b, l, outputs]` → `[b, l, embed_dim]`;
    /// otherwise as [`backward`](Self::backward). Positions past a sequence's length are ignored.
    ///
    /// # Errors
    ///
    /// As [`Hymba::backward_sequence`](crate::Hymba::backward_sequence).
    pub fn backward_frames(
        &self,
        cache: &PredictorCache,
        dy: &ArrayRef3<f32>,
        grads: &mut Predictor,
    ) -> Result<Array3<f32>> {
        self.run_backward(cache, self.rescaled_backward(cache, dy.view())?, grads)
    }

    /// Which features of which frames a prediction rests on: gradient × input of one output, for one sequence x `[l, embed_dim]` →
    /// `[l, embed_dim]`. A number above 0 raised the output, one below 0 lowered it. To first order, their sum is the output less that
    /// of frames at the mean of the input normalization (at 0 without one, and where series are normalized by themselves or only
    /// differences are read).
    ///
    /// # Errors
    ///
    /// As [`predict`](Self::predict); [`Error::Option`] if there is no such output, or if the encoder is stored for inference only and
    /// no adapter is active.
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, Task};
    ///
    /// let options = PredictorOptions::new(HymbaOptions::new(2).hidden_size(16).num_layers(1)).pooling(Pooling::Mean);
    /// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// let x = Array2::from_shape_fn((50, 2), |(t, i)| (0.3 * (t + i) as f32).sin());
    /// assert_eq!(predictor.saliency(&x, 1)?.dim(), (50, 2)); // for "standing"
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn saliency(&self, x: &ArrayRef2<f32>, output: usize) -> Result<Array2<f32>> {
        let outputs = self.task.outputs();
        if output >= outputs {
            let allowed = format!("there are {outputs} outputs: 0 to {}", outputs - 1);
            return Err(Error::Option { option: "output", given: output.to_string(), allowed });
        }
        let mut plain = self.clone();
        if plain.lora().is_none() {
            plain.remove_lora();
        }
        plain.reader = plain.reader.without_dropout();
        plain.reverse = plain.reverse.map(Reader::without_dropout);
        let (_, cache) = plain.forward_train(&x.view().insert_axis(Axis(0)), None, 0)?;
        let mut dy = Array2::zeros((1, outputs));
        dy[[0, output]] = 1.0;
        let dx = plain.backward(&cache, &dy, &mut plain.zeros_like())?.index_axis_move(Axis(0), 0);
        let mut input = x.to_owned();
        let of_frames = !self.options.normalize_series && self.options.differences != Differences::Only;
        if let Some(normalization) = self.input.as_ref().filter(|_| of_frames) {
            input -= &normalization.mean().slice(s![..x.ncols()]);
        }
        Ok(dx * input)
    }

    /// As [`run`](Self::run), for training.
    pub(crate) fn run_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
        frame_wise: bool,
    ) -> Result<(Array3<f32>, PredictorCache)> {
        if frame_wise {
            self.options.check_frame_wise()?;
        }
        let batch = x.dim().0;
        let (x, tokens, front) = self.enter(x, lengths, Keeps::Cache)?;
        let (mut pooled, reader) = self.reader.read_train(&x, tokens.as_deref(), seed, frame_wise)?;
        let mut reverse = None;
        if let Some(other) = &self.reverse {
            let tokens = full(&x, tokens.as_deref());
            let (more, cache) = other.read_train(&reversed(&x, &tokens), Some(&tokens), seed ^ REVERSE, false)?;
            pooled = beside(&pooled, &more);
            reverse = Some(cache);
        }
        let lengths = lengths.filter(|_| frame_wise).map(<[usize]>::to_vec);
        let z = sequences(self.head.forward(&Team::alone(), pooled.view()).into_array(), batch);
        let cache = PredictorCache { front, reader, reverse, tokens, pooled, outputs: z.dim(), lengths };
        Ok((z, cache))
    }

    /// The backward pass of [`run_train`](Self::run_train).
    pub(crate) fn run_backward(
        &self,
        cache: &PredictorCache,
        mut dz: Array3<f32>,
        grads: &mut Predictor,
    ) -> Result<Array3<f32>> {
        cache.check(dz.view())?;
        let shape = |of: &Predictor| {
            let encoder = HymbaOptions { dropout: 0.0, seed: 0, ..of.options.encoder.clone() };
            (PredictorOptions { encoder, ..of.options.clone() }, of.task.outputs())
        };
        if shape(grads) != shape(self)
            || cache.outputs.2 != self.task.outputs()
            || cache.pooled.ncols() != self.options.head_inputs()
            || cache.reverse.is_some() != self.reverse.is_some()
        {
            let advice = "grads or the cache is of a predictor of another size; make grads with zeros_like";
            return Err(Error::State(advice.into()));
        }
        for (row, &length) in cache.lengths.iter().flatten().enumerate() {
            dz.slice_mut(s![row, length.., ..]).fill(0.0);
        }
        let dz = rows(dz);
        // kept only if the encoder takes its part, too
        let mut dhead = grads.head.clone();
        let dpooled = self.head.backward(&Team::alone(), cache.pooled.view(), dz.view(), &mut dhead);
        let width = self.reader.pool.width();
        let part = |range: Range<usize>| dpooled.slice(s![.., range]).as_standard_layout().into_owned();
        let mut dx = self.reader.backward(&cache.reader, part(0..width).view(), &mut grads.reader)?;
        if let (Some(reverse), Some(of_reverse), Some(grad)) = (&self.reverse, &cache.reverse, &mut grads.reverse) {
            let other = reverse.backward(of_reverse, part(width..2 * width).view(), grad)?;
            let tokens = full(&dx, cache.tokens.as_deref());
            dx += &reversed(&other, &tokens);
        }
        grads.head = dhead;
        Ok(self.enter_backward(&cache.front, dx, cache.tokens.as_deref(), grads))
    }

    fn rescaled_backward(&self, cache: &PredictorCache, dy: ArrayView3<f32>) -> Result<Array3<f32>> {
        // a view of any size is only copied if it has the size of the outputs
        cache.check(dy)?;
        let mut dy = dy.to_owned();
        if let Some(output) = &self.output {
            output.undo_backward(&mut dy);
        }
        Ok(dy)
    }
}
