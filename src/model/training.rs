//! The way forth and back of a training step.

use std::fmt;

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3};

use super::{Group, Hymba, check_lengths, gather, next_id};
use crate::block::{BlockCache, Prefix, sequences};
use crate::kernels::parallel;
use crate::layers::{Buffer, dropout};
use crate::{Error, HymbaOptions, Result};

/// What [`Hymba::backward`] reads of a forward pass: about 25·h numbers for each block and frame.
pub struct TrainCache {
    model: u64,
    seed: u64,
    l: usize,
    lengths: Vec<usize>,
    /// `[b·l, embed_dim]`
    input: Buffer,
    prefixes: Vec<Prefix>,
    /// The meta tokens' way, if there are any.
    meta: Vec<BlockCache>,
    blocks: Vec<BlockCache>,
    /// Input of the final norm, `[b, h]` or `[b·l, h]`.
    last: Buffer,
}

impl TrainCache {
    /// Where the last valid frame of a sequence is among `[b·l, h]`.
    fn last_row(&self, row: usize) -> usize {
        row * self.l + self.lengths[row] - 1
    }
}

impl fmt::Debug for TrainCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrainCache").field("lengths", &self.lengths).field("blocks", &self.blocks.len()).finish()
    }
}

impl Hymba {
    /// As [`forward_ragged`](Self::forward_ragged), for training: drops numbers between the blocks at the rate of the option
    /// `dropout`, and returns also what [`backward`](Self::backward) reads. `lengths` of `None` are full ones. Which numbers are
    /// dropped follows from `seed`; give every batch another one. Without dropout the outputs are those of
    /// [`forward`](Self::forward), to the bit.
    ///
    /// # Errors
    ///
    /// As [`forward_ragged`](Self::forward_ragged).
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
        let (frames, mut cache) = self.run_train(x, lengths, seed)?;
        let mut last = Array2::zeros((cache.lengths.len(), self.options.hidden_size));
        for (row, mut last) in last.rows_mut().into_iter().enumerate() {
            last.assign(&frames.row(cache.last_row(row)));
        }
        let y = self.final_norm.forward(last.view());
        cache.last = last.into();
        Ok((y.into_array(), cache))
    }

    /// As [`forward_sequence`](Self::forward_sequence), for training: the counterpart of
    /// [`forward_train`](Self::forward_train) that returns every position, `[b, l, hidden_size]`. What stands in positions past
    /// a sequence's length means nothing; give it a gradient of zero.
    ///
    /// # Errors
    ///
    /// As [`forward_ragged`](Self::forward_ragged).
    pub fn forward_sequence_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array3<f32>, TrainCache)> {
        let (frames, mut cache) = self.run_train(x, lengths, seed)?;
        let y = self.final_norm.forward(frames.view());
        cache.last = frames;
        Ok((sequences(y.into_array(), cache.lengths.len()), cache))
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, hidden_size]`, the gradient of a loss by the outputs →
    /// that by the inputs, `[b, l, embed_dim]`. **Adds** the gradients by the parameters to `grads`, which
    /// [`zeros_like`](Self::zeros_like) makes. Frames past a sequence's length get gradients of exactly zero.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if dy has not the shape of the outputs; [`Error::State`] if `cache` is of another model, or of this one
    /// before its parameters changed, or of [`forward_sequence_train`](Self::forward_sequence_train), or if `grads` is of a
    /// model with other options. Nothing is added then.
    pub fn backward(&self, cache: &TrainCache, dy: &ArrayRef2<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        self.check_backward(cache, &[cache.lengths.len()], dy.shape(), grads)?;
        let dy = dy.as_standard_layout();
        let dlast = self.final_norm.backward(cache.last.view(), dy.view(), &mut grads.final_norm);
        let mut dframes = Buffer::zeros((cache.lengths.len() * cache.l, self.options.hidden_size));
        for (row, dlast) in dlast.rows().into_iter().enumerate() {
            dframes.row_mut(cache.last_row(row)).assign(&dlast);
        }
        Ok(self.run_backward(cache, dframes, grads))
    }

    /// The gradient of [`forward_sequence_train`](Self::forward_sequence_train): dy `[b, l, hidden_size]` → `[b, l, embed_dim]`;
    /// otherwise as [`backward`](Self::backward). Positions past a sequence's length are taken for zero.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward).
    pub fn backward_sequence(&self, cache: &TrainCache, dy: &ArrayRef3<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        let batch = cache.lengths.len();
        self.check_backward(cache, &[batch, cache.l], dy.shape(), grads)?;
        let group = Group { rows: &Vec::from_iter(0..batch), l: cache.l };
        let dy = gather(dy, group, &cache.lengths);
        let dframes = self.final_norm.backward(cache.last.view(), dy.view(), &mut grads.final_norm);
        Ok(self.run_backward(cache, dframes, grads))
    }

    /// A model with the same options whose parameters are all zero: where gradients are gathered.
    pub fn zeros_like(&self) -> Hymba {
        Hymba::zeros(self.options.clone())
    }

    /// All blocks of a training step, up to the final norm. The whole batch goes through a layer together, so that the
    /// gradient of a matrix is one product and one sum over all frames.
    fn run_train(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>, seed: u64) -> Result<(Buffer, TrainCache)> {
        let (batch, l) = self.check_input(x)?;
        let lengths = match lengths {
            Some(lengths) => {
                check_lengths(lengths, batch, l)?;
                lengths.to_vec()
            }
            None => vec![l; batch],
        };
        Ok(parallel::enter_if(self.work(batch * l), || {
            let input = gather(x, Group { rows: &Vec::from_iter(0..batch), l }, &lengths);
            let mut x = self.project(Buffer::copy_of(&input));
            let (prefixes, meta) = self.pass_meta_tokens();
            let mut blocks = Vec::with_capacity(self.blocks.len());
            for (i, (block, prefix)) in self.blocks.iter().zip(&prefixes).enumerate() {
                if i > 0 {
                    dropout(&mut x, self.options.dropout, seed, i);
                }
                let (y, cache, _) = block.forward_train(x, batch, prefix);
                blocks.push(cache);
                x = y;
            }
            let last = Buffer::any((0, 0));
            let cache = TrainCache { model: self.id, seed, l, lengths, input, prefixes, meta, blocks, last };
            (x, cache)
        }))
    }

    /// The way back of [`run_train`](Self::run_train).
    fn run_backward(&self, cache: &TrainCache, mut dx: Buffer, grads: &mut Hymba) -> Array3<f32> {
        let batch = cache.lengths.len();
        grads.prefixes.forget();
        grads.id = next_id();
        parallel::enter_if(self.work(batch * cache.l), || {
            let none = Prefix::none(&self.options);
            // of the meta tokens, behind the block at hand
            let mut dtokens = self.meta_tokens.as_ref().map(|tokens| Buffer::zeros(tokens.dim()));
            for (i, block) in self.blocks.iter().enumerate().rev() {
                let (prefix, grad) = (&cache.prefixes[i], &mut grads.blocks[i]);
                let mut dprefix = prefix.zeros_like();
                dx = block.backward(&cache.blocks[i], prefix, dx, None, grad, &mut dprefix);
                if i > 0 {
                    dropout(&mut dx, self.options.dropout, cache.seed, i);
                }
                dtokens = dtokens
                    .map(|dy| block.backward(&cache.meta[i], &none, dy, Some(&dprefix), grad, &mut none.zeros_like()));
                grad.add_own_prefix(&dprefix);
            }
            if let (Some(grad), Some(dtokens)) = (&mut grads.meta_tokens, dtokens) {
                *grad += &*dtokens;
            }
            let dinput = match (&self.input_proj, &mut grads.input_proj) {
                (Some(input_proj), Some(grad)) => input_proj.backward(cache.input.view(), dx.view(), grad),
                _ => dx,
            };
            sequences(dinput.into_array(), batch)
        })
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
        if cache.model != self.id {
            let advice = "another model made it, or the parameters have changed since; run the forward pass again";
            return Err(Error::State(advice.into()));
        }
        let outputs = outer.iter().product::<usize>();
        if cache.last.nrows() != outputs {
            let advice = "backward goes with forward_train, backward_sequence with forward_sequence_train";
            return Err(Error::State(advice.into()));
        }
        let same = |options: &HymbaOptions| HymbaOptions { dropout: 0.0, seed: 0, ..options.clone() };
        if same(&grads.options) != same(&self.options) {
            return Err(Error::State("grads is of a model with other options; make it with zeros_like".into()));
        }
        Ok(())
    }
}
