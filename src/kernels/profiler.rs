//! A stopwatch for each part of the arithmetic, with the feature `profile`. Without it [`timed`] is the call and nothing else.
//!
//! Only calls that stay on one thread from beginning to end are timed. One that hands work to other threads may run
//! somebody else's while it waits for them, and would count that as its own.

#[cfg(feature = "profile")]
pub use on::{StageReport, report, reset};

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

/// What a call has to do at least, in what can be measured alone; several numbers are for several things to be done one
/// after the other. [`Limits`](crate::profile::Limits) says how much of each goes into a second.
#[cfg_attr(not(feature = "profile"), allow(dead_code))] // nobody reads it then
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Multiplications with an addition, of vectors in registers.
    pub multiply_adds: u64,
    /// Values of exp.
    pub exps: u64,
    /// Bytes read and bytes written of what should lie in the second cache.
    pub cached_bytes: u64,
    /// Bytes of weights, which are read once for all rows.
    pub weight_bytes: u64,
    /// Bytes read and bytes written of what no cache holds.
    pub memory_bytes: u64,
}

impl Cost {
    /// So many numbers of what should lie in the second cache, each read or written.
    #[inline(always)]
    pub(crate) fn numbers(count: usize) -> Cost {
        Cost { cached_bytes: 4 * count as u64, ..Cost::default() }
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
    use std::cell::Cell;
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
    }

    pub(crate) fn timed<R>(part: Stage, work: Cost, f: impl FnOnce() -> R) -> R {
        if INSIDE.replace(true) {
            return f();
        }
        let start = Instant::now();
        let result = f();
        let nanoseconds = start.elapsed().as_nanos() as u64;
        INSIDE.set(false);
        let Cost { multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes } = work;
        let numbers = [nanoseconds, 1, multiply_adds, exps, cached_bytes, weight_bytes, memory_bytes];
        for (meter, number) in METERS[part as usize].iter().zip(numbers) {
            if number != 0 {
                meter.fetch_add(number, Relaxed);
            }
        }
        result
    }

    /// What one part of the arithmetic took since [`reset`], on all threads together.
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[non_exhaustive]
    pub struct StageReport {
        /// Which part.
        pub name: &'static str,
        /// Time that threads spent in it.
        pub seconds: f64,
        /// Times that a thread entered it.
        pub calls: u64,
        /// What it had to do.
        pub work: Cost,
    }

    /// Sets all stopwatches to zero.
    pub fn reset() {
        METERS.iter().flatten().for_each(|meter| meter.store(0, Relaxed));
    }

    /// What the parts took since [`reset`], or since the program began. To be called while no model is at work: what a thread is
    /// in the middle of is not in it.
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
