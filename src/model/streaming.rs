//! One frame after the other, at a constant cost.

use std::fmt;

use ndarray::{Array2, ArrayRef2};

use super::Hymba;
use crate::block::BlockState;
use crate::{Error, Result};

/// What a model remembers of a batch of streams between two calls of [`Hymba::step`].
///
/// A state belongs to the model that made it, and to its clones, as long as their parameters do not change. Cloning a
/// state forks the streams. Its size is constant from the frame on that fills the window; only in the Edifice preset,
/// whose attention has no window, it grows with every frame.
#[derive(Clone)]
pub struct HymbaState {
    model: u64,
    batch: usize,
    frames: u64,
    blocks: Vec<BlockState>,
}

impl HymbaState {
    /// The number of streams.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Frames seen so far by each stream.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes of what is remembered.
    pub fn num_bytes(&self) -> usize {
        self.blocks.iter().map(BlockState::num_numbers).sum::<usize>() * size_of::<f32>()
    }
}

impl fmt::Debug for HymbaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("HymbaState");
        f.field("batch", &self.batch).field("frames", &self.frames).field("bytes", &self.num_bytes()).finish()
    }
}

impl Hymba {
    /// A state for `batch` streams that have seen no frame yet.
    ///
    /// A batch whose state does not fit into memory gives a state that [`step`](Self::step) refuses.
    pub fn new_state(&self, batch: usize) -> HymbaState {
        let prefixes = self.prefixes();
        let numbers: usize = prefixes.iter().map(BlockState::num_reserved).sum();
        let fits =
            numbers.checked_mul(batch).is_some_and(|numbers| Vec::<f32>::new().try_reserve_exact(numbers).is_ok());
        let blocks =
            if fits { prefixes.iter().map(|prefix| BlockState::new(batch, prefix)).collect() } else { Vec::new() };
        HymbaState { model: self.id, batch, frames: 0, blocks }
    }

    /// The next frame of each stream: frame `[b, embed_dim]` → `[b, hidden_size]`, which equals [`forward`](Self::forward)
    /// on all frames given so far. The cost does not depend on how many they were (except in the Edifice preset, whose
    /// attention has no window).
    ///
    /// A frame with NaN makes its stream NaN from there on, as it would a sequence; the other streams of the batch go on.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the width is not `embed_dim` or b is 0; [`Error::State`] if the state is of another batch
    /// size, was made by another model, or before the parameters changed. The state is then untouched.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array2;
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let mut state = model.new_state(1);
    /// for _ in 0..100 {
    ///     let y = model.step(&Array2::<f32>::ones((1, 5)), &mut state)?;
    ///     assert_eq!(y.dim(), (1, 16));
    /// }
    /// assert_eq!(state.frames(), 100);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn step(&self, frame: &ArrayRef2<f32>, state: &mut HymbaState) -> Result<Array2<f32>> {
        let (batch, width) = frame.dim();
        if batch == 0 || width != self.options.embed_dim {
            return Err(Error::Shape {
                argument: "frame",
                expected: format!("[b, embed_dim] with b ≥ 1 and embed_dim = {}", self.options.embed_dim),
                given: frame.shape().to_vec(),
            });
        }
        if state.model != self.id {
            return Err(Error::State(
                "another model made it, or the parameters have changed since; make one with new_state".into(),
            ));
        }
        if state.batch != batch {
            return Err(Error::State(format!(
                "it holds {} streams, and the frame has {batch} rows; make one with new_state({batch})",
                state.batch
            )));
        }
        if state.blocks.len() != self.blocks.len() {
            return Err(Error::State(format!("{batch} streams do not fit into memory; stream fewer at a time")));
        }
        let mut x = self.project(frame.as_standard_layout().into_owned().into());
        for ((block, prefix), state) in self.blocks.iter().zip(self.prefixes()).zip(&mut state.blocks) {
            x = block.step(x, prefix, state);
        }
        state.frames += 1;
        Ok(self.final_norm.forward(x.view()).into_array())
    }
}
