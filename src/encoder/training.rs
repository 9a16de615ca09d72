//! The forward and the backward pass of a training step.

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, s};

use super::blocks::{BlockDropout, DepthCache};
use super::model::Hymba;
use super::options::HymbaOptions;
use super::size::Keeps;
use super::variant::Variant;
use crate::kernels::team::{Team, with_team};
use crate::layers::{Batch, Buffer, Dropout, Ends, SequenceState, Spans, StateGradient, row_seeds, seed_at};
use crate::{Error, Result};

/// The intermediate results of a forward pass that [`Hymba::backward`] needs: about 25·h + n·h/8 numbers per block and frame in
/// the default pattern (see [`Hymba::forward`] for others).
pub struct TrainCache {
    model: u64,
    seed: u64,
    /// Frames of a row, padding included.
    l: usize,
    lengths: Vec<usize>,
    /// `[rows, embed_dim]`, without padding.
    input: Buffer,
    /// The state that the meta tokens leave in front of the frames.
    initial: SequenceState,
    /// The meta tokens' pass through the blocks, if there are any.
    meta: Vec<DepthCache>,
    blocks: Vec<DepthCache>,
    /// Input of the final norm, `[b, h]` or `[rows, h]`.
    last: Buffer,
}

impl TrainCache {
    fn spans(&self) -> Spans {
        Spans::new(self.lengths.iter().copied())
    }
}

impl fmt::Debug for TrainCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrainCache").field("lengths", &self.lengths).field("blocks", &self.blocks.len()).finish()
    }
}

impl Hymba {
    /// As [`forward_ragged`](Self::forward_ragged), for training: with dropout at the rate of the option `dropout`, and with what
    /// [`backward`](Self::backward) needs. Without `lengths`, all l frames of every row are valid.
    ///
    /// Which numbers are dropped follows from `seed`, the row of the batch and the frame; give every batch another seed. Nothing
    /// is dropped from meta tokens: they are shared by the batch, and the state they leave is the one inference uses. Without
    /// dropout, here and in an adapter ([`LoraOptions::dropout`](crate::LoraOptions::dropout)), the outputs are those of
    /// [`forward`](Self::forward): to the bit for up to 8,192 frames, above that but for rounding.
    ///
    /// # Errors
    ///
    /// As [`forward_ragged`](Self::forward_ragged); [`Error::Option`] if the model is [stored](Self::store_as) for inference and has
    /// no adapters; [`Error::State`] if it holds [adapters](Self::add_lora) of which none is active.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array3;
    ///
    /// let model = Hymba::build(HymbaOptions::recommended(5).hidden_size(16).num_heads(2).num_layers(2))?;
    /// let x = Array3::<f32>::ones((2, 30, 5));
    /// let (y, cache) = model.forward_train(&x, Some(&[30, 7]), 1)?;
    /// let mut grads = model.zeros_like();
    /// let dx = model.backward(&cache, &y, &mut grads)?; // of Σ y²/2
    /// assert_eq!(dx.dim(), x.dim());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array2<f32>, TrainCache)> {
        let (last, mut cache) = self.run_train(x, lengths, seed, false)?;
        cache.last = last;
        Ok((self.final_norm.forward(&Team::alone(), cache.last.view()).into_array(), cache))
    }

    /// As [`forward_sequence`](Self::forward_sequence), for training: the counterpart of
    /// [`forward_train`](Self::forward_train) that returns every position, `[b, l, hidden_size]`, zero past a sequence's
    /// length.
    ///
    /// # Errors
    ///
    /// As [`forward_train`](Self::forward_train).
    pub fn forward_sequence_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array3<f32>, TrainCache)> {
        let (frames, mut cache) = self.run_train(x, lengths, seed, true)?;
        let y = self.final_norm.forward(&Team::alone(), frames.view());
        cache.last = frames;
        Ok((padded(&y, &cache.spans(), cache.l), cache))
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, hidden_size]`, the gradient of a loss with respect to the
    /// outputs → that with respect to the inputs, `[b, l, embed_dim]`. **Adds** the gradients of the parameters to `grads`, which
    /// [`zeros_like`](Self::zeros_like) makes. Frames past a sequence's length get gradients of exactly zero.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if dy does not have the shape of the outputs; [`Error::State`] if `cache` is of another model, of this one
    /// before its parameters changed, or of [`forward_sequence_train`](Self::forward_sequence_train), or if `grads` is of a
    /// model with other options or another adapter; [`Error::Option`] if `grads` is stored for inference. Nothing is added then.
    pub fn backward(&self, cache: &TrainCache, dy: &ArrayRef2<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        self.check_backward(cache, &[cache.lengths.len()], dy.shape(), grads)?;
        let dy = dy.as_standard_layout();
        let dlast = self.final_norm.backward(&Team::alone(), cache.last.view(), dy.view(), &mut grads.final_norm);
        Ok(self.run_backward(cache, dlast, grads))
    }

    /// The gradient of [`forward_sequence_train`](Self::forward_sequence_train): dy `[b, l, hidden_size]` → `[b, l, embed_dim]`;
    /// otherwise as [`backward`](Self::backward). Positions past a sequence's length are ignored.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward).
    pub fn backward_sequence(&self, cache: &TrainCache, dy: &ArrayRef3<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        let batch = cache.lengths.len();
        self.check_backward(cache, &[batch, cache.l], dy.shape(), grads)?;
        let dy = frames(dy, &cache.lengths);
        let dframes = self.final_norm.backward(&Team::alone(), cache.last.view(), dy.view(), &mut grads.final_norm);
        Ok(self.run_backward(cache, dframes, grads))
    }

    /// A model with the same options whose parameters are all zero, for [`backward`](Self::backward) to add gradients to.
    pub fn zeros_like(&self) -> Hymba {
        self.zero_gradient()
    }

    /// All blocks of a training step, up to the final norm. The whole batch goes through a layer together, so that the
    /// gradient of a matrix is one product and one sum over all frames. Of the last block's output there is `every_frame`, or the last
    /// of each sequence.
    fn run_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
        every_frame: bool,
    ) -> Result<(Buffer, TrainCache)> {
        self.check_trainable()?;
        let (batch, l) = self.check_batch(x, lengths, Keeps::Cache, 0)?;
        let lengths = lengths.map_or_else(|| vec![l; batch], <[usize]>::to_vec);
        Ok(with_team(self.work(lengths.iter().sum()), |team| {
            let input = frames(x, &lengths);
            let row_seeds = self.row_seeds(seed, &Spans::new(lengths.iter().copied()));
            let seeded = team.seeded(row_seeds.clone());
            let x = self.project(team, Buffer::copy_of(&input));
            drop(seeded);
            let (initial, meta) = self.run_meta_tokens(team);
            let _seeded = team.seeded(row_seeds);
            let mut states = vec![initial.clone(); lengths.len()];
            let sequences = states.iter_mut().zip(lengths.iter().copied());
            let mut batch = Batch::new(team, sequences, false, None);
            let only = (!every_frame).then(|| batch.spans.ends());
            let (x, blocks) = self.blocks.forward_train(&mut batch, x, only, |depth| self.dropout(seed, depth));
            let last = Buffer::empty();
            let cache = TrainCache { model: self.cached.id, seed, l, lengths, input, initial, meta, blocks, last };
            (x, cache)
        }))
    }

    /// Takes the meta tokens through the blocks. Returns the state they leave in front of the frames, and what the backward pass
    /// reads, which is nothing without tokens.
    fn run_meta_tokens(&self, team: &Team) -> (SequenceState, Vec<DepthCache>) {
        let (mut state, mut caches) = (self.empty_state(), Vec::new());
        if let Some(tokens) = &self.meta_tokens {
            let mut batch = Batch::new(team, [(&mut state, tokens.nrows())], true, None);
            let (x, only) = (Buffer::copy_of(tokens), Some(Ends::none()));
            (_, caches) = self.blocks.forward_train(&mut batch, x, only, |_| BlockDropout::NONE);
            batch.finish();
        }
        (state, caches)
    }

    /// The backward pass of [`run_train`](Self::run_train).
    fn run_backward(&self, cache: &TrainCache, dx: Buffer, grads: &mut Hymba) -> Array3<f32> {
        grads.changed();
        let spans = cache.spans();
        with_team(self.work(2 * spans.rows()), |team| {
            let row_seeds = self.row_seeds(cache.seed, &spans);
            let (empty, tokens) = (self.empty_state(), self.options.num_meta_tokens);
            // of the frames and of the meta tokens, behind the current block
            let mut dx = self.blocks.last_gradient(dx, spans.rows());
            let nothing = || Buffer::zeros((0, self.options.hidden_size));
            let mut dtokens = self.meta_tokens.as_ref().map(|x| self.blocks.last_gradient(nothing(), x.nrows()));
            for i in (0..self.blocks.len()).rev() {
                let (initial, grads) = (&cache.initial.layers[i], &mut grads.blocks);
                let mut dinitial = StateGradient::zeros(initial);
                let seeded = team.seeded(row_seeds.clone());
                dx = self.blocks.backward(team, i, &spans, &cache.blocks[i], initial, dx, None, grads, &mut dinitial);
                drop(seeded);
                dx.drop(self.dropout(cache.seed, i).before, team, &spans);
                dtokens = dtokens.map(|dy| {
                    let (meta, start, dfinal) = (Spans::new([tokens]), &empty.layers[i], Some(&dinitial));
                    let mut dnothing = StateGradient::zeros(start);
                    self.blocks.backward(team, i, &meta, &cache.meta[i], start, dy, dfinal, grads, &mut dnothing)
                });
                grads.add_own_meta(i, &dinitial);
            }
            let dx = dx.finish();
            if let (Some(grad), Some(dtokens)) = (&mut grads.meta_tokens, dtokens) {
                *grad += &*dtokens.finish();
            }
            let _seeded = team.seeded(row_seeds);
            let dinput = match (&self.input_proj, &mut grads.input_proj) {
                (Some(input_proj), Some(grad)) => input_proj.backward(team, cache.input.view(), dx.view(), grad),
                _ => dx,
            };
            padded(&dinput, &spans, cache.l)
        })
    }

    /// Turns dropout off, for gradients of what inference computes.
    pub(crate) fn without_dropout(mut self) -> Hymba {
        self.options.dropout = 0.0;
        self.adapters.forget_dropout();
        self
    }

    /// Seeds of the rows of a training pass, for the dropout of adapters. Meta tokens have none, as they lose nothing.
    fn row_seeds(&self, seed: u64, spans: &Spans) -> Option<Arc<[u64]>> {
        self.adapters.drops().then(|| row_seeds(spans, (0..spans.len()).map(|i| seed_at(seed, i))))
    }

    /// Where numbers are dropped around block i: the Edifice variant does so between blocks only.
    fn dropout(&self, seed: u64, i: usize) -> BlockDropout {
        let dropout = Dropout::new(self.options.dropout, seed).at(i as u64);
        match self.options.variant {
            Variant::Hymba => BlockDropout { before: Dropout::NONE, inside: dropout },
            Variant::Edifice if i == 0 => BlockDropout { before: Dropout::NONE, inside: Dropout::NONE },
            Variant::Edifice => BlockDropout { before: dropout, inside: Dropout::NONE },
        }
    }

    /// Refuses what another model made.
    pub(crate) fn check_cache(&self, cache: &TrainCache) -> Result<()> {
        if cache.model != self.cached.id {
            let advice = "another model made it, or the parameters have changed since; run the forward pass again";
            return Err(Error::State(advice.into()));
        }
        Ok(())
    }

    /// Whether the other model has an adapter of the same shapes as this one, or both have none.
    fn has_adapter_of(&self, other: &Hymba) -> bool {
        if self.adapters.is_empty() && other.adapters.is_empty() {
            return true;
        }
        let names = |of: &Hymba| {
            let mut names = Vec::new();
            of.visit(&mut |name, array| names.push((name.to_string(), array.shape().to_vec())));
            names
        };
        names(self) == names(other)
    }

    fn check_backward(&self, cache: &TrainCache, outer: &[usize], given: &[usize], grads: &Hymba) -> Result<()> {
        let expected = [outer, &[self.options.hidden_size]].concat();
        if given != expected {
            return Err(Error::Shape {
                argument: "dy",
                expected: format!("{expected:?}, the shape of the outputs"),
                given: given.to_vec(),
            });
        }
        self.check_cache(cache)?;
        let outputs = if outer.len() == 1 { cache.lengths.len() } else { cache.spans().rows() };
        if cache.last.nrows() != outputs {
            let advice = "backward goes with forward_train, backward_sequence with forward_sequence_train";
            return Err(Error::State(advice.into()));
        }
        let same = |options: &HymbaOptions| HymbaOptions { dropout: 0.0, seed: 0, ..options.clone() };
        grads.check_trainable()?;
        if same(&grads.options) != same(&self.options) || !self.has_adapter_of(grads) {
            return Err(Error::State("grads is of a model with other options; make it with zeros_like".into()));
        }
        Ok(())
    }
}

/// The sequences of a padded batch, one after the other: `[b, l, width]` → `[rows, width]`
pub(crate) fn frames(x: &ArrayRef3<f32>, lengths: &[usize]) -> Buffer {
    let mut frames = Buffer::uninit((lengths.iter().sum(), x.dim().2));
    let mut first = 0;
    for (x, &length) in x.outer_iter().zip(lengths) {
        frames.slice_mut(s![first..first + length, ..]).assign(&x.slice(s![..length, ..]));
        first += length;
    }
    frames
}

/// The other way round: zero past the end of each sequence.
pub(crate) fn padded(frames: &Array2<f32>, spans: &Spans, l: usize) -> Array3<f32> {
    let mut x = Array3::zeros((spans.len(), l, frames.ncols()));
    for (mut x, span) in x.outer_iter_mut().zip(spans.iter()) {
        x.slice_mut(s![..span.len(), ..]).assign(&frames.slice(s![span.clone(), ..]));
    }
    x
}
