//! The default model on frames of width 287: `cargo bench --bench model`. Sizes are batch × length; throughput is frames.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hymba::ndarray::{Array2, Array3};
use hymba::train::{AdamW, AdamWOptions, RegressionLoss};
use hymba::{Hymba, HymbaOptions};

const WIDTH: usize = 287;

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    group.sample_size(20);
    for (batch, length, window) in
        [(1, 60, 60), (32, 60, 60), (1, 1024, 60), (1, 1024, 1024), (1, 8192, 60), (1, 8192, 8192)]
    {
        let model = Hymba::build(HymbaOptions::new(WIDTH).window_size(window)).unwrap();
        let x = Array3::from_shape_fn((batch, length, WIDTH), |(b, t, i)| ((b * 7 + t * 3 + i) as f32 * 0.1).sin());
        group.throughput(Throughput::Elements((batch * length) as u64));
        group.bench_function(format!("{batch}x{length} window {window}"), |b| b.iter(|| model.forward(&x).unwrap()));
    }
    group.finish();
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    let model = Hymba::build(HymbaOptions::new(WIDTH)).unwrap();
    for batch in [1, 8] {
        let frame = Array2::from_shape_fn((batch, WIDTH), |(b, i)| ((b + i) as f32 * 0.1).sin());
        let mut state = model.new_state(batch);
        for _ in 0..70 {
            model.step(&frame, &mut state).unwrap();
        }
        group.throughput(Throughput::Elements(batch as u64));
        group
            .bench_function(format!("batch {batch} window 60"), |b| b.iter(|| model.step(&frame, &mut state).unwrap()));
    }
    group.finish();
}

fn train(c: &mut Criterion) {
    let mut group = c.benchmark_group("train");
    group.sample_size(10);
    let mut model = Hymba::build(HymbaOptions::recommended(WIDTH)).unwrap();
    let (batch, length) = (32, 60);
    let x = Array3::from_shape_fn((batch, length, WIDTH), |(b, t, i)| ((b * 7 + t * 3 + i) as f32 * 0.1).sin());
    group.throughput(Throughput::Elements((batch * length) as u64));
    group.bench_function(format!("forward_train {batch}x{length}"), |b| {
        b.iter(|| model.forward_train(&x, None, 0).unwrap());
    });
    let (y, cache) = model.forward_train(&x, None, 0).unwrap();
    let mut grads = model.zeros_like();
    group.bench_function(format!("backward {batch}x{length}"), |b| {
        b.iter(|| model.backward(&cache, &y, &mut grads).unwrap());
    });
    let mut optimizer = AdamW::new(&model, AdamWOptions::default().learning_rate(1e-4)).unwrap();
    group.bench_function(format!("whole step {batch}x{length}"), |b| {
        b.iter(|| {
            let (y, cache) = model.forward_train(&x, None, optimizer.steps()).unwrap();
            let loss = RegressionLoss::MeanSquaredError.evaluate(&y, &y.mapv(|y| y + 0.1)).unwrap();
            model.backward(&cache, &loss.gradient, &mut grads).unwrap();
            optimizer.step(&mut model, &mut grads).unwrap()
        });
    });
    group.finish();
    // of this whole process: run the group alone, `cargo bench --bench model -- train`
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    match status.lines().find(|line| line.starts_with("VmHWM")) {
        Some(line) => println!("peak resident memory: {}", line["VmHWM:".len()..].trim()),
        None => println!("peak resident memory: not known on this system"),
    }
}

criterion_group!(benches, forward, step, train);
criterion_main!(benches);
