//! Rows of several sequences, of any lengths, that pass through the layers together: one product serves them all, and no padding
//! is computed.

use std::collections::BTreeMap;
use std::ops::Range;

use ndarray::{Array2, ArrayRef2, Axis, CowArray, Ix2};

use super::rope::{Angles, Rotary};
use super::shared_kv::SharedKv;
use super::state::SequenceState;
use super::{Buffer, flat, flat_mut};
use crate::kernels::team::Team;

/// Which rows of activations `[rows, ·]` belong to which sequence: they lie one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spans {
    rows: Vec<Range<usize>>,
    /// The frame that the first row of each sequence is.
    first_frames: Vec<usize>,
}

impl Spans {
    /// Sequences of these lengths.
    pub(crate) fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let rows: Vec<_> = lengths
            .into_iter()
            .map(|length| {
                end += length;
                end - length..end
            })
            .collect();
        Spans { first_frames: vec![0; rows.len()], rows }
    }

    /// Sequences.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Rows of all sequences together.
    pub(crate) fn rows(&self) -> usize {
        self.rows.last().map_or(0, |span| span.end)
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &Range<usize>> + Clone {
        self.rows.iter()
    }

    /// The frame that the first row of each sequence is.
    pub(crate) fn first_frames(&self) -> &[usize] {
        &self.first_frames
    }

    /// The last row of each sequence.
    pub(crate) fn last_rows(&self) -> Vec<usize> {
        self.rows.iter().map(|span| span.end - 1).collect()
    }

    /// The last row of each sequence, alone.
    pub(crate) fn ends(&self) -> Ends {
        let (mut spans, rows) = (Spans::new(self.rows.iter().map(|_| 1)), self.last_rows());
        let frames = self.rows.iter().zip(&self.first_frames);
        spans.first_frames = frames.map(|(span, first)| first + span.len() - 1).collect();
        Ends { rows, spans }
    }

    /// Activations `[rows, width]`, sequence by sequence.
    pub(crate) fn split<'a>(&self, mut activations: &'a mut [f32], width: usize) -> std::vec::IntoIter<&'a mut [f32]> {
        let mut parts = Vec::with_capacity(self.len());
        for span in &self.rows {
            let (here, rest) = activations.split_at_mut(span.len() * width);
            parts.push(here);
            activations = rest;
        }
        parts.into_iter()
    }
}

/// Those of a batch's rows that a pass goes on with where frames no longer meet, if it does not go on with all.
#[derive(Debug)]
pub(crate) struct Ends {
    /// Which they are.
    pub rows: Vec<usize>,
    /// Which of them belong to which sequence.
    pub spans: Spans,
}

impl Ends {
    /// No row: nobody reads the output.
    pub(crate) fn none() -> Self {
        Ends { rows: Vec::new(), spans: Spans::new([]) }
    }

    /// The rows that a pass goes on with, if `only` some of those of `all`, and the sequences they belong to.
    pub(crate) fn of<'a>(only: &'a Option<Ends>, all: &'a Spans) -> (Option<&'a [usize]>, &'a Spans) {
        only.as_ref().map_or((None, all), |only| (Some(&only.rows), &only.spans))
    }
}

/// The rows of a sequence in activations `[rows, width]`.
pub(crate) fn rows_of<'a>(span: &Range<usize>, activations: &'a [f32], width: usize) -> &'a [f32] {
    &activations[span.start * width..span.end * width]
}

/// A pass of some rows of each sequence through the layers.
pub(crate) struct Batch<'a> {
    pub team: &'a Team,
    pub spans: Spans,
    /// The state of each sequence, which the layers update.
    pub states: Vec<&'a mut SequenceState>,
    /// Whether the states will be used again. Otherwise keys and values need not be kept.
    pub keeps_kv: bool,
    /// Whether the numbers of each row are, bit for bit, what they would be in a pass of its own.
    #[cfg(feature = "lm")]
    pub one_by_one: bool,
    /// The angles of each row, if there is a rotary embedding.
    pub angles: Vec<Angles>,
    /// Keys and values of this pass that later layers use, by the layer they come from.
    pub shared: BTreeMap<usize, SharedKv>,
}

impl<'a> Batch<'a> {
    /// The next `count` rows of each of the sequences with these states.
    pub(crate) fn new(
        team: &'a Team,
        sequences: impl IntoIterator<Item = (&'a mut SequenceState, usize)>,
        keeps_kv: bool,
        rotary: Option<&Rotary>,
    ) -> Self {
        let (mut states, mut lengths, mut angles) = (Vec::new(), Vec::new(), Vec::new());
        for (state, count) in sequences {
            if let Some(rotary) = rotary {
                angles.extend((state.position..state.position + count).map(|position| rotary.angles(position)));
            }
            states.push(state);
            lengths.push(count);
        }
        Batch {
            team,
            spans: Spans::new(lengths),
            states,
            keeps_kv,
            #[cfg(feature = "lm")]
            one_by_one: false,
            angles,
            shared: BTreeMap::new(),
        }
    }

    /// To be called when all layers are through.
    pub(crate) fn finish(self) {
        for (state, span) in self.states.into_iter().zip(self.spans.iter()) {
            state.position += span.len();
        }
    }
}

/// As [`for_rows`], for what all rows add to: `f` also gets `count` sums, zero at first, of the block alone. The sums of the blocks
/// are added in their order, so that the result does not depend on the threads.
#[cfg_attr(not(feature = "lm"), allow(dead_code))]
pub(crate) fn for_rows_summed(
    team: &Team,
    activations: &mut [f32],
    width: usize,
    count: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    /// Rows of a block.
    const ROWS: usize = 128;
    let blocks = activations.len().div_ceil((ROWS * width).max(1));
    let mut sums = vec![vec![0.0; count]; blocks];
    let pairs = activations.chunks_mut((ROWS * width).max(1)).zip(&mut sums);
    team.for_each(pairs.enumerate(), |(i, (rows, sums))| f(i * ROWS, rows, sums));
    let mut total = vec![0.0; count];
    sums.iter().for_each(|sums| add(sums, &mut total));
    total
}

/// x `[rows, width]`, or a copy of `only` some of its rows.
pub(crate) fn needed<'a>(x: &'a ArrayRef2<f32>, only: Option<&[usize]>) -> CowArray<'a, f32, Ix2> {
    only.map_or_else(|| x.view().into(), |rows| x.select(Axis(0), rows).into())
}

/// A copy of an array.
pub(crate) fn copied(team: &Team, x: &Array2<f32>) -> Buffer {
    let mut copy = Buffer::uninit(x.dim());
    for_rows(team, flat_mut(&mut copy), x.ncols(), |first, copy| {
        copy.copy_from_slice(&flat(x)[first * x.ncols()..][..copy.len()]);
    });
    copy
}

/// to += x
pub(crate) fn add_array(team: &Team, x: &Array2<f32>, to: &mut Array2<f32>) {
    for_rows(team, flat_mut(to), x.ncols(), |first, to| add(&flat(x)[first * x.ncols()..], to));
}

/// total += sums
pub(crate) fn add(sums: &[f32], total: &mut [f32]) {
    total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
}

/// Calls `f` with the rows of activations `[rows, width]` in blocks, and the first row of each.
pub(crate) fn for_rows(team: &Team, activations: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    /// Numbers that one thread takes at a time at least: some microseconds.
    const LEAST: usize = 8 << 10;
    /// And at most, so that what several operations do to them happens in a near cache.
    const MOST: usize = 64 << 10;
    let numbers = (activations.len() / (4 * team.threads())).clamp(LEAST, MOST);
    let rows = (numbers / width.max(1)).max(1);
    let blocks = activations.chunks_mut((rows * width).max(1)).enumerate();
    team.for_each(blocks, |(i, block)| f(i * rows, block));
}
