//! Softmax attention of frames over meta tokens and a causal window of frames, without an l × l matrix.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use super::math;
use super::matmul::{Out, PANEL, Packed, Rows, matmul_part};
use super::parallel;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Queries that pass over the keys together.
const QUERIES: usize = 24;
/// Keys whose scores are held at a time, for each of these queries.
const KEYS: usize = 8 * PANEL;

/// One sequence: l frames in front of which stand k meta tokens; rows of h numbers, the heads side by side.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a> {
    pub queries: Rows<'a>,
    pub keys: Rows<'a>,
    pub values: Rows<'a>,
    pub meta_keys: Rows<'a>,
    pub meta_values: Rows<'a>,
    /// l
    pub frames: usize,
    /// k
    pub meta: usize,
    /// p
    pub head_width: usize,
    /// Frames a frame sees, itself included; `None` is the whole past.
    pub window: Option<usize>,
}

impl<'a> Sequence<'a> {
    /// Scores are multiplied by 1/√p.
    fn scale(&self) -> f32 {
        1.0 / (self.head_width as f32).sqrt()
    }

    /// The first frame that frame `i` sees.
    fn first_seen(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }

    /// One head, as the first of what is left of the rows.
    pub(crate) fn head(&self, head: usize) -> Sequence<'a> {
        let column = head * self.head_width;
        Sequence {
            queries: self.queries.skip_columns(column),
            keys: self.keys.skip_columns(column),
            values: self.values.skip_columns(column),
            meta_keys: self.meta_keys.skip_columns(column),
            meta_values: self.meta_values.skip_columns(column),
            ..*self
        }
    }

    /// The key of the first head in a column: the meta tokens come first, then the frames.
    fn key(&self, column: usize) -> &'a [f32] {
        self.row(self.meta_keys, self.keys, column)
    }

    /// As [`key`](Self::key).
    fn value(&self, column: usize) -> &'a [f32] {
        self.row(self.meta_values, self.values, column)
    }

    fn row(&self, meta: Rows<'a>, frames: Rows<'a>, column: usize) -> &'a [f32] {
        match column.checked_sub(self.meta) {
            None => meta.row(column, self.head_width),
            Some(frame) => frames.row(frame, self.head_width),
        }
    }

    /// Meta tokens and frames that a frame sees, at most.
    pub(crate) fn most_seen(&self) -> usize {
        self.meta + self.window.map_or(self.frames, |window| window.min(self.frames))
    }

    /// All columns that frame `i` sees.
    fn seen(&self, i: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        (0..self.meta).chain(self.meta + self.first_seen(i)..self.meta + i + 1)
    }
}

/// Where ln Σ exp(score) of every frame and head `[l, a]` is kept for the backward pass.
pub(crate) type LogSums<'a> = Option<ArrayViewMut2<'a, f32>>;

/// out `[l, h]` = softmax(queries · keysᵀ/√p over what each frame sees) · values, head by head.
pub(crate) fn attend(sequence: Sequence, out: ArrayViewMut2<f32>, log_sums: LogSums) {
    let (l, h) = out.dim();
    if h == sequence.head_width {
        return attend_head(sequence, out, log_sums);
    }
    let half = h / sequence.head_width / 2;
    let (left, right) = out.split_at(Axis(1), half * sequence.head_width);
    let (left_sums, right_sums) = match log_sums.map(|sums| sums.split_at(Axis(1), half)) {
        Some((left, right)) => (Some(left), Some(right)),
        None => (None, None),
    };
    parallel::join_if(
        l * sequence.most_seen() * h,
        || attend(sequence, left, left_sums),
        || attend(sequence.head(half), right, right_sums),
    );
}

fn attend_head(head: Sequence, mut out: ArrayViewMut2<f32>, log_sums: LogSums) {
    let (columns, p) = (head.meta + head.frames, head.head_width);
    // What a query does not see has weight 0, and 0 times a number is 0 only if the number is finite. Otherwise frames
    // must really not be touched by what lies after them.
    if !(0..columns).all(|column| all_finite(head.value(column))) {
        if let Some(mut sums) = log_sums {
            sums.fill(f32::NAN); // such a sequence has no gradient
        }
        return attend_head_plainly(head, out);
    }
    let keys = Packed::from_rows(columns, p, |column| head.key(column), None);
    let values = Packed::from_columns(p, columns, |column| head.value(column));
    let mut log_sums = log_sums;
    let mut log_sums = log_sums.as_mut().map(|sums| sums.axis_chunks_iter_mut(Axis(0), QUERIES));
    let tiles: Vec<_> = (0..)
        .step_by(QUERIES)
        .zip(out.axis_chunks_iter_mut(Axis(0), QUERIES))
        .map(|(first, out)| (first, out, log_sums.as_mut().and_then(|sums| sums.next())))
        .collect();
    let attend = |(first, out, sums)| attend_tile(head, &keys, &values, first, out, sums);
    if head.frames > 16 * QUERIES {
        parallel::for_each(tiles, attend);
    } else {
        tiles.into_iter().for_each(attend);
    }
}

/// No NaN and no infinity. Written so that the compiler vectorises it.
fn all_finite(x: &[f32]) -> bool {
    let largest = x.iter().fold(0, |largest, x| u32::max(largest, x.abs().to_bits()));
    largest < f32::INFINITY.to_bits()
}

/// The queries from `first` on, as many as `out` has rows. Keys come in pieces, and what is summed so far is rescaled
/// whenever a piece holds a new largest score (the online softmax of flash attention).
fn attend_tile(
    head: Sequence,
    keys: &Packed,
    values: &Packed,
    first: usize,
    mut out: ArrayViewMut2<f32>,
    log_sums: LogSums,
) {
    let (m, p) = out.dim();
    let k = head.meta;
    let queries = Rows { data: &head.queries.data[first * head.queries.stride..], ..head.queries };
    let mut sums = vec![0.0; m * p];
    let mut softmax = vec![RunningSoftmax { largest: f32::NEG_INFINITY, sum: 0.0 }; m];
    let mut scores = vec![0.0; m * KEYS];

    for columns in pieces(k, k + head.first_seen(first), k + first + m) {
        let width = columns.len();
        matmul_part(queries, m, keys, columns.clone(), 0..p, &mut scores, width, Out::Set);
        for (i, softmax) in softmax.iter_mut().enumerate() {
            let frame = first + i;
            let here = |from: usize, to: usize| {
                let place = |column: usize| column.clamp(columns.start, columns.end) - columns.start;
                place(from)..place(to)
            };
            dispatch(SoftmaxRow {
                scores: &mut scores[i * width..][..width],
                meta: here(0, k),
                frames: here(k + head.first_seen(frame), k + frame + 1),
                scale: head.scale(),
                softmax,
                sums: &mut sums[i * p..][..p],
            });
        }
        let rows = Rows { data: &scores, stride: width };
        matmul_part(rows, m, values, 0..p, columns, &mut sums, p, Out::Add);
    }
    for (i, mut out) in out.rows_mut().into_iter().enumerate() {
        for (out, sum) in out.iter_mut().zip(&sums[i * p..]) {
            *out = sum / softmax[i].sum;
        }
    }
    if let Some(mut sums) = log_sums {
        sums.iter_mut().zip(softmax).for_each(|(sum, softmax)| *sum = softmax.largest + softmax.sum.ln());
    }
}

/// The columns of keys that some query of a tile sees, in pieces that start at a panel: the `k` meta tokens in front, and
/// from `seen` to `end`. Where there is nothing between the two to be left out, they are one run.
fn pieces(k: usize, seen: usize, end: usize) -> impl Iterator<Item = Range<usize>> {
    let run = |from: usize, to: usize| (from..to).step_by(KEYS).map(move |begin| begin..to.min(begin + KEYS));
    let hidden = k.next_multiple_of(PANEL)..seen / PANEL * PANEL;
    if hidden.is_empty() { run(0, 0).chain(run(0, end)) } else { run(0, k).chain(run(hidden.end, end)) }
}

/// The softmax of one query over the keys so far.
#[derive(Clone, Copy)]
struct RunningSoftmax {
    largest: f32,
    /// Σ exp(score − largest)
    sum: f32,
}

/// Turns the scores of one query into weights exp(score − largest), those of hidden keys into 0, and rescales the sums
/// to the new largest score.
struct SoftmaxRow<'a> {
    scores: &'a mut [f32],
    /// The columns of `scores` that the query sees, in two runs.
    meta: Range<usize>,
    frames: Range<usize>,
    scale: f32,
    softmax: &'a mut RunningSoftmax,
    sums: &'a mut [f32],
}

impl Kernel for SoftmaxRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SoftmaxRow { scores, meta, frames, scale, softmax, sums } = self;
        if meta.is_empty() && frames.is_empty() {
            scores.fill(0.0);
            return;
        }
        let mut largest = softmax.largest;
        for run in [&meta, &frames] {
            largest = max(s, &scores[run.clone()], scale, largest);
        }
        scores[..meta.start].fill(0.0);
        scores[meta.end..frames.start.max(meta.end)].fill(0.0);
        scores[frames.end.max(meta.end)..].fill(0.0);
        let mut sum = 0.0;
        for run in [meta, frames] {
            sum += exp_sum(s, &mut scores[run], scale, largest);
        }
        let faded = (softmax.largest - largest).exp();
        if faded != 1.0 {
            for sum in sums.chunks_mut(LANES) {
                s.store_some(s.mul(s.splat(faded), s.load_some(sum)), sum);
            }
        }
        *softmax = RunningSoftmax { largest, sum: softmax.sum * faded + sum };
    }
}

/// The largest of scale·x and `so_far`.
#[inline(always)]
fn max<S: Simd>(s: S, x: &[f32], scale: f32, so_far: f32) -> f32 {
    let (whole, rest) = x.as_chunks();
    let mut largest = s.splat(f32::NEG_INFINITY);
    for x in whole {
        largest = s.max(s.load(x), largest);
    }
    let mut lanes = [0.0; LANES];
    s.store(largest, &mut lanes);
    lanes.iter().chain(rest).fold(so_far, |largest, x| largest.max(scale * x))
}

/// Replaces x by exp(scale·x − largest) and returns the sum.
#[inline(always)]
fn exp_sum<S: Simd>(s: S, x: &mut [f32], scale: f32, largest: f32) -> f32 {
    let (scale_all, shift) = (s.splat(scale), s.splat(-largest));
    let mut sum = s.splat(0.0);
    let (whole, rest) = x.as_chunks_mut();
    for x in whole {
        let e = math::exp(s, s.mul_add(scale_all, s.load(x), shift));
        s.store(e, x);
        sum = s.add(sum, e);
    }
    let e = math::exp(s, s.mul_add(scale_all, s.load_some(rest), shift));
    s.store_some(e, rest);
    s.sum(sum) + rest.iter().sum::<f32>()
}

/// The weights of frame `i` of one head: first those of the k meta tokens, then those of all frames, hidden ones 0. The
/// oracle of the fast path.
pub(crate) fn weights(head: Sequence, i: usize) -> Vec<f32> {
    let query = head.queries.row(i, head.head_width);
    let mut weights = vec![0.0; head.meta + head.frames];
    let mut largest = f32::NEG_INFINITY;
    for column in head.seen(i) {
        let score: f32 = query.iter().zip(head.key(column)).map(|(q, k)| q * k).sum();
        weights[column] = score * head.scale();
        largest = largest.max(weights[column]);
    }
    let mut sum = 0.0;
    for column in head.seen(i) {
        weights[column] = (weights[column] - largest).exp();
        sum += weights[column];
    }
    for column in head.seen(i) {
        weights[column] /= sum;
    }
    weights
}

/// One head by the definition, touching nothing a frame does not see.
fn attend_head_plainly(head: Sequence, mut out: ArrayViewMut2<f32>) {
    for (i, mut out) in out.rows_mut().into_iter().enumerate() {
        let weights = weights(head, i);
        out.fill(0.0);
        for column in head.seen(i) {
            out.iter_mut().zip(head.value(column)).for_each(|(out, value)| *out += weights[column] * value);
        }
    }
}

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
    if h == sequence.head_width {
        return attend_head_backward(sequence, attended, gradient);
    }
    let half = h / sequence.head_width / 2;
    let column = half * sequence.head_width;
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
    let (columns, p, k) = (head.meta + head.frames, head.head_width, head.meta);
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

/// Keys and values `[rows, h]` of meta tokens or of frames.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
}

/// One query `[h]` over everything in `seen`: the streaming form of [`attend`].
pub(crate) fn attend_step(query: &[f32], seen: [Seen; 2], heads: usize, out: &mut [f32]) {
    dispatch(Step { query, seen, heads, out });
}

struct Step<'a> {
    query: &'a [f32],
    seen: [Seen<'a>; 2],
    heads: usize,
    out: &'a mut [f32],
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let h = self.query.len();
        let p = h / self.heads;
        let scale = 1.0 / (p as f32).sqrt();
        let mut scores = Vec::with_capacity(self.seen.iter().map(|seen| seen.keys.len() / h).sum());
        for (head, out) in self.out.chunks_exact_mut(p).enumerate() {
            let columns = head * p..(head + 1) * p;
            let query = &self.query[columns.clone()];
            scores.clear();
            for seen in &self.seen {
                for key in seen.keys.chunks_exact(h) {
                    scores.push(math::dot(s, query, &key[columns.clone()]));
                }
            }
            let largest = max(s, &scores, scale, f32::NEG_INFINITY);
            let sum = exp_sum(s, &mut scores, scale, largest);
            out.fill(0.0);
            let values = self.seen.iter().flat_map(|seen| seen.values.chunks_exact(h));
            for (weight, value) in scores.iter().zip(values) {
                math::axpy(s, *weight, &value[columns.clone()], out);
            }
            for out in out {
                *out /= sum;
            }
        }
    }
}

#[cfg(test)]
mod tests;
