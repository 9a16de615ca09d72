//! Softmax attention of frames over meta tokens and a causal window of frames, without an l × l matrix.

use std::ops::Range;

use ndarray::{ArrayViewMut2, Axis};

use super::math;
use super::matmul::{PANEL, Packed, matmul_part};
use super::memory::{Scratch, with_scratch};
use super::profiler::{Cost, Stage, timed};
use super::rows::{Out, Rows};
use super::simd::{Kernel, LANES, Simd, dispatch};

pub(crate) use backward::{AttentionGradient, AttentionOutput, attend_backward};
pub(crate) use step::{KvElement, KvRows, attend_step};

mod backward;
mod step;

/// Queries that pass over the keys together.
const QUERIES: usize = 24;
/// Keys whose scores are held at a time, for each of these queries.
const KEYS: usize = 8 * PANEL;

/// One head of one sequence: the queries of some frames, and the keys and values they may see. Rows may be longer than a head.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    /// `[l, p]`
    pub queries: Rows<'a>,
    /// `[l, p]`, of the same frames.
    pub keys: Rows<'a>,
    /// `[l, value_width]`
    pub values: Rows<'a>,
    /// `[past, p]`, of what came before them: meta tokens, then frames in their order.
    pub past_keys: Rows<'a>,
    /// `[past, value_width]`
    pub past_values: Rows<'a>,
    pub past: usize,
    /// Meta tokens among `past`, which every frame sees.
    pub meta: usize,
    /// l
    pub frames: usize,
    /// p, of queries and keys.
    pub key_width: usize,
    /// Width of a value, and of the output.
    pub value_width: usize,
    /// Frames a frame sees, itself included; `None` is the whole past.
    pub window: Option<usize>,
}

impl<'a> Head<'a> {
    /// Scores are multiplied by 1/√p.
    fn scale(&self) -> f32 {
        1.0 / (self.key_width as f32).sqrt()
    }

    /// Frames in front of the first query.
    fn before(&self) -> usize {
        self.past - self.meta
    }

    /// Keys there are. Meta tokens are the first columns of the scores, then come all frames.
    fn columns(&self) -> usize {
        self.past + self.frames
    }

    /// The first frame that frame `i` sees, counted from the first of the past.
    fn first_seen(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }

    fn key(&self, column: usize) -> &'a [f32] {
        match column.checked_sub(self.past) {
            None => self.past_keys.row(column, self.key_width),
            Some(frame) => self.keys.row(frame, self.key_width),
        }
    }

    fn value(&self, column: usize) -> &'a [f32] {
        match column.checked_sub(self.past) {
            None => self.past_values.row(column, self.value_width),
            Some(frame) => self.values.row(frame, self.value_width),
        }
    }

    /// The cost of the queries of `m` frames from `first` on: `products` multiplications of a width with every key they
    /// see, and an exp.
    fn work(&self, first: usize, m: usize, products: usize) -> Cost {
        // keys of frames that the first so many frames see, all together
        let seen = |frames: usize| {
            let full = self.window.map_or(0, |window| frames.saturating_sub(window));
            let growing = frames - full;
            growing * (growing + 1) / 2 + full * growing
        };
        let first = self.before() + first;
        let pairs = (m * self.meta + seen(first + m) - seen(first)) as u64;
        let width = (self.key_width + self.value_width) as u64 / 2;
        Cost { multiply_adds: products as u64 * pairs * width, exps: pairs, ..Cost::default() }
    }

    /// Of these columns, those that frame `i` sees, counted from the first of them: meta tokens, and frames.
    #[inline(always)]
    fn seen_of(&self, i: usize, columns: &Range<usize>) -> [Range<usize>; 2] {
        let place = |column: usize| column.clamp(columns.start, columns.end) - columns.start;
        let frames = self.meta + self.first_seen(i)..self.meta + i + 1;
        [place(0)..place(self.meta), place(frames.start)..place(frames.end)]
    }

    /// All columns that frame `i` sees.
    fn seen(&self, i: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        (0..self.meta).chain(self.meta + self.first_seen(i)..self.meta + i + 1)
    }
}

/// Where ln Σ exp(score) of every frame and head `[l, a]` is kept for the backward pass.
pub(crate) type LogSums<'a> = Option<ArrayViewMut2<'a, f32>>;

/// The keys and values of one head in the order in which products read them.
pub(crate) struct PackedHead {
    keys: Packed,
    values: Packed,
}

impl PackedHead {
    /// `None` where some value is not finite. What a query does not see has weight 0, and 0 times a number is 0 only if the
    /// number is finite; otherwise frames must really not be touched by what lies after them.
    pub(crate) fn new(head: &Head) -> Option<Self> {
        let columns = head.columns();
        let work = Cost::numbers(2 * columns * (head.key_width + head.value_width));
        timed(Stage::Attention, work, || {
            (0..columns).all(|column| all_finite(head.value(column))).then(|| PackedHead {
                keys: Packed::from_rows(columns, head.key_width, |column| head.key(column), None),
                values: Packed::from_columns(head.value_width, columns, |column| head.value(column)),
            })
        })
    }
}

/// Queries of one head that pass over the keys together: which is the first, where their output goes, and their log-sums, which
/// the backward pass reads.
pub(crate) struct Tile<'a> {
    first: usize,
    out: ArrayViewMut2<'a, f32>,
    log_sums: LogSums<'a>,
}

impl Tile<'_> {
    /// Its queries, counted from the first of the head.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.out.nrows()
    }
}

/// All queries of one head.
pub(crate) fn tiles<'a>(out: ArrayViewMut2<'a, f32>, log_sums: LogSums<'a>) -> Vec<Tile<'a>> {
    let mut out = out;
    let mut tiles = Vec::new();
    let mut log_sums = log_sums;
    while !out.is_empty() {
        let size = QUERIES.min(out.nrows());
        let (here, below) = out.split_at(Axis(0), size);
        let (sums_here, sums_below) = match log_sums.map(|sums| sums.split_at(Axis(0), size)) {
            Some((here, below)) => (Some(here), Some(below)),
            None => (None, None),
        };
        tiles.push(Tile { first: tiles.len() * QUERIES, out: here, log_sums: sums_here });
        (out, log_sums) = (below, sums_below);
    }
    tiles
}

/// No NaN and no infinity. Written so that the compiler vectorises it.
fn all_finite(x: &[f32]) -> bool {
    let largest = x.iter().fold(0, |largest, x| u32::max(largest, x.abs().to_bits()));
    largest < f32::INFINITY.to_bits()
}

/// out = softmax(queries · keysᵀ/√p over what each frame sees) · values, for one tile of queries.
pub(crate) fn attend_tile(head: Head, packed: Option<&PackedHead>, tile: Tile) {
    let work = head.work(tile.first, tile.out.nrows(), 2);
    timed(Stage::Attention, work, || attend_queries(head, packed, tile));
}

/// Keys come in pieces, and what is summed so far is rescaled whenever a piece holds a new largest score (the online
/// softmax of flash attention).
fn attend_queries(head: Head, packed: Option<&PackedHead>, tile: Tile) {
    let Tile { first, mut out, log_sums } = tile;
    let Some(PackedHead { keys, values }) = packed else {
        if let Some(mut sums) = log_sums {
            sums.fill(f32::NAN); // such a sequence has no gradient
        }
        return attend_plainly(head, first, out);
    };
    thread_local! {
        static WORK: Scratch<f32> = const { Scratch::new(Vec::new()) };
    }
    let (m, width_out) = out.dim();
    let k = head.meta;
    let queries = head.queries.skip_rows(first);
    let first = head.before() + first;
    let mut softmax = [RunningSoftmax { largest: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
    let softmax = &mut softmax[..m];
    with_scratch(&WORK, m * (width_out + KEYS), |work| {
        let (sums, scores) = work.split_at_mut(m * width_out);
        sums.fill(0.0);
        for columns in pieces(k, k + head.first_seen(first), k + first + m) {
            let width = columns.len();
            matmul_part(queries, m, keys, columns.clone(), 0..head.key_width, scores, width, Out::Set);
            dispatch(SoftmaxTile { head: &head, first, columns: columns.clone(), scores, softmax, sums });
            let rows = Rows { data: scores, stride: width };
            matmul_part(rows, m, values, 0..width_out, columns, sums, width_out, Out::Add);
        }
        for ((mut out, sums), softmax) in out.rows_mut().into_iter().zip(sums.chunks(width_out)).zip(&*softmax) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum / softmax.sum);
        }
    });
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

/// Turns the scores of a tile into weights exp(score − largest), those of hidden keys into 0, and rescales the sums to the new
/// largest scores.
struct SoftmaxTile<'a> {
    head: &'a Head<'a>,
    /// The frame of the first query, counted from the first of the past.
    first: usize,
    /// The keys of the scores.
    columns: Range<usize>,
    /// `[queries, columns]`
    scores: &'a mut [f32],
    /// `[queries]`
    softmax: &'a mut [RunningSoftmax],
    /// `[queries, value_width]`
    sums: &'a mut [f32],
}

impl Kernel for SoftmaxTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.scores.chunks_mut(self.columns.len()).zip(self.sums.chunks_mut(self.head.value_width));
        for (i, (softmax, (scores, sums))) in self.softmax.iter_mut().zip(rows).enumerate() {
            let seen = self.head.seen_of(self.first + i, &self.columns);
            soften(s, scores, seen, self.head.scale(), softmax, sums);
        }
    }
}

/// The same for one query, which sees two runs of the columns: meta tokens, and frames.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    scores: &mut [f32],
    [meta, frames]: [Range<usize>; 2],
    scale: f32,
    softmax: &mut RunningSoftmax,
    sums: &mut [f32],
) {
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
        if !run.is_empty() {
            sum += exp_sum(s, &mut scores[run], scale, largest);
        }
    }
    if largest == softmax.largest {
        softmax.sum += sum;
        return;
    }
    // before the first score there is nothing to fade; a sum of scores that are all NaN stays NaN
    if softmax.largest > f32::NEG_INFINITY || softmax.sum != 0.0 {
        let faded = (softmax.largest - largest).exp();
        for sum in sums.chunks_mut(LANES) {
            s.store_some(s.mul(s.splat(faded), s.load_some(sum)), sum);
        }
        sum += softmax.sum * faded;
    }
    *softmax = RunningSoftmax { largest, sum };
}

/// The largest of scale·x and `so_far`; NaN is passed over.
#[inline(always)]
fn max<S: Simd>(s: S, x: &[f32], scale: f32, so_far: f32) -> f32 {
    // two vectors, which do not wait for each other
    let mut largest = [s.splat(f32::NEG_INFINITY); 2];
    let (pairs, rest) = x.as_chunks::<{ 2 * LANES }>();
    for pair in pairs {
        for (largest, x) in largest.iter_mut().zip(pair.as_chunks().0) {
            *largest = s.max(s.load(x), *largest);
        }
    }
    let (whole, rest) = rest.as_chunks();
    for x in whole {
        largest[0] = s.max(s.load(x), largest[0]);
    }
    let largest = match x.len() < LANES {
        true => so_far,
        false => so_far.max(scale * s.largest(s.max(largest[0], largest[1]))),
    };
    rest.iter().fold(largest, |largest, x| largest.max(scale * x))
}

/// Replaces x by exp(scale·x − largest) and returns the sum.
#[inline(always)]
fn exp_sum<S: Simd>(s: S, x: &mut [f32], scale: f32, largest: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    let (scale, shift) = (s.splat(scale * LOG2_E), s.splat(-largest * LOG2_E));
    let mut sum = s.splat(0.0);
    let (whole, rest) = x.as_chunks_mut();
    for x in whole {
        let e = math::exp2_negative(s, s.mul_add(scale, s.load(x), shift));
        s.store(e, x);
        sum = s.add(sum, e);
    }
    let sum = s.sum(sum);
    if rest.is_empty() {
        return sum;
    }
    let e = math::exp2_negative(s, s.mul_add(scale, s.load_some(rest), shift));
    s.store_some(e, rest);
    sum + s.sum(s.load_some(rest))
}

/// The weights of query `i` of one head: first those of the k meta tokens, then those of all frames, hidden ones 0. The
/// oracle of the fast path.
pub(crate) fn weights(head: Head, i: usize) -> Vec<f32> {
    let query = head.queries.row(i, head.key_width);
    let seen = head.seen(head.before() + i);
    let mut weights = vec![0.0; head.columns()];
    let mut largest = f32::NEG_INFINITY;
    for column in seen.clone() {
        let score: f32 = query.iter().zip(head.key(column)).map(|(q, k)| q * k).sum();
        weights[column] = score * head.scale();
        largest = largest.max(weights[column]);
    }
    let mut sum = 0.0;
    for column in seen.clone() {
        weights[column] = (weights[column] - largest).exp();
        sum += weights[column];
    }
    for column in seen {
        weights[column] /= sum;
    }
    weights
}

/// The queries from `first` on by the definition, touching nothing a frame does not see.
fn attend_plainly(head: Head, first: usize, mut out: ArrayViewMut2<f32>) {
    for (i, mut out) in out.rows_mut().into_iter().enumerate() {
        let weights = weights(head, first + i);
        out.fill(0.0);
        for column in head.seen(head.before() + first + i) {
            out.iter_mut().zip(head.value(column)).for_each(|(out, value)| *out += weights[column] * value);
        }
    }
}

#[cfg(test)]
mod tests;
