//! From the frames of a sequence to one vector.
//!
//! ```text
//! last        y = x_l
//! mean        y = Σ_t x_t / l
//! max         y = max_t x_t                                            feature by feature
//! attention   y_i = Σ_t a_it x_t,   a_i = softmax_t(x_t · u_i / √h)     for each query u_i; all y_i side by side
//! ```
//!
//! All of them can be computed frame by frame: [`PoolState`] keeps running sums and maxima, those of attention with the
//! largest score so far subtracted in the exponent. Whole sequences use the same additions in the same order. Sums are
//! compensated (Kahan), so that they stay precise in a long stream.

use std::fmt;

use ndarray::{Array2, ArrayView2, s};
use serde::{Deserialize, Serialize};

use super::batch::Spans;
use super::{Buffer, Rng, flat, flat_mut, init_meta_tokens};
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};
use crate::{Error, Result};

/// How the frames of a sequence become the one vector from which a [`Predictor`](crate::Predictor) predicts.
///
/// | pooling | vector | of |
/// |---|---|---|
/// | `Last` | the last frame | `h` |
/// | `Mean` | the mean of all frames | `h` |
/// | `Max` | the largest of each feature | `h` |
/// | `Attention` | a weighted mean of all frames for each of some learned queries, side by side | `queries · h` |
///
/// With `Last`, the encoder alone has to carry what it saw to the end. The others look back at all frames, which is easier to
/// learn for whole sequences. All of them stream: see [`Predictor::step`](crate::Predictor::step).
///
/// ```
/// use hymba::Pooling;
///
/// assert_eq!(Pooling::default(), Pooling::Last);
/// assert_eq!(Pooling::Attention { queries: 4 }.width(16), 64);
/// assert!(Pooling::Attention { queries: 0 }.validate().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Pooling {
    /// The last frame.
    #[default]
    Last,
    /// The mean of all frames.
    Mean,
    /// The largest of each feature.
    Max,
    /// Weighted means of all frames, the weights by learned queries: softmax over the frames of x·u / √h.
    Attention {
        /// How many queries, 1 to [`MAX_QUERIES`](Pooling::MAX_QUERIES).
        queries: usize,
    },
}

impl Pooling {
    /// The largest number of queries.
    pub const MAX_QUERIES: usize = 64;

    /// The width of the vector, from frames of width `h`.
    pub fn width(self, h: usize) -> usize {
        h.saturating_mul(self.queries().max(1))
    }

    /// Checks the number of queries.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] unless it is 1 to [`MAX_QUERIES`](Self::MAX_QUERIES).
    pub fn validate(self) -> Result<()> {
        match self {
            Pooling::Attention { queries } if !(1..=Self::MAX_QUERIES).contains(&queries) => Err(Error::Option {
                option: "queries",
                given: queries.to_string(),
                allowed: format!("pooling by attention has 1 to {} queries; 4 is usual", Self::MAX_QUERIES),
            }),
            _ => Ok(()),
        }
    }

    fn queries(self) -> usize {
        match self {
            Pooling::Attention { queries } => queries,
            _ => 0,
        }
    }

    /// Parameters, for frames of width `h`.
    pub(crate) fn count(self, h: usize) -> Option<usize> {
        h.checked_mul(self.queries())
    }
}

/// The layer: queries u `[q, h]`, of which only attention has any.
#[derive(Clone)]
pub(crate) struct Pool {
    pooling: Pooling,
    queries: Array2<f32>,
}

/// What is kept of the frames of one sequence so far.
#[derive(Clone)]
pub(crate) struct PoolState {
    /// Frames seen.
    pub frames: usize,
    /// `[r, h]`: the sums and their compensation (mean, r = 2), the maxima (r = 1), both of the former for each query (r = 2q).
    pub sums: Array2<f32>,
    /// `[q, 3]`: the largest score of each query, the sum of its weights and the compensation.
    pub weights: Array2<f32>,
}

/// What [`Pool::backward`] reads.
pub(crate) enum PoolCache {
    /// The lengths of the sequences say all.
    Lengths,
    /// Of each sequence and feature, the row that has the largest number: `[b, h]`.
    Largest(Array2<usize>),
    /// The frames `[rows, h]`, the weights `[rows, q]`, and what came of them `[b, q·h]`.
    Attention { x: Buffer, weights: Array2<f32>, y: Array2<f32> },
}

impl Pool {
    pub(crate) fn zeros(pooling: Pooling, h: usize) -> Self {
        Pool { pooling, queries: Array2::zeros((pooling.queries(), h)) }
    }

    /// Small queries: training begins near the mean.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        if !self.queries.is_empty() {
            init_meta_tokens(&mut self.queries, rng);
        }
    }

    pub(crate) fn queries(&self) -> &Array2<f32> {
        &self.queries
    }

    pub(crate) fn width(&self) -> usize {
        self.pooling.width(self.queries.ncols())
    }

    /// A state that has seen no frame.
    pub(crate) fn new_state(&self) -> PoolState {
        let (q, h) = self.queries.dim();
        let (sums, weights) = match self.pooling {
            Pooling::Last => (Array2::zeros((0, h)), Array2::zeros((0, 3))),
            Pooling::Mean => (Array2::zeros((2, h)), Array2::zeros((0, 3))),
            Pooling::Max => (Array2::from_elem((1, h), f32::NEG_INFINITY), Array2::zeros((0, 3))),
            Pooling::Attention { .. } => {
                let mut weights = Array2::zeros((q, 3));
                weights.column_mut(0).fill(f32::NEG_INFINITY);
                (Array2::zeros((2 * q, h)), weights)
            }
        };
        PoolState { frames: 0, sums, weights }
    }

    /// The next frame x `[h]` of a sequence: moves the state on.
    pub(crate) fn add(&self, x: &[f32], state: &mut PoolState) {
        let h = x.len();
        state.frames += 1;
        let sums = flat_mut(&mut state.sums);
        match self.pooling {
            Pooling::Last => {}
            Pooling::Mean => {
                let (sum, lost) = sums.split_at_mut(h);
                add_scaled(sum, lost, 1.0, x);
            }
            Pooling::Max => {
                for (largest, &x) in sums.iter_mut().zip(x) {
                    // NaN stays
                    if x > *largest || x.is_nan() {
                        *largest = x;
                    }
                }
            }
            Pooling::Attention { .. } => {
                let each = self.queries.rows().into_iter().zip(state.weights.rows_mut());
                for ((query, mut weight), sums) in each.zip(sums.chunks_exact_mut(2 * h)) {
                    let score = score(flat(&query), x);
                    let [largest, sum, lost] = &mut weight.as_slice_mut().expect("a row of a new array")[..] else {
                        continue;
                    };
                    if score > *largest {
                        let scale = (*largest - score).exp();
                        (*sum, *lost) = (*sum * scale, *lost * scale);
                        sums.iter_mut().for_each(|x| *x *= scale);
                        *largest = score;
                    }
                    let weight = (score - *largest).exp();
                    add_scaled(std::slice::from_mut(sum), std::slice::from_mut(lost), weight, &[1.0]);
                    let (sum, lost) = sums.split_at_mut(h);
                    add_scaled(sum, lost, weight, x);
                }
            }
        }
    }

    /// The pooled vector of a sequence after its last frame x `[h]`: y `[width]`.
    pub(crate) fn read(&self, state: &PoolState, x: &[f32], y: &mut [f32]) {
        let h = x.len();
        match self.pooling {
            Pooling::Last => y.copy_from_slice(x),
            Pooling::Mean => y.iter_mut().zip(&state.sums.row(0)).for_each(|(y, sum)| *y = sum / state.frames as f32),
            Pooling::Max => y.copy_from_slice(flat(&state.sums)),
            Pooling::Attention { .. } => {
                for ((y, sums), weight) in
                    y.chunks_exact_mut(h).zip(flat(&state.sums).chunks_exact(2 * h)).zip(state.weights.rows())
                {
                    y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum / weight[1]);
                }
            }
        }
    }

    /// x `[rows, h]` of several sequences → `[b, width]`
    pub(crate) fn forward(&self, spans: &Spans, x: ArrayView2<f32>) -> Array2<f32> {
        let mut y = Array2::zeros((spans.len(), self.width()));
        self.sequences(spans, x, &mut y);
        y
    }

    /// As [`forward`](Self::forward) at every frame, from the frames up to it: `[rows, width]`.
    pub(crate) fn forward_frames(&self, spans: &Spans, x: ArrayView2<f32>) -> Array2<f32> {
        let mut y = Array2::zeros((x.nrows(), self.width()));
        for span in spans.iter() {
            let mut state = self.new_state();
            for row in span.clone() {
                let (x, y) = (x.row(row), y.row_mut(row));
                let (x, y) = (flat(&x), y.into_slice().expect("a row of a new array"));
                self.add(x, &mut state);
                self.read(&state, x, y);
            }
        }
        y
    }

    /// Returns the state that each sequence leaves.
    fn sequences(&self, spans: &Spans, x: ArrayView2<f32>, y: &mut Array2<f32>) -> Vec<PoolState> {
        let rows = spans.iter().zip(y.rows_mut());
        rows.map(|(span, y)| {
            let mut state = self.new_state();
            // the last frame alone needs no sums
            if self.pooling != Pooling::Last {
                span.clone().for_each(|row| self.add(flat(&x.row(row)), &mut state));
            }
            let last = x.row(span.end - 1);
            self.read(&state, flat(&last), y.into_slice().expect("a row of a new array"));
            state
        })
        .collect()
    }

    /// As [`forward`](Self::forward). Returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(&self, spans: &Spans, x: Buffer) -> (Array2<f32>, PoolCache) {
        let mut y = Array2::zeros((spans.len(), self.width()));
        let states = self.sequences(spans, x.view(), &mut y);
        let cache = match self.pooling {
            Pooling::Last | Pooling::Mean => PoolCache::Lengths,
            Pooling::Max => {
                let mut largest = Array2::zeros(y.dim());
                for ((span, y), mut largest) in spans.iter().zip(y.rows()).zip(largest.rows_mut()) {
                    largest.fill(span.start); // where the largest is NaN
                    for row in span.clone().rev() {
                        let same = x.row(row).into_iter().zip(y).zip(&mut largest);
                        same.filter(|((x, y), _)| x == y).for_each(|(_, largest)| *largest = row);
                    }
                }
                PoolCache::Largest(largest)
            }
            Pooling::Attention { .. } => {
                let mut weights = Array2::zeros((x.nrows(), self.queries.nrows()));
                for (span, state) in spans.iter().zip(&states) {
                    for row in span.clone() {
                        for ((a, query), state) in
                            weights.row_mut(row).iter_mut().zip(self.queries.rows()).zip(state.weights.rows())
                        {
                            *a = (score(flat(&query), flat(&x.row(row))) - state[0]).exp() / state[1];
                        }
                    }
                }
                PoolCache::Attention { x, weights, y: y.clone() }
            }
        };
        (y, cache)
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, width]` → dx `[rows, h]`. With a_it as above,
    ///
    /// ```text
    /// ds_it = a_it (dy_i · x_t − dy_i · y_i)
    /// dx_t  = Σ_i a_it dy_i + ds_it u_i / √h,   du_i += Σ_t ds_it x_t / √h
    /// ```
    pub(crate) fn backward(&self, spans: &Spans, cache: &PoolCache, dy: ArrayView2<f32>, grad: &mut Pool) -> Buffer {
        let h = self.queries.ncols();
        let mut dx = Buffer::zeros((spans.rows(), h));
        for (b, (span, dy)) in spans.iter().zip(dy.rows()).enumerate() {
            match (cache, self.pooling) {
                (PoolCache::Largest(largest), _) => {
                    largest.row(b).iter().zip(dy).enumerate().for_each(|(i, (&row, dy))| dx[[row, i]] = *dy);
                }
                (PoolCache::Attention { x, weights, y }, _) => {
                    let root = (h as f32).sqrt().recip();
                    for (i, dy) in flat(&dy).chunks_exact(h).enumerate() {
                        let mean = dot(dy, &flat(&y.row(b))[i * h..][..h]);
                        let (query, mut dquery) = (self.queries.row(i), grad.queries.row_mut(i));
                        for row in span.clone() {
                            let (x, a) = (x.row(row), weights[[row, i]]);
                            let dscore = a * (dot(dy, flat(&x)) - mean) * root;
                            let each = dx.row_mut(row).into_iter().zip(dy).zip(&query);
                            each.for_each(|((dx, dy), u)| *dx += a * dy + dscore * u);
                            dquery.scaled_add(dscore, &x);
                        }
                    }
                }
                (PoolCache::Lengths, Pooling::Mean) => {
                    let dmean = &dy / span.len() as f32;
                    dx.slice_mut(s![span.clone(), ..]).rows_mut().into_iter().for_each(|mut dx| dx.assign(&dmean));
                }
                (PoolCache::Lengths, _) => dx.row_mut(span.end - 1).assign(&dy),
            }
        }
        dx
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if !self.queries.is_empty() {
            f(&join(name, "queries"), Parameter::Array(self.queries.view().into_dyn()));
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        if !self.queries.is_empty() {
            f(&join(name, "queries"), ParameterMut::Array(self.queries.view_mut().into_dyn()));
        }
    }
}

impl fmt::Debug for PoolCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoolCache")
    }
}

impl PoolState {
    pub(crate) fn num_bytes(&self) -> usize {
        (self.sums.len() + self.weights.len()) * size_of::<f32>()
    }
}

/// x·u / √h
fn score(query: &[f32], x: &[f32]) -> f32 {
    dot(query, x) * (x.len() as f32).sqrt().recip()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// sum += scale · x, with what rounding takes from it gathered in `lost`.
fn add_scaled(sum: &mut [f32], lost: &mut [f32], scale: f32, x: &[f32]) {
    for ((sum, lost), x) in sum.iter_mut().zip(lost).zip(x) {
        let more = scale * x - *lost;
        let next = *sum + more;
        *lost = (next - *sum) - more;
        *sum = next;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const ALL: [Pooling; 4] = [Pooling::Last, Pooling::Mean, Pooling::Max, Pooling::Attention { queries: 2 }];

    fn pool(pooling: Pooling, h: usize) -> Pool {
        let mut pool = Pool::zeros(pooling, h);
        pool.init(&mut Rng::seed_from_u64(1));
        pool.queries.mapv_inplace(|u| 40.0 * u);
        pool
    }

    fn frames(rows: usize, h: usize) -> Buffer {
        Array2::from_shape_fn((rows, h), |(t, i)| (0.7 * t as f32 + 1.9 * i as f32).sin()).into()
    }

    /// The definitions above, in f64.
    fn oracle(pool: &Pool, x: ArrayView2<f32>) -> Vec<f64> {
        let x = x.mapv(f64::from);
        let (l, h) = x.dim();
        match pool.pooling {
            Pooling::Last => x.row(l - 1).to_vec(),
            Pooling::Mean => x.columns().into_iter().map(|x| x.sum() / l as f64).collect(),
            Pooling::Max => x.columns().into_iter().map(|x| x.iter().copied().fold(f64::MIN, f64::max)).collect(),
            Pooling::Attention { .. } => {
                let each = pool.queries.rows().into_iter().flat_map(|u| {
                    let e: Vec<f64> =
                        x.rows().into_iter().map(|x| (x.dot(&u.mapv(f64::from)) / (h as f64).sqrt()).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    let mean = |i: usize| x.column(i).iter().zip(&e).map(|(x, e)| x * e).sum::<f64>() / sum;
                    (0..h).map(mean).collect::<Vec<_>>()
                });
                each.collect()
            }
        }
    }

    #[test]
    fn whole_sequences_are_what_the_definitions_say_and_frames_one_by_one_give_the_same_bits() {
        for pooling in ALL {
            let (pool, spans, x) = (pool(pooling, 5), Spans::new([1, 9, 4]), frames(14, 5));
            let y = pool.forward(&spans, x.view());
            let every = pool.forward_frames(&spans, x.view());
            assert_eq!(pool.forward_train(&spans, Buffer::copy_of(&x)).0, y);
            for (span, y) in spans.iter().zip(y.rows()) {
                let want = oracle(&pool, x.slice(s![span.clone(), ..]));
                assert!(y.iter().zip(&want).all(|(y, want)| (f64::from(*y) - want).abs() < 1e-6), "{pooling:?}");
                assert_eq!(every.row(span.end - 1), y);
            }
        }
    }

    #[test]
    fn a_long_stream_does_not_wear_sums_out() {
        let pool = pool(Pooling::Mean, 1);
        let mut state = pool.new_state();
        (0..1_000_000).for_each(|_| pool.add(&[0.1], &mut state));
        let mut y = [0.0];
        pool.read(&state, &[0.1], &mut y);
        assert!((y[0] - 0.1).abs() < 1e-7, "{}", y[0]);
    }

    #[test]
    fn nan_stays() {
        for pooling in ALL {
            let (pool, mut x) = (pool(pooling, 2), frames(4, 2));
            x[[if pooling == Pooling::Last { 3 } else { 1 }, 0]] = f32::NAN;
            assert!(pool.forward(&Spans::new([4]), x.view())[[0, 0]].is_nan(), "{pooling:?}");
        }
    }

    #[test]
    fn gradients_are_those_of_difference_quotients() {
        for pooling in ALL {
            let (mut pool, spans, mut x) = (pool(pooling, 3), Spans::new([2, 5]), frames(7, 3));
            let dy = Array2::from_shape_fn((2, pool.width()), |(b, i)| 0.5 + (b + 2 * i) as f32 % 3.0);
            let value = |pool: &Pool, x: &Array2<f32>| -> f64 {
                let y = pool.forward(&spans, x.view());
                y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
            };
            let mut grad = Pool::zeros(pooling, 3);
            let (_, cache) = pool.forward_train(&spans, Buffer::copy_of(&x));
            let dx = pool.backward(&spans, &cache, dy.view(), &mut grad);
            const STEP: f32 = 1e-2;
            let close = |slope: f64, want: f32| (slope / f64::from(2.0 * STEP) - f64::from(want)).abs() < 2e-3;
            for place in ndarray::indices(x.dim()) {
                let at = x[place];
                let [high, low] = [STEP, -STEP].map(|step| {
                    x[place] = at + step;
                    value(&pool, &x)
                });
                x[place] = at;
                assert!(close(high - low, dx[place]), "{pooling:?} {place:?}");
            }
            for place in ndarray::indices(pool.queries.dim()) {
                let at = pool.queries[place];
                let [high, low] = [STEP, -STEP].map(|step| {
                    pool.queries[place] = at + step;
                    value(&pool, &x)
                });
                pool.queries[place] = at;
                assert!(close(high - low, grad.queries[place]), "{pooling:?} {place:?}");
            }
        }
    }
}
