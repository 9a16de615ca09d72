//! The kernels against the definition of attention.

use super::super::simd::{Level, dispatch_at};
use super::step::Step;
use super::*;
use ndarray::{Array2, s};

fn rows(x: &Array2<f32>) -> Rows<'_> {
    Rows { data: x.as_slice().unwrap(), stride: x.ncols() }
}

fn wave(rows: usize, h: usize, step: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, h), |(i, j)| ((i * 31 + j * step) % 41) as f32 / 10.0 - 2.0)
}

#[test]
fn tiles_equal_the_definition() {
    for l in (1..130).step_by(3).chain([600]) {
        for (k, window, heads, p) in [
            (4, Some(60), 2, 8),
            (0, Some(60), 1, 5),
            (3, Some(1), 1, 4),
            (40, Some(7), 3, 3),
            (33, None, 1, 16),
            (300, Some(20), 1, 4),
        ] {
            let h = heads * p;
            let (q, keys, values) = (wave(l, h, 7), wave(l, h, 11), wave(l, h, 13));
            let (meta_keys, meta_values) = (wave(k, h, 17), wave(k, h, 19));
            let sequence = Sequence {
                queries: rows(&q),
                keys: rows(&keys),
                values: rows(&values),
                meta_keys: rows(&meta_keys),
                meta_values: rows(&meta_values),
                frames: l,
                meta: k,
                before: 0,
                key_width: p,
                value_width: p,
                window,
            };
            let (mut fast, mut plain) = (Array2::zeros((l, h)), Array2::zeros((l, h)));
            attend(sequence, fast.view_mut(), None);
            for head in 0..heads {
                attend_plainly(sequence.head(head), 0, plain.slice_mut(s![.., head * p..(head + 1) * p]));
            }
            for (fast, plain) in fast.iter().zip(&plain) {
                assert!((fast - plain).abs() < 1e-5, "l {l} k {k} window {window:?}: {fast} {plain}");
            }
            // the last frame again, as a step
            let first = sequence.first_seen(l - 1);
            let (seen_keys, seen_values) = (keys.slice(s![first.., ..]), values.slice(s![first.., ..]));
            let run = |keys, values, rows| Run { keys, values, strides: (h, h), rows };
            let runs = [
                run(meta_keys.as_slice().unwrap(), meta_values.as_slice().unwrap(), k),
                run(seen_keys.as_slice().unwrap(), seen_values.as_slice().unwrap(), l - first),
            ];
            for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
                let mut out = vec![0.0; h];
                let query = q.row(l - 1).to_vec();
                dispatch_at(level, Step { query: &query, runs: &runs, key_heads: heads, group: 1, out: &mut out });
                for (out, plain) in out.iter().zip(plain.row(l - 1)) {
                    assert!((out - plain).abs() < 1e-5, "{level:?}");
                }
            }
        }
    }
}

/// Several heads of queries to one of keys, values of another width, and queries that begin in the middle of the frames.
#[test]
fn groups_and_later_queries_equal_the_definition() {
    let (frames, k, key_heads) = (75, 9, 2);
    for group in 1..8 {
        for (before, window, p, value_width) in [(0, None, 8, 20), (50, Some(21), 10, 65), (74, Some(3), 4, 5)] {
            let (l, heads) = (frames - before, key_heads * group);
            let queries = wave(l, heads * p, 7);
            let (keys, values) = (wave(frames, key_heads * p, 11), wave(frames, key_heads * value_width, 13));
            let (meta_keys, meta_values) = (wave(k, key_heads * p, 17), wave(k, key_heads * value_width, 19));
            let sequence = Sequence {
                queries: rows(&queries),
                keys: rows(&keys),
                values: rows(&values),
                meta_keys: rows(&meta_keys),
                meta_values: rows(&meta_values),
                frames,
                before,
                meta: k,
                key_width: p,
                value_width,
                window,
            };
            let [mut fast, mut plain] = [(); 2].map(|()| Array2::zeros((l, heads * value_width)));
            for head in 0..heads {
                let one = sequence.grouped_head(head, head / group);
                let columns = s![.., head * value_width..(head + 1) * value_width];
                let packed = PackedHead::new(&one).unwrap();
                for tile in tiles(fast.slice_mut(columns), None) {
                    attend_tile(one, Some(&packed), tile);
                }
                attend_plainly(one, 0, plain.slice_mut(columns));
            }
            assert!(fast.iter().zip(&plain).all(|(fast, plain)| (fast - plain).abs() < 1e-5), "group {group}");

            let first = sequence.first_seen(frames - 1);
            let run =
                |keys, values, rows| Run { keys, values, strides: (key_heads * p, key_heads * value_width), rows };
            let runs = [
                run(meta_keys.as_slice().unwrap(), meta_values.as_slice().unwrap(), k),
                run(
                    &keys.as_slice().unwrap()[first * key_heads * p..],
                    &values.as_slice().unwrap()[first * key_heads * value_width..],
                    frames - first,
                ),
            ];
            for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
                let mut out = vec![0.0; heads * value_width];
                let query = queries.row(l - 1).to_vec();
                dispatch_at(level, Step { query: &query, runs: &runs, key_heads, group, out: &mut out });
                for (out, plain) in out.iter().zip(plain.row(l - 1)) {
                    assert!((out - plain).abs() < 1e-5, "{level:?} group {group}: {out} {plain}");
                }
            }
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
        let want = dispatch_at(Level::Scalar, Sum(lanes));
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            assert_eq!(dispatch_at(level, Sum(lanes)), want);
            let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(dispatch_at(level, Largest(lanes)), largest);
        }
    }
}

#[test]
fn softmax_rows_agree_on_every_level() {
    for width in 0..130 {
        let scores: Vec<f32> = (0..width).map(|i| (i * 7 % 23) as f32 - 11.0).collect();
        for (meta, frames) in [(0..width / 3, width / 2..width), (0..0, 0..width), (0..width, width..width)] {
            for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
                let mut got = scores.clone();
                let mut softmax = RunningSoftmax { largest: 1.0, sum: 2.0 };
                let mut sums = [3.0; 5];
                dispatch_at(
                    level,
                    SoftmaxRow {
                        scores: &mut got,
                        meta: meta.clone(),
                        frames: frames.clone(),
                        scale: 0.5,
                        softmax: &mut softmax,
                        sums: &mut sums,
                    },
                );
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
    for (l, k, window, heads, p) in [
        (1, 0, Some(1), 1, 4),
        (30, 4, Some(7), 2, 8),
        (70, 40, Some(20), 3, 3),
        (60, 4, Some(60), 1, 16),
        (300, 2, Some(9), 1, 4),
        (290, 33, None, 1, 5),
    ] {
        let h = heads * p;
        let [q, keys, values, dout] = [7, 11, 13, 5].map(|step| wave(l, h, step) * 0.5);
        let [meta_keys, meta_values] = [17, 19].map(|step| wave(k, h, step) * 0.5);
        let sequence = Sequence {
            queries: rows(&q),
            keys: rows(&keys),
            values: rows(&values),
            meta_keys: rows(&meta_keys),
            meta_values: rows(&meta_values),
            frames: l,
            meta: k,
            before: 0,
            key_width: p,
            value_width: p,
            window,
        };
        let (mut out, mut log_sums) = (Array2::zeros((l, h)), Array2::zeros((l, heads)));
        attend(sequence, out.view_mut(), Some(log_sums.view_mut()));
        let mut got = [l, l, l, k, k].map(|rows| Array2::from_elem((rows, h), 9.0));
        let [dq, dk, dv, dmk, dmv] = &mut got;
        attend_backward(
            sequence,
            Attended { out: rows(&out), dout: rows(&dout), log_sums: log_sums.view() },
            AttentionGradient {
                queries: dq.view_mut(),
                keys: dk.view_mut(),
                values: dv.view_mut(),
                meta_keys: dmk.view_mut(),
                meta_values: dmv.view_mut(),
            },
        );

        let mut want = [l, k + l, k + l].map(|rows| Array2::<f64>::zeros((rows, h)));
        for head in 0..heads {
            let (one, at) = (sequence.head(head), head * p);
            for i in 0..l {
                let weights = weights(one, i);
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
                let (dout, query) = (&dout.row(i).to_vec()[at..at + p], one.queries.row(i, p));
                let mean: f64 = one.seen(i).map(|j| weights[j] as f64 * dot(dout, one.value(j))).sum();
                for j in one.seen(i) {
                    let weight = weights[j] as f64;
                    let ds = weight * (dot(dout, one.value(j)) - mean) * one.scale() as f64;
                    for c in 0..p {
                        want[0][[i, at + c]] += ds * one.key(j)[c] as f64;
                        want[1][[j, at + c]] += ds * query[c] as f64;
                        want[2][[j, at + c]] += weight * dout[c] as f64;
                    }
                }
            }
        }
        let [dq, dk, dv, dmk, dmv] = &got;
        let pairs = [
            (dq, want[0].slice(s![.., ..])),
            (dmk, want[1].slice(s![..k, ..])),
            (dk, want[1].slice(s![k.., ..])),
            (dmv, want[2].slice(s![..k, ..])),
            (dv, want[2].slice(s![k.., ..])),
        ];
        for (which, (got, want)) in pairs.iter().enumerate() {
            for (got, want) in got.iter().zip(want) {
                assert!((*got as f64 - want).abs() < 2e-5, "l {l} k {k} gradient {which}: {got} {want}");
            }
        }
    }
}

#[test]
fn what_lies_ahead_touches_nothing() {
    let mut values = wave(9, 4, 3);
    values[[5, 2]] = f32::NAN;
    let (q, meta) = (wave(9, 4, 7), wave(2, 4, 5));
    let sequence = Sequence {
        queries: rows(&q),
        keys: rows(&q),
        values: rows(&values),
        meta_keys: rows(&meta),
        meta_values: rows(&meta),
        frames: 9,
        meta: 2,
        before: 0,
        key_width: 2,
        value_width: 2,
        window: Some(3),
    };
    let mut out = Array2::zeros((9, 4));
    attend(sequence, out.view_mut(), None);
    for (i, row) in out.rows().into_iter().enumerate() {
        assert_eq!(row.iter().any(|x| x.is_nan()), (5..8).contains(&i), "frame {i}");
    }
}
