//! A training of one's own program on several ranks: `mpirun -n 2 cargo run --release -p hymba-mpi --example waves`.
//!
//! Each rank makes a part of the data, which could as well be read from a file of its own.

use std::ops::ControlFlow;

use hymba::ndarray::Array2;
use hymba::train::{Collective, Dataset, Targets, Trainer, TrainerOptions, TrainingData};
use hymba::{HymbaOptions, Predictor, Task};
use hymba_mpi::World;

fn main() {
    World::run(train);
}

fn train(world: &mut World) -> hymba::Result<()> {
    // slow and fast waves of any phase and 20 to 39 frames; of 120 this rank has every size-th
    let task = Task::classify(["slow", "fast"]);
    let mine: Vec<usize> = (world.rank()..120).step_by(world.size()).collect();
    let wave = |&i: &usize| {
        Array2::from_shape_fn((20 + i * 7 % 20, 1), |(t, _)| ((0.3 + 0.5 * (i % 2) as f32) * t as f32 + i as f32).sin())
    };
    let targets = Targets::Classes(mine.iter().map(|i| i % 2).collect());
    let data = Dataset::new(&task, mine.iter().map(wave).collect(), targets)?;

    let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(16).num_layers(1), task)?;
    let options = TrainerOptions::default().epochs(12).batch_size(24).learning_rate(1e-2);
    let data = TrainingData::new(&data).sharded();
    let trained = Trainer::new(predictor, options)?.fit_on(data, world, |progress, _| {
        if let Some(epoch) = &progress.finished {
            println!("epoch {}: loss {:.4}", progress.epoch, epoch.train.loss);
        }
        ControlFlow::Continue(())
    })?;
    if world.rank() == 0 {
        let right = trained.history[11].train.accuracy.unwrap_or_default();
        println!("{} ranks learned waves: {:.0} % right", world.size(), 100.0 * right);
    }
    Ok(())
}
