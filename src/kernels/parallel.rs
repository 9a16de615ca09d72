//! Work on several threads. How it is cut depends on its size only, never on the number of threads, so results do not
//! either. Without the feature `rayon` everything runs on the calling thread.

/// Runs both, at the same time if a thread is free.
#[cfg(feature = "rayon")]
pub(crate) fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    rayon::join(a, b)
}

/// Runs both.
#[cfg(not(feature = "rayon"))]
pub(crate) fn join<A, B>(a: impl FnOnce() -> A, b: impl FnOnce() -> B) -> (A, B) {
    (a(), b())
}

/// Runs both, at the same time if the work (in multiplications or what takes as long) is worth handing over.
pub(crate) fn join_if<A: Send, B: Send>(
    work: usize,
    a: impl FnOnce() -> A + Send,
    b: impl FnOnce() -> B + Send,
) -> (A, B) {
    if work >= MIN_WORK { join(a, b) } else { (a(), b()) }
}

/// About 40 µs of products on one thread, several times what handing work over costs.
pub(crate) const MIN_WORK: usize = 4 << 20;

/// Calls `f` for every item, on several threads.
#[cfg(feature = "rayon")]
pub(crate) fn for_each<T: Send>(items: Vec<T>, f: impl Fn(T) + Sync + Send) {
    use rayon::prelude::*;
    if items.len() > 1 {
        items.into_par_iter().with_max_len(1).for_each(f);
    } else {
        items.into_iter().for_each(f);
    }
}

/// Calls `f` for every item.
#[cfg(not(feature = "rayon"))]
pub(crate) fn for_each<T>(items: Vec<T>, f: impl Fn(T)) {
    items.into_iter().for_each(f);
}

/// Calls `f` for every item, on several threads if the work is worth handing over.
pub(crate) fn for_each_if<T: Send>(work: usize, items: Vec<T>, f: impl Fn(T) + Sync + Send) {
    if work >= MIN_WORK { for_each(items, f) } else { items.into_iter().for_each(f) }
}

/// The results of `f` for every item, in order, on several threads.
#[cfg(feature = "rayon")]
pub(crate) fn map<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    use rayon::prelude::*;
    items.into_par_iter().with_max_len(1).map(f).collect()
}

/// The results of `f` for every item, in order.
#[cfg(not(feature = "rayon"))]
pub(crate) fn map<T, R>(items: Vec<T>, f: impl Fn(T) -> R) -> Vec<R> {
    items.into_iter().map(f).collect()
}

/// Runs `f` on a thread of the pool if the work is large enough, so that the joins inside it need not enter the pool each
/// on its own.
#[cfg(feature = "rayon")]
pub(crate) fn enter_if<R: Send>(work: usize, f: impl FnOnce() -> R + Send) -> R {
    if work >= 2 * MIN_WORK { rayon::scope(|_| f()) } else { f() }
}

/// Runs `f`.
#[cfg(not(feature = "rayon"))]
pub(crate) fn enter_if<R>(_work: usize, f: impl FnOnce() -> R) -> R {
    f()
}
