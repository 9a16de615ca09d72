//! The predictor in training: forward and backward pass.

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, ArrayView3, Axis, s};

use super::{Predictor, rows};
use crate::encoder::{Keeps, frames, padded, sequences};
use crate::kernels::team::Team;
use crate::layers::{PoolCache, Spans};
use crate::{Error, Pooling, Result, TrainCache};

/// What [`Predictor::backward`] reads of a forward pass.
#[derive(Debug)]
pub struct PredictorCache {
    encoder: TrainCache,
    /// Where frames are pooled: the lengths of the sequences, padded to l frames, and what pooling keeps.
    pooling: Option<(Spans, usize, PoolCache)>,
    /// Input of the head, `[rows, p]`.
    pooled: Array2<f32>,
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
        let pools = self.options.pooling != Pooling::Last;
        if frame_wise && pools {
            return Err(Error::Option {
                option: "pooling",
                given: format!("{:?} where every frame is trained", self.options.pooling),
                allowed: "each frame is judged by itself: Pooling::Last".into(),
            });
        }
        let more = self.options().embed_dim + 2 * self.task.outputs() + self.options.head_inputs();
        self.encoder.check_batch(x, lengths, Keeps::Cache, more)?;
        let (batch, l, _) = x.dim();
        let x = self.normalized(x);
        let mut pooling = None;
        let (pooled, encoder) = if pools {
            let (hidden, encoder) = self.encoder.forward_sequence_train(&x, lengths, seed)?;
            let lengths = lengths.map_or_else(|| vec![l; batch], <[usize]>::to_vec);
            let (hidden, spans) = (frames(&hidden, &lengths), Spans::new(lengths));
            let (pooled, cache) = self.pool.forward_train(&spans, hidden);
            pooling = Some((spans, l, cache));
            (pooled, encoder)
        } else if frame_wise {
            let (hidden, encoder) = self.encoder.forward_sequence_train(&x, lengths, seed)?;
            (rows(hidden), encoder)
        } else {
            self.encoder.forward_train(&x, lengths, seed)?
        };
        let lengths = lengths.filter(|_| frame_wise).map(<[usize]>::to_vec);
        let z = sequences(self.head.forward(&Team::alone(), pooled.view()).into_array(), batch);
        let cache = PredictorCache { encoder, pooling, pooled, outputs: z.dim(), lengths, frame_wise };
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
        let sizes = |of: &Predictor| (of.options.encoder.hidden_size, of.options.pooling, of.task.outputs());
        let inputs = cache.pooled.ncols();
        if sizes(grads) != sizes(self)
            || cache.outputs.2 != self.task.outputs()
            || inputs != self.options.head_inputs()
            || cache.pooling.is_some() != (self.options.pooling != Pooling::Last)
        {
            let advice = "grads or the cache is of a predictor of another size; make grads with zeros_like";
            return Err(Error::State(advice.into()));
        }
        for (row, &length) in cache.lengths.iter().flatten().enumerate() {
            dz.slice_mut(s![row, length.., ..]).fill(0.0);
        }
        let dz = rows(dz);
        // kept only if the encoder takes its part, too
        let (mut dhead, mut dpool) = (grads.head.clone(), grads.pool.clone());
        let dpooled = self.head.backward(&Team::alone(), cache.pooled.view(), dz.view(), &mut dhead);
        let mut dx = match &cache.pooling {
            Some((spans, l, pooling)) => {
                let dhidden = self.pool.backward(spans, pooling, dpooled.view(), &mut dpool);
                let dhidden = padded(&dhidden, spans, *l);
                self.encoder.backward_sequence(&cache.encoder, &dhidden, &mut grads.encoder)?
            }
            None if cache.frame_wise => {
                let dhidden = sequences(dpooled.into_array(), cache.outputs.0);
                self.encoder.backward_sequence(&cache.encoder, &dhidden, &mut grads.encoder)?
            }
            None => self.encoder.backward(&cache.encoder, &dpooled, &mut grads.encoder)?,
        };
        (grads.head, grads.pool) = (dhead, dpool);
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
