//! The predictor in training: forward and backward pass.

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, ArrayView3, Axis, s};

use super::{Predictor, rows};
use crate::encoder::{Keeps, sequences};
use crate::kernels::team::Team;
use crate::{Error, Result, TrainCache};

/// What [`Predictor::backward`] reads of a forward pass.
#[derive(Debug)]
pub struct PredictorCache {
    encoder: TrainCache,
    /// Input of the head, `[rows, h]`.
    hidden: Array2<f32>,
    /// `[b, l, c]`, of which l is 1 where only last frames were asked for.
    outputs: (usize, usize, usize),
    /// The frames of each sequence that have an output, if not all have.
    lengths: Option<Vec<usize>>,
    frame_wise: bool,
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
    /// [`backward`](Self::backward) reads.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_train`](crate::Hymba::forward_train): [`Error::Option`] if the encoder is stored for inference, too.
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

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, outputs]` → that by the inputs, `[b, l, embed_dim]`.
    /// **Adds** the gradients by the parameters to `grads`, which [`zeros_like`](Self::zeros_like) makes.
    ///
    /// # Errors
    ///
    /// As [`Hymba::backward`](crate::Hymba::backward).
    pub fn backward(&self, cache: &PredictorCache, dy: &ArrayRef2<f32>, grads: &mut Predictor) -> Result<Array3<f32>> {
        self.run_backward(cache, self.rescaled_backward(cache, dy.view().insert_axis(Axis(1)))?, grads)
    }

    /// As [`predict_frames`](Self::predict_frames), for training. Positions past a sequence's length hold nothing of
    /// meaning.
    ///
    /// # Errors
    ///
    /// As [`Hymba::forward_sequence_train`](crate::Hymba::forward_sequence_train).
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
    /// otherwise as [`backward`](Self::backward). Positions past a sequence's length are taken for zero.
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

    /// As [`run`](Self::run), for training.
    pub(crate) fn run_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
        frame_wise: bool,
    ) -> Result<(Array3<f32>, PredictorCache)> {
        let more = self.options().embed_dim + 2 * self.task.outputs();
        self.encoder.check_batch(x, lengths, Keeps::Cache, more)?;
        let x = self.normalized(x);
        let (hidden, encoder) = if frame_wise {
            self.encoder.forward_sequence_train(&x, lengths, seed)?
        } else {
            let (last, cache) = self.encoder.forward_train(&x, lengths, seed)?;
            (last.insert_axis(Axis(1)), cache)
        };
        let lengths = lengths.filter(|_| frame_wise).map(<[usize]>::to_vec);
        let (z, hidden) = self.apply_head(hidden);
        let cache = PredictorCache { encoder, hidden, outputs: z.dim(), lengths, frame_wise };
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
        let sizes = |of: &Predictor| (of.encoder.options().hidden_size, of.task.outputs());
        if sizes(grads) != sizes(self) || cache.outputs.2 != self.task.outputs() {
            let advice = "grads or the cache is of a predictor of another size; make grads with zeros_like";
            return Err(Error::State(advice.into()));
        }
        for (row, &length) in cache.lengths.iter().flatten().enumerate() {
            dz.slice_mut(s![row, length.., ..]).fill(0.0);
        }
        let dz = rows(dz);
        // kept only if the encoder takes its part, too
        let mut dhead = grads.head.clone();
        let dhidden = self.head.backward(&Team::alone(), cache.hidden.view(), dz.view(), &mut dhead);
        let mut dx = if cache.frame_wise {
            let batch = cache.outputs.0;
            self.encoder.backward_sequence(
                &cache.encoder,
                &sequences(dhidden.into_array(), batch),
                &mut grads.encoder,
            )?
        } else {
            self.encoder.backward(&cache.encoder, &dhidden, &mut grads.encoder)?
        };
        grads.head = dhead;
        if let Some(input) = &self.input {
            input.apply_backward(&mut dx);
        }
        Ok(dx)
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
