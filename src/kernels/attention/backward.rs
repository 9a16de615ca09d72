//! The gradient of attention.

use std::ops::Range;

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};

use super::{Head, KEYS, QUERIES, pieces};
use crate::kernels::math;
use crate::kernels::matmul::{Packed, STRIP, matmul_across, matmul_part};
use crate::kernels::memory::Scratch;
use crate::kernels::profiler::{Stage, timed};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// What [`attend_backward`] writes, for one head of keys and its g heads of queries; all overwritten.
pub(crate) struct AttentionGradient<'a> {
    /// `[l, g·p]`
    pub queries: ArrayViewMut2<'a, f32>,
    /// `[l, p]`
    pub keys: ArrayViewMut2<'a, f32>,
    /// `[l, value_width]`
    pub values: ArrayViewMut2<'a, f32>,
    /// `[past, p]`
    pub past_keys: ArrayViewMut2<'a, f32>,
    /// `[past, value_width]`
    pub past_values: ArrayViewMut2<'a, f32>,
}

/// What the forward pass left: its output and the gradient of that `[l, g·value_width]`, and the log-sums `[l, g]`.
#[derive(Clone, Copy)]
pub(crate) struct AttentionOutput<'a> {
    pub out: Rows<'a>,
    pub dout: Rows<'a>,
    pub log_sums: ArrayView2<'a, f32>,
}

/// The gradient of [`attend_tile`](super::attend_tile) over all tiles of the g heads of queries that share a head of keys;
/// `head` has the queries of the first. Queries that are not `used` have no gradient. The weights P = exp(scores − log-sum) are computed
/// again, piece by piece; with dout the gradient of out = P·V,
///
/// ```text
/// dV = Pᵀ·dout
/// dS = P ⊙ (dout·Vᵀ − Σ dout ⊙ out)/√p          of the products of queries and keys
/// dQ = dS·K,  dK = dSᵀ·Q
/// ```
pub(crate) fn attend_backward(head: Head, used: Range<usize>, output: AttentionOutput, gradient: AttentionGradient) {
    let work = head.work(used.start, used.len(), 5 * output.log_sums.ncols());
    timed(Stage::Attention, work, || group_backward(head, used, output, gradient));
}

/// Numbers of work memory that a thread keeps; what a long sequence takes more is given back.
const KEPT: usize = 1 << 20;

fn group_backward(head: Head, used: Range<usize>, output: AttentionOutput, mut gradient: AttentionGradient) {
    thread_local! {
        static WORK: Scratch<f32> = const { Scratch::new(Vec::new()) };
    }
    let (columns, p, v) = (head.columns(), head.key_width, head.value_width);
    let keys = Packed::from_rows(columns, p, |column| head.key(column), None);
    let values = Packed::from_rows(columns, v, |column| head.value(column), None);
    let keys_across = Packed::from_columns(p, columns, |column| head.key(column));
    let scores = QUERIES * KEYS.next_multiple_of(STRIP);
    let mut work = WORK.take();
    work.resize(work.len().max(columns * (p + v) + 2 * scores + QUERIES * p), 0.0);
    let (dkeys, rest) = work.split_at_mut(columns * p);
    let (dvalues, rest) = rest.split_at_mut(columns * v);
    let (weights, rest) = rest.split_at_mut(scores); // P
    let (dscores, rest) = rest.split_at_mut(scores); // dS
    dkeys.fill(0.0);
    dvalues.fill(0.0);
    if used.len() < head.frames {
        gradient.queries.fill(0.0);
    }
    for (g, log_sums) in output.log_sums.columns().into_iter().enumerate() {
        let (out, dout) = (output.out.skip_columns(g * v), output.dout.skip_columns(g * v));
        let queries = head.queries.skip_columns(g * p);
        for first in used.clone().step_by(QUERIES) {
            let m = QUERIES.min(used.end - first);
            let (queries, out, dout) = (queries.skip_rows(first), out.skip_rows(first), dout.skip_rows(first));
            let queries_across = Packed::from_columns(p, m, |i| queries.row(i, p));
            let dout_across = Packed::from_columns(v, m, |i| dout.row(i, v));
            let dqueries = &mut rest[..m * p];
            dqueries.fill(0.0);
            // of the frames, counted from the first of the past
            let asking = head.before() + first;
            for columns in pieces(head.meta, head.meta + head.first_seen(asking), head.meta + asking + m) {
                let (width, stride) = (columns.len(), columns.len().next_multiple_of(STRIP));
                matmul_part(queries, m, &keys, columns.clone(), 0..p, weights, stride, Out::Set);
                matmul_part(dout, m, &values, columns.clone(), 0..v, dscores, stride, Out::Set);
                dispatch(SoftmaxBackward {
                    head: &head,
                    first: asking,
                    columns: columns.clone(),
                    scores: &mut weights[..m * stride],
                    dscores,
                    stride,
                    log_sums: log_sums.slice(s![first..first + m]),
                    out,
                    dout,
                });
                let scores = Rows { data: dscores, stride };
                matmul_part(scores, m, &keys_across, 0..p, columns.clone(), dqueries, p, Out::Add);
                let products =
                    [(&queries_across, &*dscores, &mut *dkeys, p), (&dout_across, &*weights, &mut *dvalues, v)];
                for (across, from, to, size) in products {
                    let to = &mut to[columns.start * size..columns.end * size];
                    matmul_across(Rows { data: from, stride }, width, across, to, Out::Add);
                }
            }
            for (i, dquery) in dqueries.chunks_exact(p).enumerate() {
                numbers(gradient.queries.row_mut(first + i))[g * p..][..p].copy_from_slice(dquery);
            }
        }
    }
    for (from, mut past, mut frames) in
        [(&*dkeys, gradient.past_keys, gradient.keys), (&*dvalues, gradient.past_values, gradient.values)]
    {
        let width = frames.ncols();
        let rows = past.rows_mut().into_iter().chain(frames.rows_mut());
        rows.zip(from.chunks_exact(width)).for_each(|(to, from)| numbers(to).copy_from_slice(from));
    }
    if work.capacity() <= KEPT {
        WORK.set(work);
    }
}

/// Those of a row, side by side.
fn numbers(row: ArrayViewMut1<'_, f32>) -> &mut [f32] {
    row.into_slice().expect("columns of rows in order")
}

/// Turns the scores of a tile into its weights P, and dout·Vᵀ into dS = P ⊙ (dout·Vᵀ − Σ dout ⊙ out)·scale; both are 0 for
/// hidden keys.
struct SoftmaxBackward<'a> {
    head: &'a Head<'a>,
    /// The frame of the first query, counted from the first of the past.
    first: usize,
    /// The keys of the scores.
    columns: Range<usize>,
    /// `[queries, columns]`, the rows `stride` apart.
    scores: &'a mut [f32],
    dscores: &'a mut [f32],
    stride: usize,
    /// `[queries]`
    log_sums: ArrayView1<'a, f32>,
    /// `[queries, value_width]`
    out: Rows<'a>,
    dout: Rows<'a>,
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        /// Rows that are fetched before their turn.
        const AHEAD: usize = 4;
        let (head, width) = (self.head, self.columns.len());
        let scale = s.splat(head.scale());
        let rows = self.scores.chunks_mut(self.stride).zip(self.dscores.chunks_mut(self.stride));
        for (i, ((scores, dscores), log_sum)) in rows.zip(self.log_sums).enumerate() {
            let [meta, frames] = head.seen_of(self.first + i, &self.columns);
            for hidden in [0..meta.start, meta.end..frames.start.max(meta.end), frames.end.max(meta.end)..width] {
                scores[hidden.clone()].fill(0.0);
                dscores[hidden].fill(0.0);
            }
            // the forward pass wrote them long ago, and each row is short
            for line in (0..head.value_width).step_by(LANES) {
                s.prefetch(self.out.data.as_ptr().wrapping_add((i + AHEAD) * self.out.stride + line));
            }
            let (out, dout) = (self.out.row(i, head.value_width), self.dout.row(i, head.value_width));
            let mut projection = s.splat(0.0);
            for (out, dout) in out.chunks(LANES).zip(dout.chunks(LANES)) {
                projection = s.mul_add(s.load_some(out), s.load_some(dout), projection);
            }
            let (shift, projection) = (s.splat(-log_sum), s.splat(s.sum(projection)));
            for run in [meta, frames] {
                for (score, dscore) in scores[run.clone()].chunks_mut(LANES).zip(dscores[run].chunks_mut(LANES)) {
                    let weight = math::exp(s, s.mul_add(scale, s.load_some(score), shift));
                    let dweight = s.sub(s.load_some(dscore), projection);
                    s.store_some(weight, score);
                    s.store_some(s.mul(s.mul(weight, dweight), scale), dscore);
                }
            }
        }
    }
}
