//! Threads that stay awake during one call.
//!
//! One token passes through some 250 products, each of which keeps two cores busy for a few hundred microseconds. Waking a
//! thread for every one of them takes a good part of that time. So a [`Team`] is
//! called together once per token: its helpers wait for work without sleeping, and taking a share of a product costs them
//! well below a microsecond.
//!
//! The caller does not wait for helpers to show up: it works on the items itself, and only waits for helpers that took
//! one. In a pool that is busy with other things it therefore does everything alone. A thread belongs to one team at
//! most, which rules out that two teams wait for each other.
//!
//! How work is cut depends on its size and the number of threads, the results on neither. Without the feature `rayon`, and in a child
//! of `fork`, which has none of the pool's threads, everything runs on the calling thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

#[cfg(feature = "profile")]
use super::profiler;
#[cfg(feature = "rayon")]
pub(crate) use pool::with_team;

#[cfg(feature = "rayon")]
mod pool;

/// Runs `f` on this thread.
#[cfg(not(feature = "rayon"))]
pub(crate) fn with_team<R>(_work: usize, f: impl FnOnce(&Team) -> R) -> R {
    f(&Team::alone())
}

/// About 40 µs of products on one thread, several times what calling a team together costs.
#[cfg(feature = "rayon")]
pub(crate) const MIN_WORK: usize = 4 << 20;

/// The product of these factors: an estimate of work, in multiplications or what takes as long.
pub(crate) fn work<const N: usize>(factors: [usize; N]) -> usize {
    factors.into_iter().fold(1, usize::saturating_mul)
}

/// Whether this process has the threads of the current pool.
#[cfg(feature = "rayon")]
pub(crate) fn has_threads() -> bool {
    // a thread of a pool is where its pool is
    rayon::current_thread_index().is_some() || owns_global_pool()
}

/// Whether the threads of the global pool are, or would be, those of this process: after `fork` a child has the pool's
/// memory, and would wait for threads that only its parent has.
#[cfg(all(feature = "rayon", unix))]
fn owns_global_pool() -> bool {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    /// The process that used the pool first; 0 is none.
    static OWNER: AtomicU32 = AtomicU32::new(0);
    let here = std::process::id();
    OWNER.compare_exchange(0, here, Relaxed, Relaxed).map_or_else(|owner| owner == here, |_| true)
}

#[cfg(all(feature = "rayon", not(unix)))]
fn owns_global_pool() -> bool {
    true
}

/// Threads that work at the same time, at most.
pub(crate) fn threads() -> usize {
    #[cfg(feature = "rayon")]
    if has_threads() {
        return rayon::current_num_threads();
    }
    1
}

/// The thread that called [`with_team`] and its helpers.
pub(crate) struct Team {
    /// Members, the caller among them.
    threads: usize,
    /// Whether a job is under way, from before it is shown until the last helper has left it.
    busy: AtomicBool,
    /// What there is to do, on the stack of the thread in [`for_each`](Team::for_each); null while there is nothing.
    job: AtomicPtr<Job<'static>>,
    /// How many jobs there have been; tells a helper that there is a new one.
    jobs: AtomicUsize,
    /// Helpers that may hold a reference to the job.
    inside: AtomicUsize,
    /// See [`seeded`](Team::seeded).
    row_seeds: Mutex<Option<Arc<[u64]>>>,
}

struct Job<'a> {
    /// Takes items until there are none left.
    work: &'a (dyn Fn() + Sync),
    /// What a helper's panic left behind.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Team {
    fn of(threads: usize) -> Team {
        Team {
            threads,
            busy: AtomicBool::new(false),
            job: AtomicPtr::new(ptr::null_mut()),
            jobs: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            row_seeds: Mutex::new(None),
        }
    }

    /// Until what it returns is dropped, layers deep inside the call find a seed for each row that passes through them by
    /// [`row_seeds`](Self::row_seeds), if there are any.
    pub(crate) fn seeded(&self, seeds: Option<Arc<[u64]>>) -> Seeded<'_> {
        Seeded { team: self, before: std::mem::replace(&mut *self.locked_seeds(), seeds) }
    }

    /// Until what it returns is dropped, `only` some rows pass through layers, if not all do: of the seeds, these are found.
    pub(crate) fn seeded_at(&self, only: Option<&[usize]>) -> Seeded<'_> {
        let seeds = self.row_seeds();
        self.seeded(match only {
            Some(rows) => seeds.map(|seeds| rows.iter().map(|&row| seeds[row]).collect()),
            None => seeds,
        })
    }

    pub(crate) fn row_seeds(&self) -> Option<Arc<[u64]>> {
        self.locked_seeds().clone()
    }

    fn locked_seeds(&self) -> MutexGuard<'_, Option<Arc<[u64]>>> {
        self.row_seeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Members, the caller among them.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Only the calling thread.
    pub(crate) fn alone() -> Team {
        Team::of(1)
    }

    /// Calls `f` for every item; whoever is free takes the next one. Returns when all are done.
    ///
    /// Called while the team is at work already, by one of its members or by another thread, it does everything itself.
    pub(crate) fn for_each<I>(&self, items: I, f: impl Fn(I::Item) + Sync)
    where
        I: IntoIterator,
        I::IntoIter: Send,
    {
        let items = items.into_iter();
        let one_at_most = items.size_hint().1.is_some_and(|count| count <= 1);
        // a member that is inside a job must not show another and then wait until nobody is inside
        if self.threads == 1 || one_at_most || self.busy.swap(true, Ordering::Acquire) {
            return items.for_each(f);
        }
        #[cfg(feature = "profile")]
        if profiler::simulated().is_some() {
            profiler::hand_out(items, f);
            return self.busy.store(false, Ordering::Release);
        }
        let items = Mutex::new(items);
        let work = || {
            loop {
                // not in the head of a `while let`, where the lock would be held during f
                let item = items.lock().unwrap_or_else(PoisonError::into_inner).next();
                match item {
                    Some(item) => f(item),
                    None => break,
                }
            }
        };
        let job = Job { work: &work, panic: Mutex::new(None) };
        let shown = Shown::new(self, &job);
        work();
        drop(shown);
        if let Some(payload) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }

    /// The results of `f` for every item, in order.
    pub(crate) fn map<T: Send, R: Send>(&self, items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
        let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
        self.for_each(items.into_iter().zip(&mut results), |(item, result)| *result = Some(f(item)));
        results.into_iter().flatten().collect()
    }

    /// Works on the job there is, if any.
    #[cfg_attr(not(feature = "rayon"), allow(dead_code))]
    fn help(&self) {
        struct Inside<'a>(&'a AtomicUsize);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                // Release: what this helper wrote is seen by who reads that it has left
                self.0.fetch_sub(1, Ordering::Release);
            }
        }

        self.inside.fetch_add(1, Ordering::SeqCst);
        let _inside = Inside(&self.inside);
        let job = self.job.load(Ordering::SeqCst);
        // SAFETY: `Shown` keeps the job alive until it has set the pointer to null and then seen `inside` at zero. All
        // four accesses are SeqCst, so either it sees our count above and waits for us, or we see its null here.
        if let Some(job) = unsafe { job.as_ref() }
            && let Err(payload) = catch_unwind(AssertUnwindSafe(job.work))
        {
            job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }
}

/// While it lives, the rows of a pass have seeds.
pub(crate) struct Seeded<'a> {
    team: &'a Team,
    /// The seeds there were before, and will be again.
    before: Option<Arc<[u64]>>,
}

impl Drop for Seeded<'_> {
    fn drop(&mut self) {
        *self.team.locked_seeds() = self.before.take();
    }
}

/// A job on display. Dropped, also by a panic, when no helper sees it any more.
struct Shown<'a>(&'a Team);

impl<'a> Shown<'a> {
    /// For a team that has just become busy. Must be dropped before the job, and is if it is declared after it.
    fn new(team: &'a Team, job: &Job<'_>) -> Self {
        team.job.store(ptr::from_ref(job).cast_mut().cast(), Ordering::SeqCst);
        team.jobs.fetch_add(1, Ordering::Release);
        Shown(team)
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.0.job.store(ptr::null_mut(), Ordering::SeqCst);
        let mut wait = Wait::default();
        while self.0.inside.load(Ordering::SeqCst) != 0 {
            wait.a_moment();
        }
        self.0.busy.store(false, Ordering::Release);
    }
}

/// Waiting without sleep: the other side is nearly done, as a rule.
#[derive(Default)]
struct Wait(u32);

impl Wait {
    /// About 50 µs.
    const SPINS: u32 = 2000;

    fn a_moment(&mut self) {
        if self.0 < Self::SPINS {
            self.0 += 1;
            std::hint::spin_loop();
        } else {
            // whoever we wait for may want this core
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_never_less_for_more() {
        assert_eq!(work([3, 5, 7]), 105);
        assert_eq!(work([usize::MAX / 2, 3]), usize::MAX);
        assert_eq!(work([usize::MAX, usize::MAX, 0]), 0);
    }

    use std::sync::Barrier;

    /// Enough for a team.
    const WORK: usize = usize::MAX;

    /// A team of this many, whatever the machine has.
    fn among<R: Send>(threads: usize, f: impl FnOnce(&Team) -> R + Send) -> R {
        let team = Team::of(threads);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        team.help();
                        thread::yield_now();
                    }
                });
            }
            let result = catch_unwind(AssertUnwindSafe(|| f(&team)));
            over.store(true, Ordering::Relaxed);
            result.unwrap_or_else(|payload| resume_unwind(payload))
        })
    }

    fn sum(team: &Team, count: usize) -> usize {
        let sum = AtomicUsize::new(0);
        team.for_each(0..count, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        sum.into_inner()
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [1, 2, 3, 8] {
            among(threads, |team| {
                assert_eq!(team.threads, threads);
                for count in (0..70).chain([1000]) {
                    let mut items = vec![0; count];
                    team.for_each(items.iter_mut().enumerate(), |(i, item)| *item += i + 1);
                    assert!(items.iter().enumerate().all(|(i, item)| *item == i + 1), "{threads} {count}");
                }
            });
        }
    }

    #[test]
    fn helpers_take_part() {
        among(3, |team| {
            // each item waits for the others, so three threads are needed
            let together = Barrier::new(3);
            team.for_each(0..3, |_| {
                together.wait();
            });
        });
    }

    #[test]
    fn inside_an_item_the_team_is_the_thread_at_hand() {
        among(3, |team| {
            let sums = Mutex::new(Vec::new());
            team.for_each(0..20, |i| {
                let sum = sum(team, i);
                sums.lock().unwrap().push((i, sum));
            });
            let mut sums = sums.into_inner().unwrap();
            sums.sort();
            assert!(sums.iter().enumerate().all(|(i, sum)| *sum == (i, i * i.saturating_sub(1) / 2)), "{sums:?}");
        });
    }

    #[test]
    fn a_helper_still_inside_when_the_caller_is_done_works_alone() {
        among(2, |team| {
            let together = Barrier::new(2);
            let caller = thread::current().id();
            team.for_each(0..2, |_| {
                together.wait();
                if thread::current().id() != caller {
                    thread::sleep(std::time::Duration::from_millis(5));
                    assert_eq!(sum(team, 100), 4950);
                }
            });
            assert_eq!(sum(team, 100), 4950);
        });
    }

    #[test]
    fn panics_reach_the_caller_and_the_team_goes_on() {
        for threads in [1, 2, 3] {
            among(threads, |team| {
                for bad in [0, 5, 19] {
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        team.for_each(0..20, |i| {
                            assert_ne!(i, bad, "bad item");
                            thread::yield_now();
                        });
                    }));
                    assert!(result.is_err(), "{threads} {bad}");
                    assert_eq!(sum(team, 10), 45);
                }
            });
        }
    }

    #[test]
    fn teams_of_any_pool() {
        assert_eq!(with_team(0, |team| team.threads), 1);
        with_team(WORK, |team| {
            assert_eq!(sum(team, 100), 4950);
            with_team(WORK, |inner| assert_eq!(sum(inner, 100), 4950));
        });
        assert!(catch_unwind(|| with_team(WORK, |_| panic!("inside"))).is_err());
    }

    #[cfg(feature = "rayon")]
    #[test]
    fn many_teams_in_one_pool() {
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            thread::scope(|scope| {
                for _ in 0..6 {
                    scope.spawn(|| {
                        for _ in 0..10 {
                            pool.install(|| {
                                with_team(WORK, |team| {
                                    assert!(team.threads <= threads);
                                    // a join may pick up other teams' parts while it waits
                                    let (a, b) = rayon::join(|| sum(team, 30), || sum(team, 40));
                                    assert_eq!((a, b, sum(team, 50)), (435, 780, 1225));
                                    with_team(WORK, |inner| assert_eq!((inner.threads, sum(inner, 3)), (1, 3)));
                                });
                            });
                        }
                    });
                }
            });
        }
    }
}
