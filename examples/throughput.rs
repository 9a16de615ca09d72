//! Times the default model (frames of width 287) and prints one JSON object a case, for comparison with other programs:
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release --example throughput -- 5
//! ```
//!
//! The argument is the number of rounds (3 unless given). A round calls a case for at least 0.3 s after a warm-up and takes
//! the median call. Cases: `f1` batch 1 × length 60, `f32` 32 × 60, `f1k` 1 × 1024 and `f8k` 1 × 8192 with a window as
//! long as the sequence, `step` one frame of one stream past 70 frames, `train` forward, mean squared error, backward and
//! AdamW on 32 × 60.

use std::error::Error;
use std::time::{Duration, Instant};

use hymba::ndarray::{Array2, Array3};
use hymba::train::{AdamW, AdamWOptions, RegressionLoss};
use hymba::{Hymba, HymbaOptions};

const WIDTH: usize = 287;
const ROUND: Duration = Duration::from_millis(300);

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = match std::env::args().nth(1) {
        Some(rounds) => rounds.parse().map_err(|_| format!("the number of rounds, not {rounds:?}"))?,
        None => 3,
    };
    let threads = match std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok()) {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    for (case, batch, length) in [("f1", 1, 60), ("f32", 32, 60), ("f1k", 1, 1024), ("f8k", 1, 8192)] {
        let model = Hymba::build(HymbaOptions::new(WIDTH).window_size(length.max(60)))?;
        let x = Array3::from_shape_fn((batch, length, WIDTH), |(b, t, i)| ((b * 7 + t * 3 + i) as f32 * 0.1).sin());
        report(case, threads, rounds, || model.forward(&x).map(|_| ()))?;
    }
    let model = Hymba::build(HymbaOptions::new(WIDTH))?;
    let mut state = model.new_state(1);
    let frame = Array2::from_shape_fn((1, WIDTH), |(_, i)| (i as f32 * 0.1).sin());
    for _ in 0..70 {
        model.step(&frame, &mut state)?;
    }
    report("step", threads, rounds, || model.step(&frame, &mut state).map(|_| ()))?;

    let mut model = model;
    let x = Array3::from_shape_fn((32, 60, WIDTH), |(b, t, i)| ((b * 7 + t * 3 + i) as f32 * 0.1).sin());
    let targets = Array2::from_shape_fn((32, model.options().output_size()), |(b, i)| ((b + i) as f32 * 0.1).sin());
    let mut gradient = model.zeros_like();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default())?;
    report("train", threads, rounds, || {
        let (y, cache) = model.forward_train(&x, None, optimizer.steps())?;
        let loss = RegressionLoss::MeanSquaredError.evaluate(&y, &targets)?;
        model.backward(&cache, &loss.gradient, &mut gradient)?;
        optimizer.step(&mut model, &mut gradient).map(|_| ())
    })?;
    Ok(())
}

fn report(case: &str, threads: usize, rounds: usize, mut call: impl FnMut() -> hymba::Result<()>) -> hymba::Result<()> {
    let mut medians = Vec::new();
    for _ in 0..=rounds {
        let (mut calls, start) = (Vec::new(), Instant::now());
        while start.elapsed() < ROUND || calls.len() < 3 {
            let start = Instant::now();
            call()?;
            calls.push(start.elapsed().as_secs_f64() * 1e3);
        }
        medians.push(median(&mut calls));
    }
    medians.remove(0); // the warm-up
    let median = median(&mut medians);
    println!(
        r#"{{"peer": "hymba", "case": "{case}", "threads": {threads}, "ms_min": {:.4}, "ms_med": {median:.4}, "ms_max": {:.4}}}"#,
        medians[0],
        medians[medians.len() - 1],
    );
    Ok(())
}

/// Sorts the times, too.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
