//! The state of a language model between calls.

use std::fmt;

use ndarray::{Array2, Array3};

use crate::layers::{KvCache, SequenceState};
use crate::{Error, Result};

/// The state of a language model between calls, for each row of a batch.
///
/// A row holds, for each layer, the state of the Mamba branch and, in layers that have their own, keys and values: the last
/// `sliding_window + 1` tokens' and the meta tokens' in windowed layers, all tokens' in global ones. Cloning a state forks the
/// conversation.
///
/// ```no_run
/// # fn main() -> hymba::Result<()> {
/// use hymba::HymbaLm;
/// use hymba::ndarray::arr2;
///
/// let lm = HymbaLm::from_dir("Hymba-1.5B-Base")?;
/// let mut state = lm.new_state(1);
/// lm.prefill(&arr2(&[[1, 4103, 3186]]), &mut state)?;
/// let mut other_way = state.clone();
/// lm.prefill(&arr2(&[[29889]]), &mut state)?;
/// lm.prefill(&arr2(&[[29991]]), &mut other_way)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LmState {
    pub(super) model: u64,
    /// Meta tokens in front of each row.
    pub(super) meta: usize,
    pub(super) rows: Vec<SequenceState>,
}

/// The state of one layer for one row: see [`LmState::layer`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LmLayerState {
    /// The last inputs of the convolution `[3, E]`, oldest first.
    pub conv: Array2<f32>,
    /// The state of the selective scan `[E, N]`.
    pub scan: Array2<f32>,
    /// Keys `[heads, tokens, width]` after the rotary embedding and values, meta tokens first, in layers that have their own.
    pub keys_and_values: Option<(Array3<f32>, Array3<f32>)>,
}

impl LmState {
    /// The number of rows.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Tokens seen by each row, without the meta tokens.
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.position - self.meta).collect()
    }

    /// Bytes of memory that the state takes.
    pub fn num_bytes(&self) -> usize {
        self.rows.iter().map(SequenceState::num_bytes).sum()
    }

    /// Bytes of the keys and values among them, the only part that grows.
    pub fn kv_bytes(&self) -> usize {
        let layers = self.rows.iter().flat_map(|row| &row.layers);
        layers.filter_map(|layer| layer.kv.as_ref()).map(KvCache::num_bytes).sum()
    }

    /// The state of a layer for a row; `None` if there is no such row or layer.
    pub fn layer(&self, row: usize, layer: usize) -> Option<LmLayerState> {
        let layer = self.rows.get(row)?.layers.get(layer)?;
        Some(LmLayerState {
            conv: layer.mamba.conv.clone(),
            scan: layer.mamba.scan.t().to_owned(),
            keys_and_values: layer.kv.as_ref().map(KvCache::arrays),
        })
    }

    /// A state of these rows of this one, in this order; a row may occur several times. `None` if there is no such row.
    pub fn select(&self, rows: &[usize]) -> Option<LmState> {
        let rows = rows.iter().map(|&row| self.rows.get(row).cloned()).collect::<Option<_>>()?;
        Some(LmState { rows, ..*self })
    }
}

impl LmState {
    /// The rows, each a state of its own. Neither this nor [`append`](Self::append) copies rows, so a batch can be put
    /// together anew for every step.
    pub fn into_rows(self) -> Vec<LmState> {
        let LmState { model, meta, rows } = self;
        rows.into_iter().map(|row| LmState { model, meta, rows: vec![row] }).collect()
    }

    /// Adds the rows of another state of the same model after these, so that conversations join a batch.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if another model made `other`. This state is then untouched.
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// # use hymba::ndarray::arr2;
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let (mut state, mut other) = (lm.new_state(1), lm.new_state(1));
    /// lm.prefill(&arr2(&[[1, 2, 3]]), &mut other)?;
    /// state.append(other)?;
    /// assert_eq!(state.lengths(), [0, 3]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn append(&mut self, other: LmState) -> Result<()> {
        if other.model != self.model {
            return Err(Error::State("another model made the other state".into()));
        }
        self.rows.extend(other.rows);
        Ok(())
    }
}

impl fmt::Debug for LmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("LmState");
        f.field("lengths", &self.lengths()).field("bytes", &self.num_bytes()).finish()
    }
}
