//! The scan and its gradient against plain loops in f64.

use super::super::simd::{Isa, dispatch_at};
use super::*;
use ndarray::{Array2, Array3};

fn wave(count: usize, step: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|i| ((i * step % 37) as f32 / 18.0 - 1.0) * scale).collect()
}

/// The recurrence as the paper writes it, in f64, one number at a time: the oracle.
fn reference(input: &ScanInput, state: &mut Array2<f32>, l: usize, d: usize) -> Vec<f64> {
    let n = state.nrows();
    let at = |rows: Rows, t: usize, i: usize| rows.data[t * rows.stride + i] as f64;
    let mut out = vec![0.0; l * d];
    for ch in 0..d {
        let mut hidden: Vec<f64> = state.column(ch).iter().map(|s| *s as f64).collect();
        for t in 0..l {
            let (delta, v, z) = (at(input.delta, t, ch), at(input.v, t, ch), at(input.z, t, ch));
            let step = input.mean_delta.map_or(delta, |step| step[t] as f64);
            let mut y = input.skip.map_or(0.0, |skip| skip[ch] as f64) * v;
            for (i, hidden) in hidden.iter_mut().enumerate() {
                let decay = (delta * input.a[i * d + ch] as f64).exp();
                *hidden = decay * *hidden + step * at(input.b, t, i) * v;
                y += *hidden * at(input.c, t, i);
            }
            out[t * d + ch] = y * z / (1.0 + (-z).exp());
        }
        for i in 0..n {
            state[[i, ch]] = hidden[i] as f32;
        }
    }
    out
}

/// What a scan of l frames reads.
struct Numbers {
    delta: Vec<f32>,
    v: Vec<f32>,
    z: Vec<f32>,
    bc: Vec<f32>,
    a: Vec<f32>,
    skip: Vec<f32>,
    mean_delta: Vec<f32>,
}

impl Numbers {
    fn new(l: usize, d: usize, n: usize) -> Self {
        Numbers {
            delta: wave(l * d, 5, 0.04).iter().map(|x| x + 0.05).collect(),
            v: wave(l * d, 7, 1.0),
            z: wave(l * 2 * d, 11, 2.0),
            bc: wave(l * 2 * n, 13, 1.0),
            a: (0..n * d).map(|i| -((i / d + 1) as f32) - (i % 3) as f32 / 7.0).collect(),
            skip: wave(d, 3, 1.0),
            mean_delta: wave(l, 3, 0.1),
        }
    }

    fn input(&self, edifice: bool) -> ScanInput<'_> {
        let d = self.skip.len();
        let n = self.a.len() / d;
        ScanInput {
            delta: Rows { data: &self.delta, stride: d },
            v: Rows { data: &self.v, stride: d },
            b: Rows { data: &self.bc, stride: 2 * n },
            c: Rows { data: &self.bc[n..], stride: 2 * n },
            z: Rows { data: &self.z[d..], stride: 2 * d },
            a: &self.a,
            skip: (!edifice).then_some(&self.skip),
            mean_delta: edifice.then_some(&self.mean_delta),
        }
    }
}

#[test]
fn every_level_equals_the_plain_recurrence() {
    for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
        for d in (1..130).step_by(3).chain([16, 32, 64, 512]) {
            for (l, n, edifice) in [(1, 16, false), (9, 5, true), (9, 1, false)] {
                let numbers = Numbers::new(l, d, n);
                let input = numbers.input(edifice);
                let mut want_state = Array2::from_elem((n, d), 0.5);
                let mut state = want_state.clone();
                let want = reference(&input, &mut want_state, l, d);
                let mut out = Array2::zeros((l, d));
                let scan = Scan { input, first: 0, state: state.view_mut(), out: out.view_mut(), checkpoints: None };
                dispatch_at(level, scan);
                for (got, want) in out.iter().zip(&want) {
                    assert!((*got as f64 - want).abs() < 1e-5, "{level:?} d {d} {got} {want}");
                }
                for (got, want) in state.iter().zip(&want_state) {
                    assert!((got - want).abs() < 1e-5);
                }
            }
        }
    }
}

#[test]
fn channels_do_not_depend_on_how_they_are_shared_out() {
    let (l, d, n) = (200, 300, 16);
    let delta: Vec<f32> = wave(l * d, 5, 0.04).iter().map(|x| x + 0.05).collect();
    let (v, bc) = (wave(l * d, 7, 1.0), wave(l * 2 * n, 13, 1.0));
    let a: Vec<f32> = (0..n * d).map(|i| -((i / d + 1) as f32)).collect();
    let input = ScanInput {
        delta: Rows { data: &delta, stride: d },
        v: Rows { data: &v, stride: d },
        b: Rows { data: &bc, stride: 2 * n },
        c: Rows { data: &bc[n..], stride: 2 * n },
        z: Rows { data: &v, stride: d },
        a: &a,
        skip: None,
        mean_delta: None,
    };
    let (mut shared, mut alone) = (Array2::zeros((l, d)), Array2::zeros((l, d)));
    let (mut shared_state, mut state) = (Array2::zeros((n, d)), Array2::zeros((n, d)));
    selective_scan(input, 0, state.view_mut(), alone.view_mut(), None);
    for (i, (mut state, mut out)) in
        shared_state.axis_chunks_iter_mut(Axis(1), 128).zip(shared.axis_chunks_iter_mut(Axis(1), 128)).enumerate()
    {
        selective_scan(input, 128 * i, state.view_mut(), out.view_mut(), None);
    }
    assert_eq!(shared, alone);
    assert_eq!(shared_state, state);
}

/// The reverse recurrence in f64, one number at a time: the oracle.
#[test]
fn gradients_equal_the_plain_reverse_recurrence_on_every_level() {
    for (d, l, n, edifice) in [(1, 1, 1, false), (33, 16, 5, false), (40, 37, 3, true), (70, 33, 16, false)] {
        let numbers = Numbers::new(l, d, n);
        let (input, dout) = (numbers.input(edifice), wave(l * d, 17, 1.0));
        let Numbers { a, skip, .. } = &numbers;
        let (start, dend) = (wave(n * d, 19, 0.5), wave(n * d, 23, 0.5));

        let at = |rows: Rows, t: usize, i: usize| rows.data[t * rows.stride + i] as f64;
        let [mut ddelta, mut dv, mut dz] = [(); 3].map(|()| vec![0.0; l * d]);
        let (mut dbc, mut dstep) = (vec![0.0; l * 2 * n], vec![0.0; l]);
        let (mut da, mut dskip, mut dstart) = (vec![0.0; n * d], vec![0.0; d], vec![0.0; n * d]);
        for ch in 0..d {
            // states[t] is that before frame t
            let mut states = vec![(0..n).map(|i| start[i * d + ch] as f64).collect::<Vec<f64>>()];
            let step_at = |t: usize| if edifice { numbers.mean_delta[t] as f64 } else { at(input.delta, t, ch) };
            let decay = |t: usize, i: usize| (at(input.delta, t, ch) * a[i * d + ch] as f64).exp();
            for t in 0..l {
                let wrote = |i: usize| step_at(t) * at(input.b, t, i) * at(input.v, t, ch);
                states.push((0..n).map(|i| decay(t, i) * states[t][i] + wrote(i)).collect());
            }
            let mut ds: Vec<f64> = (0..n).map(|i| dend[i * d + ch] as f64).collect();
            for t in (0..l).rev() {
                let (z, v, g) = (at(input.z, t, ch), at(input.v, t, ch), dout[t * d + ch] as f64);
                let sigmoid = 1.0 / (1.0 + (-z).exp());
                let skip = if edifice { 0.0 } else { skip[ch] as f64 };
                let y = skip * v + (0..n).map(|i| states[t + 1][i] * at(input.c, t, i)).sum::<f64>();
                dz[t * d + ch] = g * y * sigmoid * (1.0 + z * (1.0 - sigmoid));
                let dy = g * z * sigmoid;
                dskip[ch] += dy * v;
                dv[t * d + ch] = skip * dy;
                for i in 0..n {
                    dbc[t * 2 * n + n + i] += dy * states[t + 1][i];
                    ds[i] += dy * at(input.c, t, i);
                    dbc[t * 2 * n + i] += ds[i] * step_at(t) * v;
                    dv[t * d + ch] += ds[i] * step_at(t) * at(input.b, t, i);
                    let of_step = ds[i] * at(input.b, t, i) * v;
                    if edifice {
                        dstep[t] += of_step
                    } else {
                        ddelta[t * d + ch] += of_step
                    }
                    let exponent = ds[i] * decay(t, i) * states[t][i];
                    ddelta[t * d + ch] += exponent * a[i * d + ch] as f64;
                    da[i * d + ch] += exponent * at(input.delta, t, ch);
                    ds[i] *= decay(t, i);
                }
            }
            (0..n).for_each(|i| dstart[i * d + ch] = ds[i]);
        }

        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            let mut state = Array2::from_shape_vec((n, d), start.clone()).unwrap();
            let mut out = Array2::zeros((l, d));
            let mut kept = Array3::zeros((l.div_ceil(CHUNK), n, d));
            let checkpoints = Some(kept.view_mut());
            let scan = Scan { input, first: 0, state: state.view_mut(), out: out.view_mut(), checkpoints };
            dispatch_at(level, scan);
            let [mut got_delta, mut got_v] = [(); 2].map(|()| vec![9.0; l * d]);
            let (mut got_bc, mut got_z, mut got_step) = (vec![9.0; l * 2 * n], vec![9.0; l * d], vec![9.0; l]);
            let (mut got_a, mut got_skip, mut got_state) = (vec![0.0; n * d], vec![0.0; d], dend.clone());
            let gradient = ScanGradient {
                delta: &mut got_delta,
                v: &mut got_v,
                bc: RowsMut { data: &mut got_bc, stride: 2 * n },
                z: RowsMut { data: &mut got_z, stride: d },
                a: &mut got_a,
                skip: (!edifice).then_some(&mut got_skip),
                state: &mut got_state,
                mean_delta: edifice.then_some(&mut got_step),
            };
            dispatch_at(level, ScanBackward { input, checkpoints: kept.view(), dout: &dout, gradient });
            let mut pairs = vec![
                ("Δ", &got_delta, &ddelta),
                ("v", &got_v, &dv),
                ("B | C", &got_bc, &dbc),
                ("z", &got_z, &dz),
                ("A", &got_a, &da),
                ("state", &got_state, &dstart),
            ];
            pairs.push(if edifice { ("step", &got_step, &dstep) } else { ("D", &got_skip, &dskip) });
            for (name, got, want) in pairs {
                let bound = 1e-5 * want.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                for (got, want) in got.iter().zip(want) {
                    assert!((*got as f64 - want).abs() < bound, "{level:?} d {d} {name}: {got} {want}");
                }
            }
        }
    }
}
