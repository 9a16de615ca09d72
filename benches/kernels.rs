//! The kernels at the shapes of the default model (h 256, d 512, n 16, r 16, heads of 64): `cargo bench --bench kernels`.
//!
//! The kernels are not public, so this file includes their sources.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::{Array2, Array3};

#[allow(dead_code, unused_imports)]
#[path = "../src/kernels/mod.rs"]
mod kernels;

use kernels::attention::{
    AttentionGradient, AttentionOutput, Head, KvRows, PackedHead, attend_backward, attend_step, attend_tile, tiles,
};
use kernels::conv::conv_silu;
use kernels::math::{Gelu, Sigmoid, Silu, Softplus, Unary, map};
use kernels::matmul::{Packed, matmul, matmul_gradient, matmul_part};
use kernels::norm::{SmallVariance, layer_norm};
use kernels::rows::{Out, Rows, RowsMut};
use kernels::scan::{CHUNK, ScanGradient, ScanInput, selective_scan, selective_scan_backward};
use kernels::team::{Team, with_team};

const H: usize = 256;
const D: usize = 512;
const N: usize = 16;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// One thread, and rows enough for several; throughput is multiplications.
fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    for (rows, inputs, outputs) in
        [(60, 256, 1024), (60, 1024, 256), (60, 512, 256), (60, 512, 48), (60, 16, 512), (1920, 256, 1024)]
    {
        let (x, w) = (numbers(rows * inputs), numbers(outputs * inputs));
        let packed = Packed::from_rows(outputs, inputs, |i| &w[i * inputs..][..inputs], None);
        let mut y = vec![0.0; rows * outputs];
        let x = Rows { data: &x, stride: inputs };
        let size = format!("{rows}x{inputs}x{outputs}");
        group.throughput(Throughput::Elements((rows * inputs * outputs) as u64));
        group.bench_function(BenchmarkId::new("one thread", &size), |b| {
            b.iter(|| matmul_part(x, rows, &packed, 0..outputs, 0..inputs, black_box(&mut y), outputs, Out::Set));
        });
        group.bench_function(BenchmarkId::new("all threads", &size), |b| {
            with_team(usize::MAX, |team| b.iter(|| matmul(team, x, rows, &packed, black_box(&mut y), Out::Set)));
        });
        let mut grad = vec![0.0; outputs * inputs];
        group.bench_function(BenchmarkId::new("gradient of the matrix", &size), |b| {
            with_team(usize::MAX, |team| {
                b.iter(|| {
                    let dy = Rows { data: &y, stride: outputs };
                    matmul_gradient(team, dy, outputs, x, inputs, rows, black_box(&mut grad));
                });
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("matvec");
    for (inputs, outputs) in [(256, 1024), (1024, 256), (512, 256), (512, 48), (1600, 6400)] {
        let (x, w) = (numbers(inputs), numbers(outputs * inputs));
        let packed = Packed::from_rows(outputs, inputs, |i| &w[i * inputs..][..inputs], None);
        let mut y = vec![0.0; outputs];
        group.throughput(Throughput::Bytes((inputs * outputs * size_of::<f32>()) as u64));
        group.bench_function(format!("{inputs}x{outputs}"), |b| {
            let (x, alone) = (Rows { data: &x, stride: inputs }, Team::alone());
            b.iter(|| matmul(&alone, x, 1, &packed, black_box(&mut y), Out::Set));
        });
    }
    group.finish();
}

fn sequences(c: &mut Criterion) {
    let mut group = c.benchmark_group("sequence");
    for l in [1, 60, 1024] {
        group.throughput(Throughput::Elements((l * D) as u64));
        let (x, out) = (numbers(l * 2 * D), &mut vec![0.0; l * D]);
        let (before, weight) = (numbers(3 * D), numbers(4 * D));
        group.bench_function(format!("conv {l}x{D}"), |b| {
            b.iter(|| {
                let x = Rows { data: &x, stride: 2 * D };
                conv_silu(x, &before, &weight, &before[..D], black_box(out));
            });
        });

        group.throughput(Throughput::Elements((l * D * N) as u64));
        let bc = numbers(l * (16 + 2 * N));
        let delta = vec![0.05; l * D];
        let a: Vec<f32> = (0..N * D).map(|i| -((i / D + 1) as f32)).collect();
        let (mut state, mut y) = (Array2::zeros((N, D)), Array2::zeros((l, D)));
        let rows = |data, stride| Rows { data, stride };
        let input = ScanInput {
            delta: rows(&delta, D),
            v: rows(&x, 2 * D),
            b: rows(&bc[16..], 16 + 2 * N),
            c: rows(&bc[16 + N..], 16 + 2 * N),
            z: rows(&x[D..], 2 * D),
            a: &a,
            skip: Some(&before[..D]),
            mean_delta: None,
        };
        group.bench_function(format!("scan {l}x{D}x{N}"), |b| {
            b.iter(|| selective_scan(input, 0, state.view_mut(), black_box(&mut y).view_mut(), None));
        });

        let mut checkpoints = Array3::zeros((l.div_ceil(CHUNK), N, D));
        selective_scan(input, 0, state.view_mut(), y.view_mut(), Some(checkpoints.view_mut()));
        let dout = numbers(l * D);
        let (mut ddelta, mut dv) = (vec![0.0; l * D], vec![0.0; l * D]);
        let (mut dbc, mut dxz) = (vec![0.0; l * (16 + 2 * N)], vec![0.0; l * 2 * D]);
        let (mut da, mut dskip, mut dstate) = (vec![0.0; N * D], vec![0.0; D], vec![0.0; N * D]);
        group.bench_function(format!("scan backward {l}x{D}x{N}"), |b| {
            b.iter(|| {
                let gradient = ScanGradient {
                    delta: black_box(&mut ddelta),
                    v: &mut dv,
                    bc: RowsMut { data: &mut dbc, stride: 16 + 2 * N },
                    z: RowsMut { data: &mut dxz, stride: 2 * D },
                    a: &mut da,
                    skip: Some(&mut dskip),
                    state: &mut dstate,
                    mean_delta: None,
                };
                selective_scan_backward(input, checkpoints.view(), &dout, gradient);
            });
        });
    }

    let meta = numbers(4 * H);
    for (l, window) in [(60, 60), (1024, 60), (1024, 1024)] {
        let x = numbers(l * H);
        let rows = |data| Rows { data, stride: H };
        let head = Head {
            queries: rows(&x),
            keys: rows(&x),
            values: rows(&x),
            past_keys: rows(&meta),
            past_values: rows(&meta),
            past: 4,
            meta: 4,
            frames: l,
            key_width: 64,
            value_width: 64,
            window: Some(window),
        };
        let (mut out, mut log_sums) = (Array2::zeros((l, 64)), Array2::zeros((l, 1)));
        group.throughput(Throughput::Elements((l * 64) as u64));
        group.bench_function(format!("attention of a head {l}x64 window {window}"), |b| {
            b.iter(|| {
                let packed = PackedHead::new(&head);
                let tiles = tiles(black_box(&mut out).view_mut(), Some(log_sums.view_mut()));
                tiles.into_iter().for_each(|tile| attend_tile(head, packed.as_ref(), tile));
            });
        });

        let (out, dout) = (Rows { data: out.as_slice().unwrap(), stride: 64 }, rows(&x));
        let output = AttentionOutput { out, dout, log_sums: log_sums.view() };
        let mut frames = [(); 3].map(|()| Array2::zeros((l, 64)));
        let mut tokens = [(); 2].map(|()| Array2::zeros((4, 64)));
        group.bench_function(format!("attention backward of a head {l}x64 window {window}"), |b| {
            b.iter(|| {
                let [queries, keys, values] = black_box(&mut frames).each_mut().map(|array| array.view_mut());
                let [past_keys, past_values] = tokens.each_mut().map(|array| array.view_mut());
                attend_backward(
                    head,
                    0..head.frames,
                    output,
                    AttentionGradient { queries, keys, values, past_keys, past_values },
                );
            });
        });
    }
    let (x, mut out) = (numbers(60 * H), vec![0.0; H]);
    let run = |keys, values, rows| KvRows { keys, values, strides: (H, H), rows };
    let runs = [run(&meta, &meta, 4), run(&x, &x, 60)];
    group.throughput(Throughput::Elements(H as u64));
    group.bench_function("attention step window 60", |b| {
        b.iter(|| attend_step(&x[..H], &runs, 4, 1, black_box(&mut out)));
    });

    let mut out = vec![0.0; 60 * H];
    group.throughput(Throughput::Elements((60 * H) as u64));
    group.bench_function(format!("norm 60x{H}"), |b| {
        b.iter(|| layer_norm(&x, &meta[..H], &meta[H..2 * H], 1e-5, SmallVariance::AddEpsilon, black_box(&mut out)));
    });
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    fn bench<F: Unary>(c: &mut Criterion, name: &str) {
        let mut x = numbers(60 * 4 * H);
        let mut group = c.benchmark_group("elementwise");
        group.throughput(Throughput::Elements(x.len() as u64));
        group.bench_function(format!("{name} {}", x.len()), |b| b.iter(|| map::<F>(black_box(&mut x))));
        group.finish();
    }
    bench::<Gelu>(c, "gelu");
    bench::<Silu>(c, "silu");
    bench::<Sigmoid>(c, "sigmoid");
    bench::<Softplus>(c, "softplus");
}

criterion_group!(benches, products, sequences, elementwise);
criterion_main!(benches);
