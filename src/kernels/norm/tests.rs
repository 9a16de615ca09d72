//! Norms and their gradients against their definitions, on every instruction set.

use super::layer::{LayerNorm, LayerNormBackward};
use super::rms::{RmsNorm, RmsNormInPlace};
use super::*;
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Isa, dispatch_at};

#[test]
fn every_level_equals_the_plain_norm() {
    for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
        for h in 1..130 {
            let x: Vec<f32> = (0..2 * h).map(|i| (i * 7 % 13) as f32 - 5.5).collect();
            let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
            let bias: Vec<f32> = (0..h).map(|i| i as f32 / 50.0).collect();
            let mut out = vec![0.0; 2 * h];
            let rule = SmallVariance::AddEpsilon;
            let norm = LayerNorm { x: &x, weight: &weight, bias: &bias, epsilon: 1e-5, rule, out: &mut out };
            dispatch_at(level, norm);
            for (x, out) in x.chunks(h).zip(out.chunks(h)) {
                let mean = x.iter().map(|x| *x as f64).sum::<f64>() / h as f64;
                let variance = x.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / h as f64;
                for i in 0..h {
                    let want = (x[i] as f64 - mean) / (variance + 1e-5).sqrt() * weight[i] as f64 + bias[i] as f64;
                    assert!((out[i] as f64 - want).abs() < 1e-5, "{level:?} h {h}: {} {want}", out[i]);
                }
            }
        }
    }
}

#[test]
fn every_level_equals_the_plain_rms_norm() {
    for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
        for h in 1..130 {
            let x: Vec<f32> = (0..2 * (h + 3)).map(|i| (i * 7 % 13) as f32 - 5.5).collect();
            let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
            let rows = Rows { data: &x, stride: h + 3 };
            for (mode, before) in [(Out::Set, 0.0), (Out::Add, 1.0)] {
                let mut out = vec![1.0; 2 * h];
                let norm = RmsNorm { x: rows, weight: &weight, epsilon: 1e-2, scale: 0.5, out: &mut out, mode };
                dispatch_at(level, norm);
                let mut in_place = x[..h].to_vec();
                dispatch_at(level, RmsNormInPlace { x: &mut in_place, weight: &weight, epsilon: 1e-2 });
                assert!((0..h).all(|i| (in_place[i] * 0.5 + before as f32 - out[i]).abs() < 1e-5));
                for (i, out) in out.chunks(h).enumerate() {
                    let x = rows.row(i, h);
                    let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / h as f64;
                    for j in 0..h {
                        let want = before + 0.5 * x[j] as f64 / (mean + 1e-2).sqrt() * weight[j] as f64;
                        assert!((out[j] as f64 - want).abs() < 1e-5, "{level:?} h {h}: {} {want}", out[j]);
                    }
                }
            }
        }
    }
}

/// Rows that f32 can hold and the textbook's sums cannot: nearly constant ones, and ones whose squares overflow.
fn extreme_rows(h: usize) -> Vec<Vec<f32>> {
    let wave = |i: usize| (i * 7 % 13) as f32 - 5.5;
    let mut rows = Vec::new();
    for c in [1.0f32, 10.1, 1234.567, 54321.9, 98765.4, 3e7, 1e12] {
        let ulp = f32::from_bits(c.to_bits() + 1) - c;
        rows.push(vec![c; h]);
        rows.push((0..h).map(|i| c + ulp * wave(i).round()).collect());
        rows.push((0..h).map(|i| if i == 0 { -c } else { c }).collect());
        rows.push((0..h).map(|i| if i + 1 == h { c + 3.0 * ulp } else { -c }).collect());
    }
    for c in [1e18, 1e19, 1e20, 1e25, 1e30, 5e37] {
        rows.push((0..h).map(|i| c * wave(i)).collect());
        rows.push((0..h).map(|i| if i % 2 == 0 { f32::MAX } else { c }).collect());
    }
    rows.push((0..h).map(|i| if i % 2 == 0 { f32::MAX } else { f32::MIN }).collect());
    rows
}

#[test]
fn rows_of_any_size_and_spread() {
    for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
        for (h, rule) in [2, 16, 37, 96, 128, 256, 512]
            .into_iter()
            .flat_map(|h| [(h, SmallVariance::AddEpsilon), (h, SmallVariance::ClipBelowEpsilon)])
        {
            let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
            let bias: Vec<f32> = (0..h).map(|i| i as f32 / 50.0).collect();
            let dy: Vec<f32> = (0..h).map(|i| (i as f32).sin()).collect();
            for x in extreme_rows(h) {
                let mean = x.iter().map(|x| *x as f64).sum::<f64>() / h as f64;
                let variance = x.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / h as f64;
                let clipped = rule == SmallVariance::ClipBelowEpsilon && variance < 1e-5;
                let deviation = if clipped { 1e-5f64.sqrt() } else { (variance + 1e-5).sqrt() };
                let hat: Vec<f64> = x.iter().map(|x| (*x as f64 - mean) / deviation).collect();

                let mut out = vec![9.0; h];
                let norm = LayerNorm { x: &x, weight: &weight, bias: &bias, epsilon: 1e-5, rule, out: &mut out };
                dispatch_at(level, norm);
                for i in 0..h {
                    let want = hat[i] * weight[i] as f64 + bias[i] as f64;
                    let error = (out[i] as f64 - want).abs();
                    assert!(error < 2e-6 * want.abs().max(1.0), "{level:?} {h} {} {want} {:?}", out[i], &x[..2]);
                }

                let (mut dx, mut dweight, mut dbias) = (vec![9.0; h], vec![0.0; h], vec![0.0; h]);
                let (dx, dweight, dbias) = (&mut dx[..], &mut dweight[..], &mut dbias[..]);
                let (x, weight, dy) = (&x[..], &weight[..], &dy[..]);
                dispatch_at(
                    level,
                    LayerNormBackward { x, weight, epsilon: 1e-5, rule, dy, dx, mode: Out::Set, dweight, dbias },
                );
                let g: Vec<f64> = (0..h).map(|i| weight[i] as f64 * dy[i] as f64).collect();
                let mean_g = g.iter().sum::<f64>() / h as f64;
                let projection = g.iter().zip(&hat).map(|(g, hat)| g * hat).sum::<f64>() / h as f64;
                let projection = if clipped { 0.0 } else { projection };
                for i in 0..h {
                    let want = g[i] - mean_g - hat[i] * projection;
                    assert!((dx[i] as f64 * deviation - want).abs() < 2e-5, "{level:?} {h} {:?}", &x[..2]);
                    let want = dy[i] as f64 * hat[i];
                    assert!((dweight[i] as f64 - want).abs() < 2e-6 * want.abs().max(1.0));
                }
            }
        }
    }
}

#[test]
fn rms_of_any_size() {
    for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
        for h in [1, 2, 16, 37, 256] {
            let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 100.0).collect();
            for x in extreme_rows(h) {
                let deviation = (x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / h as f64 + 1e-6).sqrt();
                let (mut out, mut in_place) = (vec![1.0; h], x.clone());
                let (rows, out_mut, mode) = (Rows { data: &x, stride: h }, &mut out[..], Out::Add);
                dispatch_at(level, RmsNorm { x: rows, weight: &weight, epsilon: 1e-6, scale: 0.5, out: out_mut, mode });
                dispatch_at(level, RmsNormInPlace { x: &mut in_place, weight: &weight, epsilon: 1e-6 });
                for i in 0..h {
                    let want = x[i] as f64 / deviation * weight[i] as f64;
                    let close = |got: f64, want: f64| (got - want).abs() < 2e-6 * want.abs().max(1.0);
                    assert!(close(in_place[i] as f64, want), "{level:?} {h} {} {want}", in_place[i]);
                    assert!(close(out[i] as f64, 1.0 + want / 2.0), "{level:?} {h} {} {want}", out[i]);
                }
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 20] {
            let mut x = vec![1.0; 40];
            x[place] = bad;
            let mut out = vec![0.0; 40];
            layer_norm(&x, &[1.0; 40], &[0.0; 40], 1e-5, SmallVariance::AddEpsilon, &mut out);
            assert!(out.iter().all(|y| y.is_nan()));
        }
    }
}

#[test]
fn gradients_equal_finite_differences_on_every_level() {
    for rule in [SmallVariance::AddEpsilon, SmallVariance::ClipBelowEpsilon] {
        for (h, spread) in [(1, 1.0), (5, 1.0), (16, 1.0), (37, 1.0), (37, 1e-3)] {
            let x: Vec<f32> = (0..2 * h).map(|i| ((i * 7 % 13) as f32 - 5.5) * spread).collect();
            let weight: Vec<f32> = (0..h).map(|i| 1.0 + i as f32 / 10.0).collect();
            let dy: Vec<f32> = (0..2 * h).map(|i| (i as f32).sin()).collect();
            // Σ dy ⊙ norm(x), in f64
            let value = |x: &[f64]| -> f64 {
                let mut total = 0.0;
                for (x, dy) in x.chunks(h).zip(dy.chunks(h)) {
                    let mean = x.iter().sum::<f64>() / h as f64;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / h as f64;
                    let clipped = rule.is_clipped(variance as f32, 1e-5);
                    let deviation = if clipped { 1e-5f64.sqrt() } else { (variance + 1e-5).sqrt() };
                    let terms = x.iter().zip(dy).zip(&weight);
                    total += terms.map(|((x, dy), w)| (x - mean) / deviation * *w as f64 * *dy as f64).sum::<f64>();
                }
                total
            };
            for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
                let (mut dx, mut dweight, mut dbias) = (vec![9.0; 2 * h], vec![1.0; h], vec![2.0; h]);
                let (dx, dweight, dbias) = (&mut dx[..], &mut dweight[..], &mut dbias[..]);
                let (x, weight, dy) = (&x[..], &weight[..], &dy[..]);
                dispatch_at(
                    level,
                    LayerNormBackward { x, weight, epsilon: 1e-5, rule, dy, dx, mode: Out::Set, dweight, dbias },
                );
                let wide: Vec<f64> = x.iter().map(|x| *x as f64).collect();
                let largest = dx.iter().fold(1.0f64, |m, dx| m.max(dx.abs() as f64));
                for i in 0..2 * h {
                    let step = 1e-6 * spread as f64;
                    let (mut above, mut below) = (wide.clone(), wide.clone());
                    above[i] += step;
                    below[i] -= step;
                    let slope = (value(&above) - value(&below)) / (2.0 * step);
                    assert!((dx[i] as f64 - slope).abs() < 1e-4 * largest, "{level:?} {rule:?} {h}");
                }
                for i in 0..h {
                    assert!((dbias[i] - 2.0 - dy[i] - dy[h + i]).abs() < 1e-5);
                }
                let mut y = vec![0.0; 2 * h];
                layer_norm(x, &vec![1.0; h], &vec![0.0; h], 1e-5, rule, &mut y);
                for i in 0..h {
                    assert!((dweight[i] - 1.0 - dy[i] * y[i] - dy[h + i] * y[h + i]).abs() < 1e-5);
                }
            }
        }
    }
}

#[test]
fn the_two_rules_part_below_epsilon() {
    let (add, clip) = (SmallVariance::AddEpsilon, SmallVariance::ClipBelowEpsilon);
    assert_eq!(add.reciprocal_deviation(2e-5, 1e-5), clip.reciprocal_deviation(2e-5, 1e-5));
    approx::assert_relative_eq!(clip.reciprocal_deviation(9e-6, 1e-5), 316.22778, max_relative = 1e-6);
    assert!(add.reciprocal_deviation(9e-6, 1e-5) < 230.0);
}
