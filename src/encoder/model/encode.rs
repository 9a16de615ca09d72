//! Sequences through the model: groups of short ones, one on each thread, and long ones in pieces.

use ndarray::{Array2, ArrayRef3, ArrayView2, Axis, s};

use super::Hymba;
use crate::encoder::size::{GROUP, PIECE};
use crate::kernels::team::{Team, with_team};
use crate::layers::{Batch, SequenceState, flat};

/// A sequence to be encoded.
struct Sequence<'a> {
    /// `[l, embed_dim]`
    frames: ArrayView2<'a, f32>,
    /// `[l, h]`, or `[h]` for the last frame.
    out: &'a mut [f32],
}

impl Hymba {
    /// The last of so many frames of each row of x → `[b, h]`
    pub(super) fn encode_last(&self, x: &ArrayRef3<f32>, lengths: &[usize]) -> Array2<f32> {
        let mut y = Array2::zeros((lengths.len(), self.options.hidden_size));
        let sequences = x.outer_iter().zip(lengths).zip(y.outer_iter_mut());
        let sequences = sequences.map(|((frames, &length), out)| {
            let out = out.into_slice().expect("a row of a new array");
            Sequence { frames: frames.slice_move(s![..length, ..]), out }
        });
        self.encode(sequences.collect(), false);
        y
    }

    /// As [`forward_sequence`](Self::forward_sequence) of right-padded sequences, one after the other and without padding:
    /// `[rows, h]`. For callers that have checked x and the lengths.
    pub(crate) fn encode_frames(&self, x: &ArrayRef3<f32>, lengths: &[usize]) -> Array2<f32> {
        let h = self.options.hidden_size;
        let mut y = Array2::zeros((lengths.iter().sum(), h));
        let mut rest = y.as_slice_mut().expect("a new array");
        let mut sequences = Vec::with_capacity(lengths.len());
        for (frames, &length) in x.outer_iter().zip(lengths) {
            let (out, after) = rest.split_at_mut(length * h);
            sequences.push(Sequence { frames: frames.slice_move(s![..length, ..]), out });
            rest = after;
        }
        self.encode(sequences, true);
        y
    }

    /// Sequences through all blocks and the final norm. Which thread does what depends on sizes and the number of
    /// threads, but no sum is cut by it.
    fn encode(&self, sequences: Vec<Sequence>, every_frame: bool) {
        let total: usize = sequences.iter().map(|sequence| sequence.frames.nrows()).sum();
        with_team(self.work(total), |team| {
            // a long sequence is everybody's; groups of others are each one thread's
            let (long, short): (Vec<_>, Vec<_>) =
                sequences.into_iter().partition(|sequence| sequence.frames.nrows() > 2 * GROUP);
            let group = (total / team.threads()).min(GROUP);
            let mut groups: Vec<Vec<Sequence>> = Vec::new();
            let mut free = 0;
            for sequence in short {
                let frames = sequence.frames.nrows();
                match groups.last_mut() {
                    Some(group) if frames <= free => group.push(sequence),
                    _ => {
                        groups.push(vec![sequence]);
                        free = group.max(frames);
                    }
                }
                free -= frames;
            }
            match groups.len() {
                // too few for all threads
                few if few == 1 || 2 * few <= team.threads() => {
                    self.encode_together(team, groups.into_iter().flatten().collect(), every_frame);
                }
                _ => team.for_each(groups, |group| self.encode_together(&Team::alone(), group, every_frame)),
            }
            long.into_iter().for_each(|sequence| self.encode_together(team, vec![sequence], every_frame));
        });
    }

    /// Some sequences at the same time, in pieces if they are very long.
    fn encode_together(&self, team: &Team, mut sequences: Vec<Sequence>, every_frame: bool) {
        let h = self.options.hidden_size;
        let mut states = vec![SequenceState::clone(self.initial()); sequences.len()];
        let longest = sequences.iter().map(|sequence| sequence.frames.nrows()).max().unwrap_or(0);
        for first in (0..longest).step_by(PIECE) {
            let mut pieces: Vec<_> = sequences
                .iter_mut()
                .zip(&mut states)
                .map(|(sequence, state)| (first..sequence.frames.nrows().min(first + PIECE), sequence, state))
                .filter(|(range, ..)| !range.is_empty())
                .collect();
            let frames: Vec<_> =
                pieces.iter().map(|(range, sequence, _)| sequence.frames.slice(s![range.clone(), ..])).collect();
            let frames = ndarray::concatenate(Axis(0), &frames).expect("frames of one width");
            let states = pieces.iter_mut().map(|(range, _, state)| (&mut **state, range.len()));
            let mut batch = Batch::new(team, states, longest > PIECE, None);
            let last = batch.spans.last_rows();
            let y = self.run(&mut batch, frames.into(), if every_frame { None } else { Some(&last) });
            batch.finish();
            let mut y = flat(&y);
            for (range, sequence, _) in pieces {
                let out =
                    if every_frame { &mut sequence.out[range.start * h..range.end * h] } else { &mut *sequence.out };
                let (here, rest) = y.split_at(out.len());
                out.copy_from_slice(here);
                y = rest;
            }
        }
    }
}
