//! Predictions while frames come in.

use std::fmt;
use std::path::Path;

use ndarray::{Array2, ArrayRef2, ArrayRef3, ArrayView2, Axis};

use super::Predictor;
use crate::encoder::{Keeps, no_such_row, of_numbers};
use crate::kernels::team::{Team, work};
use crate::layers::{PoolState, flat};
use crate::{Error, HymbaState, Pooling, Result};

/// The state of a batch of streams of a [`Predictor`] between two calls of [`Predictor::step`] or [`Predictor::prefill`]: that of its
/// encoder and that of its pooling.
///
/// As a [`HymbaState`], it belongs to the weights that made it, and clones fork the streams.
///
/// ```
/// use hymba::ndarray::Array2;
/// use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, Task};
///
/// let options = PredictorOptions::new(HymbaOptions::new(6).hidden_size(16).num_layers(1)).pooling(Pooling::Mean);
/// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
/// let mut state = predictor.new_state(2);
/// predictor.step(&Array2::ones((2, 6)), &mut state)?;
/// // one more joins, and the first one begins anew
/// state.append(predictor.new_state(1))?;
/// state.reset(0)?;
/// assert_eq!(state.lengths(), [0, 1, 0]);
/// assert_eq!(state.select(&[1])?.lengths(), [1]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct PredictorState {
    encoder: HymbaState,
    /// Of the pooling that made it.
    fingerprint: u64,
    /// The state of pooling before the first frame.
    initial: PoolState,
    pools: Vec<PoolState>,
}

impl PredictorState {
    /// The number of streams.
    pub fn batch(&self) -> usize {
        self.encoder.batch()
    }

    /// Frames seen so far by each stream.
    pub fn lengths(&self) -> Vec<usize> {
        self.encoder.lengths()
    }

    /// Frames seen so far by the stream that has seen most.
    pub fn frames(&self) -> u64 {
        self.encoder.frames()
    }

    /// Bytes of memory that the state takes.
    pub fn num_bytes(&self) -> usize {
        self.encoder.num_bytes() + self.pools.iter().map(PoolState::num_bytes).sum::<usize>()
    }

    /// The state of the encoder.
    pub fn encoder(&self) -> &HymbaState {
        &self.encoder
    }

    /// Resets stream `row`: it has seen no frame.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if there is no such stream.
    pub fn reset(&mut self, row: usize) -> Result<()> {
        self.encoder.reset(row)?;
        self.pools[row] = self.initial.clone();
        Ok(())
    }

    /// A state of these streams, in this order; a stream may occur several times.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if there is no such stream.
    pub fn select(&self, rows: &[usize]) -> Result<PredictorState> {
        let encoder = self.encoder.select(rows)?;
        let pool = |&row: &usize| self.pools.get(row).cloned().ok_or_else(|| no_such_row(row, self.batch()));
        let pools = rows.iter().map(pool).collect::<Result<_>>()?;
        Ok(PredictorState { encoder, pools, initial: self.initial.clone(), ..*self })
    }

    /// Appends the streams of another state of the same weights.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if a predictor with other weights or another pooling made `other`. This state is then untouched.
    pub fn append(&mut self, other: PredictorState) -> Result<()> {
        if other.fingerprint != self.fingerprint {
            return Err(Error::State("the other state was made by a model with another pooling".into()));
        }
        self.encoder.append(other.encoder)?;
        self.pools.extend(other.pools);
        Ok(())
    }
}

impl fmt::Debug for PredictorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("PredictorState");
        f.field("batch", &self.batch()).field("lengths", &self.lengths()).field("bytes", &self.num_bytes()).finish()
    }
}

/// Names of what pooling keeps, in files.
const SUMS: &str = "pooling.sums";
const WEIGHTS: &str = "pooling.weights";

impl Predictor {
    /// A state for `batch` streams that have seen no frame yet. For its size see [`Hymba::new_state`](crate::Hymba::new_state).
    pub fn new_state(&self, batch: usize) -> PredictorState {
        let initial = self.reader.pool.new_state();
        let bytes = initial.num_bytes() + size_of::<PoolState>();
        let encoder = self.reader.encoder.new_state_with(batch, bytes);
        let pools = vec![initial.clone(); encoder.lengths().len()];
        PredictorState { encoder, fingerprint: self.pool_fingerprint(), initial, pools }
    }

    /// The next frame of each stream: frame `[b, embed_dim]` → `[b, outputs]`, which equals [`predict`](Self::predict) on all
    /// frames given so far.
    ///
    /// # Errors
    ///
    /// As [`Hymba::step`](crate::Hymba::step); [`Error::Option`] if an option other than `encoder` and `pooling` is set, see
    /// [`PredictorOptions`](crate::PredictorOptions).
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::{HymbaOptions, Predictor, Task, softmax};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
    /// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// let mut state = predictor.new_state(1);
    /// for _ in 0..20 {
    ///     let probabilities = softmax(&predictor.step(&Array2::ones((1, 6)), &mut state)?);
    ///     assert!((probabilities.sum() - 1.0).abs() < 1e-6);
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn step(&self, frame: &ArrayRef2<f32>, state: &mut PredictorState) -> Result<Array2<f32>> {
        let more = self.options().embed_dim + 2 * self.task.outputs() + self.options.head_inputs();
        self.options.check_causal()?;
        self.reader.encoder.check_frame(frame, &state.encoder, more)?;
        self.check_pools(state)?;
        let hidden = self.reader.encoder.step(&self.normalized(frame), &mut state.encoder)?;
        for (hidden, pool) in hidden.rows().into_iter().zip(&mut state.pools) {
            self.reader.pool.add(flat(&hidden), pool);
        }
        Ok(self.read_pools(hidden.view(), state))
    }

    /// The next frames of each stream, the same number for each: x `[b, l, embed_dim]` → the predictions after the last
    /// `[b, outputs]`. Equals l calls of [`step`](Self::step), at the speed of [`predict`](Self::predict).
    ///
    /// # Errors
    ///
    /// As [`Hymba::prefill`](crate::Hymba::prefill); [`Error::Option`] as [`step`](Self::step).
    ///
    /// ```
    /// use hymba::ndarray::{Array2, Array3};
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let options = HymbaOptions::new(6).hidden_size(16).num_layers(1);
    /// let predictor = Predictor::build(options, Task::classify(["walking", "standing"]))?;
    /// let mut state = predictor.new_state(1);
    /// predictor.prefill(&Array3::ones((1, 100, 6)), &mut state)?; // what has happened so far
    /// predictor.step(&Array2::ones((1, 6)), &mut state)?; // and on, frame by frame
    /// assert_eq!(state.lengths(), [101]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn prefill(&self, x: &ArrayRef3<f32>, state: &mut PredictorState) -> Result<Array2<f32>> {
        self.options.check_causal()?;
        self.check_pools(state)?;
        // before frames are copied
        let (_, l, width) = x.dim();
        self.reader.encoder.check_batch(x, None, Keeps::Last, work([l, width]))?;
        let x = self.normalized(x);
        if self.options.pooling == Pooling::Last {
            let hidden = self.reader.encoder.prefill(&x, &mut state.encoder)?;
            return Ok(self.read_pools(hidden.view(), state));
        }
        let mut last = Array2::zeros((0, 0));
        let pools = &mut state.pools;
        self.reader.encoder.prefill_each(&x, &mut state.encoder, &mut |hidden| {
            for (hidden, pool) in hidden.outer_iter().zip(pools.iter_mut()) {
                hidden.rows().into_iter().for_each(|hidden| self.reader.pool.add(flat(&hidden), pool));
            }
            last = hidden.index_axis(Axis(1), hidden.dim().1 - 1).to_owned();
        })?;
        Ok(self.read_pools(last.view(), state))
    }

    /// Writes a state to a safetensors file, as [`Hymba::save_state`](crate::Hymba::save_state), for
    /// [`load_state`](Self::load_state).
    ///
    /// # Errors
    ///
    /// As [`Hymba::save_state`](crate::Hymba::save_state).
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, Task};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("streams");
    /// let options = PredictorOptions::new(HymbaOptions::new(3).hidden_size(8).num_layers(1)).pooling(Pooling::Mean);
    /// let predictor = Predictor::build(options, Task::Regress { outputs: 1 })?;
    /// let (mut state, frame) = (predictor.new_state(2), Array2::ones((2, 3)));
    /// predictor.step(&frame, &mut state)?;
    /// predictor.save_state(&state, &path)?;
    /// let mut later = predictor.load_state(&path)?;
    /// assert_eq!(predictor.step(&frame, &mut later)?, predictor.step(&frame, &mut state)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_state(&self, state: &PredictorState, path: impl AsRef<Path>) -> Result<()> {
        self.check_pools(state)?;
        let mut more = Vec::new();
        for (row, pool) in state.pools.iter().enumerate() {
            for (what, array) in [(SUMS, &pool.sums), (WEIGHTS, &pool.weights)] {
                if !array.is_empty() {
                    more.push((crate::states::more_name(row, what), array));
                }
            }
        }
        self.reader.encoder.save_state_with(&state.encoder, path.as_ref(), self.pool_fingerprint(), more)
    }

    /// Reads a state that [`save_state`](Self::save_state) wrote. The file need not be trusted.
    ///
    /// # Errors
    ///
    /// As [`Hymba::load_state`](crate::Hymba::load_state).
    pub fn load_state(&self, path: impl AsRef<Path>) -> Result<PredictorState> {
        let state = self.new_state(0);
        let initial = &state.initial;
        let arrays = [(SUMS, &initial.sums), (WEIGHTS, &initial.weights)];
        let shapes = arrays.into_iter().filter(|(_, array)| !array.is_empty()).map(|(what, array)| (what, array.dim()));
        let shapes: Vec<_> = shapes.collect();
        let (encoder, more) = self.reader.encoder.load_state_with(path.as_ref(), state.fingerprint, &shapes)?;
        let pools = more.into_iter().zip(encoder.lengths()).map(|(arrays, frames)| {
            let mut arrays = arrays.into_iter();
            let mut next =
                |of: &Array2<f32>| if of.is_empty() { of.clone() } else { arrays.next().unwrap_or_default() };
            PoolState { frames, sums: next(&initial.sums), weights: next(&initial.weights) }
        });
        Ok(PredictorState { pools: pools.collect(), encoder, ..state })
    }

    /// Predictions `[b, outputs]` from the pools of all streams after the last frames, hidden `[b, h]`.
    fn read_pools(&self, hidden: ArrayView2<f32>, state: &PredictorState) -> Array2<f32> {
        let mut pooled = Array2::zeros((hidden.nrows(), self.reader.pool.width()));
        for ((hidden, pool), pooled) in hidden.rows().into_iter().zip(&state.pools).zip(pooled.rows_mut()) {
            self.reader.pool.read(pool, flat(&hidden), pooled.into_slice().expect("a row of a new array"));
        }
        self.rescaled(self.head.forward(&Team::alone(), pooled.view()).into_array())
    }

    fn check_pools(&self, state: &PredictorState) -> Result<()> {
        match state.fingerprint == self.pool_fingerprint() {
            true => Ok(()),
            false => Err(Error::State(
                "a predictor of another pooling made it, or the parameters have changed since; make one with new_state"
                    .into(),
            )),
        }
    }

    /// Of how frames are pooled; 0 where only the last one counts, so that states are those of the encoder.
    fn pool_fingerprint(&self) -> u64 {
        let kind = match self.options.pooling {
            Pooling::Last => return 0,
            Pooling::Mean => 1.0,
            Pooling::Max => 2.0,
            Pooling::Attention { .. } => 3.0,
        };
        of_numbers([kind].iter().chain(self.reader.pool.queries()))
    }
}
