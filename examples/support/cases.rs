//! The cases that are timed, all of the default model (frames of width 287).

use hymba::ndarray::{Array2, Array3};
use hymba::train::{AdamW, AdamWOptions, RegressionLoss};
use hymba::{Hymba, HymbaOptions};

pub const WIDTH: usize = 287;

/// `f1` batch 1 × length 60, `f32` 32 × 60, `f1k` 1 × 1024 and `f8k` 1 × 8192 with a window as long as the sequence, `step`
/// one frame of one stream past 70 frames, `train` forward, mean squared error, backward and AdamW on 32 × 60, `small` the same on
/// 16 × 16.
pub const CASES: [&str; 7] = ["f1", "f32", "f1k", "f8k", "step", "train", "small"];

/// What is called again and again.
pub type Call = Box<dyn FnMut() -> hymba::Result<()>>;

/// Builds the model and the input of one of [`CASES`].
pub fn prepare(case: &str) -> hymba::Result<Call> {
    match case {
        "f1" => forward(1, 60, 60),
        "f32" => forward(32, 60, 60),
        "f1k" => forward(1, 1024, 1024),
        "f8k" => forward(1, 8192, 8192),
        "step" => step(),
        "train" => train(32, 60),
        "small" => train(16, 16),
        _ => unreachable!("{case} is not one of the cases"),
    }
}

pub fn forward(batch: usize, length: usize, window: usize) -> hymba::Result<Call> {
    let model = Hymba::build(HymbaOptions::new(WIDTH).window_size(window))?;
    let x = input(batch, length);
    Ok(Box::new(move || model.forward(&x).map(drop)))
}

pub fn input(batch: usize, length: usize) -> Array3<f32> {
    Array3::from_shape_fn((batch, length, WIDTH), |(b, t, i)| ((b * 7 + t * 3 + i) as f32 * 0.1).sin())
}

pub fn frame() -> Array2<f32> {
    Array2::from_shape_fn((1, WIDTH), |(_, i)| (i as f32 * 0.1).sin())
}

fn step() -> hymba::Result<Call> {
    let model = Hymba::build(HymbaOptions::new(WIDTH))?;
    let mut state = model.new_state(1);
    let frame = frame();
    for _ in 0..70 {
        model.step(&frame, &mut state)?;
    }
    Ok(Box::new(move || model.step(&frame, &mut state).map(drop)))
}

fn train(batch: usize, length: usize) -> hymba::Result<Call> {
    let mut model = Hymba::build(HymbaOptions::new(WIDTH))?;
    let x = input(batch, length);
    let targets = Array2::from_shape_fn((batch, model.options().output_size()), |(b, i)| ((b + i) as f32 * 0.1).sin());
    let mut gradient = model.zeros_like();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default())?;
    Ok(Box::new(move || {
        let (y, cache) = model.forward_train(&x, None, optimizer.steps())?;
        let loss = RegressionLoss::MeanSquaredError.evaluate(&y, &targets)?;
        model.backward(&cache, &loss.gradient, &mut gradient)?;
        optimizer.step(&mut model, &mut gradient).map(drop)
    }))
}
