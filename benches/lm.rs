//! The language model with random weights: `cargo bench --features lm --bench lm`. Throughput is tokens.
//!
//! `layers` are two layers of the real sizes, one that owns its keys and values and one that uses them, and the head; `model` is
//! the whole Hymba-1.5B, which takes 3.1 GB of memory in bf16 and some seconds to make. `matrix` is one product of the sizes in
//! a layer, with weights that no cache holds; its throughput is multiplications.

use std::cell::LazyCell;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hymba::lm::{Arithmetic, GenerateOptions, HymbaLm, HymbaLmConfig, LmState, LoadOptions, Quantization, Sampler};
use hymba::ndarray::Array1;

#[allow(dead_code, unused_imports)]
#[path = "../src/kernels/mod.rs"]
mod kernels;

use kernels::matmul::{Matrix, Storage};
use kernels::rows::{Out, Rows};
use kernels::team::with_team;

const POSITION: usize = 512;

/// The ways in which a model may be kept and multiplied.
fn kinds() -> [(&'static str, LoadOptions); 4] {
    let options = LoadOptions::default;
    [
        ("bf16", options()),
        ("bf16, products too", options().arithmetic(Arithmetic::Bf16)),
        ("8 bits", options().quantize(Quantization::Bits8)),
        ("4 bits", options().quantize(Quantization::Bits4)),
    ]
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| i * 7919 % 32_000).collect()
}

/// A model of so many layers, and a state of one row that has seen [`POSITION`] tokens.
fn model(layers: usize, options: &LoadOptions) -> (HymbaLm, LmState) {
    let mut config = HymbaLmConfig::hymba_1_5b();
    if layers < config.num_hidden_layers {
        (config.num_hidden_layers, config.global_attn_idx) = (layers, Some(vec![]));
        config.kv_reuse_group = Some(vec![(0..layers).collect()]);
    }
    let lm = HymbaLm::random(config, 0, options).unwrap();
    let mut state = lm.new_state(1);
    lm.prefill_ragged(&[prompt(POSITION)], &mut state).unwrap();
    (lm, state)
}

fn tokens(c: &mut Criterion) {
    for (name, layers) in [("layers", 2), ("model", 32)] {
        for (kind, options) in kinds() {
            let mut group = c.benchmark_group(format!("{name}, {kind}"));
            group.sample_size(10);
            // made only if something is measured
            let made = LazyCell::new(|| model(layers, &options));
            for length in [32, POSITION] {
                group.throughput(Throughput::Elements(length as u64));
                group.bench_function(BenchmarkId::new("prefill", length), |b| {
                    let (lm, _) = &*made;
                    let prompt = prompt(length);
                    b.iter(|| lm.prefill_ragged(&[&prompt], &mut lm.new_state(1)).unwrap());
                });
            }
            for batch in [1, 2, 4, 8] {
                group.throughput(Throughput::Elements(batch as u64));
                group.bench_function(BenchmarkId::new(format!("decode at {POSITION}, batch"), batch), |b| {
                    let (lm, state) = &*made;
                    let mut states = state.select(&vec![0; batch]).unwrap();
                    let ids = Array1::from_elem(batch, 9);
                    b.iter(|| lm.step(&ids, &mut states).unwrap());
                });
            }
            group.finish();
        }
    }
}

fn matrix(c: &mut Criterion) {
    /// More than caches hold.
    const BYTES: usize = 256 << 20;
    let storages = [
        ("bf16", Storage::Bf16, false),
        ("bf16, products too", Storage::Bf16, true),
        ("8 bits", Storage::Q8, false),
        ("4 bits", Storage::Q4, false),
    ];
    for (kind, storage, rounds_inputs) in storages {
        let mut group = c.benchmark_group(format!("matrix, {kind}"));
        group.sample_size(20);
        for (inputs, outputs) in [(1600, 5504), (5504, 1600), (3200, 1600), (1600, 32_001)] {
            let made = LazyCell::new(|| {
                let make = || {
                    let mut matrix = Matrix::zeros(outputs, inputs, storage);
                    matrix.set_rows(|row, to| (0..).zip(to).for_each(|(i, x)| *x = ((row + i * 7) % 97) as f32 - 48.0));
                    matrix.set_rounds_inputs(rounds_inputs);
                    matrix
                };
                let first = make();
                let copies = BYTES.div_ceil(first.num_bytes());
                std::iter::once(first).chain((1..copies).map(|_| make())).collect::<Vec<_>>()
            });
            for rows in [1, 4, 512] {
                group.throughput(Throughput::Elements((rows * inputs * outputs) as u64));
                group.bench_function(BenchmarkId::new(format!("{inputs}x{outputs}"), format!("{rows} rows")), |b| {
                    let x: Vec<f32> = (0..rows * inputs).map(|i| (i as f32 * 0.37).sin()).collect();
                    let mut y = vec![0.0; rows * outputs];
                    let mut matrices = made.iter().cycle();
                    with_team(usize::MAX, |team| {
                        b.iter(|| {
                            let Some(matrix) = matrices.next() else { return };
                            let x = Rows { data: &x, stride: inputs };
                            matrix.multiply(team, x, rows, black_box(&mut y), Out::Set);
                        });
                    });
                });
            }
        }
        group.finish();
    }
}

fn sampler(c: &mut Criterion) {
    let mut group = c.benchmark_group("sampler of 32001");
    let logits: Vec<f32> = (0..32_001).map(|i| 4.0 * ((i * 7919 % 32_001) as f32 / 16_000.0 - 1.0).powi(3)).collect();
    let drawn = GenerateOptions::default().temperature(1.0);
    for (name, options) in [
        ("greedy", GenerateOptions::default()),
        ("temperature", drawn.clone()),
        ("top_k 40", drawn.clone().top_k(40)),
        ("top_p 0.95", drawn.top_p(0.95)),
    ] {
        let mut sampler = Sampler::new(&options).unwrap();
        group.bench_function(name, |b| b.iter(|| sampler.pick(&logits).unwrap()));
    }
    group.finish();
}

criterion_group!(benches, tokens, matrix, sampler);
criterion_main!(benches);
