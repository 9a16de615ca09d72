//! How fast this machine does the simplest things: the limits that the parts of the arithmetic are compared with.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::math;
use super::profiler::Cost;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// How much of each kind of [`Cost`] one thread does in a second.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Multiply-adds, of vectors that never leave the registers, in independent chains.
    pub multiply_adds: f64,
    /// Values of the crate's vectorised exp, of numbers in the first-level cache.
    pub exps: f64,
    /// Bytes read and written in passes that overwrite half of the second-level cache.
    pub cached_bytes: f64,
    /// Bytes read in passes over 20 MB, the weights of the default model.
    pub weight_bytes: f64,
    /// Bytes read and written in passes that overwrite 80 MB.
    pub memory_bytes: f64,
}

impl Limits {
    /// Measures on the calling thread, in about half a second: the best pass of many. Call it on several threads at the same
    /// time to learn what each has when all work.
    pub fn measure() -> Limits {
        let mut x = numbers(2 * EXPS);
        let mut cached = numbers(second_cache() / 2 / size_of::<f32>());
        let mut memory = numbers(MEMORY);
        let (mut a, b) = (black_box(0.999), black_box(0.001));
        let chained = best(|| {
            a = dispatch(Chains { a, b }).min(0.999);
            CHAINED
        });
        Limits {
            multiply_adds: chained,
            exps: best(|| {
                let (x, out) = x.split_at_mut(EXPS);
                dispatch(Exps { x: aligned(x), out: aligned(out) }) as f64
            }),
            cached_bytes: best(|| dispatch(Overwrite { x: aligned(&mut cached), a, b }) as f64 * 8.0),
            weight_bytes: best(|| dispatch(Read(aligned(&mut memory[..WEIGHTS]))) as f64 * 4.0),
            memory_bytes: best(|| dispatch(Overwrite { x: aligned(&mut memory), a, b }) as f64 * 8.0),
        }
    }

    /// Seconds that `work` takes one thread at these limits.
    pub fn seconds(&self, work: &Cost) -> f64 {
        work.multiply_adds as f64 / self.multiply_adds
            + work.exps as f64 / self.exps
            + work.cached_bytes as f64 / self.cached_bytes
            + work.weight_bytes as f64 / self.weight_bytes
            + work.memory_bytes as f64 / self.memory_bytes
    }
}

/// Numbers whose exps are taken in a pass: 8 kB, and as much for the results.
const EXPS: usize = 2048;
/// Numbers in 20 and in 80 MB.
const WEIGHTS: usize = 5_000_000;
const MEMORY: usize = 20_000_000;
/// Multiply-adds of a pass of [`Chains`].
const CHAINED: f64 = (ROUNDS * CHAINS * LANES) as f64;
const ROUNDS: usize = 10_000;
/// Chains that fill both multipliers of a core over their latency of 4 or 5 cycles: 12 where a vector is a register.
const CHAINS: usize = 12;

/// The best rate, in what `pass` returns per second, of passes for 80 ms.
fn best(mut pass: impl FnMut() -> f64) -> f64 {
    let begin = Instant::now();
    let mut best: f64 = 0.0;
    while begin.elapsed() < Duration::from_millis(80) {
        let start = Instant::now();
        let work = pass();
        best = best.max(work / start.elapsed().as_secs_f64());
    }
    best
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i % 100) as f32 / 10.0 - 5.0).collect()
}

/// Bytes of the second cache of a core, 1 MB where the system does not say.
fn second_cache() -> usize {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").unwrap_or_default();
    size.trim().strip_suffix('K').and_then(|size| size.parse().ok()).map_or(1 << 20, |kilobytes: usize| kilobytes << 10)
}

/// The vectors of `x` from the first on that begins a cache line.
fn aligned(x: &mut [f32]) -> &mut [[f32; LANES]] {
    let skip = x.as_ptr().align_offset(64).min(x.len());
    x[skip..].as_chunks_mut().0
}

struct Chains {
    a: f32,
    b: f32,
}

impl Kernel for Chains {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        // where a vector takes two registers, half as many at a time leave none to be spilled
        if S::TILE_ROWS >= CHAINS {
            chains::<S, CHAINS>(s, self.a, self.b, ROUNDS)
        } else {
            chains::<S, { CHAINS / 2 }>(s, self.a, self.b, 2 * ROUNDS)
        }
    }
}

#[inline(always)]
fn chains<S: Simd, const N: usize>(s: S, a: f32, b: f32, rounds: usize) -> f32 {
    let (a, b) = (s.splat(a), s.splat(b));
    let mut sums = [b; N];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = s.splat(i as f32 / 16.0);
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = s.mul_add(a, *sum, b);
        }
    }
    sums.into_iter().fold(0.0, |total, sum| total + s.sum(sum))
}

struct Exps<'a> {
    x: &'a [[f32; LANES]],
    out: &'a mut [[f32; LANES]],
}

impl Kernel for Exps<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        for (x, out) in self.x.iter().zip(&mut *self.out) {
            s.store(math::exp(s, s.load(x)), out);
        }
        self.x.len().min(self.out.len()) * LANES
    }
}

/// x = a·x + b
struct Overwrite<'a> {
    x: &'a mut [[f32; LANES]],
    a: f32,
    b: f32,
}

impl Kernel for Overwrite<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let (a, b) = (s.splat(self.a), s.splat(self.b));
        for x in &mut *self.x {
            s.store(s.mul_add(a, s.load(x), b), x);
        }
        self.x.len() * LANES
    }
}

struct Read<'a>(&'a [[f32; LANES]]);

impl Kernel for Read<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let mut sums = [s.splat(0.0); 8];
        let (blocks, _) = self.0.as_chunks::<8>();
        for block in blocks {
            for (sum, x) in sums.iter_mut().zip(block) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        black_box(sums.map(|sum| s.sum(sum)));
        blocks.len() * 8 * LANES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_rates_of_this_machine() {
        let limits = Limits::measure();
        // any machine does a million a second, and none a quadrillion
        for rate in [limits.multiply_adds, limits.exps, limits.cached_bytes, limits.weight_bytes, limits.memory_bytes] {
            assert!((1e6..1e15).contains(&rate), "{limits:?}");
        }
        let work = Cost { exps: 1000, weight_bytes: 500, ..Cost::default() };
        approx::assert_relative_eq!(limits.seconds(&work), 1000.0 / limits.exps + 500.0 / limits.weight_bytes);
    }
}
