//! Several processes that train one model: what they do together.

use crate::Result;

mod data;
mod ranks;
mod threads;

pub use data::TrainingData;
pub(super) use ranks::{Hash, Ranks, hash_of, hash_of_every, hash_of_text};
pub use threads::Threads;

/// The connection between the processes of a training, the ranks. [`Trainer::fit_on`](super::Trainer::fit_on) needs no more than this: the package
/// `hymba-mpi` has it over MPI, [`Threads`] within one process, and [`Alone`] is a training of one.
///
/// Every rank makes the same calls in the same order, with slices of the same lengths. A call returns when all ranks have made it.
/// Where a rank is gone for good it returns an error, on every rank that is left, and so must all later calls.
///
/// ```
/// use hymba::train::{Collective, Threads};
///
/// let ranks: Vec<_> = Threads::new(3).into_iter().map(|mut rank| {
///     std::thread::spawn(move || {
///         let mut numbers = [1.0, rank.rank() as f32];
///         rank.sum(&mut numbers).map(|()| numbers)
///     })
/// }).collect();
/// for rank in ranks {
///     assert_eq!(rank.join().unwrap()?, [3.0, 3.0]);
/// }
/// # Ok::<(), hymba::Error>(())
/// ```
pub trait Collective {
    /// Which of the ranks this is, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are, this one included.
    fn size(&self) -> usize;

    /// Adds up the numbers of all ranks, place by place. All ranks get the same sums, **bit for bit**: the weights of two ranks would
    /// drift apart otherwise.
    ///
    /// # Errors
    ///
    /// [`Error::Collective`](crate::Error::Collective) if a rank is gone, or does something else.
    fn sum(&mut self, numbers: &mut [f32]) -> Result<()>;

    /// As [`sum`](Self::sum), for few numbers that matter more: counts, losses, flags. Integers up to 2⁵³ are added exactly.
    ///
    /// # Errors
    ///
    /// Those of [`sum`](Self::sum).
    fn sum_f64(&mut self, numbers: &mut [f64]) -> Result<()>;

    /// Gives the numbers of rank 0 to all ranks.
    ///
    /// # Errors
    ///
    /// Those of [`sum`](Self::sum).
    fn broadcast(&mut self, numbers: &mut [f32]) -> Result<()>;
}

/// The only rank: nothing is added and nothing is sent.
///
/// ```
/// use hymba::train::{Alone, Collective};
///
/// assert_eq!((Alone.rank(), Alone.size()), (0, 1));
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn sum_f64(&mut self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
}
