//! How a team is called together: from the threads of a rayon pool.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{MIN_WORK, Team, Wait, has_threads};

thread_local! {
    static IN_A_TEAM: Cell<bool> = const { Cell::new(false) };
}

/// A thread's membership in a team.
struct Member(());

impl Member {
    fn join() -> Option<Member> {
        (!IN_A_TEAM.replace(true)).then(|| Member(()))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        IN_A_TEAM.set(false);
    }
}

/// Runs `f` with a team of the threads of the current rayon pool, no more of them than there are cores; alone, if the
/// work (in multiplications or what takes as long) is small.
pub(crate) fn with_team<R: Send>(work: usize, f: impl FnOnce(&Team) -> R + Send) -> R {
    if work < MIN_WORK || !has_threads() {
        return f(&Team::alone());
    }
    #[cfg(feature = "profile")]
    if let Some(threads) = crate::kernels::profiler::simulated() {
        return f(&Team::of(threads));
    }
    // The outer scope enters the pool. The thread is a member until the inner one is over, where it might otherwise
    // pick up a helper's part of another team and be kept by that.
    rayon::scope(|_| match Member::join() {
        None => f(&Team::alone()),
        Some(_member) => called_together(rayon::current_num_threads().min(cores()), f),
    })
}

fn called_together<R: Send>(threads: usize, f: impl FnOnce(&Team) -> R + Send) -> R {
    struct SetOnDrop<'a>(&'a AtomicBool);
    impl Drop for SetOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let team = Team::of(threads);
    let over = AtomicBool::new(false);
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| {
                if let Some(_member) = Member::join() {
                    wait_and_help(&team, &over);
                }
            });
        }
        let _over = SetOnDrop(&over);
        f(&team)
    })
}

fn wait_and_help(team: &Team, over: &AtomicBool) {
    let (mut jobs, mut wait) = (0, Wait::default());
    while !over.load(Ordering::Relaxed) {
        let now = team.jobs.load(Ordering::Acquire);
        if now == jobs {
            wait.a_moment();
        } else {
            jobs = now;
            team.help();
            wait = Wait::default();
        }
    }
}

fn cores() -> usize {
    // asked once, as std reads files for it
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}
