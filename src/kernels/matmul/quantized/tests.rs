use super::super::matrix::{Matrix, Storage};
use super::*;
use crate::kernels::simd::dispatch_at;
use crate::kernels::team::with_team;

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|level| level.is_available())
}

/// Numbers between −1 and 1 without a pattern.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let number = |i: u32| {
        let mut bits = i.wrapping_mul(0x9e37_79b9) ^ seed.wrapping_mul(0x85eb_ca6b);
        bits = (bits ^ bits >> 15).wrapping_mul(0x2c1b_3c6d);
        bits = (bits ^ bits >> 12).wrapping_mul(0x297a_2d39);
        (bits ^ bits >> 15) as f32 / 2f32.powi(31) - 1.0
    };
    (0..count as u32).map(number).collect()
}

fn normal(count: usize, seed: u32) -> Vec<f32> {
    let (a, b) = (numbers(count, seed), numbers(count, seed + 1));
    let pair = |(a, b): (&f32, &f32)| (-2.0 * (a.abs() + 1e-7).min(1.0).ln()).sqrt() * (std::f32::consts::PI * b).cos();
    a.iter().zip(&b).map(pair).collect()
}

fn quantized<Q: Quants>(w: &[f32], n: usize, k: usize) -> Quantized<Q> {
    let mut matrix = Quantized::zeros(n, k);
    for row in 0..n {
        matrix.set_row(row, &w[row * k..][..k]);
    }
    matrix
}

fn multiply<Q: Quants>(w: &Quantized<Q>, level: Isa, team: &Team, x: Rows, m: usize, out: &mut [f32], mode: Out) {
    let out = ArrayViewMut2::from_shape((m, w.n), out).unwrap();
    w.multiply(level, team, x, m, out, mode);
}

/// The inputs of a row in 8 bits, by the definition, and the scale of each block.
fn narrowed(x: &[f32]) -> Vec<(Vec<i32>, f32)> {
    let block = |x: &[f32]| {
        let scale = x.iter().fold(0f32, |largest, x| largest.max(x.abs())) / 127.0;
        let whole = x.iter().map(|x| if scale > 0.0 { (x * (1.0 / scale)).round_ties_even() as i32 } else { 0 });
        (whole.collect(), scale)
    };
    x.chunks(BLOCK).map(block).collect()
}

fn every_level_equals_the_definition<Q: Quants>() {
    let sizes = (1..21).map(|m| (m, 33, 45)).chain((1..130).map(|n| (1 + n % 3, n, 40)));
    for (m, n, k) in sizes.chain((0..131).map(|k| (1 + k % 7, 40, k))).chain([(0, 3, 5), (100, 65, 33), (7, 257, 300)])
    {
        let stride = k + 3;
        let (x, w) = (numbers(m * stride, 5), numbers(n * k, 7));
        let w = quantized::<Q>(&w, n, k);
        let mut want = Vec::new();
        for i in 0..m {
            let x = narrowed(&x[i * stride..][..k]);
            for row in 0..n {
                let (mut sum, mut size) = (0f64, 0f64);
                for (block, (x, x_scale)) in w.panel(row).iter().zip(&x) {
                    let quants = block.get(row % PANEL).map(|byte| i32::from(byte) - i32::from(Q::BIAS));
                    let whole: i32 = quants.iter().zip(x).map(|(w, x)| w * x).sum();
                    // the same three roundings as in the kernel, where there is one block
                    sum += f64::from(whole as f32 * block.scale(row % PANEL).to_f32()) * f64::from(*x_scale);
                    size += sum.abs();
                }
                want.push((sum, size));
            }
        }
        let mut fused = Vec::new();
        for level in levels() {
            let mut out = vec![7.0; m * n];
            for (mode, times) in [(Out::Set, 1.0), (Out::Add, 2.0)] {
                multiply(&w, level, &Team::alone(), Rows { data: &x, stride }, m, &mut out, mode);
                for (got, (want, size)) in out.iter().zip(&want) {
                    let error = (f64::from(*got) - times * want).abs();
                    assert!(error <= 1e-6 * size, "{level:?} {m}x{n}x{k} {got} {want}");
                    assert!(k > BLOCK || *got == times as f32 * *want as f32, "{level:?} {m}x{n}x{k} {got} {want}");
                }
            }
            if level > Isa::Scalar {
                fused.push(out);
            }
        }
        assert!(fused.windows(2).all(|pair| pair[0] == pair[1]), "{m}x{n}x{k}");
    }
}

#[test]
fn every_level_equals_the_definition_in_8_bits() {
    every_level_equals_the_definition::<Q8Block>();
}

#[test]
fn every_level_equals_the_definition_in_4_bits() {
    every_level_equals_the_definition::<Q4Block>();
}

fn a_row_depends_neither_on_its_batch_nor_on_the_team<Q: Quants>() {
    let (m, n, k) = (100, 300, 401);
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let w = quantized::<Q>(&w, n, k);
    for level in levels() {
        let mut all = vec![0.0; m * n];
        with_team(usize::MAX, |team| {
            multiply(&w, level, team, Rows { data: &x, stride: k }, m, &mut all, Out::Set);
        });
        for (first, rows) in (1..20).map(|rows| (rows, rows)).chain([(1, 99), (99, 1)]) {
            let mut some = vec![0.0; rows * n];
            let x = Rows { data: &x[first * k..], stride: k };
            multiply(&w, level, &Team::alone(), x, rows, &mut some, Out::Set);
            assert!(some == all[first * n..][..rows * n], "{level:?} {first} {rows}");
        }
    }
}

#[test]
fn a_row_depends_neither_on_its_batch_nor_on_the_team_in_8_and_4_bits() {
    a_row_depends_neither_on_its_batch_nor_on_the_team::<Q8Block>();
    a_row_depends_neither_on_its_batch_nor_on_the_team::<Q4Block>();
}

/// Sums of the largest products there can be.
#[test]
fn no_sum_overflows() {
    for sign in [1.0, -1.0] {
        let (n, k) = (33, 64);
        let (x, w) = (vec![sign; 3 * k], vec![1.0; n * k]);
        for level in levels() {
            let mut out = vec![0.0; 3 * n];
            multiply(
                &quantized::<Q8Block>(&w, n, k),
                level,
                &Team::alone(),
                Rows { data: &x, stride: k },
                3,
                &mut out,
                Out::Set,
            );
            // 1/127 is not a bfloat16
            assert!(out.iter().all(|sum| (sum - sign * 64.0).abs() < 0.2), "{level:?} {}", out[0]);
            multiply(
                &quantized::<Q4Block>(&w, n, k),
                level,
                &Team::alone(),
                Rows { data: &x, stride: k },
                3,
                &mut out,
                Out::Set,
            );
            assert!(out.iter().all(|sum| (sum - sign * 64.0).abs() < 1e-4), "{level:?} {}", out[0]);
        }
    }
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 31, 40] {
            let (n, k) = (3, 45);
            let (mut x, mut w) = (numbers(2 * k, 1), numbers(n * k, 2));
            let good = quantized::<Q4Block>(&w, n, k);
            w[k + place] = bad;
            x[k + place] = bad;
            for level in levels() {
                let mut out = vec![0.0; 2 * n];
                let rows = Rows { data: &x, stride: k };
                multiply(&good, level, &Team::alone(), rows, 2, &mut out, Out::Set);
                assert!(out.iter().enumerate().all(|(i, sum)| sum.is_nan() == (i >= n)), "{level:?} {out:?}");
                multiply(&quantized::<Q4Block>(&w, n, k), level, &Team::alone(), rows, 1, &mut out[..n], Out::Set);
                assert!(out[1].is_nan() && !out[0].is_nan() && !out[2].is_nan(), "{level:?} {out:?}");
                multiply(&quantized::<Q8Block>(&w, n, k), level, &Team::alone(), rows, 1, &mut out[..n], Out::Set);
                assert!(out[1].is_nan() && !out[0].is_nan() && !out[2].is_nan(), "{level:?} {out:?}");
            }
        }
    }
    // and what is very small is zero, or nearly so
    for tiny in [1e-45, 1e-39, 1e-37] {
        for storage in [Storage::Q8, Storage::Q4] {
            let mut matrix = Matrix::zeros(1, 40, storage);
            matrix.set_row(0, &[tiny; 40]);
            let mut row = [1.0; 40];
            matrix.row(0, &mut row);
            assert!(row.iter().all(|x| (0.0..=2e-37).contains(x)), "{row:?}");
            let mut out = [1.0];
            matrix.multiply(&Team::alone(), Rows { data: &[tiny; 40], stride: 40 }, 1, &mut out, Out::Set);
            assert_eq!(out, [0.0]);
        }
    }
}

#[test]
fn all_levels_choose_the_same_weights() {
    fn check<Q: Quants>() {
        let numbers = normal(40 * 70, 3);
        let mut first: Option<Vec<_>> = None;
        for level in levels() {
            let mut panel = [Q::ZERO; 2];
            let mut all = Vec::new();
            for (row, numbers) in numbers.chunks_exact(40).enumerate() {
                let output = row % PANEL;
                dispatch_at(level, SetRow { panel: &mut panel, output, numbers });
                all.push(panel.each_ref().map(|block| (block.scale(output), block.get(output))));
            }
            assert!(*first.get_or_insert_with(|| all.clone()) == all, "{level:?}");
        }
    }
    check::<Q8Block>();
    check::<Q4Block>();
}

/// The root of the mean squared error, as a part of the weights' own: measured, and set against what it would be if the number
/// of largest magnitude were always mapped to −8 (0.0860 and 0.1278).
#[test]
fn weights_are_as_near_as_measured() {
    let (n, k) = (640, 640);
    let normals = normal(n * k, 1);
    // Student's distribution with three degrees of freedom
    let [a, b, c] = [3, 5, 7].map(|seed| normal(n * k, seed));
    let heavy: Vec<_> =
        (0..n * k).map(|i| normals[i] / ((a[i] * a[i] + b[i] * b[i] + c[i] * c[i]) / 3.0).sqrt()).collect();
    let error = |w: &[f32], storage| {
        let mut one_by_one = Matrix::zeros(n, k, storage);
        let mut at_once = Matrix::zeros(n, k, storage);
        at_once.set_rows(|row, to| to.copy_from_slice(&w[row * k..][..k]));
        let (mut off, mut size) = (0f64, 0f64);
        let [mut row, mut same] = [vec![0.0; k], vec![0.0; k]];
        for (i, w) in w.chunks_exact(k).enumerate() {
            one_by_one.set_row(i, w);
            one_by_one.row(i, &mut row);
            at_once.row(i, &mut same);
            assert_eq!(row, same);
            off += w.iter().zip(&row).map(|(w, row)| f64::from(w - row).powi(2)).sum::<f64>();
            size += w.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        }
        (off / size).sqrt()
    };
    for (w, storage, most) in [
        (&normals, Storage::Q8, 0.0055),
        (&heavy, Storage::Q8, 0.0089),
        (&normals, Storage::Q4, 0.082),
        (&heavy, Storage::Q4, 0.126),
    ] {
        let error = error(w, storage);
        assert!(error < most && error > 0.9 * most, "{storage:?} {error}");
    }
}

#[test]
fn files_hold_all_of_a_row() {
    fn check<Q: Quants>() {
        let (n, k) = (40, 75);
        let matrix = quantized::<Q>(&numbers(n * k, 3), n, k);
        let mut again = Quantized::<Q>::zeros(n, k);
        for row in 0..n {
            let (mut bytes, mut scales) = (Vec::new(), Vec::new());
            matrix.bytes(row, &mut bytes);
            matrix.scales(row, &mut scales);
            assert_eq!((bytes.len(), scales.len()), (3 * Q::FILE_BYTES, 3));
            again.set_bytes(row, &bytes);
            again.set_scales(row, &scales);
        }
        let [mut first, mut second] = [vec![0.0; k], vec![0.0; k]];
        for row in 0..n {
            matrix.row(row, &mut first);
            again.row(row, &mut second);
            assert_eq!(first, second);
        }
    }
    check::<Q8Block>();
    check::<Q4Block>();

    let mut matrix = Quantized::<Q4Block>::zeros(1, 32);
    matrix.set_scales(0, &[0.5]);
    matrix.set_bytes(0, &[0x70, 0x8f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut row = [0.0; 32];
    matrix.row(0, &mut row);
    // the first of two is in the low bits
    assert_eq!(row[..5], [-4.0, -0.5, 3.5, 0.0, -4.0]);
    assert_eq!(Quantized::<Q8Block>::zeros(64, 33).num_bytes(), 64 * 2 * 34);
    assert_eq!(Quantized::<Q4Block>::zeros(64, 32).num_bytes(), 64 * 18);
}
