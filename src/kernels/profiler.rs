//! A stopwatch for each part of the arithmetic, with the feature `profile`. Without it [`timed`] is the call and nothing else.
//!
//! [`simulate`] counts instead of timing: what many threads would be handed, whatever the machine has.
//!
//! Only calls that stay on one thread from beginning to end are timed. One that hands work to other threads may run
//! somebody else's while it waits for them, and would count that as its own.

#[cfg(feature = "profile")]
pub use on::{Simulation, StageReport, report, reset, simulate};
#[cfg(feature = "profile")]
pub(crate) use on::{hand_out, simulated};

/// A part of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Products,
    /// Products of so few frames that reading the weights, or their gradient, takes longer than multiplying.
    FewFrames,
    /// Bringing matrices into the order in which products read them.
    Packing,
    Scan,
    Attention,
    /// Norms, activations, convolution, gate.
    Elementwise,
    Optimizer,
}

/// The least work of a call, in units that can be measured alone; where several are not 0, they are done one after the
/// other. [`Limits`](crate::profile::Limits) says how much of each takes a second.
#[cfg_attr(not(feature = "profile"), allow(dead_code))] // nobody reads it then
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Multiplications with an addition, of vectors in registers.
    pub multiply_adds: u64,
    /// Values of exp.
    pub exps: u64,
    /// Bytes read and written that should be in the second-level cache.
    pub cached_bytes: u64,
    /// Bytes of weights, which are read once for all rows.
    pub weight_bytes: u64,
    /// Bytes read and written that no cache holds.
    pub memory_bytes: u64,
}

impl Cost {
    /// `count` numbers, each read or written, that should be in the second-level cache.
    #[inline(always)]
    pub(crate) fn numbers(count: usize) -> Cost {
        Cost { cached_bytes: 4 * count as u64, ..Cost::default() }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.multiply_adds += other.multiply_adds;
        self.exps += other.exps;
        self.cached_bytes += other.cached_bytes;
        self.weight_bytes += other.weight_bytes;
        self.memory_bytes += other.memory_bytes;
    }
}

/// Calls `f`, which must not hand work to other threads.
#[cfg(not(feature = "profile"))]
#[inline(always)]
pub(crate) fn timed<R>(_part: Stage, _work: Cost, f: impl FnOnce() -> R) -> R {
    f()
}

/// Calls `f`, which must not hand work to other threads, and books its time and work on `part`, unless the call is part of
/// another that is being timed.
#[cfg(feature = "profile")]
pub(crate) use on::timed;

/// As [`timed`], for a product `[m, k]` · `[k, n]`. Frames are the rows on the left, or, in the gradient of weights, what is
/// summed over.
#[inline(always)]
pub(crate) fn timed_product<R>(m: usize, n: usize, k: usize, f: impl FnOnce() -> R) -> R {
    /// A core multiplies some ten frames in the time in which it fetches a weight from the third cache.
    const FEW: usize = 8;
    let (few, weights) = (m.min(k), 4 * n as u64 * m.max(k) as u64);
    if few <= FEW {
        timed(Stage::FewFrames, Cost { weight_bytes: weights, ..Cost::default() }, f)
    } else {
        let multiply_adds = m as u64 * n as u64 * k as u64;
        timed(Stage::Products, Cost { multiply_adds, ..Cost::default() }, f)
    }
}

#[cfg(feature = "profile")]
mod on {
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::{Duration, Instant};

    use super::{Cost, Stage};

    const PARTS: [(Stage, &str); 7] = [
        (Stage::Products, "products"),
        (Stage::FewFrames, "products, ≤ 8 frames"),
        (Stage::Packing, "packing"),
        (Stage::Scan, "scan"),
        (Stage::Attention, "attention"),
        (Stage::Elementwise, "element-wise"),
        (Stage::Optimizer, "optimiser"),
    ];

    /// Nanoseconds, calls, and the fields of [`Cost`] in their order.
    type Meter = [AtomicU64; 7];

    static METERS: [Meter; PARTS.len()] = [const { [const { AtomicU64::new(0) }; 7] }; PARTS.len()];

    thread_local! {
        /// Whether this thread is inside a timed call.
        static INSIDE: Cell<bool> = const { Cell::new(false) };
        /// The simulation that this thread is at, and the work since its last task.
        static SIMULATION: RefCell<Option<(Simulation, Cost)>> = const { RefCell::new(None) };
    }

    /// The tasks that a call would hand to some number of threads: see [`simulate`].
    #[derive(Debug, Clone, PartialEq, Default)]
    #[non_exhaustive]
    pub struct Simulation {
        /// The number of threads simulated.
        pub threads: usize,
        /// Work of the calling thread alone.
        pub alone: Cost,
        /// Every time that work is shared: the tasks, in the order in which they are taken.
        pub shared: Vec<Vec<Cost>>,
    }

    impl Simulation {
        /// The time of all work on [`threads`](Self::threads) threads, each of which takes the next task when it is
        /// free, and on one thread, both in the unit in which `seconds` gives the time of a [`Cost`].
        pub fn seconds(&self, seconds: impl Fn(&Cost) -> f64) -> (f64, f64) {
            let alone = seconds(&self.alone);
            let (mut together, mut one) = (alone, alone);
            for tasks in &self.shared {
                let mut free: Vec<f64> = vec![0.0; self.threads.clamp(1, tasks.len().max(1))];
                for task in tasks {
                    let first = free.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("there is a thread");
                    *first += seconds(task);
                    one += seconds(task);
                }
                together += free.into_iter().fold(0.0, f64::max);
            }
            (together, one)
        }
    }

    /// Calls `f` on this thread alone, with work split as for `threads` threads, and returns its result and the tasks.
    /// Only work that the stopwatches see is counted.
    pub fn simulate<R>(threads: usize, f: impl FnOnce() -> R) -> (R, Simulation) {
        let new = Simulation { threads, ..Simulation::default() };
        SIMULATION.with_borrow_mut(|simulation| *simulation = Some((new, Cost::default())));
        let result = f();
        let done = SIMULATION.with_borrow_mut(Option::take);
        let (mut simulation, rest) = done.unwrap_or_default();
        simulation.alone += rest;
        (result, simulation)
    }

    /// Threads there are to be, in a simulation.
    pub(crate) fn simulated() -> Option<usize> {
        SIMULATION.with_borrow(|simulation| simulation.as_ref().map(|(simulation, _)| simulation.threads))
    }

    /// Calls `f` for every item; in a simulation each is a task.
    pub(crate) fn hand_out<I>(items: impl Iterator<Item = I>, f: impl Fn(I)) {
        let taken =
            || SIMULATION.with_borrow_mut(|simulation| simulation.as_mut().map(|(_, work)| std::mem::take(work)));
        let before = taken().unwrap_or_default();
        let mut tasks = Vec::new();
        items.for_each(|item| {
            f(item);
            tasks.extend(taken());
        });
        SIMULATION.with_borrow_mut(|simulation| {
            if let Some((simulation, _)) = simulation {
                simulation.alone += before;
                simulation.shared.push(tasks);
            }
        });
    }

    pub(crate) fn timed<R>(part: Stage, work: Cost, f: impl FnOnce() -> R) -> R {
        if INSIDE.replace(true) {
            return f();
        }
        let start = Instant::now();
        let result = f();
        let nanoseconds = start.elapsed().as_nanos() as u64;
        INSIDE.set(false);
        SIMULATION.with_borrow_mut(|simulation| {
            if let Some((_, since)) = simulation {
                *since += work;
            }
        });
        let Cost { multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes } = work;
        let numbers = [nanoseconds, 1, multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes];
        for (meter, number) in METERS[part as usize].iter().zip(numbers) {
            if number != 0 {
                meter.fetch_add(number, Relaxed);
            }
        }
        result
    }

    /// Time and work of one part of the arithmetic since [`reset`], on all threads together.
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[non_exhaustive]
    pub struct StageReport {
        /// Which part.
        pub name: &'static str,
        /// Time that threads spent in it.
        pub seconds: f64,
        /// Times that a thread entered it.
        pub calls: u64,
        /// The work it did.
        pub work: Cost,
    }

    /// Sets all stopwatches to zero.
    pub fn reset() {
        METERS.iter().flatten().for_each(|meter| meter.store(0, Relaxed));
    }

    /// Time and work of every part since [`reset`], or since the program began. Call it while no model is running:
    /// unfinished calls are not counted.
    pub fn report() -> Vec<StageReport> {
        let report = |(part, name): (Stage, &'static str)| {
            let [nanoseconds, calls, multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes] =
                METERS[part as usize].each_ref().map(|meter| meter.load(Relaxed));
            let work = Cost { multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes };
            StageReport { name, seconds: Duration::from_nanos(nanoseconds).as_secs_f64(), calls, work }
        };
        PARTS.into_iter().map(report).collect()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[cfg(feature = "rayon")]
        #[test]
        fn simulated_threads_take_the_next_task_when_they_are_free() {
            let work = |exps| Cost { exps, ..Cost::default() };
            let task = |exps: u64| timed(Stage::Scan, work(exps), || ());
            let ((), simulation) = simulate(2, || {
                task(5);
                assert_eq!(simulated(), Some(2));
                crate::kernels::team::with_team(usize::MAX, |team| {
                    assert_eq!(team.threads(), 2);
                    team.for_each([3, 1, 1, 4], |exps| {
                        task(exps);
                        // inside a task nothing is handed out
                        team.for_each([1, 1], |_| ());
                    });
                });
                task(7);
            });
            assert_eq!(simulated(), None);
            assert_eq!((simulation.alone, &*simulation.shared), (work(12), &[[3, 1, 1, 4].map(work).to_vec()][..]));
            // 3 | 1 + 1 + 4
            assert_eq!(simulation.seconds(|cost| cost.exps as f64), (18.0, 21.0));
        }

        #[test]
        fn every_part_has_its_place() {
            assert!(PARTS.into_iter().enumerate().all(|(i, (part, _))| part as usize == i));
        }

        #[test]
        fn a_call_inside_another_belongs_to_it() {
            // other tests of this process may run kernels, but none of them an optimiser with exps
            let work = |exps| Cost { exps, ..Cost::default() };
            let before = report()[Stage::Optimizer as usize].work.exps;
            let inner = || timed(Stage::Optimizer, work(100), || 1);
            assert_eq!(timed(Stage::Optimizer, work(7), inner), 1);
            assert_eq!(timed(Stage::Scan, work(0), inner), 1);
            assert_eq!(inner(), 1);
            assert_eq!(report()[Stage::Optimizer as usize].work.exps, before + 107);
        }
    }
}
