//! One pass of some tokens through all layers.

use std::collections::BTreeMap;
use std::ops::Range;

use super::attention::View;
use super::rope::{Rotary, Turn};
use super::state::RowState;
use crate::kernels::team::Team;

/// Consecutive tokens of one row of the state.
pub(super) struct Piece {
    /// Which rows of the activations `[tokens, ·]` they are.
    pub rows: Range<usize>,
}

impl Piece {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Their part of activations `[tokens, width]`.
    pub(super) fn of<'a>(&self, activations: &'a [f32], width: usize) -> &'a [f32] {
        &activations[self.rows.start * width..self.rows.end * width]
    }
}

/// Pieces of different rows that pass through the layers together: one product serves them all.
pub(super) struct Pass<'a> {
    pub team: &'a Team,
    pub pieces: Vec<Piece>,
    /// The states of the rows, one a piece.
    pub states: Vec<&'a mut RowState>,
    /// The angles of each token, if there is a rotary embedding.
    pub turns: Vec<Turn>,
    /// Keys and values that later layers of this pass use, by the layer they come from.
    pub views: BTreeMap<usize, Vec<Option<View>>>,
    /// The number of tokens.
    pub tokens: usize,
}

impl<'a> Pass<'a> {
    /// The next `count` tokens for each of the states.
    pub(super) fn new(team: &'a Team, states: Vec<(&'a mut RowState, usize)>, rotary: Option<&Rotary>) -> Self {
        let (mut pieces, mut turns, mut tokens) = (Vec::new(), Vec::new(), 0);
        for (state, count) in &states {
            pieces.push(Piece { rows: tokens..tokens + count });
            tokens += count;
            if let Some(rotary) = rotary {
                turns.extend((state.position..state.position + count).map(|position| rotary.turn(position)));
            }
        }
        let states = states.into_iter().map(|(state, _)| state).collect();
        Pass { team, pieces, states, turns, views: BTreeMap::new(), tokens }
    }

    /// To be called when all layers are through.
    pub(super) fn finish(self) {
        for (state, piece) in self.states.into_iter().zip(&self.pieces) {
            state.position += piece.len();
        }
    }
}

/// Rows that one thread takes at a time where every row is worked on alone.
const BLOCK: usize = 16;

/// Activations `[tokens, width]` in blocks of rows: the first row of each, and its numbers.
pub(super) fn row_blocks(activations: &mut [f32], width: usize) -> Vec<(usize, &mut [f32])> {
    activations.chunks_mut(BLOCK * width).enumerate().map(|(i, block)| (i * BLOCK, block)).collect()
}

/// Activations `[tokens, width]`, piece by piece.
pub(super) fn by_pieces<'a>(pieces: &[Piece], mut activations: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (here, rest) = activations.split_at_mut(piece.len() * width);
        parts.push(here);
        activations = rest;
    }
    parts
}
