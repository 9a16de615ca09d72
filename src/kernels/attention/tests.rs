//! The kernels against the definition of attention.

use super::super::simd::{Isa, dispatch_at};
use super::step::Step;
use super::*;
use ndarray::{Array2, s};

fn rows(x: &Array2<f32>) -> Rows<'_> {
    Rows { data: x.as_slice().unwrap(), stride: x.ncols() }
}

fn wave(rows: usize, h: usize, step: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, h), |(i, j)| ((i * 31 + j * step) % 41) as f32 / 10.0 - 2.0)
}

/// A sequence of `frames`, the last of which ask, with meta tokens in front of it.
struct Case {
    queries: Array2<f32>,
    keys: Array2<f32>,
    values: Array2<f32>,
    meta_keys: Array2<f32>,
    meta_values: Array2<f32>,
    heads: usize,
    group: usize,
    window: Option<usize>,
}

impl Case {
    /// `before` frames come before those that ask.
    fn new(
        (frames, before, k): (usize, usize, usize),
        (heads, group): (usize, usize),
        (p, v): (usize, usize),
        window: Option<usize>,
    ) -> Self {
        let key_heads = heads / group;
        Case {
            queries: wave(frames - before, heads * p, 7),
            keys: wave(frames, key_heads * p, 11),
            values: wave(frames, key_heads * v, 13),
            meta_keys: wave(k, key_heads * p, 17),
            meta_values: wave(k, key_heads * v, 19),
            heads,
            group,
            window,
        }
    }

    /// Keys and values of meta tokens and of the frames before those that ask, one below the other.
    fn past(&self) -> (Array2<f32>, Array2<f32>) {
        let before = self.keys.nrows() - self.queries.nrows();
        let stack = |meta: &Array2<f32>, frames: &Array2<f32>| {
            ndarray::concatenate(Axis(0), &[meta.view(), frames.slice(s![..before, ..])]).unwrap()
        };
        (stack(&self.meta_keys, &self.keys), stack(&self.meta_values, &self.values))
    }

    fn head<'a>(&'a self, past: &'a (Array2<f32>, Array2<f32>), head: usize) -> Head<'a> {
        let key_heads = self.heads / self.group;
        let (p, v) = (self.keys.ncols() / key_heads, self.values.ncols() / key_heads);
        let (key_head, before) = (head / self.group, self.keys.nrows() - self.queries.nrows());
        Head {
            queries: rows(&self.queries).skip_columns(head * p),
            keys: rows(&self.keys).skip_rows(before).skip_columns(key_head * p),
            values: rows(&self.values).skip_rows(before).skip_columns(key_head * v),
            past_keys: rows(&past.0).skip_columns(key_head * p),
            past_values: rows(&past.1).skip_columns(key_head * v),
            past: past.0.nrows(),
            meta: self.meta_keys.nrows(),
            frames: self.queries.nrows(),
            key_width: p,
            value_width: v,
            window: self.window,
        }
    }

    /// Output `[l, heads · v]` and log-sums `[l, heads]`.
    fn attend(&self) -> (Array2<f32>, Array2<f32>) {
        let (past, l) = (self.past(), self.queries.nrows());
        let v = self.head(&past, 0).value_width;
        let (mut out, mut log_sums) = (Array2::zeros((l, self.heads * v)), Array2::zeros((l, self.heads)));
        for head in 0..self.heads {
            let one = self.head(&past, head);
            let packed = PackedHead::new(&one);
            let sums = log_sums.slice_mut(s![.., head..head + 1]);
            for tile in tiles(out.slice_mut(s![.., head * v..(head + 1) * v]), Some(sums)) {
                attend_tile(one, packed.as_ref(), tile);
            }
        }
        (out, log_sums)
    }

    fn by_the_definition(&self) -> Array2<f32> {
        let past = self.past();
        let v = self.head(&past, 0).value_width;
        let mut out = Array2::zeros((self.queries.nrows(), self.heads * v));
        for head in 0..self.heads {
            attend_plainly(self.head(&past, head), 0, out.slice_mut(s![.., head * v..(head + 1) * v]));
        }
        out
    }

    /// The last frame, as a step.
    fn step(&self, level: Isa) -> Vec<f32> {
        let key_heads = self.heads / self.group;
        let frames = self.keys.nrows();
        let first = self.window.map_or(0, |window| frames.saturating_sub(window));
        let strides = (self.keys.ncols(), self.values.ncols());
        let kv = |keys, values, rows| KvRows { keys, values, strides, rows };
        let (keys, values) = (self.keys.as_slice().unwrap(), self.values.as_slice().unwrap());
        let runs = [
            kv(self.meta_keys.as_slice().unwrap(), self.meta_values.as_slice().unwrap(), self.meta_keys.nrows()),
            kv(&keys[first * strides.0..], &values[first * strides.1..], frames - first),
        ];
        let mut out = vec![0.0; self.group * strides.1];
        let query = self.queries.row(self.queries.nrows() - 1).to_vec();
        dispatch_at(level, Step { query: &query, runs: &runs, key_heads, group: self.group, out: &mut out });
        out
    }

    fn check(&self, name: &str) {
        let (fast, plain) = (self.attend().0, self.by_the_definition());
        for (fast, plain) in fast.iter().zip(&plain) {
            assert!((fast - plain).abs() < 1e-5, "{name}: {fast} {plain}");
        }
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for (out, plain) in self.step(level).iter().zip(plain.row(plain.nrows() - 1)) {
                assert!((out - plain).abs() < 1e-5, "{level:?} {name}: {out} {plain}");
            }
        }
    }
}

#[test]
fn tiles_and_steps_equal_the_definition() {
    for l in (1..130).step_by(3).chain([600]) {
        for (k, window, heads, p) in [
            (4, Some(60), 2, 8),
            (0, Some(60), 1, 5),
            (3, Some(1), 1, 4),
            (40, Some(7), 3, 3),
            (33, None, 1, 16),
            (300, Some(20), 1, 4),
        ] {
            Case::new((l, 0, k), (heads, 1), (p, p), window).check(&format!("l {l} k {k} window {window:?}"));
        }
    }
}

/// Several heads of queries to one of keys, values of another width, and queries that begin in the middle of the frames.
#[test]
fn groups_and_later_queries_equal_the_definition() {
    for group in 1..8 {
        for (before, window, p, v) in [(0, None, 8, 20), (50, Some(21), 10, 65), (74, Some(3), 4, 5)] {
            Case::new((75, before, 9), (2 * group, group), (p, v), window)
                .check(&format!("group {group} before {before}"));
        }
    }
}

#[test]
fn sums_and_maxima_of_lanes_are_the_same_on_every_level() {
    struct Sum([f32; LANES]);
    impl Kernel for Sum {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            s.sum(s.load(&self.0))
        }
    }
    struct Largest([f32; LANES]);
    impl Kernel for Largest {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            s.largest(s.load(&self.0))
        }
    }
    for seed in 0..50 {
        let lanes = std::array::from_fn(|i| ((i * 37 + seed * 11) % 97) as f32 * 1.7e-3 - 0.08);
        let want = dispatch_at(Isa::Scalar, Sum(lanes));
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            assert_eq!(dispatch_at(level, Sum(lanes)), want);
            let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(dispatch_at(level, Largest(lanes)), largest);
        }
    }
}

struct Soften<'a> {
    scores: &'a mut [f32],
    seen: [Range<usize>; 2],
    softmax: &'a mut RunningSoftmax,
    sums: &'a mut [f32],
}

impl Kernel for Soften<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        soften(s, self.scores, self.seen, 0.5, self.softmax, self.sums);
    }
}

#[test]
fn softmax_rows_agree_on_every_level() {
    for width in 0..130 {
        let scores: Vec<f32> = (0..width).map(|i| (i * 7 % 23) as f32 - 11.0).collect();
        for (meta, frames) in [(0..width / 3, width / 2..width), (0..0, 0..width), (0..width, width..width)] {
            for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
                let mut got = scores.clone();
                let mut softmax = RunningSoftmax { largest: 1.0, sum: 2.0 };
                let mut sums = [3.0; 5];
                let seen = [meta.clone(), frames.clone()];
                dispatch_at(level, Soften { scores: &mut got, seen, softmax: &mut softmax, sums: &mut sums });
                let seen = |i: &usize| meta.contains(i) || frames.contains(i);
                let largest = (0..width).filter(seen).fold(1.0f32, |m, i| m.max(0.5 * scores[i]));
                let mut sum = 2.0 * (1.0 - largest).exp();
                for i in 0..width {
                    let want = if seen(&i) { (0.5 * scores[i] - largest).exp() } else { 0.0 };
                    assert!((got[i] - want).abs() < 1e-6, "{level:?} width {width} {i}");
                    sum += want;
                }
                assert!((softmax.sum - sum).abs() < 1e-5 * sum && softmax.largest == largest);
                assert!((sums[4] - 3.0 * (1.0 - largest).exp()).abs() < 1e-5);
            }
        }
    }
}

/// The gradients by the definition, in f64, one pair of query and key at a time: the oracle.
#[test]
fn gradients_equal_the_definition() {
    for (l, before, k, window, heads, group, p, v, used) in [
        (1, 0, 0, Some(1), 1, 1, 4, 4, 0..1),
        (30, 0, 4, Some(7), 2, 1, 8, 8, 0..30),
        (70, 0, 40, Some(20), 3, 1, 3, 3, 0..70),
        (60, 0, 4, Some(60), 1, 1, 16, 16, 59..60),
        (300, 0, 2, Some(9), 1, 1, 4, 4, 0..300),
        (290, 0, 33, None, 1, 1, 5, 5, 0..290),
        (290, 0, 33, None, 1, 1, 5, 5, 200..251),
        (40, 0, 4, Some(9), 6, 3, 4, 7, 0..40),
        (50, 20, 3, Some(11), 4, 2, 4, 9, 0..30),
        (50, 20, 3, Some(11), 4, 2, 4, 9, 3..29),
        (9, 0, 3, None, 1, 1, 4, 4, 0..0),
    ] {
        let mut case = Case::new((l, before, k), (heads, group), (p, v), window);
        for array in [&mut case.queries, &mut case.keys, &mut case.values, &mut case.meta_keys, &mut case.meta_values] {
            *array *= 0.5;
        }
        let (out, log_sums) = case.attend();
        let mut dout = wave(l - before, heads * v, 5) * 0.5;
        dout.slice_mut(s![..used.start, ..]).fill(0.0);
        dout.slice_mut(s![used.end.., ..]).fill(0.0);
        let past = case.past();
        for key_head in 0..heads / group {
            let first = key_head * group;
            let [mut dq, mut dk, mut dv, mut dpk, mut dpv] =
                [(l - before, group * p), (l - before, p), (l - before, v), (k + before, p), (k + before, v)]
                    .map(|dim| Array2::from_elem(dim, 9.0));
            attend_backward(
                case.head(&past, first),
                used.clone(),
                AttentionOutput {
                    out: rows(&out).skip_columns(first * v),
                    dout: rows(&dout).skip_columns(first * v),
                    log_sums: log_sums.slice(s![.., first..first + group]),
                },
                AttentionGradient {
                    queries: dq.view_mut(),
                    keys: dk.view_mut(),
                    values: dv.view_mut(),
                    past_keys: dpk.view_mut(),
                    past_values: dpv.view_mut(),
                },
            );

            let mut want_q = Array2::<f64>::zeros(dq.dim());
            let [mut want_k, mut want_v] = [p, v].map(|width| Array2::<f64>::zeros((k + l, width)));
            for g in 0..group {
                let (one, at) = (case.head(&past, first + g), (first + g) * v);
                for i in 0..l - before {
                    let (weights, seen) = (weights(one, i), one.seen(before + i));
                    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
                    let (dout, query) = (&dout.row(i).to_vec()[at..at + v], one.queries.row(i, p));
                    let mean: f64 = seen.clone().map(|j| weights[j] as f64 * dot(dout, one.value(j))).sum();
                    for j in seen {
                        let weight = weights[j] as f64;
                        let ds = weight * (dot(dout, one.value(j)) - mean) * one.scale() as f64;
                        for c in 0..p {
                            want_q[[i, g * p + c]] += ds * one.key(j)[c] as f64;
                            want_k[[j, c]] += ds * query[c] as f64;
                        }
                        (0..v).for_each(|c| want_v[[j, c]] += weight * dout[c] as f64);
                    }
                }
            }
            let pairs = [
                (&dq, want_q.view()),
                (&dpk, want_k.slice(s![..k + before, ..])),
                (&dk, want_k.slice(s![k + before.., ..])),
                (&dpv, want_v.slice(s![..k + before, ..])),
                (&dv, want_v.slice(s![k + before.., ..])),
            ];
            for (which, (got, want)) in pairs.iter().enumerate() {
                for (got, want) in got.iter().zip(want) {
                    assert!((*got as f64 - want).abs() < 3e-5, "l {l} k {k} gradient {which}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn what_lies_ahead_touches_nothing() {
    let mut case = Case::new((9, 0, 2), (2, 1), (2, 2), Some(3));
    case.values[[5, 2]] = f32::NAN;
    let (out, _) = case.attend();
    for (i, row) in out.rows().into_iter().enumerate() {
        assert_eq!(row.iter().any(|x| x.is_nan()), (5..8).contains(&i), "frame {i}");
    }
}

/// NaN in all keys that a query sees in a piece: no later piece makes its sum a number again.
#[test]
fn nan_of_an_earlier_piece_stays() {
    let mut meta = Case::new((200, 0, 1), (1, 1), (4, 4), Some(40));
    meta.meta_keys.fill(f32::NAN);
    let mut first = Case::new((2 * KEYS, 0, 0), (1, 1), (4, 4), None);
    first.keys.slice_mut(s![..KEYS, ..]).fill(f32::NAN);
    for case in [meta, first] {
        let (out, log_sums) = case.attend();
        assert!(out.iter().chain(&log_sums).all(|x| x.is_nan()), "{log_sums}");
    }
}
