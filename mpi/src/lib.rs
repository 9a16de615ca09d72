//! [`World`]: the processes of an MPI job as the ranks of a training of [`hymba`].
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use hymba::ndarray::Array2;
//! use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
//! use hymba::{HymbaOptions, Predictor, Task};
//! use hymba_mpi::World;
//!
//! World::run(|world| {
//!     let task = Task::classify(["a", "b"]);
//!     let data = Dataset::new(&task, vec![Array2::ones((9, 1)); 8], Targets::Classes(vec![0, 1, 0, 1, 0, 1, 1, 1]))?;
//!     let predictor = Predictor::build(HymbaOptions::new(1), task)?;
//!     let trainer = Trainer::new(predictor, TrainerOptions::default().checkpoint("run"))?;
//!     let trained = trainer.fit_on(&data, world, |progress, _| {
//!         println!("{progress:?}"); // rank 0 alone
//!         ControlFlow::Continue(())
//!     })?;
//!     println!("{} epochs", trained.history.len());
//!     Ok::<(), hymba::Error>(())
//! });
//! ```
//!
//! ```sh
//! mpirun -n 4 my-program
//! ```

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::thread::sleep;
use std::time::Duration;

use hymba::train::Collective;
use hymba::{Error, Result};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence, Root};

/// Numbers of one MPI call at most: it counts in i32.
const MOST: usize = 1 << 26;
/// How long a rank waits, after another has failed, for that one to print its error.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// All processes that `mpirun` or `srun` started together.
///
/// An error in one process ends all of them. Where a process is killed, MPI itself ends the job, and says which rank it
/// was.
pub struct World {
    world: SimpleCommunicator,
    f32s: Vec<f32>,
    f64s: Vec<f64>,
    /// Ends MPI when it is dropped.
    _universe: Universe,
}

impl World {
    /// Joins the job, and does `work`. An error, or a panic, is printed with its rank, and ends the job: with exit code 1, on all
    /// ranks. (A rank that came to its end by itself would leave the others waiting.)
    ///
    /// A program that no `mpirun` started is a job of one.
    pub fn run<E: Display>(work: impl FnOnce(&mut World) -> Result<(), E>) {
        let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
            eprintln!("MPI is in use already: World::run is called once in a program");
            std::process::exit(1);
        };
        let mut world = World { world: universe.world(), f32s: Vec::new(), f64s: Vec::new(), _universe: universe };
        let rank = world.rank();
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            print(panic);
            eprintln!("rank {rank} panicked: it ends the job");
            SimpleCommunicator::world().abort(1)
        }));
        if let Err(error) = work(&mut world) {
            let text = error.to_string();
            // the error of another rank, which prints it itself
            if text.starts_with(&Error::Collective(String::new()).to_string()) {
                sleep(LAST_WORDS);
            }
            // in one piece, or what MPI says comes in between
            let line = format!("rank {rank}: {text}\n");
            eprint!("{line}");
            world.world.abort(1)
        }
    }

    /// Broadcasts the bytes of rank 0 to all ranks: those of a file that it alone has, or of options that follow from
    /// its data. `own` of other ranks is ignored.
    pub fn of_rank_0(&mut self, own: Vec<u8>) -> Vec<u8> {
        self.of_rank(0, own)
    }

    /// As [`of_rank_0`](Self::of_rank_0), the bytes of any rank below the number of ranks.
    pub fn of_rank(&mut self, rank: usize, own: Vec<u8>) -> Vec<u8> {
        let (mut bytes, mut length) = (own, 0u64);
        if self.rank() == rank {
            length = bytes.len() as u64;
        }
        let root = self.world.process_at_rank(rank as i32);
        root.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        for some in bytes.chunks_mut(MOST) {
            root.broadcast_into(some);
        }
        bytes
    }
}

impl Collective for World {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&mut self, numbers: &mut [f32]) -> Result<()> {
        sum(&self.world, &mut self.f32s, numbers);
        Ok(())
    }

    fn sum_f64(&mut self, numbers: &mut [f64]) -> Result<()> {
        sum(&self.world, &mut self.f64s, numbers);
        Ok(())
    }

    fn broadcast(&mut self, numbers: &mut [f32]) -> Result<()> {
        for some in numbers.chunks_mut(MOST) {
            self.world.process_at_rank(0).broadcast_into(some);
        }
        Ok(())
    }
}

/// Errors of MPI end the job: there are none to return.
fn sum<T: Equivalence + Copy>(world: &SimpleCommunicator, own: &mut Vec<T>, numbers: &mut [T]) {
    for numbers in numbers.chunks_mut(MOST) {
        own.clear();
        own.extend_from_slice(numbers);
        world.all_reduce_into(&own[..], numbers, SystemOperation::sum());
    }
}
