//! Attention of one query per head over cached rows: the streaming form.

use super::{exp_sum, max};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};

/// A type in which keys and values are kept.
pub(crate) trait KvElement: Copy + Sync {
    /// Sixteen numbers as f32.
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V;

    /// At most sixteen; the other lanes are zero.
    fn load_some<S: Simd>(s: S, x: &[Self]) -> S::V;
}

impl KvElement for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[f32; LANES]) -> S::V {
        s.load(x)
    }

    #[inline(always)]
    fn load_some<S: Simd>(s: S, x: &[f32]) -> S::V {
        s.load_some(x)
    }
}

impl KvElement for half::bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[half::bf16; LANES]) -> S::V {
        s.load_bf16(&x.map(half::bf16::to_bits))
    }

    #[inline(always)]
    fn load_some<S: Simd>(s: S, x: &[half::bf16]) -> S::V {
        let mut lanes = [half::bf16::ZERO; LANES];
        lanes[..x.len()].copy_from_slice(x);
        Self::load(s, &lanes)
    }
}

/// Keys and values in memory. A row of `keys` begins with those of the first of the heads; the others follow.
#[derive(Clone, Copy)]
pub(crate) struct KvRows<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    /// From one row of keys to the next, and the same for values.
    pub strides: (usize, usize),
    pub rows: usize,
}

/// Attention of `query [key_heads · g · p]`, g heads of queries for each of `key_heads` heads of keys, over all rows of
/// `runs` → `out [key_heads · g · value width]`.
pub(crate) fn attend_step<T: KvElement>(
    query: &[f32],
    runs: &[KvRows<T>],
    key_heads: usize,
    group: usize,
    out: &mut [f32],
) {
    let rows = runs.iter().map(|run| run.rows).sum::<usize>() as u64;
    let multiply_adds = rows * (query.len() + out.len()) as u64;
    let work = Cost { multiply_adds, exps: rows * (key_heads * group) as u64, ..Cost::default() };
    timed(Stage::Attention, work, || dispatch(Step { query, runs, key_heads, group, out }));
}

pub(super) struct Step<'a, T> {
    pub query: &'a [f32],
    pub runs: &'a [KvRows<'a, T>],
    pub key_heads: usize,
    pub group: usize,
    pub out: &'a mut [f32],
}

impl<T: KvElement> Kernel for Step<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let heads = self.key_heads * self.group;
        let (key_width, value_width) = (self.query.len() / heads, self.out.len() / heads);
        let rows: usize = self.runs.iter().map(|run| run.rows).sum();
        let mut scores = vec![0.0; self.group.min(QUERIES) * rows];
        for key_head in 0..self.key_heads {
            let mut head = key_head * self.group;
            let end = head + self.group;
            let (key, value) = (key_head * key_width, key_head * value_width);
            while head < end {
                let queries = (end - head).min(QUERIES);
                let query = &self.query[head * key_width..][..queries * key_width];
                let out = &mut self.out[head * value_width..][..queries * value_width];
                let scores = &mut scores[..queries * rows];
                match queries {
                    1 => attend_group::<S, T, 1>(s, query, self.runs, key, value, scores, out),
                    2 => attend_group::<S, T, 2>(s, query, self.runs, key, value, scores, out),
                    3 => attend_group::<S, T, 3>(s, query, self.runs, key, value, scores, out),
                    4 => attend_group::<S, T, 4>(s, query, self.runs, key, value, scores, out),
                    _ => attend_group::<S, T, QUERIES>(s, query, self.runs, key, value, scores, out),
                }
                head += queries;
            }
        }
    }
}

/// Queries for which a key is read once. With [`VECTORS`] their sums stay in 32 registers. Only language models have several queries
/// for a key: the code for them would be most of what a web page loads of this kernel.
const QUERIES: usize = if cfg!(feature = "lm") { 5 } else { 1 };
/// Vectors of a value that are summed in one pass over the rows.
const VECTORS: usize = 4;

/// G queries over the keys and values from these columns on.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as in `weighted_sum`
fn attend_group<S: Simd, T: KvElement, const G: usize>(
    s: S,
    query: &[f32],
    runs: &[KvRows<T>],
    key: usize,
    value: usize,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let (key_width, value_width) = (query.len() / G, out.len() / G);
    let rows = scores.len() / G;
    let scale = 1.0 / (key_width as f32).sqrt();
    let mut at = 0;
    for run in runs {
        for row in 0..run.rows {
            let keys = &run.keys[row * run.strides.0 + key..][..key_width];
            prefetch(s, keys, run.strides.0);
            let mut sums = [s.splat(0.0); G];
            let (whole, rest) = keys.as_chunks();
            for (chunk, keys) in whole.iter().enumerate() {
                let keys = T::load(s, keys);
                for g in 0..G {
                    let query = s.load_some(&query[g * key_width + chunk * LANES..][..LANES]);
                    sums[g] = s.mul_add(query, keys, sums[g]);
                }
            }
            if !rest.is_empty() {
                let keys = T::load_some(s, rest);
                for g in 0..G {
                    let query = s.load_some(&query[(g + 1) * key_width - rest.len()..][..rest.len()]);
                    sums[g] = s.mul_add(query, keys, sums[g]);
                }
            }
            for (g, sum) in sums.into_iter().enumerate() {
                scores[g * rows + at] = s.sum(sum);
            }
            at += 1;
        }
    }
    let mut totals = [0.0; G];
    for (scores, total) in scores.chunks_exact_mut(rows.max(1)).zip(&mut totals) {
        let largest = max(s, scores, scale, f32::NEG_INFINITY);
        *total = exp_sum(s, scores, scale, largest);
    }
    for first in (0..value_width).step_by(VECTORS * LANES) {
        let columns = first..value_width.min(first + VECTORS * LANES);
        let sums = match columns.len() == VECTORS * LANES {
            true => weighted_sum::<S, T, G, true>(s, runs, value + first, columns.len(), scores),
            false => weighted_sum::<S, T, G, false>(s, runs, value + first, columns.len(), scores),
        };
        for (g, (sums, total)) in sums.into_iter().zip(totals).enumerate() {
            let out = &mut out[g * value_width..][columns.clone()];
            for (sum, out) in sums.into_iter().zip(out.chunks_mut(LANES)) {
                s.store_some(s.div(sum, s.splat(total)), out);
            }
        }
    }
}

/// Prefetches a row some rows ahead. Rows are short, and the CPU's own prefetcher stops at the end of a page.
#[inline(always)]
fn prefetch<S: Simd, T>(s: S, row: &[T], stride: usize) {
    const ROWS: usize = 8;
    for line in row.chunks(64 / size_of::<T>()) {
        s.prefetch(line.as_ptr().wrapping_add(ROWS * stride));
    }
}

/// The sums of the values, each times its score, over all rows: `width` columns from `value` on, or [`VECTORS`] whole vectors.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
fn weighted_sum<S: Simd, T: KvElement, const G: usize, const WHOLE: bool>(
    s: S,
    runs: &[KvRows<T>],
    value: usize,
    width: usize,
    scores: &[f32],
) -> [[S::V; VECTORS]; G] {
    let rows = scores.len() / G;
    let mut sums = [[s.splat(0.0); VECTORS]; G];
    let mut at = 0;
    for run in runs {
        for row in 0..run.rows {
            let values = &run.values[row * run.strides.1 + value..];
            prefetch(s, &values[..width], run.strides.1);
            let mut lanes = [s.splat(0.0); VECTORS];
            if WHOLE {
                let (values, _) = values[..VECTORS * LANES].as_chunks();
                for v in 0..VECTORS {
                    lanes[v] = T::load(s, &values[v]);
                }
            } else {
                for v in 0..VECTORS {
                    let columns = (v * LANES).min(width)..((v + 1) * LANES).min(width);
                    lanes[v] = T::load_some(s, &values[columns]);
                }
            }
            for g in 0..G {
                let score = s.splat(scores[g * rows + at]);
                for v in 0..VECTORS {
                    sums[g][v] = s.mul_add(score, lanes[v], sums[g][v]);
                }
            }
            at += 1;
        }
    }
    sums
}
