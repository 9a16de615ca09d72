//! One frame after the other, or any number at once, at a constant cost per frame.

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, ArrayRef2, ArrayRef3, ArrayView3, Axis, s};

use super::block::rows;
use super::model::Hymba;
use super::size::{Keeps, fits};
use crate::kernels::team::{with_team, work};
use crate::layers::{Batch, SequenceState};
use crate::{Error, Result};

/// The state of a batch of streams between two calls of [`Hymba::step`] or [`Hymba::prefill`].
///
/// A state belongs to the weights that made it: it can be used with every model that has the same ones, also in another
/// process ([`Hymba::save_state`]), and with none whose parameters have changed. Cloning a state forks the streams. Its size is
/// constant from the frame on that fills the window; only in the Edifice variant, whose attention has no window, it grows with
/// every frame.
///
/// Streams join and leave:
///
/// ```
/// use hymba::{Hymba, HymbaOptions};
/// use hymba::ndarray::{Array2, Array3};
///
/// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
/// let mut state = model.new_state(2);
/// model.step(&Array2::ones((2, 5)), &mut state)?;
/// // one more joins, with a past of 30 frames
/// let mut other = model.new_state(1);
/// model.prefill(&Array3::ones((1, 30, 5)), &mut other)?;
/// state.append(other)?;
/// assert_eq!(state.lengths(), [1, 1, 30]);
/// // the first one ends, and its place is taken by a new one; the second one leaves
/// state.reset(0)?;
/// let state = state.select(&[0, 2])?;
/// assert_eq!(state.lengths(), [0, 30]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct HymbaState {
    /// Of the weights that made it.
    pub(super) fingerprint: u64,
    /// The state of a stream before its first frame.
    pub(super) initial: Arc<SequenceState>,
    pub(super) rows: Vec<SequenceState>,
    /// Streams that were asked for and did not fit into memory.
    pub(super) missing: usize,
}

impl HymbaState {
    /// The number of streams.
    pub fn batch(&self) -> usize {
        self.rows.len() + self.missing
    }

    /// Frames seen so far by each stream.
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.position - self.initial.position).collect()
    }

    /// Frames seen so far by the stream that has seen most.
    pub fn frames(&self) -> u64 {
        self.lengths().into_iter().max().unwrap_or(0) as u64
    }

    /// Bytes of memory that the state takes.
    pub fn num_bytes(&self) -> usize {
        self.rows.iter().map(SequenceState::num_used_bytes).sum()
    }

    /// Resets stream `row`: it has seen no frame.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if there is no such stream.
    pub fn reset(&mut self, row: usize) -> Result<()> {
        let batch = self.batch();
        let state = self.rows.get_mut(row).ok_or_else(|| no_such_row(row, batch))?;
        *state = SequenceState::clone(&self.initial);
        Ok(())
    }

    /// A state of these streams, in this order; a stream may occur several times.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if there is no such stream.
    pub fn select(&self, rows: &[usize]) -> Result<HymbaState> {
        let of = |&row: &usize| self.rows.get(row).cloned().ok_or_else(|| no_such_row(row, self.batch()));
        let rows = rows.iter().map(of).collect::<Result<_>>()?;
        Ok(HymbaState { rows, initial: self.initial.clone(), ..*self })
    }

    /// Appends the streams of another state of the same weights.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if a model with other weights made `other`. This state is then untouched.
    pub fn append(&mut self, other: HymbaState) -> Result<()> {
        if other.fingerprint != self.fingerprint {
            return Err(Error::State("the other state was made by a model with other weights".into()));
        }
        self.rows.extend(other.rows);
        self.missing += other.missing;
        Ok(())
    }
}

pub(crate) fn no_such_row(row: usize, batch: usize) -> Error {
    Error::State(format!("it has no stream {row}; it holds {batch}, counted from 0"))
}

impl fmt::Debug for HymbaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("HymbaState");
        f.field("batch", &self.batch()).field("lengths", &self.lengths()).field("bytes", &self.num_bytes()).finish()
    }
}

impl Hymba {
    /// A state for `batch` streams that have seen no frame yet.
    ///
    /// A stream takes `4·(2h·(n + 3) + 2h·(k + w))` bytes per block when its window is full, and some hundred bytes of
    /// bookkeeping: the first term where a block has Mamba, the second where it has attention, and twice the second per use of a
    /// shared attention block. Memory for the window is taken 64 frames at a time. If the state of the batch, or the first 64 frames of
    /// it, does not fit into memory, [`step`](Self::step) refuses it.
    pub fn new_state(&self, batch: usize) -> HymbaState {
        self.new_state_with(batch, 0)
    }

    /// As [`new_state`](Self::new_state), where `more` bytes per stream are kept elsewhere.
    pub(crate) fn new_state_with(&self, batch: usize, more: usize) -> HymbaState {
        let initial = self.initial();
        let bytes = initial.footprint().max(work([self.state_numbers(FIRST_FRAMES), size_of::<f32>()]));
        let bytes = bytes.saturating_add(more);
        let fits = fits(work([batch, bytes]));
        let rows = vec![SequenceState::clone(initial); if fits { batch } else { 0 }];
        let missing = batch - rows.len();
        HymbaState { fingerprint: self.fingerprint(), initial: initial.clone(), rows, missing }
    }

    /// The next frame of each stream: frame `[b, embed_dim]` → `[b, hidden_size]`, which equals [`forward`](Self::forward)
    /// on all frames given so far. The cost does not depend on how many they were (except in the Edifice variant, whose
    /// attention has no window).
    ///
    /// A frame with NaN makes its stream NaN from there on, as it would a sequence; the other streams of the batch go on.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the width is not `embed_dim`, b is 0, or the step does not fit into memory; [`Error::State`] if the
    /// state has another batch size, was made by a model with other weights or before the parameters changed, or did not fit
    /// into memory when it was made. The state is then untouched.
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
        self.check_frame(frame, state, 0)?;
        Ok(self.advance(&frame.view().insert_axis(Axis(1)), state, None))
    }

    /// The next frames of each stream, the same number for each: x `[b, l, embed_dim]` → the outputs after the last
    /// `[b, hidden_size]`. Equals l calls of [`step`](Self::step), at the speed of [`forward`](Self::forward). Memory does not
    /// grow with l.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] as [`forward`](Self::forward), [`Error::State`] as [`step`](Self::step). The state is then untouched.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::{Array2, Array3};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let mut state = model.new_state(1);
    /// model.prefill(&Array3::ones((1, 100, 5)), &mut state)?; // what has happened so far
    /// let y = model.step(&Array2::ones((1, 5)), &mut state)?; // and on, frame by frame
    /// assert_eq!(state.lengths(), [101]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn prefill(&self, x: &ArrayRef3<f32>, state: &mut HymbaState) -> Result<Array2<f32>> {
        self.check_prefill(x, state)?;
        Ok(self.advance(x, state, None))
    }

    /// As [`prefill`](Self::prefill), with `each` called for the outputs of some frames after the other, `[b, count, h]`.
    pub(crate) fn prefill_each(&self, x: &ArrayRef3<f32>, state: &mut HymbaState, each: Each) -> Result<()> {
        self.check_prefill(x, state)?;
        self.advance(x, state, Some(each));
        Ok(())
    }

    fn check_prefill(&self, x: &ArrayRef3<f32>, state: &HymbaState) -> Result<()> {
        let (batch, _, width) = x.dim();
        if width == self.options.embed_dim {
            self.check_state(state, batch, "x has")?;
        }
        self.check_batch(x, None, Keeps::Last, 0).map(drop)
    }

    /// Feeds frames, in pieces: between two of them, other work of the pool gets its turn. Returns the last outputs, or
    /// calls `each` with all of them.
    fn advance(&self, x: &ArrayRef3<f32>, state: &mut HymbaState, mut each: Option<Each>) -> Array2<f32> {
        let (batch, l, _) = x.dim();
        let piece = (PIECE / batch).max(1);
        let mut y = Array2::zeros((0, 0));
        for first in (0..l).step_by(piece) {
            let x = x.slice(s![.., first..l.min(first + piece), ..]);
            let count = x.dim().1;
            let last_only = count > 1 && each.is_none();
            y = with_team(self.work(batch * count) / 8, |team| {
                let states = state.rows.iter_mut().map(|state| (state, count));
                let mut batch = Batch::new(team, states, true, None);
                let last = batch.spans.last_rows();
                let only = last_only.then_some(&last[..]);
                let y = self.run(&mut batch, rows(&x), only);
                batch.finish();
                y.into_array()
            });
            if let Some(each) = &mut each {
                let all = y.view().into_shape_with_order((state.rows.len(), count, y.ncols()));
                each(all.expect("the frames of all streams"));
            }
        }
        y
    }

    /// Checks a frame `[b, embed_dim]` and its state, and that the step fits into memory together with `more` numbers per row.
    pub(crate) fn check_frame(&self, frame: &ArrayRef2<f32>, state: &HymbaState, more: usize) -> Result<()> {
        let (batch, width) = frame.dim();
        let wrong = |expected: String| Err(Error::Shape { argument: "frame", expected, given: frame.shape().to_vec() });
        if batch == 0 || width != self.options.embed_dim {
            return wrong(format!("[b, embed_dim] with b ≥ 1 and embed_dim = {}", self.options.embed_dim));
        }
        self.check_state(state, batch, "the frame has")?;
        if !fits(work([batch, self.frame_numbers().saturating_add(more), size_of::<f32>()])) {
            return wrong("fewer streams: a step of this many does not fit into memory".into());
        }
        Ok(())
    }

    pub(super) fn check_state(&self, state: &HymbaState, batch: usize, given: &str) -> Result<()> {
        if state.fingerprint != self.fingerprint() {
            return Err(Error::State(
                "another model made it, or the parameters have changed since; make one with new_state".into(),
            ));
        }
        if state.batch() != batch {
            return Err(Error::State(format!(
                "it holds {} streams, and {given} {batch} rows; make one with new_state({batch})",
                state.batch()
            )));
        }
        if state.missing > 0 {
            return Err(Error::State(format!("{batch} streams do not fit into memory; stream fewer at a time")));
        }
        Ok(())
    }
}

/// Called with the outputs of some frames `[b, count, h]`.
type Each<'a> = &'a mut dyn FnMut(ArrayView3<f32>);

/// Frames of all streams together that go through the blocks at a time.
const PIECE: usize = 1024;

/// Frames of a window for which a new state must have room.
const FIRST_FRAMES: usize = 64;
