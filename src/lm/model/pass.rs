//! Tokens through the layers, in pieces.

use std::ops::ControlFlow;

use ndarray::{Array2, ArrayView2, s};

use super::HymbaLm;
use crate::Result;
use crate::kernels::rows::Out;
use crate::kernels::team::{Team, with_team};
use crate::layers::{Batch, Buffer, SequenceState};
use crate::lm::state::LmState;

/// Tokens that pass through the layers together, at most. Their activations take about 60 MB in the 1.5B model.
pub(super) const MOST_TOKENS: usize = 512;

/// Takes the logits after a token: its row, its place in the row, and the logits.
pub(in crate::lm) type Sink<'a> = dyn FnMut(usize, usize, &mut [f32]) -> Result<()> + Send + 'a;

/// What goes into a pass for one row.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Ids(&'a [u32]),
    /// The first one, and how many.
    MetaTokens(usize, usize),
}

impl Input<'_> {
    pub fn len(&self) -> usize {
        match self {
            Input::Ids(ids) => ids.len(),
            Input::MetaTokens(_, count) => *count,
        }
    }
}

impl HymbaLm {
    /// Feeds tokens to each row, perhaps none, and hands out the logits after the tokens from `first` on (one entry per row), those of
    /// a row in order.
    pub(in crate::lm) fn advance(
        &self,
        rows: &[impl AsRef<[u32]>],
        state: &mut LmState,
        first: &[usize],
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        self.advance_with(rows, state, first, sink, &mut |_| ControlFlow::Continue(())).map(drop)
    }

    /// As [`advance`](Self::advance); `on_progress` is called after each piece with the tokens done, and may end it.
    pub(super) fn advance_with(
        &self,
        rows: &[impl AsRef<[u32]>],
        state: &mut LmState,
        first: &[usize],
        sink: &mut Sink<'_>,
        on_progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        self.check(rows, Some(state))?;
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        let mut done = vec![0; rows.len()];
        loop {
            // Pieces end at multiples of MOST_TOKENS of their own row, whatever the others do: so a row's numbers do not
            // depend on its company.
            let mut pieces = Vec::new();
            let mut total = 0;
            for (row, state) in state.rows.iter_mut().enumerate() {
                let left = &rows[row][done[row]..];
                let piece = &left[..left.len().min(MOST_TOKENS)];
                if !piece.is_empty() && (total == 0 || total + piece.len() <= MOST_TOKENS) {
                    total += piece.len();
                    pieces.push((row, state, piece));
                }
            }
            if pieces.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            let wanted: Vec<_> = pieces
                .iter()
                .scan(0, |start, (row, _, piece)| {
                    let offset = *start;
                    *start += piece.len();
                    let from = first[*row].saturating_sub(done[*row]).min(piece.len());
                    Some((from..piece.len()).map(move |i| (*row, i, offset + i)))
                })
                .flatten()
                .map(|(row, i, at)| (row, done[row] + i, at))
                .collect();
            pieces.iter().for_each(|(row, _, piece)| done[*row] += piece.len());
            let inputs = pieces.into_iter().map(|(_, state, piece)| (state, Input::Ids(piece))).collect();
            // a team for each piece: between two of them, other calls and the program's own work get their turn
            let mut logits = with_team(total.saturating_mul(self.num_parameters()), |team| {
                let x = self.pass(team, inputs, false, None);
                self.logits(team, &x, &wanted)
            });
            for ((row, i, _), mut logits) in wanted.into_iter().zip(logits.rows_mut()) {
                sink(row, i, logits.as_slice_mut().expect("a row of an array in standard layout"))?;
            }
            if on_progress(done.iter().sum()).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    /// Feeds some tokens, at most [`MOST_TOKENS`] and at least one, to the only row of a state → the logits after each of those from
    /// `first` on, all bit for bit what [`step`](Self::step) would give, token by token.
    pub(in crate::lm) fn step_through(&self, ids: &[u32], state: &mut LmState, first: usize) -> Array2<f32> {
        let wanted: Vec<_> = (first..ids.len()).map(|i| (0, i, i)).collect();
        with_team(ids.len().saturating_mul(self.num_parameters()), |team| {
            let x = self.pass(team, vec![(&mut state.rows[0], Input::Ids(ids))], true, None);
            self.logits(team, &x, &wanted).to_owned()
        })
    }

    /// The logits `[wanted, vocab_size]` after some rows of x.
    fn logits(&self, team: &Team, x: &Buffer, wanted: &[(usize, usize, usize)]) -> Buffer {
        let places: Vec<_> = wanted.iter().map(|(_, _, at)| *at).collect();
        let x = x.rows_at(&places);
        let mut normal = Buffer::uninit(x.dim());
        self.final_norm.forward(team, x.view(), 1.0, &mut normal, Out::Set);
        self.head_logits(team, normal.view())
    }

    /// The logits `[tokens, vocab_size]` of the output of the final norm.
    pub(in crate::lm) fn head_logits(&self, team: &Team, normal: ArrayView2<f32>) -> Buffer {
        match &self.head {
            Some(head) => head.forward(team, normal),
            None => self.embedding.logits(team, normal),
        }
    }

    /// Sends tokens through all layers → `[tokens, H]`, before the final norm. `trace` gets the input of each layer. `one_by_one`, they
    /// are bit for bit what passes of one token each would give.
    pub(super) fn pass(
        &self,
        team: &Team,
        rows: Vec<(&mut SequenceState, Input)>,
        one_by_one: bool,
        mut trace: Option<&mut Vec<Array2<f32>>>,
    ) -> Buffer {
        let mut x = Buffer::uninit((rows.iter().map(|(_, input)| input.len()).sum(), self.config.hidden_size));
        let mut at = 0;
        for (_, input) in &rows {
            let mut here = x.slice_mut(s![at..at + input.len(), ..]);
            match *input {
                Input::Ids(ids) => here.assign(&*self.embedding.forward(team, ids)),
                Input::MetaTokens(first, count) => here.assign(&self.meta_tokens.slice(s![first..first + count, ..])),
            }
            at += input.len();
        }
        let sequences = rows.into_iter().map(|(state, input)| (state, input.len()));
        let mut batch = Batch::new(team, sequences, true, self.rotary.as_ref());
        batch.one_by_one = one_by_one;
        for block in &self.blocks {
            if let Some(trace) = &mut trace {
                trace.push(x.to_owned());
            }
            block.forward(&mut batch, &mut x);
        }
        batch.finish();
        x
    }

    /// The meta tokens, as many at a time as pass through the layers together.
    pub(super) fn meta_pieces<'a>(&self) -> impl Iterator<Item = Input<'a>> + use<'a> {
        let count = self.meta_tokens.nrows();
        (0..count).step_by(MOST_TOKENS).map(move |first| Input::MetaTokens(first, MOST_TOKENS.min(count - first)))
    }
}
