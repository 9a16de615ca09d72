//! The memory bandwidth of this machine, and the memory this process takes.

use std::hint::black_box;
use std::time::Instant;

/// Bytes that are read at a time.
pub const BYTES: usize = 1 << 30;

/// Memory to read from.
pub struct Memory(Vec<u64>);

impl Memory {
    pub fn new() -> Self {
        Memory(vec![1; BYTES / 8])
    }

    /// Seconds in which all threads of the pool together read [`BYTES`].
    pub fn read(&self) -> f64 {
        const PIECE: usize = 1 << 18;
        let start = Instant::now();
        rayon::broadcast(|thread| {
            // each thread reads a run of its own
            let share = self.0.len().div_ceil(thread.num_threads());
            for piece in self.0.chunks(share).nth(thread.index()).unwrap_or_default().chunks(PIECE) {
                let mut sums = [0u64; 32];
                for piece in piece.chunks_exact(32) {
                    sums.iter_mut().zip(piece).for_each(|(sum, number)| *sum = sum.wrapping_add(*number));
                }
                black_box(sums);
            }
        });
        start.elapsed().as_secs_f64()
    }
}

/// The most memory this process ever held, in bytes, where the system says so.
pub fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kilobytes| kilobytes * 1024)
}
