//! The gradient of attention.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use super::{KEYS, QUERIES, Sequence, pieces};
use crate::kernels::clock::{Part, timed};
use crate::kernels::math;
use crate::kernels::matmul::{Out, Packed, Rows, matmul_part};
use crate::kernels::parallel;
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// What [`attend_backward`] writes, for one sequence; all overwritten.
pub(crate) struct AttentionGradient<'a> {
    /// `[l, h]`
    pub queries: ArrayViewMut2<'a, f32>,
    pub keys: ArrayViewMut2<'a, f32>,
    pub values: ArrayViewMut2<'a, f32>,
    /// `[k, h]`
    pub meta_keys: ArrayViewMut2<'a, f32>,
    pub meta_values: ArrayViewMut2<'a, f32>,
}

impl<'a> AttentionGradient<'a> {
    /// The columns before `column`, and the others.
    fn split_at(self, column: usize) -> (Self, Self) {
        let (queries, right_queries) = self.queries.split_at(Axis(1), column);
        let (keys, right_keys) = self.keys.split_at(Axis(1), column);
        let (values, right_values) = self.values.split_at(Axis(1), column);
        let (meta_keys, right_meta_keys) = self.meta_keys.split_at(Axis(1), column);
        let (meta_values, right_meta_values) = self.meta_values.split_at(Axis(1), column);
        let right = AttentionGradient {
            queries: right_queries,
            keys: right_keys,
            values: right_values,
            meta_keys: right_meta_keys,
            meta_values: right_meta_values,
        };
        (AttentionGradient { queries, keys, values, meta_keys, meta_values }, right)
    }
}

/// What the forward pass left: its output and the gradient of that `[l, h]`, and the log-sums `[l, a]`.
#[derive(Clone, Copy)]
pub(crate) struct Attended<'a> {
    pub out: Rows<'a>,
    pub dout: Rows<'a>,
    pub log_sums: ArrayView2<'a, f32>,
}

/// The gradient of [`attend`]. The weights P = exp(scores − log-sum) are computed again, piece by piece; with dout the
/// gradient of out = P·V,
///
/// ```text
/// dV = Pᵀ·dout
/// dS = P ⊙ (dout·Vᵀ − Σ dout ⊙ out)/√p          of the products of queries and keys
/// dQ = dS·K,  dK = dSᵀ·Q
/// ```
pub(crate) fn attend_backward(sequence: Sequence, attended: Attended, gradient: AttentionGradient) {
    let (l, h) = gradient.queries.dim();
    if h == sequence.key_width {
        let work = sequence.work(0, l, 5);
        return timed(Part::Attention, work, || attend_head_backward(sequence, attended, gradient));
    }
    let half = h / sequence.key_width / 2;
    let column = half * sequence.key_width;
    let (left, right) = gradient.split_at(column);
    let (left_sums, right_sums) = attended.log_sums.split_at(Axis(1), half);
    let right_attended = Attended {
        out: attended.out.skip_columns(column),
        dout: attended.dout.skip_columns(column),
        log_sums: right_sums,
    };
    parallel::join_if(
        2 * l * sequence.most_seen() * h,
        || attend_backward(sequence, Attended { log_sums: left_sums, ..attended }, left),
        || attend_backward(sequence.head(half), right_attended, right),
    );
}

fn attend_head_backward(head: Sequence, attended: Attended, mut gradient: AttentionGradient) {
    let (columns, p, k) = (head.meta + head.frames, head.key_width, head.meta);
    let keys = Packed::from_rows(columns, p, |column| head.key(column), None);
    let values = Packed::from_rows(columns, p, |column| head.value(column), None);
    let keys_across = Packed::from_columns(p, columns, |column| head.key(column));
    let (mut dkeys, mut dvalues) = (vec![0.0; columns * p], vec![0.0; columns * p]);
    let mut weights = vec![0.0; QUERIES * KEYS]; // P
    let mut dscores = vec![0.0; QUERIES * KEYS]; // dS
    let mut turned = vec![0.0; QUERIES * KEYS];
    for first in (0..head.frames).step_by(QUERIES) {
        let m = QUERIES.min(head.frames - first);
        let queries = Rows { data: &head.queries.data[first * head.queries.stride..], ..head.queries };
        let dout = Rows { data: &attended.dout.data[first * attended.dout.stride..], ..attended.dout };
        let queries_across = Packed::from_columns(p, m, |i| queries.row(i, p));
        let dout_across = Packed::from_columns(p, m, |i| dout.row(i, p));
        let mut dqueries = vec![0.0; m * p];
        for columns in pieces(k, k + head.first_seen(first), k + first + m) {
            let width = columns.len();
            matmul_part(queries, m, &keys, columns.clone(), 0..p, &mut weights, width, Out::Set);
            matmul_part(dout, m, &values, columns.clone(), 0..p, &mut dscores, width, Out::Set);
            for i in 0..m {
                let frame = first + i;
                let here = |from: usize, to: usize| {
                    let place = |column: usize| column.clamp(columns.start, columns.end) - columns.start;
                    place(from)..place(to)
                };
                let dout = dout.row(i, p);
                dispatch(SoftmaxBackward {
                    scores: &mut weights[i * width..][..width],
                    dscores: &mut dscores[i * width..][..width],
                    meta: here(0, k),
                    frames: here(k + head.first_seen(frame), k + frame + 1),
                    scale: head.scale(),
                    log_sum: attended.log_sums[[frame, 0]],
                    projection: dout.iter().zip(attended.out.row(frame, p)).map(|(dout, out)| dout * out).sum(),
                });
            }
            let scores = Rows { data: &dscores, stride: width };
            matmul_part(scores, m, &keys_across, 0..p, columns.clone(), &mut dqueries, p, Out::Add);
            let here = columns.start * p..columns.end * p;
            for (across, from, to) in
                [(&queries_across, &dscores, &mut dkeys[here.clone()]), (&dout_across, &weights, &mut dvalues[here])]
            {
                for (i, row) in from.chunks_exact(width).enumerate().take(m) {
                    row.iter().enumerate().for_each(|(column, number)| turned[column * m + i] = *number);
                }
                let rows = Rows { data: &turned, stride: m };
                matmul_part(rows, width, across, 0..p, 0..m, to, p, Out::Add);
            }
        }
        for (i, dquery) in dqueries.chunks_exact(p).enumerate() {
            gradient.queries.row_mut(first + i).iter_mut().zip(dquery).for_each(|(to, from)| *to = *from);
        }
    }
    for (from, mut meta, mut frames) in
        [(&dkeys, gradient.meta_keys, gradient.keys), (&dvalues, gradient.meta_values, gradient.values)]
    {
        let rows = meta.rows_mut().into_iter().chain(frames.rows_mut());
        for (mut to, from) in rows.zip(from.chunks_exact(p)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    }
}

/// Turns the scores of one query into its weights P, and dout·Vᵀ into dS = P ⊙ (dout·Vᵀ − projection)·scale; both are 0 for
/// hidden keys.
struct SoftmaxBackward<'a> {
    scores: &'a mut [f32],
    dscores: &'a mut [f32],
    /// The columns that the query sees, in two runs.
    meta: Range<usize>,
    frames: Range<usize>,
    scale: f32,
    log_sum: f32,
    /// Σ dout ⊙ out
    projection: f32,
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SoftmaxBackward { scores, dscores, meta, frames, scale, log_sum, projection } = self;
        for hidden in [0..meta.start, meta.end..frames.start.max(meta.end), frames.end.max(meta.end)..scores.len()] {
            scores[hidden.clone()].fill(0.0);
            dscores[hidden].fill(0.0);
        }
        let (scale_all, shift, projection) = (s.splat(scale), s.splat(-log_sum), s.splat(projection));
        for run in [meta, frames] {
            for (score, dscore) in scores[run.clone()].chunks_mut(LANES).zip(dscores[run].chunks_mut(LANES)) {
                let weight = math::exp(s, s.mul_add(scale_all, s.load_some(score), shift));
                let dweight = s.sub(s.load_some(dscore), projection);
                s.store_some(weight, score);
                s.store_some(s.mul(s.mul(weight, dweight), scale_all), dscore);
            }
        }
    }
}
