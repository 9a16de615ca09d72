//! A training loop written by hand, where `Trainer` does not do what you want: two learning rates, a schedule, a metric of one's own.
//!
//! ```sh
//! cargo run --release --example training_loop
//! ```
//!
//! It learns which of three bursts a noisy series has in it. Success looks like `accuracy of the last epoch: 1.00`.

use hymba::ndarray::Array2;
use hymba::train::{AdamW, AdamWOptions, CrossEntropy, Dataset, Schedule, Targets};
use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, Task, argmax};

const EPOCHS: u64 = 12;
const BATCH: usize = 16;

fn main() -> hymba::Result<()> {
    let data = bursts(240)?;
    let (train, validation) = data.split(0.25, 0)?;

    let options =
        PredictorOptions::new(HymbaOptions::recommended(1).hidden_size(32).num_layers(1)).pooling(Pooling::Max);
    let mut predictor = Predictor::build(options, data.task().clone())?;
    let mut gradient = predictor.zeros_like();
    let steps = EPOCHS * train.batches(BATCH, 0)?.len() as u64;
    let schedule = Schedule::cosine(5e-3, steps).warm_up(steps / 10);
    // the encoder's decays stay as they are, and the head learns faster
    let rates =
        AdamWOptions::default().schedule(schedule).clip_norm(1.0).rate_for("*.a_log", 0.0).rate_for("head.*", 2.0);
    let mut optimizer = AdamW::new(&predictor, rates)?;
    let loss = CrossEntropy::new().label_smoothing(0.1);

    let mut seed = 0;
    for epoch in 0..EPOCHS {
        let mut total = 0.0;
        for batch in train.batches(BATCH, epoch)? {
            let ((x, lengths), labels) = (train.pad(&batch)?, classes(&train, &batch));
            let (logits, cache) = predictor.forward_train(&x, Some(&lengths), seed)?; // [b, classes]
            let of_batch = loss.evaluate(&logits, &labels)?;
            predictor.backward(&cache, &of_batch.gradient, &mut gradient)?; // adds
            optimizer.step(&mut predictor, &mut gradient)?; // and clears it
            (total, seed) = (total + of_batch.value * batch.len() as f32, seed + 1);
        }
        let all: Vec<usize> = (0..validation.num_series()).collect();
        let ((x, lengths), labels) = (validation.pad(&all)?, classes(&validation, &all));
        let predicted = argmax(&predictor.predict(&x, Some(&lengths))?);
        let right = predicted.iter().zip(&labels).filter(|(predicted, label)| predicted == label).count();
        let accuracy = right as f64 / all.len() as f64;
        println!("epoch {:2}: loss {:.3}, accuracy {accuracy:.2}", epoch + 1, total / train.num_series() as f32);
        if epoch + 1 == EPOCHS {
            println!("accuracy of the last epoch: {accuracy:.2}");
        }
    }
    Ok(())
}

fn classes(data: &Dataset, indices: &[usize]) -> Vec<usize> {
    let Targets::Classes(classes) = data.targets() else { return Vec::new() };
    indices.iter().map(|&i| classes[i]).collect()
}

/// Series of 40 to 59 frames, with a burst of one of three frequencies somewhere.
fn bursts(count: usize) -> hymba::Result<Dataset> {
    let burst = |i: usize| {
        let (frequency, start) = (0.4 + 0.5 * (i % 3) as f32, i * 13 % 25);
        Array2::from_shape_fn((40 + i % 20, 1), |(t, _)| {
            let noise = ((i * 7919 + t * 104_729) % 997) as f32 / 997.0 - 0.5;
            let inside = (start..start + 15).contains(&t);
            noise + if inside { 2.0 * (frequency * (t - start) as f32).sin() } else { 0.0 }
        })
    };
    let labels = Targets::Classes((0..count).map(|i| i % 3).collect());
    Dataset::new(&Task::classify(["slow", "middle", "fast"]), (0..count).map(burst).collect(), labels)
}
