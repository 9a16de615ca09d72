//! What happens to one rank, for `mpi/test.sh`: `mpirun -n 2 faults KIND`. Each must end both ranks within seconds.
//!
//! | kind | what happens |
//! |---|---|
//! | `nan` | a target of rank 1 has a loss past what f32 holds |
//! | `error` | rank 1 has data of another width |
//! | `stop` | the callback of rank 0 says stop after the third step |
//! | `panic` | rank 1 panics in its third sum |
//! | `killed` | rank 1 is killed in its third sum |
//! | `differ` | rank 1 changes a number of its third sum |

use std::ops::ControlFlow;
use std::process::Command;

use hymba::ndarray::Array2;
use hymba::train::{Collective, Dataset, Targets, Trainer, TrainerOptions, TrainingData};
use hymba::{HymbaOptions, Predictor, Task};
use hymba_mpi::World;

fn main() {
    let kind = std::env::args().nth(1).unwrap_or_default();
    World::run(|world| train(world, &kind));
}

fn train(world: &mut World, kind: &str) -> hymba::Result<()> {
    let task = Task::Regress { outputs: 1 };
    let at_fault = world.rank() == 1;
    let width = if at_fault && kind == "error" { 3 } else { 1 };
    let series = |i: usize| Array2::from_shape_fn((9 + i % 5, width), |(t, _)| ((i * t) as f32).sin());
    let target = |(i, _)| if at_fault && kind == "nan" && i == 7 { 1e25 } else { (i % 3) as f32 };
    let targets = Targets::Values(Array2::from_shape_fn((64, 1), target));
    let data = Dataset::new(&task, (0..64).map(series).collect(), targets)?;

    let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(16).num_layers(1), task)?;
    let options = TrainerOptions::default().epochs(1000).batch_size(8).normalize(false);
    let rank = world.rank();
    let mut world = Faulty { world, kind, sums: 0 };
    let data = TrainingData::new(&data).sharded();
    let trained = Trainer::new(predictor, options)?.fit_on(data, &mut world, |progress, _| match progress.batch {
        3 if kind == "stop" => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })?;
    println!("rank {rank}: {}", trained.stopped);
    Ok(())
}

struct Faulty<'a> {
    world: &'a mut World,
    kind: &'a str,
    sums: usize,
}

impl Collective for Faulty<'_> {
    fn rank(&self) -> usize {
        self.world.rank()
    }
    fn size(&self) -> usize {
        self.world.size()
    }
    fn sum(&mut self, numbers: &mut [f32]) -> hymba::Result<()> {
        self.sums += 1;
        let now = self.sums == 3 && self.rank() == 1;
        match self.kind {
            "panic" if now => panic!("as was asked for"),
            "killed" if now => {
                let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
            }
            _ => self.world.sum(numbers)?,
        }
        if self.kind == "differ" && now {
            numbers[0] += 1.0;
        }
        Ok(())
    }
    fn sum_f64(&mut self, numbers: &mut [f64]) -> hymba::Result<()> {
        self.world.sum_f64(numbers)
    }
    fn broadcast(&mut self, numbers: &mut [f32]) -> hymba::Result<()> {
        self.world.broadcast(numbers)
    }
}
