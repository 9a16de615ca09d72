//! Work memory that is reused.
//!
//! A forward pass makes and drops some twenty arrays per block. Left to the allocator, much of that memory goes back to
//! the system each time, and fetching it again costs more than a quarter of a training step. So arrays that are dropped
//! are kept here and handed out to the next that asks for one of about their size.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, TryLockError};

use ndarray::Array2;

/// The most that is kept, in numbers: 256 MB, somewhat more than a training step of the default model on a batch of 32
/// sequences of 60 frames has in use.
const MOST_KEPT: usize = 64 << 20;
/// Smaller arrays are left to the allocator, which is quick with them.
const SMALLEST: usize = 4 << 10;

/// Threads that call models at the same time seldom meet at one pool.
static POOLS: [Mutex<Pool>; 16] = [const { Mutex::new(Pool { arrays: Vec::new() }) }; 16];
/// Numbers there is room for in all arrays of all pools.
static KEPT: AtomicUsize = AtomicUsize::new(0);

#[derive(Default)]
struct Pool {
    arrays: Vec<Vec<f32>>,
}

/// The pool of this thread, unless another keeps it for long: one that is not running, or that was left behind by `fork`, so that
/// nobody will ever unlock it.
fn pool() -> Option<MutexGuard<'static, Pool>> {
    /// Some microseconds; others need a fraction of one.
    const TRIES: usize = 1000;
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static PLACE: usize = THREADS.fetch_add(1, Relaxed) % POOLS.len();
    }
    // a thread that ends may have lost its place already
    let pool = &POOLS[PLACE.try_with(|place| *place).unwrap_or(0)];
    for _ in 0..TRIES {
        match pool.try_lock() {
            Ok(pool) => return Some(pool),
            // every change leaves the pool usable, so a panic elsewhere does not matter
            Err(TryLockError::Poisoned(pool)) => return Some(pool.into_inner()),
            Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
        }
    }
    None
}

/// An array from the pool of this thread, or else from another's: what one thread makes, as the logits in a pool of threads or what a
/// training step leaves, another may drop, call after call.
fn take(count: usize) -> Option<Vec<f32>> {
    let own = pool().and_then(|mut pool| pool.take(count));
    own.or_else(|| POOLS.iter().find_map(|pool| pool.try_lock().ok()?.take(count)))
}

impl Pool {
    /// The smallest array with room for `count` numbers, unless it is far too large.
    fn take(&mut self, count: usize) -> Option<Vec<f32>> {
        let fits = |array: &&Vec<f32>| (count..=2 * count).contains(&array.capacity());
        let (place, _) = self
            .arrays
            .iter()
            .enumerate()
            .filter(|(_, array)| fits(array))
            .min_by_key(|(_, array)| array.capacity())?;
        let array = self.arrays.swap_remove(place);
        KEPT.fetch_sub(array.capacity(), Relaxed);
        Some(array)
    }

    /// Keeps the array, or gives it back, to be dropped when the pool is unlocked.
    fn put(&mut self, array: Vec<f32>) -> Option<Vec<f32>> {
        if array.capacity() < SMALLEST {
            return Some(array);
        }
        if KEPT.fetch_add(array.capacity(), Relaxed) + array.capacity() > MOST_KEPT {
            KEPT.fetch_sub(array.capacity(), Relaxed);
            return Some(array);
        }
        self.arrays.push(array);
        None
    }
}

/// An array `[rows, width]` whose memory comes from the pool and goes back to it.
pub(crate) struct Buffer(Array2<f32>);

impl Buffer {
    /// An array with unspecified contents, for callers that overwrite every element.
    pub(crate) fn uninit(dim: (usize, usize)) -> Self {
        let count = dim.0 * dim.1;
        let mut array = if count >= SMALLEST { take(count) } else { None }.unwrap_or_default();
        array.resize(count, 0.0);
        Buffer(Array2::from_shape_vec(dim, array).expect("as many numbers as the shape has"))
    }

    /// An array without numbers, to be replaced.
    pub(crate) fn empty() -> Self {
        Buffer(Array2::zeros((0, 0)))
    }

    pub(crate) fn zeros(dim: (usize, usize)) -> Self {
        let mut buffer = Self::uninit(dim);
        buffer.fill(0.0);
        buffer
    }

    pub(crate) fn copy_of(array: &Array2<f32>) -> Self {
        let mut buffer = Self::uninit(array.dim());
        buffer.assign(array);
        buffer
    }

    /// A copy of some rows.
    pub(crate) fn rows_at(&self, rows: &[usize]) -> Self {
        let mut copy = Self::uninit((rows.len(), self.ncols()));
        copy.rows_mut().into_iter().zip(rows).for_each(|(mut copy, &row)| copy.assign(&self.row(row)));
        copy
    }

    /// `count` rows: these, or if these are `only` some of them, with zeros in the others.
    pub(crate) fn spread(self, only: Option<&[usize]>, count: usize) -> Self {
        let Some(rows) = only else { return self };
        let mut all = Self::zeros((count, self.ncols()));
        rows.iter().zip(self.rows()).for_each(|(&to, row)| all.row_mut(to).assign(&row));
        all
    }

    /// Adds `more` to some rows.
    pub(crate) fn add_at(&mut self, rows: &[usize], more: &Array2<f32>) {
        rows.iter().zip(more.rows()).for_each(|(&row, more)| self.row_mut(row).scaled_add(1.0, &more));
    }

    /// The array, which no longer goes back to the pool.
    pub(crate) fn into_array(mut self) -> Array2<f32> {
        std::mem::take(&mut self.0)
    }
}

impl From<Array2<f32>> for Buffer {
    fn from(array: Array2<f32>) -> Self {
        Buffer(array)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.len() >= SMALLEST {
            let (array, _) = std::mem::take(&mut self.0).into_raw_vec_and_offset();
            let _not_kept = match pool() {
                Some(mut pool) => pool.put(array),
                None => Some(array),
            };
        }
    }
}

impl Deref for Buffer {
    type Target = Array2<f32>;

    fn deref(&self) -> &Array2<f32> {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Array2<f32> {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacities(pool: &Pool) -> Vec<usize> {
        pool.arrays.iter().map(Vec::capacity).collect()
    }

    #[test]
    fn memory_comes_back_only_where_it_fits() {
        let mut pool = Pool::default();
        for count in [SMALLEST - 1, 5000, 9000, MOST_KEPT] {
            pool.put(Vec::with_capacity(count));
        }
        assert_eq!(capacities(&pool), [5000, 9000]);
        assert!(pool.take(4000).is_none_or(|array| array.capacity() == 5000));
        assert!(pool.take(4000).is_none(), "9000 is far too large");
        assert_eq!(pool.take(9000).map(|array| array.capacity()), Some(9000));
        assert!(pool.arrays.is_empty());
    }

    #[test]
    fn what_another_thread_drops_is_used_again() {
        // a size that nothing else has
        let dim = (1, (3 << 20) + 7);
        let first = std::thread::spawn(move || {
            let buffer = Buffer::uninit(dim);
            (buffer.as_ptr().addr(), buffer)
        });
        let (place, buffer) = first.join().unwrap();
        drop(buffer);
        let again = std::thread::spawn(move || Buffer::uninit(dim).as_ptr().addr()).join().unwrap();
        assert_eq!(place, again);
    }

    #[test]
    fn zeros_are_zero_and_copies_are_copies() {
        Buffer::uninit((100, 100)).fill(7.0);
        assert!(Buffer::zeros((100, 100)).iter().all(|x| *x == 0.0));
        let array = Array2::from_elem((100, 90), 3.0);
        assert_eq!(*Buffer::copy_of(&array), array);
    }
}
