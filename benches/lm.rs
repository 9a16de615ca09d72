//! The language model with random weights: `cargo bench --features lm --bench lm`. Throughput is tokens.
//!
//! `layers` are two layers of the real sizes, one that owns its keys and values and one that uses them, and the head; `model` is
//! the whole Hymba-1.5B, which takes 3.1 GB of memory in bf16 and some seconds to make.

use std::cell::LazyCell;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hymba::lm::{GenerateOptions, HymbaLm, HymbaLmConfig, LmState, LoadOptions, Sampler};
use hymba::ndarray::Array1;

const POSITION: usize = 512;

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| i * 7919 % 32_000).collect()
}

/// A model of so many layers, and a state of one row that has seen [`POSITION`] tokens.
fn model(layers: usize) -> (HymbaLm, LmState) {
    let mut config = HymbaLmConfig::hymba_1_5b();
    if layers < config.num_hidden_layers {
        (config.num_hidden_layers, config.global_attn_idx) = (layers, Some(vec![]));
        config.kv_reuse_group = Some(vec![(0..layers).collect()]);
    }
    let lm = HymbaLm::random(config, 0, &LoadOptions::default()).unwrap();
    let mut state = lm.new_state(1);
    lm.prefill_ragged(&[prompt(POSITION)], &mut state).unwrap();
    (lm, state)
}

fn tokens(c: &mut Criterion) {
    for (name, layers) in [("layers", 2), ("model", 32)] {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        // made only if something is measured
        let made = LazyCell::new(|| model(layers));
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

criterion_group!(benches, tokens, sampler);
criterion_main!(benches);
